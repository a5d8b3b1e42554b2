"""The one thread that feeds the merge from callbacks and Orthanc's log, and writes the outbox.

Whatever goes wrong is healed in the same way: the batch goes back to the queue, and the thread anchors again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from orthanc_events_bridge.changes.log import OrthancLog
from orthanc_events_bridge.changes.merge import Merge, MisalignedError, from_callback
from orthanc_events_bridge.changes.model import Callback, ChangeKind, Fact
from orthanc_events_bridge.changes.repair import Repair
from orthanc_events_bridge.errors import BridgeError, LogUnavailableError, OutboxFullError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.continuity import EMPTIED, Break, Continuity
from orthanc_events_bridge.plugin.flush import Flusher
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.plugin.lookup import Lookup
from orthanc_events_bridge.plugin.upkeep import Upkeep
from orthanc_events_bridge.status import iso

#: Callbacks that may wait in memory while the outbox can't be written.
MAX_WAITING: Final = 100_000
#: Seconds that a first start waits for the bridge to say which settings apply.
FIRST_SETTINGS: Final = 10.0
#: Seconds to gather more after a batch of several instances: half the cost of acting at once.
_LINGER: Final = 0.020
_TICK: Final = 1.0
#: Between two steps of repair: seconds at least, and how many times as long as the last one took.
_REST: Final = 0.020
_REST_FACTOR: Final = 9
#: And behind a question that Orthanc could not answer.
_REST_AFTER_REFUSAL: Final = 1.0


class Waiting:
    """The merge's clock in a real process."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self.now = time.monotonic

    def wait(self, seconds: float) -> bool:
        return self._stop.wait(seconds)


