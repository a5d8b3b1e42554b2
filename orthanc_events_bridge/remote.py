"""Capture without any plugin: a remote Orthanc's change log, followed over HTTP in the bridge's own process.

There are no callbacks, so the log is all there is; deletions come by comparison and jobs by looking at their list.
`docs/operating.md` has the table of what is seen and what is not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from orthanc_events_bridge.changes.jobs import Jobs
from orthanc_events_bridge.changes.log import PAGE
from orthanc_events_bridge.changes.merge import Anchor, Merge, MisalignedError
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.changes.repair import Repair
from orthanc_events_bridge.changes.rounds import SURE, Rounds
from orthanc_events_bridge.errors import BridgeError, LogUnavailableError, NotAnsweredError, OrthancError, OutboxError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.orthanc_api import OrthancApi, OrthancOptions
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.capture import Capture, Waiting
from orthanc_events_bridge.plugin.continuity import Break
from orthanc_events_bridge.plugin.joining import AnyMerge, is_joined, join
from orthanc_events_bridge.plugin.lookup import job_snapshot

log = logging.getLogger(__name__)

#: Seconds between two tries while Orthanc can't be asked: at first, and at most.
_FIRST_PATIENCE: Final = 0.25
_LAST_PATIENCE: Final = 10.0
#: Seconds between two looks whether the log still is the one that was read.
_LOOK_EVERY: Final = 1.0
#: Seconds until a list of jobs that was refused is asked for again.
_JOBS_AGAIN: Final = 60.0
#: Seconds that capture has to end, at most, before the bridge drains.
_STOP_WITHIN: Final = 3.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a remote Orthanc is asked.

    :ivar poll: seconds between two looks at its log and its jobs.
    :ivar compare_every: seconds from the end of a look for deletions to the beginning of the next; 0: only at a start,
        and where something may have been missed.
    :ivar instances: whether deletions of single instances are looked for as well: a question for each series.
    :ivar stable_age: Orthanc's ``StableAge``, seconds: what is growing for longer is asked for.
    """

    poll: float = 1.0
    compare_every: float = 600.0
    instances: bool = False
    stable_age: float = 60.0


class Asking:
    """A GET that opens its connection when it is needed, and anew, with what the files then hold, after a refusal.

    :param options: where Orthanc is.
    """

    def __init__(self, options: OrthancOptions) -> None:
        self._options = options
        self._api: OrthancApi | None = None

    def get(self, path: str) -> bytes:
        """
        :raises GoneError: Orthanc says that there is no such thing.
        :raises LogUnavailableError: it can't be reached or can't answer now.
        :raises OrthancError: it refuses, or what answers is no Orthanc.
        """
        if self._api is None:
            self._api = OrthancApi(self._options)
        try:
            answer = self._api.get(path)
            if answer.lstrip()[:1] not in (b"{", b"["):
                raise OrthancError(
                    f"{self._options.place} does not answer GET {path.partition('?')[0]} in JSON",
                    "check the URL: it has to lead to Orthanc's REST API itself, past any page to log in",
                )
        except OrthancError:
            self.close()
            raise
        return answer

    def close(self) -> None:
        if self._api is not None:
            self._api.close()
            self._api = None


class LogHost:
    """The bridge's own log, in place of Orthanc's."""

    def info(self, message: str) -> None:
        log.info("%s", message)

    def warning(self, message: str) -> None:
        log.warning("%s", message)

    def error(self, message: str) -> None:
        log.error("%s", message)


class LogMerge(Merge):
    """No callback is merged with the log: it is read to its end."""

    def anchor(self) -> Anchor | None:
        tip = self._log.tip()
        if tip < self.cursor:
            raise MisalignedError(f"the log ends at {tip}, {self.cursor} is recorded")
        return Anchor(tip, "proof")


