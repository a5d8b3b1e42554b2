"""What is there and was never announced: the other direction of repair, behind a log that is not the one of before.

Patients, studies and series that have come since recording began. Orthanc does not keep when something was created; it
does of each instance when it was received, and lists those of a series in the order in which they came. So something is
as old as the first instance that is left of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from orthanc_events_bridge.changes.log import date_to_ms
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.changes.questions import Announced, Orthanc, found_of, is_new
from orthanc_events_bridge.changes.walk import Doubts
from orthanc_events_bridge.errors import PassedOverError

#: Ids of studies in one page of Orthanc's list, and how many of the last page are asked for again: where something is
#: deleted meanwhile, all behind it move up.
_PAGE: Final = 200
_AGAIN: Final = 20
#: Studies that are looked at in one step.
_STUDIES: Final = 10
_BELOW: Final = {"patient": "Studies", "study": "Series", "series": "Instances"}
_LEVEL_BELOW: Final = {"patient": "study", "study": "series", "series": "instance"}


class Strangers:
    """Looks for them, once through Orthanc's list of studies. Part of `orthanc_events_bridge.changes.repair.Repair`.

    :param began: when recording began, milliseconds since the epoch.
    :param place: where an earlier one was; none where there is nothing to look for.
    :ivar registry: what was announced.
    """

    def __init__(
        self,
        registry: Announced,
        orthanc: Orthanc,
        now: Callable[[], float],
        began: int,
        place: int | None,
    ) -> None:
        self.registry = registry
        self._orthanc = orthanc
        self._began = began // 1000 * 1000  # Orthanc's dates have whole seconds
        self._seen = Doubts[str](now)
        self._page: deque[str] = deque()
        self._next = place
        self._began_at = place or 0
        self._deleted = 0
        self._tips: dict[str, int] = {}

    @property
    def active(self) -> bool:
        return self.looking or bool(self._seen)

    @property
    def looking(self) -> bool:
        return self._next is not None or bool(self._page)

    @property
    def place(self) -> int | None:
        """The index of the page that is being looked at: of what is in front of it, everything is told."""
        return self._began_at if self.active else None

    def begin(self) -> None:
        """Look through all of Orthanc's studies."""
        self._page.clear()
        self._next = self._began_at = 0

    def deleted(self) -> None:
        """A study was deleted: what stands behind it in Orthanc's list moves up."""
        self._deleted += 1

    def told(self, resource: str) -> int:
        """The counter of Orthanc's log when a resource was seen whose creation was told now."""
        self._seen.drop(resource)
        return self._tips.pop(resource, 0)

    def look(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Look at some studies; gives those that were announced, with Orthanc's answers."""
        if not self._page and not self._turn_the_page():
            return
        new: list[str] = []
        for study in list(self._page)[:_STUDIES]:
            answer = found_of(self._orthanc, "study", study)
            if answer is not None:
                if date_to_ms(str(answer.get("LastUpdate"))) >= self._began:  # else nothing of it has come since
                    new += [one for one in answer.get("Series", ()) if is_new(self.registry, one)]
                if not is_new(self.registry, study):
                    yield study, answer
        for _ in range(min(_STUDIES, len(self._page))):
            self._page.popleft()
        if new:
            tip = self._orthanc.tip()
            for series in new:
                self._seen.add(series, series, tip)

    def _turn_the_page(self) -> bool:
        if self._next is None or self._seen:  # first tell what the last one has shown
            return False
        start = max(0, self._next - self._deleted - (_AGAIN if self._next else 0))
        self._deleted = 0
        page = self._orthanc.studies(start, _PAGE)
        self._began_at, self._next = start, start + _PAGE if len(page) == _PAGE else None
        self._page.extend(page)
        return bool(page)

    def facts(self, cursor: int, calm: float, limit: int) -> list[Fact]:
        """What some of them are announced with: the series, their study, its patient, in the order of Orthanc's own."""
        facts: dict[str, Fact] = {}
        for series, _, tip in self._seen.settled(cursor, calm)[:limit]:
            try:
                family = self._family(series) if is_new(self.registry, series) else []
            except PassedOverError:  # it can't be told as a whole
                family = []
            if not family:
                self._seen.drop(series)
            for fact in family:
                assert fact.resource is not None
                facts.setdefault(fact.resource, fact)
                self._tips.setdefault(fact.resource, tip)
        return list(facts.values())

    def _family(self, series: str) -> list[Fact]:
        answer = self._orthanc.resource("series", series)
        if answer is None:
            return []
        study = str(answer["ParentStudy"])
        own = self._orthanc.resource("study", study)
        if own is None:
            return []
        patient = str(own["ParentPatient"])
        facts: list[Fact] = []
        for level, one, found, parents in (
            ("series", series, answer, {"study": study, "patient": patient}),
            ("study", study, own, {"patient": patient}),
            ("patient", patient, None, {}),
        ):
            if not is_new(self.registry, one):
                continue
            found = found or self._orthanc.resource(level, one) or {}
            date = str(found.get("LastUpdate") or "")
            if date_to_ms(date) >= self._began and self._came_since(level, found):
                change = f"New{level.capitalize()}"
                facts.append(Fact(change, level, one, date_to_ms(date), None, date, parents, {"inferred": True}))
        return facts

    def _came_since(self, level: str, answer: Mapping[str, Any]) -> bool:
        """Whether it has come since recording began, as far as one can tell by its first instance."""
        while level != "instance":
            below = answer.get(_BELOW[level], ())
            if not below:
                return True
            level = _LEVEL_BELOW[level]
            if level == "instance":
                date = self._orthanc.received(below[0])
                return not date or date_to_ms(date) >= self._began
            answer = self._orthanc.resource(level, below[0]) or {}
        return True
