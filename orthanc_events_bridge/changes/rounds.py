"""Repair where nobody calls back: rounds for ever, and stable events by Orthanc's word alone.

Without callbacks a deletion is seen only by looking, so another round begins some time after the last has ended: a
question for each study, which may take hours. Studies that are gone as a whole are found sooner, by Orthanc's list of
them, as often. And
whether Orthanc was started again meanwhile is not known, nor its ``StableAge``. So whatever has been growing for a
while is asked for: if Orthanc calls it stable, its event is on its way, or will never come. It is taken as swallowed
when everything that Orthanc has logged for some seconds since is recorded, and Orthanc still says so. (It takes a
resource from its list of the unstable first, and writes the row right behind that.)

Nobody tells either which instances went with a series: they are told with it, if those of instances are wanted at all,
and forgotten in any case. For that, the registry has to keep its index of instances.

To be stepped only when the log has just been read to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from orthanc_events_bridge.changes.listing import Listing
from orthanc_events_bridge.changes.log import date_to_ms
from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.changes.questions import found_of
from orthanc_events_bridge.changes.repair import STABLE, Repair

#: Seconds within which the row of a stable event is in the log, once Orthanc calls its resource stable.
SURE: Final = 5.0
#: Questions in one step, as `Repair` does.
_QUESTIONS: Final = 10


class Rounds(Repair):
    """Used by capture's thread alone.

    :param every: seconds between the end of a round and the beginning of the next, and between two quick looks; 0: none
        begins by itself.
    :param sure: seconds within which a row that is written is read, once Orthanc calls its resource stable.
    :param stable_age: how long something may grow before it is asked for, seconds.
    :param asked: as of `Repair`; and `more`.
    :ivar rounds: how many have ended.
    """

    def __init__(self, *asked: Any, every: float, sure: float = SURE, stable_age: float, **more: Any) -> None:
        super().__init__(*asked, stable_age=stable_age, **more)
        self._every = every
        self._sure = sure
        self.rounds = 0
        self._next_round = self._now() + every
        self._next_listing = self._next_round
        self._listing: Listing | None = None
        #: Announced studies that were not in the list.
        self._doubtful: deque[Resource] = deque()
        self._next_look = self._now()
        #: What was growing at the last look.
        self._grown: set[str] = set()
        self._to_ask: deque[Resource] = deque()
        #: What Orthanc calls stable and was not told to be: since when.
        self._calm: dict[str, tuple[Resource, float]] = {}

    @property
    def active(self) -> bool:
        looking = self._listing or self._doubtful or self._to_ask or self._calm
        due = self._round_due or self._listing_due or self._now() >= self._next_look
        return super().active or bool(looking) or due

    @property
    def suspects(self) -> int:
        """How many resources are missing, and not told yet to be deleted."""
        return len(self._missing)

    @property
    def _round_due(self) -> bool:
        return bool(self._every) and self._now() >= self._next_round

    @property
    def _listing_due(self) -> bool:
        return bool(self._every) and self._now() >= self._next_listing

    def begin(self) -> None:
        self._begin_listing()
        self.compare()

    def announce(self, since: int = 0) -> None:
        """Of what may be stable, Orthanc is asked in any case."""
        super().announce()

    def step(self, cursor: int, calm: float) -> list[Fact]:
        if self._listing_due:
            self._next_listing = float("inf")
            self._begin_listing()
        if self._round_due:
            self._next_round = float("inf")
            self.compare()
        if self._listing or self._doubtful:
            facts = self._told(cursor, calm)
            if not facts:
                self._look_quickly()
            return facts
        before = self._walk
        facts = super().step(cursor, calm)
        if before is not None and self._walk is None:
            self.rounds += 1
            self._next_round = self._now() + self._every
        return facts

    def _begin_listing(self) -> None:
        self._listing = Listing(self._orthanc.studies, lambda after, limit: self._registry.page("study", after, limit))

    def _look_quickly(self) -> None:
        if self._doubtful:
            study = self._doubtful[0]
            missing = self._looks.of_study(study)
            self._doubtful.popleft()
            self._doubt(missing)
        elif self._listing is not None:
            found = self._listing.step()
            if found is None:
                self._listing, self._next_listing = None, self._now() + self._every
            else:
                self._doubtful.extend(found)

    # -- stable --------------------------------------------------------------------------------------------------------

    def _stable(self, cursor: int, calm: float) -> list[Fact]:
        now = self._now()
        if now >= self._next_look:
            growing = self._registry.growing()
            self._to_ask = deque(one for one in growing if one.id in self._grown and one.id not in self._calm)
            self._grown = {one.id for one in growing}
            self._next_look = now + self._stable_age
        for _ in range(min(_QUESTIONS, len(self._to_ask))):
            one = self._to_ask[0]
            answer = found_of(self._orthanc, one.level, one.id)
            self._to_ask.popleft()
            if answer is not None and answer.get("IsStable"):
                self._calm[one.id] = one, now
        due = [one for one, since in self._calm.values() if now - since >= self._sure][:_QUESTIONS]
        if not due:
            return []
        growing_now = {one.id for one in self._registry.growing()}
        facts: list[Fact] = []
        for one in due:
            found = found_of(self._orthanc, one.level, one.id) if one.id in growing_now else None
            if found is None or not found.get("IsStable"):
                del self._calm[one.id]
                continue
            date = str(found.get("LastUpdate") or "")
            facts.append(
                Fact(STABLE[one.level], one.level, one.id, date_to_ms(date), None, date, None, {"inferred": True})
            )
        return facts

    def done(self, facts: Iterable[Fact]) -> None:
        facts = list(facts)
        super().done(facts)
        self._growing.clear()  # what is growing, the registry says
        for fact in facts:
            self._calm.pop(fact.resource or "", None)
            if fact.change == "Deleted" and fact.level == "series" and fact.resource:
                self._registry.forget(self._registry.members(Resource("series", fact.resource, None, None)))
