"""What Orthanc never said, told from what it has: stable events and deletions that a stop, a kill or a gap swallowed.

Such facts are marked as inferred (``data.inferred``). The ids of their events are made as those of logged changes are,
with ``inferred`` in place of Seq, and with a date that makes a second inference of the same fact equal:

- a deletion: the Seq of the resource's creation, as text; empty where that was before our time;
- a stable event, a creation: the resource's ``LastUpdate``, as Orthanc spells it; it moves with each instance.

**Stable.** Orthanc keeps the timers of ``StableAge`` in memory. A resource that had got an instance, and was not told
to be stable, when Orthanc ended has no timer any more; it gets one if another instance comes. So what was growing at
the start, and has got nothing for ``StableAge`` since, is told to be stable, if Orthanc says that it is.

**Deletions.** What was announced and isn't there has been deleted. While Orthanc runs, the callback of a deletion may
still be on its way, and must not be told twice. Callbacks come in the order of the commits, so a resource that is
missing is a suspect until a logged change was recorded that is younger than the look, or no callback has come for a
while; if nothing was heard of its deletion by then, nothing will be.

**Creations.** Where the log was not the one that was read before, what is there and was never announced is announced:
patients, studies and series that have received something since recording began. They are strangers until then, for the
same reason.

All of it is bounded work: a few questions at a time, from where the last look ended, also across restarts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from orthanc_events_bridge.changes.log import date_to_ms
from orthanc_events_bridge.changes.model import Fact, Resource

#: Seconds without any callback, behind which a deletion that was not heard of never will be.
CALM: Final = 2.0
#: Questions to Orthanc in one step; 0.1 to 1.4 ms each.
_QUESTIONS: Final = 10
_PAGE: Final = 50
_STABLE: Final = {"series": "StableSeries", "study": "StableStudy", "patient": "StablePatient"}
_ORDER: Final = {"instance": 0, "series": 1, "study": 2, "patient": 3}
_GROWN: Final = ("series", "study", "patient")


class Registry(Protocol):
    """What was announced (`orthanc_events_bridge.resources.Resources`)."""

    def find(self, resource: str) -> Resource | None: ...
    def below(self, resource: Resource) -> list[Resource]: ...
    def page(self, level: str, after: str, limit: int) -> list[Resource]: ...
    def instances(self, after: str, limit: int) -> tuple[list[Resource], str]: ...
    def growing(self) -> list[Resource]: ...


def deletion(resource: Resource, at: int) -> Fact:
    """The deletion of a resource that follows from what exists.

    :param at: milliseconds since the epoch.
    """
    date = "" if resource.born is None else str(resource.born)
    return Fact("Deleted", resource.level, resource.id, at, None, date, None, {"inferred": True})


class Repair:
    """One start's repair. Used by capture's thread alone.

    :param registry: what was announced.
    :param ask: Orthanc's answer about a resource, by level and id; none when it is gone.
    :param tip: the counter of Orthanc's log.
    :param studies: so many ids of studies that Orthanc has, from an index on.
    :param now: seconds, monotonic.
    :param wall: seconds since the epoch.
    :param stable_age: Orthanc's ``StableAge``, seconds.
    :param began: when recording began, milliseconds since the epoch.
    :param instances: whether deletions of instances are inferred as well: a question for each that Orthanc has.
    :param place: where an earlier walk ended, as `place` gave it.
    :ivar inferred: how many facts were inferred so far, by their change.
    """

    def __init__(
        self,
        registry: Registry,
        ask: Callable[[str, str], Mapping[str, Any] | None],
        tip: Callable[[], int],
        studies: Callable[[int, int], Sequence[str]],
        now: Callable[[], float],
        wall: Callable[[], float],
        *,
        stable_age: float,
        began: int = 0,
        instances: bool = False,
        place: str = "",
    ) -> None:
        self._registry = registry
        self._ask = ask
        self._tip = tip
        self._studies = studies
        self._began = began // 1000 * 1000  # LastUpdate has whole seconds
        self._now = now
        self._wall = wall
        self._stable_age = stable_age
        self._levels = ("instance", "study", "patient", "series") if instances else ("study", "patient", "series")
        self._due = 0.0
        self._growing: dict[str, Resource] = {}
        self._walk = _Walk(place) if place else None
        self._suspects: dict[str, tuple[Resource, int, float]] = {}
        self._listed: int | None = None
        self._strangers: dict[str, tuple[str, int, float]] = {}
        self.inferred: dict[str, int] = {}

    @property
    def active(self) -> bool:
        """Whether there is something left to do."""
        looking = self._walk or self._listed is not None
        return bool(looking or self._growing or self._suspects or self._strangers)

    @property
    def place(self) -> str:
        """Where the walk is, to be kept over restarts; empty when it is over."""
        return str(self._walk) if self._walk else ""

    def begin(self) -> None:
        """Orthanc has started, and everything that it had logged by then is recorded."""
        self._due = self._now() + self._stable_age
        self._growing = {one.id: one for one in self._registry.growing()}
        self.compare()

    def compare(self) -> None:
        """Something may have been missed: look for deletions, once around."""
        self._walk = _Walk(str(self._walk) if self._walk else f"{self._levels[0]}:")

    def announce(self) -> None:
        """The log was another one: look for what was never announced, and for deletions."""
        self._listed = 0
        self.compare()

    def recorded(self, facts: Iterable[Fact]) -> None:
        """Facts that Orthanc told were recorded: what still grows has a timer again."""
        if not self._growing:
            return
        for fact in facts:
            if fact.change == "NewInstance" and not fact.extra.get("inferred"):  # else it was there long before
                for level in _GROWN:
                    self._growing.pop((fact.parents or {}).get(level, ""), None)
            elif fact.change == "NewChildInstance" or fact.change.startswith("Stable"):
                self._growing.pop(fact.resource or "", None)

    def step(self, cursor: int, calm: float) -> list[Fact]:
        """Do a little.

        :param cursor: the last Seq that is recorded.
        :param calm: seconds since the last callback came; none is waiting.
        :return: facts to be recorded now, and then to be handed to `done`; those that are not, come again.
        :raises LogUnavailableError: Orthanc can't answer now; call again.
        """
        facts = self._confirmed(cursor, calm) or self._creations(cursor, calm) or self._stable()
        if not facts and self._listed is not None:
            self._list()
        elif not facts and self._walk:
            self._look()
        return facts

    def done(self, facts: Iterable[Fact]) -> None:
        """What was inferred is recorded."""
        for fact in facts:
            self.inferred[fact.change] = self.inferred.get(fact.change, 0) + 1
            resource = fact.resource or ""
            if fact.change == "Deleted":
                self._suspects.pop(resource, None)
            elif fact.change.startswith("Stable"):
                self._growing.pop(resource, None)
            else:  # a creation; it may well be stable by now
                self._strangers.pop(resource, None)
                self._growing[resource] = Resource(fact.level, resource, None, None)

    # -- stable --------------------------------------------------------------------------------------------------------

    def _stable(self) -> list[Fact]:
        if not self._growing or self._now() < self._due:
            return []
        facts: list[Fact] = []
        for one in list(self._growing.values())[:_QUESTIONS]:
            answer = self._ask(one.level, one.id)
            if answer is None or not answer.get("IsStable"):
                # What isn't there, the walk finds; what isn't stable has a timer, whose end Orthanc will tell.
                del self._growing[one.id]
                continue
            date = str(answer.get("LastUpdate") or "")
            extra = {"inferred": True}
            facts.append(Fact(_STABLE[one.level], one.level, one.id, date_to_ms(date), None, date, None, extra))
        return facts

    # -- deletions -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """A few questions about the next ones."""
        walk = self._walk
        assert walk is not None
        missing: list[Resource] = []
        if walk.level == "instance":
            page, last = self._registry.instances(walk.after, _QUESTIONS * 4)
        else:
            page = self._registry.page(walk.level, walk.after, _QUESTIONS if walk.level == "study" else _PAGE)
            last = page[-1].id if page else ""
        questions = 0
        for one in page:
            if walk.level == "study":
                missing += self._of_study(one)
            elif walk.level == "instance" or self._is_loose(one):
                questions += 1
                if self._ask(one.level, one.id) is None:
                    missing.append(one)
            if questions == _QUESTIONS:
                last = one.id
                break
        if missing:
            tip, now = self._tip(), self._now()
            for one in missing:
                self._suspects.setdefault(one.id, (one, tip, now))
        if walk.go_on(last, self._levels):
            self._walk = None

    def _of_study(self, study: Resource) -> list[Resource]:
        answer = self._ask("study", study.id)
        below = self._registry.below(study)
        if answer is not None:
            there = set(answer.get("Series", ()))
            return [one for one in below if one.id not in there]
        missing = [*below, study]
        patient = self._registry.find(study.parent) if study.parent else None
        if patient is not None and self._ask("patient", patient.id) is None:
            missing.append(patient)
        return missing

    def _is_loose(self, one: Resource) -> bool:
        """Whether the walk over the studies says nothing of it."""
        if one.level == "patient":
            return not self._registry.below(one)
        return one.parent is None or self._registry.find(one.parent) is None

    def _confirmed(self, cursor: int, calm: float) -> list[Fact]:
        """The deletions of the suspects of which nobody can say anything any more."""
        if not self._suspects:
            return []
        at = int(self._wall() * 1000)
        gone: list[Resource] = []
        for one, tip, since in list(self._suspects.values()):
            if self._registry.find(one.id) != one:  # its deletion was told, or it is there again
                del self._suspects[one.id]
            elif self._is_told(tip, since, cursor, calm):
                gone.append(one)
        gone.sort(key=lambda one: _ORDER[one.level])
        return [deletion(one, at) for one in gone]

    def _is_told(self, tip: int, since: float, cursor: int, calm: float) -> bool:
        """Whether everything that was committed before a look is recorded by now."""
        return cursor > tip or (calm >= CALM and self._now() - since >= CALM)

    # -- creations -----------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        """A page of the studies that Orthanc has."""
        assert self._listed is not None
        page = self._studies(self._listed, _QUESTIONS)
        strangers: list[tuple[str, str]] = []
        for study in page:
            if self._is_new(study):
                strangers.append(("study", study))
                continue
            series = (self._ask("study", study) or {}).get("Series", ())
            strangers += [("series", one) for one in series if self._is_new(one)]
        if strangers:
            tip, now = self._tip(), self._now()
            for level, one in strangers:
                self._strangers.setdefault(one, (level, tip, now))
        self._listed = self._listed + len(page) if page else None

    def _is_new(self, resource: str) -> bool:
        """Whether nobody has said that it was created."""
        known = self._registry.find(resource)
        return known is None or known.born is None

    def _creations(self, cursor: int, calm: float) -> list[Fact]:
        """What the next stranger is announced with: the series, then their study, then its patient, as by Orthanc."""
        for one, (level, tip, since) in list(self._strangers.items()):
            if self._is_new(one):
                if not self._is_told(tip, since, cursor, calm):
                    continue
                answer = self._ask(level, one)
                facts = self._family(level, one, answer) if answer is not None else []
                if facts:
                    return facts
            del self._strangers[one]
        return []

    def _family(self, level: str, resource: str, answer: Mapping[str, Any]) -> list[Fact]:
        study = resource if level == "study" else str(answer["ParentStudy"])
        own = answer if level == "study" else self._ask("study", study)
        if own is None:
            return []
        patient = str(own["ParentPatient"])
        family = [
            ("series", one, {"study": study, "patient": patient})
            for one in (own.get("Series", ()) if level == "study" else (resource,))
        ]
        family += [("study", study, {"patient": patient}), ("patient", patient, {})]
        facts: list[Fact] = []
        for at_level, one, parents in family:
            if not self._is_new(one):
                continue
            found = own if one == study else self._ask(at_level, one)
            date = str((found or {}).get("LastUpdate") or "")
            if date_to_ms(date) >= self._began:  # what has got nothing since was there before
                change = f"New{at_level.capitalize()}"
                extra = {"inferred": True}
                facts.append(Fact(change, at_level, one, date_to_ms(date), None, date, parents, extra))
        return facts


class _Walk:
    """Once around all levels and ids, from somewhere back to there."""

    def __init__(self, place: str) -> None:
        self.level, _, self.after = place.partition(":")
        self._began = (self.level, self.after)
        self._wrapped = not self.after
        self._left: deque[str] | None = None

    def __str__(self) -> str:
        return f"{self.level}:{self.after}"

    def go_on(self, last: str, levels: Sequence[str]) -> bool:
        """Move behind an id, or from the end of a level to the next; true when it has been everywhere."""
        if self._left is None:  # the other levels, and at last what lies in front of where it began
            at = levels.index(self.level) if self.level in levels else 0
            self.level = levels[at]
            self._left = deque([*levels[at + 1 :], *levels[:at], *([] if self._wrapped else [self.level])])
        if last:
            self.after = last
            began = self.level == self._began[0] and not self._left and not self._wrapped
            return began and last >= self._began[1]
        if not self._left:
            return True
        self.level, self.after = self._left.popleft(), ""
        return False