class Capture:
    """Records every change of one Orthanc.

    :param folder: where the outbox is; prepared.
    :param get: a GET of Orthanc's REST API.
    :param queue: filled by the callback.
    :param bell: set by the callback.
    :param ring: tells the bridge that there are new rows.
    :param host: Orthanc's log.
    :param blocked: says why Orthanc's API must not be called from this thread, or nothing.
    :param stable_age: Orthanc's ``StableAge``, seconds.
    """

    def __init__(
        self,
        folder: Folder,
        get: Callable[[str], bytes | str],
        queue: deque[Callback],
        bell: threading.Event,
        ring: Callable[[], None],
        host: Host,
        blocked: Callable[[], str] = lambda: "",
        stable_age: float = 60.0,
    ) -> None:
        self._folder = folder
        self._asking = threading.Lock()
        self._closed = False

        def ask(path: str) -> bytes | str:
            with self._asking:
                if self._closed:
                    raise LogUnavailableError("Orthanc is stopping")
                return get(path)

        self._log = OrthancLog(ask)
        self._look_up = Lookup(ask)
        self._queue = queue
        self._bell = bell
        self._ring = ring
        self._host = host
        self._blocked = blocked
        self._stable_age = stable_age
        self._repair: Repair | None = None
        self._begun = False
        self._continuity = Continuity(self._log, self._look_up.resource)
        self._next_repair = 0.0
        self._heard = time.monotonic()
        self._stop = threading.Event()
        self._outbox: OutboxWriter | None = None
        self._held: int | None = None
        self._upkeep = Upkeep(folder, host, self._look_up.allow)
        self._repeats = Repeats(time.monotonic)
        self._leaving = threading.Event()
        self._all_taken = threading.Event()
        self._anchored = False
        self._next_tick = 0.0
        self._flusher = Flusher(host)
        self._counts = {"vanished": 0, "dropped": 0, "reanchored": 0, "discontinuities": 0, "jobs_missed": 0}
        self._state = "starting"
        self._problem: dict[str, str] | None = None
        self._noted: dict[str, Any] = {}
        #: What else is kept for the command line to read, besides capture's own status.
        self.notes: dict[str, Callable[[], dict[str, Any]]] = {}
        self._threads = [
            threading.Thread(target=self._run, name="orthanc-events-capture", daemon=True),
            self._flusher,
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def leave(self, seconds: float) -> None:
        """Orthanc is stopping: record what came until now, and ask it nothing any more.

        To be called at ORTHANC_STOPPED, in Orthanc's own thread, which waits. Behind it Orthanc takes its parts away
        one by one, and a request that meets that aborts the process (1.10.1: about 1 of 60 resets).

        :param seconds: how long Orthanc may be kept waiting; what isn't recorded then, the next start reads in the log.
        """
        self._leaving.set()
        self._bell.set()
        self._all_taken.wait(seconds)
        with self._asking:
            self._closed = True

    def stop(self, deadline: float) -> bool:
        """Record what waits, close the outbox, and end the threads.

        :param deadline: by `time.monotonic`.
        :return: whether they ended in time.
        """
        self._stop.set()
        self._bell.set()
        self._flusher.stop()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def status(self) -> dict[str, Any]:
        """What the status shows of capture."""
        return {
            "state": self._state,
            "waiting": len(self._queue),
            **self._counts,
            "repairing": bool(self._repair and self._repair.active),
            "inferred": dict(self._repair.inferred) if self._repair else {},
            "limit": self._upkeep.limit,
            "problem": self._problem,
        }

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._capture()
            except Exception as error:
                self._failed(error)
                self._stop.wait(0.01 if isinstance(error, LogUnavailableError) else 0.1)
        try:
            self._finish()
        except Exception as error:
            self._failed(error)
            if self._outbox is not None:
                self._outbox.abandon()
        self._upkeep.close()
        if self._held is not None:
            os.close(self._held)

    def _failed(self, error: Exception) -> None:
        """Say what is wrong, without flooding, and keep memory bounded while it lasts."""
        if isinstance(error, OutboxFullError):
            self._state = "paused"
            if self._outbox is not None:
                self._outbox.compact()
        if not isinstance(error, LogUnavailableError):  # that one is normal while Orthanc starts and stops
            text = str(error) if isinstance(error, BridgeError) else f"{type(error).__name__}: {error}"
            self._problem = {"message": text, "at": iso(time.time() * 1000)}
            if isinstance(error, OutboxFullError):
                text += "; until then changes wait in memory, and deletions, jobs and starts are at risk"
            line = self._repeats.line(f"{type(error).__name__}{str(error)[:60]}", text)
            if line:
                self._host.error(line)
        if len(self._queue) > MAX_WAITING:
            dropped = len(self._queue)
            self._queue.clear()
            self._anchored = False
            self._counts["dropped"] += dropped
            if self._repair is not None:
                self._repair.compare()
            self._host.error(
                f"{dropped} waiting callbacks were dropped: the outbox could not be written for too long. What Orthanc"
                " logs will be read from its log; deletions and jobs among them are lost"
            )

    def _capture(self) -> None:
        """Anchor, catch up, and follow, until told to stop."""
        if self._held is None:
            self._held = self._folder.hold_outbox()
        if self._outbox is None:
            self._outbox = OutboxWriter(self._folder.outbox, time.time)
        outbox = self._outbox
        self._await_settings(outbox)
        self._bell.wait(_TICK)  # Orthanc calls back as soon as it has started; asked earlier, it logs an error
        reason = self._blocked() or self._other_database()
        if reason:
            self._state, self._problem = "off", {"message": reason, "at": iso(time.time() * 1000)}
            self._host.error(reason)
            self._all_taken.set()
            while not self._stop.wait(_TICK):
                self._queue.clear()
            return
        cursor, found = self._recognise(outbox)
        repair = self._repair = self._repair or self._make_repair(outbox)
        merge = Merge(self._log, self._queue, cursor or 0, Waiting(self._stop))
        self._state = "anchoring"
        anchor = merge.anchor()
        if anchor is None:
            return
        if anchor.rule == "guess":
            self._host.warning(
                f"Orthanc was too busy to tell exactly where its callbacks join its log; taken: Seq {anchor.seq}"
            )
        if cursor is None and (found is not None or self._upkeep.options["start"] == "now"):
            merge.cursor = anchor.seq
        if found is not None:
            since = outbox.last_recorded()  # until then nothing can have gone unseen
            self._discontinuity(outbox, found, merge.cursor)
            repair.announce(since)
        elif cursor is None and merge.cursor:
            outbox.move_cursor(merge.cursor)
        self._catch_up(outbox, merge, anchor.seq, known=cursor is not None)
        if not self._begun:
            repair.begin()
            self._begun = True
        self._anchored = True
        while not self._stop.is_set() and self._anchored:
            try:
                self._follow(merge)
            except OutboxFullError as error:  # the batch is back in the queue, and the anchor still holds
                self._failed(error)
                self._upkeep.take_settings(outbox)  # outbox.max_bytes may have been raised
                self._stop.wait(0.1)

    def _catch_up(self, outbox: OutboxWriter, merge: Merge, through: int, *, known: bool) -> None:
        """Record what the log holds behind the cursor, and see what it doesn't hold any more.

        :param known: whether what is missing there was ours to see: not on a first start.
        """
        repair = self._repair
        assert repair is not None
        cursor, seen = merge.cursor, 0
        backlog = merge.backlog(through)
        while not self._stop.is_set():
            facts = next(backlog, None)
            if known and merge.vanished and not seen:
                oldest = self._log.page(0, 1)
                if not oldest or oldest[0].seq > cursor:  # nothing of before is left to show that it was not emptied
                    repair.announce()
                elif self._begun:  # callbacks may have been lost as well
                    repair.compare()
                self._write_notes(outbox)  # before the cursor moves: what is to be looked for outlives a kill
                seen = 1
            if facts is None:
                break
            self._append(facts, merge)
        if known and merge.vanished:
            self._counts["vanished"] += merge.vanished
            self._host.info(
                f"{merge.vanished} logged changes vanished before they were read (their resources are gone)"
            )

    def _make_repair(self, outbox: OutboxWriter) -> Repair:
        """Once for each of Orthanc's starts."""
        instances = bool(self._upkeep.options["infer_instances"])
        outbox.index_instances(instances)
        repair = Repair(
            outbox.resources,
            self._look_up.resource,
            self._log.tip,
            self._look_up.studies,
            self._look_up.received,
            time.monotonic,
            time.time,
            stable_age=self._stable_age,
            began=outbox.began,
            instances=instances,
            place=outbox.noted("repair"),
        )
        self.notes["repair"] = lambda: repair.place
        return repair

    def _other_database(self) -> str:
        """Why this Orthanc's log can't be followed: with several writers, Seq is not the order of commits there."""
        backend = self._look_up.database()
        if backend is None:
            return ""
        return (
            f"changes are NOT recorded: Orthanc keeps its index in another database than SQLite ({backend}), which this"
            " version does not support yet"
        )

    def _follow(self, merge: Merge) -> None:
        """One batch, or one wait."""
        self._bell.clear()
        if not self._queue:
            if self._state != "paused":
                self._well()
            if self._leaving.is_set():
                facts = merge.tail()  # no callback comes any more
                if facts:
                    self._append(facts, merge)
                self._all_taken.set()
                self._stop.wait()
                return
            self._tick(merge)
            self._bell.wait(self._mend(merge))
            return
        self._heard = time.monotonic()
        batch = merge.take()
        cursor = merge.cursor
        try:
            self._snapshot_jobs(batch)
            facts = merge.facts(batch)
            for callback, fact in zip(batch, facts, strict=True):
                job = self._look_up.job_taken(callback)
                if job is not None:
                    fact.extra["job"] = job
            repair = self._repair
            self._append(repair.news(facts) if repair else facts, merge)
            if repair:
                repair.heard()
        except BaseException as error:
            merge.cursor = cursor
            merge.put_back(batch)
            if isinstance(error, MisalignedError):
                self._counts["reanchored"] += 1
                if self._repair is not None:
                    self._repair.compare()  # callbacks may have been lost
            raise
        self._well()
        self._look_up.forget_jobs()
        if sum(callback.kind == ChangeKind.NEW_INSTANCE for callback in batch) > 1:
            self._stop.wait(_LINGER)
        self._mend(merge)
        self._tick(merge)

    def _mend(self, merge: Merge) -> float:
        """Take a step of repair, if there is anything to repair and it is time to; how long to wait for the next."""
        repair = self._repair
        if repair is None or not repair.active or self._leaving.is_set():
            return _TICK
        now = time.monotonic()
        if now >= self._next_repair:
            passed_over = repair.passed_over
            try:
                facts = repair.step(merge.cursor, now - self._heard)
                if facts:
                    self._append(facts, merge)
                    repair.done(facts)
                rest = max(_REST, _REST_FACTOR * (time.monotonic() - now))
            except LogUnavailableError as error:  # what it is about can wait; capture can't
                rest = _REST_AFTER_REFUSAL
                if repair.passed_over > passed_over:
                    self._host.warning(f"{error}; what has become of this one is left open until the next start")
            self._next_repair = time.monotonic() + rest
        return max(0.0, self._next_repair - time.monotonic())

    def _well(self) -> None:
        """The outbox could be written, or there is nothing to write."""
        if self._state != "following":
            self._state, self._problem = "following", None
            self._repeats = Repeats(time.monotonic)

    def _snapshot_jobs(self, batch: list[Callback]) -> None:
        """At once: Orthanc keeps only the last ten jobs."""
        for callback in batch:
            if callback.level_name == "job" and not self._look_up.take_job(callback):
                self._counts["jobs_missed"] += 1

    def _append(self, facts: list[Fact], merge: Merge) -> None:
        outbox = self._outbox
        assert outbox is not None
        self._look_up.describe(facts)
        self._upkeep.make_room(outbox)
        outbox.append(facts, merge.cursor, self._upkeep.settings, self._look_up.parents)
        if self._repair is not None:
            self._repair.recorded(facts)
        self._flusher.soil(outbox.sync_path)
        self._ring()

    def _finish(self) -> None:
        """Record what only callbacks show. Orthanc is being torn down and must not be asked any more: what its log
        holds, the next start reads."""
        outbox = self._outbox
        if outbox is None:
            return
        batch = [callback for callback in self._queue if not callback.logged]
        if batch and outbox.cursor is not None:
            facts = [from_callback(callback, None) for callback in batch]
            outbox.append(facts, outbox.cursor, self._upkeep.settings, lambda _level, _resource: None)
        self._state = "stopped"
        self._write_notes(outbox)
        outbox.close()

    # -- now and then -------------------------------------------------------------------------------------------------

    def _tick(self, merge: Merge) -> None:
        outbox = self._outbox
        now = time.monotonic()
        if outbox is None or now < self._next_tick:
            return
        self._next_tick = now + _TICK
        self._upkeep.take_settings(outbox)
        self._write_notes(outbox)
        if self._state == "paused":  # even so, something could be written: the note that says so
            self._well()
        self._upkeep.retain(outbox)
        self._watch_log(outbox, merge)

    def _write_notes(self, outbox: OutboxWriter) -> None:
        for key, current in {"capture": self.status, **self.notes}.items():
            document = current()
            if self._noted.get(key) != document:
                outbox.note(key, document)
                self._noted[key] = document

    def _await_settings(self, outbox: OutboxWriter) -> None:
        """On a first start, give the bridge time to say which settings apply; later the last good ones do."""
        until = time.monotonic() + FIRST_SETTINGS
        while not self._upkeep.take_settings(outbox) and outbox.cursor is None and time.monotonic() < until:
            self._state = "waiting for the settings"
            if self._leaving.is_set() or self._stop.wait(0.05):
                return

    def _recognise(self, outbox: OutboxWriter) -> tuple[int | None, Break | None]:
        """The cursor to go on from, and why it is not where recording ended: is this the log that was read before?

        The cursor is none on a first start, and where the two logs have nothing in common.
        """
        published = self._upkeep.acknowledged_seq()
        cursor = outbox.cursor if outbox.cursor is not None else published
        if cursor is None:
            return None, None
        found = self._continuity.recognise(outbox.tail(), cursor)
        outbox.published = published or 0 if found is None else 0
        return (cursor, None) if found is None else (found.going_on, found)

    def _watch_log(self, outbox: OutboxWriter, merge: Merge) -> None:
        if self._continuity.is_emptied(outbox, merge.cursor):
            self._discontinuity(outbox, Break("emptied", EMPTIED, merge.cursor, merge.cursor), merge.cursor)
            if self._repair is not None:
                self._repair.announce()

    def _discontinuity(self, outbox: OutboxWriter, found: Break, going_on: int) -> None:
        """The log doesn't go on where it ended: say so, in an event too, and remember to look at what there is."""
        self._counts["discontinuities"] += 1
        self._host.error(
            f"Orthanc's change log {found.what}. Going on behind Seq {going_on}; what exists is compared with"
            " what was announced"
        )
        extra = {"reason": found.reason, "recorded": outbox.cursor or 0, "counter": found.tip, "continues": going_on}
        fact = Fact("LogDiscontinuity", "server", None, int(time.time() * 1000), extra={"log": extra})
        emptied = found.reason == "emptied"
        outbox.append(
            [fact],
            going_on,
            self._upkeep.settings,
            self._look_up.parents,
            emptied=emptied,
            another_log=not emptied,
            note=("repair", {"place": "", "listed": 0}),
        )
