"""The one thread that feeds the merge from callbacks and Orthanc's log, and writes the outbox.

Whatever goes wrong is healed in the same way: the batch goes back to the queue, and the thread anchors again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from orthanc_events_bridge.changes.merge import MisalignedError
from orthanc_events_bridge.changes.model import Callback, ChangeKind
from orthanc_events_bridge.changes.unlogged import Unlogged
from orthanc_events_bridge.changes.unordered import REREAD
from orthanc_events_bridge.errors import DamagedError, LogUnavailableError, NotAnsweredError, OutboxFullError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.chores import Chore
from orthanc_events_bridge.plugin.continuity import EMPTIED, Break, Continuity
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.plugin.joining import AnyMerge, is_joined, join
from orthanc_events_bridge.plugin.recorder import Recorder
from orthanc_events_bridge.plugin.rescue import Rescue
from orthanc_events_bridge.salvage import StoppedError

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


class Capture(Recorder):
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
        super().__init__(folder, get, queue, ring, host, stable_age)
        self._bell = bell
        self._blocked = blocked
        self._continuity = Continuity(self._log, self._look_up.resource)
        self._mending, self._filling = Chore(), Chore()
        self._heard = time.monotonic()
        self._held: int | None = None
        self._late_said = 0
        self._rescue = Rescue(folder, host, self._upkeep, self._stop.is_set)
        self._all_taken = threading.Event()
        self._next_tick = 0.0
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

    def _snapshot_jobs(self, batch: list[Callback]) -> None:
        """At once: Orthanc keeps only the last ten jobs."""
        for callback in batch:
            if callback.level_name == "job" and not self._look_up.take_job(callback):
                self._counts["jobs_missed"] += 1

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
