"""The one thread that feeds the merge from callbacks and Orthanc's log, and writes the outbox.

Whatever goes wrong is healed in the same way: the batch goes back to the queue, and the thread anchors again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from orthanc_events_bridge.changes.log import PAGE, TAIL, OrthancLog, Row, common_seq, same_log
from orthanc_events_bridge.changes.merge import Merge, MisalignedError, from_callback
from orthanc_events_bridge.changes.model import Callback, ChangeKind, Fact
from orthanc_events_bridge.changes.repair import Repair
from orthanc_events_bridge.errors import BridgeError, DamagedError, LogUnavailableError, OutboxFullError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.plugin.lookup import Lookup
from orthanc_events_bridge.plugin.rescue import Rescue
from orthanc_events_bridge.plugin.upkeep import Upkeep
from orthanc_events_bridge.salvage import StoppedError
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
_EMPTIED: Final = "was emptied (DELETE /changes)"
#: Resources that are asked for where rows of the log are missing.
_ASKED: Final = 5


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
        self._discontinued = False
        self._first: Sequence[Row] = ()  # of the log, at the last look
        self._emptied = False
        self._next_repair = 0.0
        self._heard = time.monotonic()
        self._stop = threading.Event()
        self._outbox: OutboxWriter | None = None
        self._upkeep = Upkeep(folder, host, self._look_up.allow)
        self._rescue = Rescue(folder, host, self._upkeep, self._stop.is_set)
        self._repeats = Repeats(time.monotonic)
        self._leaving = threading.Event()
        self._all_taken = threading.Event()
        self._anchored = False
        self._next_tick = 0.0
        self._dirty = threading.Event()
        self._counts = {"vanished": 0, "dropped": 0, "reanchored": 0, "discontinuities": 0, "jobs_missed": 0}
        self._state = "starting"
        self._problem: dict[str, str] | None = None
        self._noted: dict[str, Any] = {}
        #: What else is kept for the command line to read, besides capture's own status.
        self.notes: dict[str, Callable[[], dict[str, Any]]] = {}
        self._threads = [
            threading.Thread(target=self._run, name="orthanc-events-capture", daemon=True),
            threading.Thread(target=self._sync, name="orthanc-events-sync", daemon=True),
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
        self._dirty.set()
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
            except DamagedError as error:
                self._exchange(error)
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

    def _exchange(self, error: DamagedError) -> None:
        """The outbox can't be used any more: go on with a new one. What is not recorded yet is in the queue still."""
        outbox = self._outbox
        try:
            found = self._rescue.save(outbox, error)
            self._outbox, self._anchored, self._noted = None, False, {}
            self.notes.pop("repair", None)
            self._rescue.exchange(outbox, found, error)
        except StoppedError:
            return
        except Exception as failure:
            self._failed(failure)
            self._stop.wait(_TICK)

    def _capture(self) -> None:
        """Anchor, catch up, and follow, until told to stop."""
        if self._outbox is None:
            self._outbox = self._rescue.open()
            self._go_on_repairing(self._outbox)
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
        cursor = self._recognise(outbox)
        repair = self._repair
        merge = Merge(self._log, self._queue, cursor or 0, Waiting(self._stop))
        self._state = "anchoring"
        anchor = merge.anchor()
        if anchor is None:
            return
        if anchor.rule == "guess":
            self._host.warning(
                f"Orthanc was too busy to tell exactly where its callbacks join its log; taken: Seq {anchor.seq}"
            )
        if cursor is None and self._upkeep.options["start"] == "now":
            outbox.move_cursor(anchor.seq)
            merge.cursor = anchor.seq
        for facts in merge.backlog(anchor.seq):
            self._append(facts, merge)
            if self._stop.is_set():
                return
        if merge.vanished and cursor is not None:  # on a first start, they were never ours to see
            self._counts["vanished"] += merge.vanished
            self._host.info(
                f"{merge.vanished} logged changes vanished before they were read (their resources are gone)"
            )
            oldest = self._log.page(0, 1)
            # Nothing of before is left that shows that it was not emptied.
            self._discontinued = self._discontinued or not oldest or oldest[0].seq > cursor
        if repair is None:
            repair = self._repair = self._begin_repair(outbox, begin=cursor is not None)
        if self._discontinued:
            repair.announce()
            self._discontinued = False
        self._anchored = True
        while not self._stop.is_set() and self._anchored:
            try:
                self._follow(merge)
            except OutboxFullError as error:  # the batch is back in the queue, and the anchor still holds
                self._failed(error)
                self._upkeep.take_settings(outbox)  # outbox.max_bytes may have been raised
                self._stop.wait(0.1)

    def _go_on_repairing(self, outbox: OutboxWriter) -> None:
        """The outbox was exchanged while Orthanc ran on, and its timers with it."""
        if self._repair is not None:
            self._repair.go_on(outbox.resources, outbox.noted("repair").get("remembered"))
            self._note_repair(self._repair)

    def _note_repair(self, repair: Repair) -> None:
        self.notes["repair"] = lambda: {"place": repair.place, "remembered": repair.remembered}

    def _begin_repair(self, outbox: OutboxWriter, *, begin: bool) -> Repair:
        """Once for each of Orthanc's starts, when its backlog is recorded."""
        kept = outbox.noted("repair")
        repair = Repair(
            outbox.resources,
            self._look_up.resource,
            self._log.tip,
            self._look_up.studies,
            time.monotonic,
            time.time,
            stable_age=self._stable_age,
            began=outbox.began,
            place=str(kept.get("place", "")),
            remembered=kept.get("remembered"),
        )
        self._note_repair(repair)
        if begin:
            repair.begin()
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
            self._append(facts, merge)
        except BaseException as error:
            merge.cursor = cursor
            merge.put_back(batch)
            if isinstance(error, MisalignedError):
                self._counts["reanchored"] += 1
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
            facts = repair.step(merge.cursor, now - self._heard)
            if facts:
                self._append(facts, merge)
                repair.done(facts)
            rest = max(_REST, _REST_FACTOR * (time.monotonic() - now))
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
        self._dirty.set()
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
        self._rescue.look(outbox)
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

    def _recognise(self, outbox: OutboxWriter) -> int | None:
        """The cursor to go on from: is this the log that was read before? None on a first start."""
        cursor = outbox.cursor if outbox.cursor is not None else self._upkeep.acknowledged_seq()
        if cursor is None:
            return None
        waiting = sum(callback.logged for callback in self._queue.copy())  # before the query: all have their rows
        tail, tip = outbox.tail(), self._log.tip()
        rows = self._log.page(tail[0].seq - 1, TAIL) if tail else []
        if not same_log(tail, rows, tip, cursor):
            why = f"its counter is {tip}, {cursor} was recorded" if tip < cursor else "its numbers are given to others"
            going_on = min(common_seq(tail, rows), tip) or max(0, tip - waiting)
            self._discontinuity(
                outbox, f"is not the one that was read before ({why}): another or a restored database", going_on
            )
            return going_on
        if self._was_emptied(tail):
            self._discontinuity(outbox, _EMPTIED, cursor)
        return cursor

    def _was_emptied(self, tail: list[Row]) -> bool:
        """Whether rows of the log are gone although their resources are not.

        :param tail: the last rows that were read.
        """
        if not tail:
            return False
        oldest = self._log.page(0, PAGE)
        if oldest and oldest[0].seq <= tail[-1].seq:
            return False
        new = {row.resource for row in oldest}  # deleted, and stored again
        last = list({row.resource: row for row in tail if row.resource not in new}.values())[-_ASKED:]
        return any(self._look_up.resource(row.level, row.resource) is not None for row in last)

    def _watch_log(self, outbox: OutboxWriter, merge: Merge) -> None:
        """Notice that the log was emptied while we follow it: its first rows are gone, and what they are about is not.

        What was deleted and stored again has a younger creation; the callback of that may still be on its way, so it
        has to look like that twice.
        """
        first = self._log.page(0, _ASKED)
        if self._first and not set(self._first) & set(first):
            kept = [row for row in self._first if self._is_kept(outbox, row)]
            if kept and self._emptied:
                self._discontinuity(outbox, _EMPTIED, merge.cursor)
                if self._repair is not None:
                    self._repair.announce()
                    self._discontinued = False
            elif kept:
                self._emptied = True
                return  # look again at the same rows
        self._first, self._emptied = first, False

    def _is_kept(self, outbox: OutboxWriter, row: Row) -> bool:
        known = outbox.resources.find(row.resource)
        if known is None or (known.born or 0) > row.seq:
            return False
        return self._look_up.resource(row.level, row.resource) is not None

    def _discontinuity(self, outbox: OutboxWriter, what: str, going_on: int) -> None:
        """The log doesn't go on where it ended: say so, in an event too, and look at what there is."""
        self._counts["discontinuities"] += 1
        self._discontinued = True
        self._host.error(
            f"Orthanc's change log {what}. Going on behind Seq {going_on}; what exists is compared with what was"
            " announced"
        )
        fact = Fact("LogDiscontinuity", "server", None, int(time.time() * 1000))
        outbox.append([fact], going_on, self._upkeep.settings, self._look_up.parents, another_log=True)

    # -- durability ----------------------------------------------------------------------------------------------------

    def _sync(self) -> None:
        """Flush what is dirty, at most once a second, on a thread of its own: a slow disk must not hold up capture."""
        while not self._stop.is_set():
            self._dirty.wait()
            self._dirty.clear()
            outbox = self._outbox
            if outbox is not None:
                try:
                    descriptor = os.open(outbox.sync_path, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                except OSError as error:
                    line = self._repeats.line("sync", f"{outbox.sync_path} can't be flushed: {error.strerror}")
                    if line:
                        self._host.error(line)
            self._stop.wait(_TICK)