class RemoteCapture(Capture):
    """Records the changes of one Orthanc that is asked over HTTP.

    :param folder: where the outbox is; prepared.
    :param options: where Orthanc is.
    :param pace: how often it is asked.
    """

    def __init__(self, folder: Folder, options: OrthancOptions, pace: Pace) -> None:
        bell = threading.Event()
        bell.set()  # nobody rings, so nobody waits for it
        self._asking_for = Asking(options)
        get = self._asking_for.get
        super().__init__(folder, get, deque(), bell, self._ring_bridge, LogHost(), stable_age=pace.stable_age)
        self._options = options
        self._pace = pace
        self._get = get
        self._ring_it: Callable[[], None] = lambda: None
        self._given_up = False
        self._tries = 0
        self._away_since: float | None = None
        self._next_look = 0.0
        self._jobs: Jobs | None = None
        self._next_jobs = 0.0
        self._jobs_problem: str | None = None

    # -- as the bridge sees it -----------------------------------------------------------------------------------------

    def begin(self, ring: Callable[[], None]) -> None:
        """Start; the outbox is ours alone.

        :param ring: called from capture's thread when there are new rows.
        """
        self._ring_it = ring
        self.start()

    def end(self) -> None:
        """Record what was read, and close the outbox. An answer that does not come is not waited for."""
        if self.stop(time.monotonic() + _STOP_WITHIN):
            self._asking_for.close()
        elif not self._given_up:
            self._given_up = True
            log.warning("Orthanc is still being waited for; the next start goes on from the log's cursor")

    def _ring_bridge(self) -> None:
        self._ring_it()

    def status(self) -> dict[str, Any]:
        repair = self._repair if isinstance(self._repair, Rounds) else None
        return {
            **super().status(),
            "jobs_missed": self._jobs.missed if self._jobs else 0,
            "orthanc": self._options.url,
            "rounds": repair.rounds if repair else 0,
            "suspects": repair.suspects if repair else 0,
            "jobs_problem": self._jobs_problem,
        }

    # -- trouble -------------------------------------------------------------------------------------------------------

    def _patience(self, error: Exception) -> float:
        self._tries += 1
        longest = min(_LAST_PATIENCE, _FIRST_PATIENCE * 2 ** min(self._tries, 10))
        return random.uniform(longest / 2, longest)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, NotAnsweredError) or not isinstance(error, LogUnavailableError | OrthancError):
            super()._failed(error)
        else:
            text = str(error)
            self._state = "not connected"
            self._problem = {"message": text, "at": iso(time.time() * 1000)}
            if self._away_since is None:
                self._away_since = time.monotonic()
            if line := self._repeats.line(text[:160], text):
                self._host.error(line)
        if self._outbox is not None:
            with contextlib.suppress(OutboxError):
                self._keep_house(self._outbox)

    def _well(self) -> None:
        super()._well()
        self._tries = 0
        if self._away_since is not None:
            seconds = time.monotonic() - self._away_since
            self._away_since = None
            self._host.warning(f"{self._options.place} is well again after {seconds:.0f} s")

    # -- following -----------------------------------------------------------------------------------------------------

    def _recognise(self, outbox: OutboxWriter) -> tuple[int | None, Break | None]:
        cursor, found = super()._recognise(outbox)
        if found is not None and cursor is None:
            # Nobody calls back to say where to go on. No number from the oldest remembered one on was read in this log.
            tail = outbox.tail()
            cursor = max(0, min(tail[0].seq - 1 if tail else found.tip, found.tip))
        return cursor, found

    def _join(self, outbox: OutboxWriter, cursor: int | None, found: Break | None) -> AnyMerge:
        clock, options, never = Waiting(self._stop), self._options_here, float("inf")
        if not self._log.unordered:
            return LogMerge(self._log, self._queue, cursor or 0, clock)
        ahead = outbox.ahead if found is None or found.reason == "emptied" else ""
        return join(self._log, self._queue, cursor, ahead, clock, options, began=never, counts=self._counts)

    def _is_joined(self, merge: AnyMerge) -> bool:
        return is_joined(merge, self._options_here)

    @property
    def _options_here(self) -> dict[str, Any]:
        """Those of the settings; without the log there would be nothing."""
        return {**self._upkeep.options, "log": True}

    @property
    def _finds_members(self) -> bool:
        """Nobody tells which instances went with a series."""
        return True

    def _make_repair(self, outbox: OutboxWriter, make: Callable[..., Repair] = Rounds, **more: Any) -> Repair:
        return super()._make_repair(
            outbox,
            make,
            stable_age=self._stable_age,
            instances=self._pace.instances,
            every=self._pace.compare_every,
            sure=SURE + (self._upkeep.options["grace"] if self._log.unordered else 0.0),
            **more,
        )

    def _follow(self, merge: AnyMerge) -> None:
        """A page of the log; at its end also jobs, upkeep, and a step of repair, and a wait."""
        if not self._read_page(merge):
            return
        self._look_at_jobs(merge)
        self._tick(merge)
        self._stop.wait(min(self._mend(merge), self._fill(merge), self._pace.poll))

    def _read_page(self, merge: AnyMerge) -> bool:
        """Record what the log has gained; whether that was all."""
        vanished = merge.vanished
        facts = merge.tail()
        if not facts and not self._log.unordered and (self._log.counter or 0) < merge.cursor:
            raise MisalignedError(f"the log ends at {self._log.counter}, {merge.cursor} is recorded")
        if facts and not self._is_same_log():
            merge.put_back(())
            self._anchored = False  # join it anew, which says so and compares
            return False
        self._record(self._repair.news(facts) if self._repair else facts, merge)
        self._counts["vanished"] += merge.vanished - vanished
        self._well()
        return len(facts) < PAGE

    def _append(self, facts: list[Fact], merge: AnyMerge) -> None:
        self._look_up.foresee(facts)
        super()._append(facts, merge)

    def _is_same_log(self) -> bool:
        """Whether what was read goes on where the outbox ends: nobody says when Orthanc is started again, and with
        which database. Asked once a second at most, no Orthanc is exchanged faster."""
        outbox, now = self._outbox, time.monotonic()
        if outbox is None or now < self._next_look:
            return True
        self._next_look = now + _LOOK_EVERY
        return self._continuity.is_followed(outbox.tail())

    def _look_at_jobs(self, merge: AnyMerge) -> None:
        outbox, now = self._outbox, time.monotonic()
        if outbox is None or now < self._next_jobs:
            return
        if self._jobs is None:
            kept = outbox.noted("jobs")
            self._jobs = Jobs(job_snapshot, kept.get("known"))
        try:
            facts, seen = self._jobs.look(json.loads(self._get("/jobs?expand")))
        except LogUnavailableError:
            raise
        except (BridgeError, LookupError, TypeError, ValueError) as error:
            text = str(error) if isinstance(error, BridgeError) else "its list of jobs is none"
            self._next_jobs, self._jobs_problem = now + _JOBS_AGAIN, text
            if line := self._repeats.line("jobs", f"jobs are not seen: {text}"):
                self._host.error(line)
            return
        self._jobs_problem = None
        if facts:
            self._append(facts, merge)
        if seen != self._jobs.known:
            self._jobs.done(seen)
            outbox.note("jobs", {"known": seen})
