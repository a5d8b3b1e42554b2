"""A backfill that was asked for on the command line: begun, gone on with after a restart, or ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from orthanc_events_bridge.changes.backfill import LEVELS, Backfill, Request
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.lookup import Lookup

#: The part of the outbox's limit that a backfill may fill, so that it never stands in the way of what is new.
_ROOM: Final = 0.5


class Backfilling:
    """Used by capture's thread alone.

    :param asked: what the bridge has last been asked for; empty where that is nothing.
    :param look_up: what Orthanc is asked by.
    """

    def __init__(self, asked: Callable[[], Mapping[str, Any]], look_up: Lookup) -> None:
        self._asked = asked
        self._look_up = look_up
        self._backfill: Backfill | None = None
        self._kept: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        """What is kept of the last one, and shown; empty where there never was one."""
        return self._backfill.status() if self._backfill is not None else self._kept

    @property
    def active(self) -> bool:
        """Whether there is something left to do."""
        return self._backfill is not None and not self._backfill.over

    def look(self, outbox: OutboxWriter) -> None:
        """Has anything been asked for? To be called now and then."""
        self._kept = self._kept or outbox.noted("backfill")
        asked, last = self._asked(), self.status()
        number = asked.get("number")
        goes_on = self._backfill is None and last.get("state") == "running"  # it was, when Orthanc ended
        if number is None or (number == last.get("number") and not goes_on):
            return
        if asked.get("recorder") != outbox.recorder:  # it was for one that is lost, and was perhaps done long ago
            return
        if asked.get("stop"):
            ended = (
                last
                if last.get("state") == "running"
                else Backfill(Request(number), outbox.resources, self._look_up).status()
            )
            self._kept = {**ended, "number": number, "state": "stopped"}
            self._backfill = None
            return
        level = asked.get("level")
        request = Request(
            number,
            level if level in LEVELS else "study",
            int(asked.get("since") or 0),
            bool(asked.get("dry_run")),
        )
        announced = last.get("announced") if last.get("number") == number else None
        self._backfill = Backfill(request, outbox.resources, self._look_up, announced)

    def step(self, outbox: OutboxWriter, cursor: int, limit: int) -> list[Fact]:
        """Do a little, if there is room for it: `Backfill.step`.

        :param limit: of the outbox, in bytes.
        """
        if self._backfill is None or outbox.bytes_used() > limit * _ROOM:
            return []
        return self._backfill.step(cursor)

    def recorded(self, facts: Iterable[Fact]) -> None:
        """See `Backfill.recorded`."""
        if self._backfill is not None:
            self._backfill.recorded(facts)

    def done(self, facts: Iterable[Fact]) -> None:
        """See `Backfill.done`."""
        if self._backfill is not None:
            self._backfill.done(facts)
