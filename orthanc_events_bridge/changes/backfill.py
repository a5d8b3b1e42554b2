"""What Orthanc had before anyone recorded it, announced when a person asks for it.

The walk goes over Orthanc's studies, and announces of each what nobody has announced: from the patients down to the
level that was asked for, in the order in which Orthanc would have: instances, then their series, the study, the
patient. What Orthanc calls stable is told to be that, too. All of these facts are marked as inferred, and the ids of
their events are made as `orthanc_events_bridge.changes.repair` says, so that one that is announced again, because the
outbox was lost, is the same event.

While Orthanc runs, the callback of a creation may still be on its way, which must not be told twice. Every creation
has a number in Orthanc's log, so a resource that was seen, and is not known when all numbers of that moment are
recorded, was there before.

What was announced is in the registry of resources from then on, so that a walk that was interrupted, or a second one,
announces nothing twice; it begins anew and soon comes to where it was. What Orthanc can't describe is passed over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from orthanc_events_bridge.changes.log import date_to_ms
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.changes.questions import Announced, Orthanc, found_of, is_new
from orthanc_events_bridge.errors import PassedOverError

#: From the top; a level stands for all in front of it too.
LEVELS: Final = ("patient", "study", "series", "instance")
#: Questions to Orthanc in one step; 0.1 to 1.4 ms each.
_QUESTIONS: Final = 10
#: Studies in one list of them, and how many of the one before it are in it again: where some were deleted that nobody
#: has heard of yet, the others have moved up.
_PAGE: Final = 200
_OVERLAP: Final = 100
#: So many resources that were seen wait for the log at most.
_WAITING: Final = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """What a person has asked for.

    :param number: of the request.
    :param level: down to which level.
    :param since: only what got something since then, milliseconds since the epoch.
    :param dry_run: count it, and announce nothing.
    """

    number: int
    level: str = "study"
    since: int = 0
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class _Seen:
    level: str
    resource: str
    parents: dict[str, str]
    tip: int  # the log's counter then


class Backfill:
    """One request. Used by capture's thread alone.

    :param announced: by an interrupted walk for the same request, by change.
    :ivar over: whether everything was looked at, and announced.
    :ivar looked: how many studies were looked at.
    :ivar announced: how many facts, by change; with ``dry_run`` only counted.
    """

    def __init__(
        self,
        request: Request,
        registry: Announced,
        orthanc: Orthanc,
        announced: Mapping[str, int] | None = None,
    ) -> None:
        self._request = request
        self._registry = registry
        self._orthanc = orthanc
        self._levels = LEVELS[: LEVELS.index(request.level) + 1]
        self._walk: Iterator[None] | None = None
        self._index = 0  # in Orthanc's list of studies
        self._recent: deque[str] = deque(maxlen=2 * _PAGE)  # the last ones that were looked at
        self._waiting: deque[_Seen] = deque()
        self._ids: set[str] = set()  # of those that wait; in a dry run, of counted patients too, who come again
        self._ended = False
        self._studies: int | None = None
        self.looked = 0
        self.announced = {} if request.dry_run else dict(announced or {})

    @property
    def over(self) -> bool:
        return self._ended and not self._waiting

    def status(self) -> dict[str, Any]:
        """What is kept of it, and shown."""
        request = self._request
        return {
            "number": request.number,
            "state": "done" if self.over else "running",
            "level": request.level,
            "since": request.since,
            "dry_run": request.dry_run,
            "studies": self._studies,
            "looked": self.looked,
            "announced": dict(self.announced),
        }

    def recorded(self, facts: Iterable[Fact]) -> None:
        """Facts that Orthanc told were recorded: what was deleted is not announced, and Orthanc's list is shorter."""
        for fact in facts:
            if fact.change != "Deleted":
                continue
            if fact.level == "study":
                self._index -= 1
            if fact.resource in self._ids:
                self._waiting = deque(one for one in self._waiting if one.resource != fact.resource)
                self._ids.discard(fact.resource)

    def step(self, cursor: int) -> list[Fact]:
        """Do a little.

        :param cursor: the last Seq that is recorded.
        :return: facts to be recorded now, and then to be handed to `done`; those that are not, come again.
        :raises LogUnavailableError: Orthanc can't answer now; call again.
        """
        facts = self._announce(cursor)
        if not facts and not self._ended and len(self._waiting) < _WAITING:
            self._look()
        return facts

    def done(self, facts: Iterable[Fact]) -> None:
        """What was inferred is recorded."""
        for fact in facts:
            self._count(fact)
            while self._waiting and self._waiting[0].resource == fact.resource:
                self._forget()

    def _count(self, fact: Fact) -> None:
        self.announced[fact.change] = self.announced.get(fact.change, 0) + 1

    def _forget(self) -> None:
        seen = self._waiting.popleft()
        if seen.level != "patient" or not self._request.dry_run:
            self._ids.discard(seen.resource)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """A few questions about the next ones."""
        if self._studies is None:
            self._studies = self._orthanc.count_studies()
        if self._walk is None:
            self._walk = self._studies_of_orthanc()
        try:
            for _ in range(_QUESTIONS):
                next(self._walk)
        except StopIteration:
            self._ended = True
        except BaseException:
            self._walk = None  # it ended with the error; the next one begins with the same page
            raise

    def _studies_of_orthanc(self) -> Iterator[None]:
        """The walk: it stops after each question."""
        while True:
            at = self._index
            begin = max(0, at - _OVERLAP)
            page = self._orthanc.studies(begin, _PAGE)
            yield
            for study in page:
                if study not in self._recent:
                    with suppress(PassedOverError):
                        yield from self._look_at(study)
                    self._recent.append(study)
                    self.looked += 1
            self._index += begin + len(page) - at
            if len(page) < _PAGE:
                return

    def _look_at(self, study: str) -> Iterator[None]:
        known = self._registry.find(study)
        if self._request.level in ("patient", "study") and known is not None and known.parent is not None:
            wanted = [known.parent, study][: len(self._levels)]
            if not any(is_new(self._registry, one) for one in wanted):
                return
        answer = self._orthanc.resource("study", study)
        yield
        if answer is None:
            return
        patient, found = str(answer["ParentPatient"]), []
        above = {"study": study, "patient": patient}
        for series in answer.get("Series", ()) if "series" in self._levels else ():
            if "instance" in self._levels:
                below = found_of(self._orthanc, "series", series) or {}
                yield
                found += [("instance", one, {"series": series, **above}) for one in below.get("Instances", ())]
            found.append(("series", series, above))
        if "study" in self._levels:
            found.append(("study", study, {"patient": patient}))
        found.append(("patient", patient, {}))
        new = [one for one in found if is_new(self._registry, one[1]) and one[1] not in self._ids]
        if new:
            tip = self._orthanc.tip()
            self._waiting.extend(_Seen(*one, tip) for one in new)
            self._ids.update(resource for _, resource, _ in new)

    # -- announcing ----------------------------------------------------------------------------------------------------

    def _announce(self, cursor: int) -> list[Fact]:
        """The facts about the next of those that nobody else will tell of any more."""
        facts: list[Fact] = []
        ready = [one for one in list(self._waiting)[:_QUESTIONS] if one.tip <= cursor]
        for seen in ready:
            told = self._facts(seen) if is_new(self._registry, seen.resource) else []
            if told and not self._request.dry_run:
                facts += told
                continue
            if facts:  # those in front of it first
                break
            for fact in told:
                self._count(fact)
            self._forget()
        return facts

    def _facts(self, seen: _Seen) -> list[Fact]:
        answer: Mapping[str, Any] = {}
        date = None
        with suppress(PassedOverError):
            if seen.level == "instance":
                date = self._orthanc.received(seen.resource)
            elif (found := self._orthanc.resource(seen.level, seen.resource)) is not None:
                answer, date = found, str(found.get("LastUpdate") or "")
        if date is None or date_to_ms(date) < self._request.since:
            return []
        name, at, extra = seen.level.capitalize(), date_to_ms(date), {"inferred": True}
        facts = [Fact(f"New{name}", seen.level, seen.resource, at, None, date, seen.parents, dict(extra))]
        if answer.get("IsStable"):  # else Orthanc will tell
            facts.append(Fact(f"Stable{name}", seen.level, seen.resource, at, None, date, seen.parents, dict(extra)))
        return facts
