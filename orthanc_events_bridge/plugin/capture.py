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
from orthanc_events_bridge.changes.merge import MisalignedError, from_callback
from orthanc_events_bridge.changes.model import Callback, ChangeKind, Fact
from orthanc_events_bridge.changes.repair import Repair
from orthanc_events_bridge.changes.unlogged import Unlogged
from orthanc_events_bridge.changes.unordered import REREAD
from orthanc_events_bridge.errors import (
    BridgeError,
    DamagedError,
    LogUnavailableError,
    NotAnsweredError,
    OutboxFullError,
)
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.backfilling import Backfilling
from orthanc_events_bridge.plugin.chores import Chore
from orthanc_events_bridge.plugin.continuity import EMPTIED, Break, Continuity
from orthanc_events_bridge.plugin.flush import Flusher
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.plugin.joining import AnyMerge, is_joined, join
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
#: Seconds until Orthanc is asked again what it did not answer, answering else.
_ASK_AGAIN: Final = 1.0


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
        self._look_up = Lookup(ask, self._log.tip, time.monotonic, self._pass_over)
        self._queue = queue
        self._bell = bell
        self._ring = ring
        self._host = host
        self._blocked = blocked
        self._stable_age = stable_age
        self._repair: Repair | None = None
        self._begun = False
        self._continuity = Continuity(self._log, self._look_up.resource)
        self._mending, self._filling = Chore(), Chore()
        self._heard = time.monotonic()
        self._began = time.time()
        self._stop = threading.Event()
        self._outbox: OutboxWriter | None = None
        self._held: int | None = None
        self._late_said = 0
        self._upkeep = Upkeep(folder, host, self._look_up.allow)
        self._backfilling = Backfilling(self._upkeep.backfill, self._look_up)
        self._rescue = Rescue(folder, host, self._upkeep, self._stop.is_set)
        self._repeats, self._unanswered = Repeats(time.monotonic), Repeats(time.monotonic)
        self._leaving = threading.Event()
        self._all_taken = threading.Event()
        self._anchored = False
        self._next_tick = 0.0
        self._flusher = Flusher(host)
        self._counts = {
            "vanished": 0,
            "passed": 0,
            "late": 0,
            "dropped": 0,
            "reanchored": 0,
            "discontinuities": 0,
            "jobs_missed": 0,
            "unanswered": 0,
        }
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
            "backfill": self._backfilling.status() or None,
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
                self._stop.wait(self._patience(error))
        try:
            self._finish()
        except Exception as error:
            self._failed(error)
            if self._outbox is not None:
                self._outbox.abandon()
        self._upkeep.close()
        if self._held is not None:
            os.close(self._held)

    def _patience(self, error: Exception) -> float:
        """Seconds until it is tried again."""
        if isinstance(error, NotAnsweredError) and not self._leaving.is_set():
            return _ASK_AGAIN
        return 0.01 if isinstance(error, LogUnavailableError) else 0.1

    def _pass_over(self, problem: str) -> None:
        """Orthanc can't say something of one resource, and nothing waits for it any longer."""
        self._counts["unanswered"] += 1
        line = self._unanswered.line("unanswered", f"{problem}; it is passed over, and what depends on it is not told")
        if line:
            self._host.warning(line)

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
            self._began = time.time()
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
        if self._held is None:
            self._held = self._folder.hold_outbox()
        if self._outbox is None:
            self._outbox = self._rescue.open()
            self._go_on_repairing(self._outbox)
        outbox = self._outbox
        self._await_settings(outbox)
        self._bell.wait(_TICK)  # Orthanc calls back as soon as it has started; asked earlier, it logs an error
        reason = self._blocked()
        if reason:
            self._state, self._problem = "off", {"message": reason, "at": iso(time.time() * 1000)}
            self._host.error(reason)
            self._all_taken.set()
            while not self._stop.wait(_TICK):
                self._queue.clear()
            return
        self._log.unordered = self._look_up.database() is not None
        cursor, found = self._recognise(outbox)
        merge = self._join(outbox, cursor, found)
        if isinstance(merge, Unlogged):  # the one that reads the log repairs it
            self._repair, self._begun = None, False
        elif self._repair is None:
            self._repair = self._begin_repair(outbox)
        repair = self._repair
        self._state = "anchoring"
        anchor = merge.anchor()
        if anchor is None:
            return
        if anchor.rule == "guess":
            self._host.warning(
                f"Orthanc was too busy to tell exactly where its callbacks join its log; taken: Seq {anchor.seq}"
            )
        if cursor is None and (found is not None or self._upkeep.options["start"] == "now"):
            merge.skip(anchor.seq)
        if found is not None:
            since = outbox.last_recorded()  # until then nothing can have gone unseen
            self._discontinuity(outbox, found, merge)
            if repair is not None:
                repair.announce(since)
        elif cursor is None and (merge.cursor or merge.ahead):
            outbox.move_cursor(merge.cursor, merge.ahead)
        self._catch_up(outbox, merge, anchor.seq, known=cursor is not None)
        if repair is not None and not self._begun:
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

    def _catch_up(self, outbox: OutboxWriter, merge: AnyMerge, through: int, *, known: bool) -> None:
        """Record what the log holds behind the cursor, and see what it doesn't hold any more.

        :param known: whether what is missing there was ours to see: not on a first start.
        """
        repair = self._repair
        cursor, seen = merge.cursor, 0
        backlog = merge.backlog(through)
        while not self._stop.is_set():
            facts = next(backlog, None)
            if known and merge.vanished and not seen and repair is not None:
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

    def _go_on_repairing(self, outbox: OutboxWriter) -> None:
        """The outbox was exchanged while Orthanc ran on, and its timers with it."""
        repair = self._repair
        if repair is not None:
            outbox.index_instances(self._finds_members)
            repair.go_on(outbox.resources, outbox.noted("repair").get("remembered"))
            self.notes["repair"] = lambda: repair.place

    def _begin_repair(self, outbox: OutboxWriter) -> Repair:
        """Once for each of Orthanc's starts."""
        outbox.index_instances(self._finds_members)
        repair = self._make_repair(outbox)
        self.notes["repair"] = lambda: repair.place
        return repair

    @property
    def _finds_members(self) -> bool:
        """Whether the instances of a series have to be found."""
        return bool(self._upkeep.options["infer_instances"])

    def _make_repair(self, outbox: OutboxWriter, make: Callable[..., Repair] = Repair, **more: Any) -> Repair:
        """Make it, with what it asks Orthanc and the outbox.

        :param more: options of `make`, in place of these or beside them.
        """
        # Other Orthancs' rows are recorded that much later.
        late = self._upkeep.options["grace"] if self._log.unordered else 0.0
        options = {
            "stable_age": self._stable_age + late,
            "began": outbox.began,
            "instances": self._finds_members,
            "place": outbox.noted("repair"),
        }
        return make(
            outbox.resources,
            self._look_up,
            time.monotonic,
            time.time,
            **{**options, **more},
        )

    def _join(self, outbox: OutboxWriter, cursor: int | None, found: Break | None) -> AnyMerge:
        """What turns Orthanc's log and its callbacks into facts, from a cursor on.

        :param found: why the log is not the one that was read before: then nothing of it is recorded above the cursor.
        """
        clock, options = Waiting(self._stop), self._upkeep.options
        ahead = outbox.ahead if found is None or found.reason == "emptied" else ""
        return join(self._log, self._queue, cursor, ahead, clock, options, began=self._began, counts=self._counts)

    def _follow(self, merge: AnyMerge) -> None:
        """One batch, or one wait."""
        self._bell.clear()
        if not self._queue:
            if self._state != "paused":
                self._well()
            if self._leaving.is_set():
                self._record(merge.tail(), merge)  # no callback comes any more
                self._all_taken.set()
                self._stop.wait()
                return
            self._record(merge.due(), merge)
            self._tick(merge)
            self._bell.wait(min(self._mend(merge), self._fill(merge)))
            return
        self._heard = time.monotonic()
        batch = merge.take()
        try:
            self._snapshot_jobs(batch)
            facts = merge.facts(batch)
            jobs = (callback for callback in batch if callback.level_name == "job")
            for callback, fact in zip(jobs, (fact for fact in facts if fact.level == "job"), strict=True):
                job = self._look_up.job_taken(callback)
                if job is not None:
                    fact.extra["job"] = job
            repair = self._repair
            self._append(repair.news(facts) if repair else facts, merge)
            if repair:
                repair.heard()
        except BaseException as error:
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
        self._record(merge.due(), merge)
        self._mend(merge)
        self._fill(merge)
        self._tick(merge)

    def _mend(self, merge: AnyMerge) -> float:
        """Take a step of repair, if there is anything to repair and it is time to; how long to wait for the next."""
        repair = self._repair
        if repair is None or not repair.active or self._leaving.is_set():
            return _TICK

        def work() -> None:
            facts = repair.step(merge.cursor, time.monotonic() - self._heard)
            if facts:
                self._append(facts, merge)
                repair.done(facts)

        return self._mending.step(work)

    def _fill(self, merge: AnyMerge) -> float:
        """Take a step of a backfill, as `_mend` does of repair."""
        outbox = self._outbox
        if outbox is None or not self._backfilling.active or self._leaving.is_set():
            return _TICK

        def work() -> None:
            facts = self._backfilling.step(outbox, merge.cursor, self._upkeep.limit)
            if facts:
                self._append(facts, merge)
                self._backfilling.done(facts)

        return self._filling.step(work)

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

    def _record(self, facts: list[Fact], merge: AnyMerge) -> None:
        """Record what no callback has told, or that the cursor has moved without it."""
        assert self._outbox is not None
        if not facts and merge.cursor == self._outbox.cursor:
            return
        try:
            self._append(facts, merge)
        except BaseException:
            merge.put_back(())
            raise

    def _append(self, facts: list[Fact], merge: AnyMerge) -> None:
        outbox = self._outbox
        assert outbox is not None
        self._look_up.describe(facts)
        self._upkeep.make_room(outbox)
        outbox.append(facts, merge.cursor, self._upkeep.settings, self._look_up.parents, ahead=merge.ahead)
        if self._repair is not None:
            self._repair.recorded(facts)
        self._flusher.soil(outbox.sync_path)
        self._backfilling.recorded(facts)
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
            outbox.append(
                facts, outbox.cursor, self._upkeep.settings, lambda _level, _resource: None, ahead=outbox.ahead
            )
        self._state = "stopped"
        self._write_notes(outbox)
        outbox.close()

    # -- now and then -------------------------------------------------------------------------------------------------

    def _tick(self, merge: AnyMerge) -> None:
        outbox = self._outbox
        now = time.monotonic()
        if outbox is None or now < self._next_tick:
            return
        self._next_tick = now + _TICK
        self._keep_house(outbox)
        if not self._is_joined(merge):
            self._anchored = False  # the settings are other ones
            return
        if self._state == "paused":  # even so, something could be written: the note that says so
            self._well()
        self._rescue.look(outbox)
        self._watch_log(outbox, merge)
        late, self._late_said = self._counts["late"] - self._late_said, self._counts["late"]
        if late:
            self._host.warning(
                f"{late} changes came into Orthanc's log later than capture.grace, and were told late; make it longer"
            )

    def _is_joined(self, merge: AnyMerge) -> bool:
        return is_joined(merge, self._upkeep.options)

    def _keep_house(self, outbox: OutboxWriter) -> None:
        """What needs no Orthanc."""
        self._upkeep.take_settings(outbox)
        self._look_for_backfill(outbox)
        self._write_notes(outbox)
        self._upkeep.retain(outbox)

    def _look_for_backfill(self, outbox: OutboxWriter) -> None:
        self._backfilling.look(outbox)
        if self._backfilling.status():  # before, what is kept of an earlier one would be lost
            self.notes["backfill"] = self._backfilling.status

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
        cursor = outbox.cursor
        if cursor is None and published is not None:
            # Where Seq is not the order of the commits, it says nothing of what is below it.
            cursor = max(0, published - REREAD) if self._log.unordered else published
        elif self._log.unordered and outbox.settled is not None:
            cursor = outbox.settled
        if cursor is None or not self._upkeep.options["log"]:
            return cursor, None
        found = self._continuity.recognise(outbox.tail(), cursor)
        outbox.published = published or 0 if found is None else 0
        return (cursor, None) if found is None else (found.going_on, found)

    def _watch_log(self, outbox: OutboxWriter, merge: AnyMerge) -> None:
        if not isinstance(merge, Unlogged) and self._continuity.is_emptied(outbox, merge.cursor):
            self._discontinuity(outbox, Break("emptied", EMPTIED, merge.cursor, merge.cursor), merge)
            if self._repair is not None:
                self._repair.announce()

    def _discontinuity(self, outbox: OutboxWriter, found: Break, merge: AnyMerge) -> None:
        """The log doesn't go on where it ended: say so, in an event too, and remember to look at what there is."""
        going_on = merge.cursor
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
            ahead=merge.ahead,
        )
