"""What a worker counts: never more than names of types, so that no patient's data can be in it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from typing import Final

from orthanc_events_bridge.events.derived import NAMES
from orthanc_events_bridge.moments import seconds_of

#: Upper bounds of the classes of durations, in seconds.
BUCKETS: Final = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0, 1800.0)
#: What events of others, and messages that are none, are counted under.
OTHER: Final = "other"
_NAMES: Final = frozenset(NAMES)
#: How an event can end, and an attempt to publish one; and what that means.
OUTCOMES: Final = {
    "handled": "Events whose handlers have returned.",
    "ignored": "Events that no handler is for.",
    "retried": "Deliveries that are given again, because a handler failed.",
    "dead": "Events that went among the dead letters.",
    "published": "Events that handlers have published, as often as the broker has confirmed them.",
    "publish_failed": "Attempts of handlers to publish an event that have failed.",
}


class Meter:
    """Counts since the start.

    :ivar counts: (one of `OUTCOMES`; short name of the type) → number.
    :ivar in_flight: handlers that run.
    :ivar durations: short name → how many ended within each of `BUCKETS`, and all.
    :ivar seconds: short name → seconds in handlers.
    :ivar waiting: events that wait for a place of retries or dead letters that takes none.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.in_flight = 0
        self.durations: dict[str, list[int]] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._newest = ""
        self._handled = 0.0
        self.waiting = 0

    def count(self, outcome: str, name: str) -> None:
        """One more event has come to this end."""
        self.counts[outcome, _known(name)] += 1

    def begin(self) -> None:
        """A handler begins."""
        self.in_flight += 1

    def end(self, name: str, seconds: float) -> None:
        """It ends, however."""
        self.in_flight -= 1
        name = _known(name)
        found = self.durations.get(name)
        if found is None:
            found = self.durations[name] = [0] * (len(BUCKETS) + 1)
        found[bisect_left(BUCKETS, seconds)] += 1
        self.seconds[name] += seconds

    def handled(self, recorded: str, now: float) -> None:
        """How far behind it is.

        :param recorded: the event's ``recordedtime``; of a retry or replay nothing is to be learned.
        :param now: seconds since the epoch.
        """
        if recorded >= self._newest:  # as text it sorts: RFC 3339, UTC, milliseconds
            self._newest, self._handled = recorded, now

    @property
    def newest(self) -> float | None:
        """When the newest event that is handled was recorded, in seconds since the epoch; none: there is none."""
        return seconds_of(self._newest) if self._newest else None

    @property
    def lag(self) -> float:
        """Seconds from then until it was handled."""
        newest = self.newest
        return 0.0 if newest is None else max(0.0, self._handled - newest)

    def total(self, outcome: str) -> int:
        """Over all types."""
        return sum(number for (kind, _), number in self.counts.items() if kind == outcome)


def _known(name: str) -> str:
    return name if name in _NAMES else OTHER
