"""What capture writes: facts with what Orthanc says of them, the log's cursor, and notes on how it is doing.

And what it asks Orthanc by, until Orthanc stops. When what is written, and in which order, is the matter of
`orthanc_events_bridge.plugin.capture`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from orthanc_events_bridge.changes.log import OrthancLog
from orthanc_events_bridge.changes.merge import from_callback
from orthanc_events_bridge.changes.model import Callback, Fact
from orthanc_events_bridge.changes.repair import Repair
from orthanc_events_bridge.errors import BridgeError, LogUnavailableError, OutboxFullError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.backfilling import Backfilling
from orthanc_events_bridge.plugin.continuity import Break
from orthanc_events_bridge.plugin.flush import Flusher
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.plugin.joining import AnyMerge
from orthanc_events_bridge.plugin.lookup import Lookup
from orthanc_events_bridge.plugin.upkeep import Upkeep

#: Callbacks that may wait in memory while the outbox can't be written.
MAX_WAITING: Final = 100_000


class Recorder:
    """Writes the outbox for `Capture`. Used by its thread alone, but for `status`.

    :param folder: where the outbox is; prepared.
    :param get: a GET of Orthanc's REST API.
    :param queue: the callbacks that wait.
    :param ring: tells the bridge that there are new rows.
    :param host: Orthanc's log.
    :param stable_age: Orthanc's ``StableAge``, seconds.
    """

    def __init__(
        self,
        folder: Folder,
        get: Callable[[str], bytes | str],
        queue: deque[Callback],
        ring: Callable[[], None],
        host: Host,
        stable_age: float,
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
        self._ring = ring
        self._host = host
        self._stable_age = stable_age
        self._repair: Repair | None = None
        self._begun = False
        self._began = time.time()
        self._stop = threading.Event()
        self._outbox: OutboxWriter | None = None
        self._upkeep = Upkeep(folder, host, self._look_up.allow)
        self._backfilling = Backfilling(self._upkeep.backfill, self._look_up)
        self._repeats, self._unanswered = Repeats(time.monotonic), Repeats(time.monotonic)
        self._leaving = threading.Event()
        self._anchored = False
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

    def _well(self) -> None:
        """The outbox could be written, or there is nothing to write."""
        if self._state != "following":
            self._state, self._problem = "following", None
            self._repeats = Repeats(time.monotonic)

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
