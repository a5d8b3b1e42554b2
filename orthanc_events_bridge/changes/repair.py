"""What Orthanc never said, told from what it has: stable events and deletions that a stop, a kill or a gap swallowed.

Such facts are marked as inferred (``data.inferred``). The ids of their events are made as those of logged changes are,
with ``inferred`` in place of Seq, and with a date that makes a second inference of the same fact equal:

- a deletion: the Seq of the resource's creation, as text; empty where that was before our time;
- a stable event, a creation: the resource's ``LastUpdate``, as Orthanc spells it; it moves with each instance.

Where a database was put back, what was told before can happen once more, and is another fact then: behind the n-th log
that was not the one of before, the outbox appends ``/n`` to that date.

**Stable.** Orthanc keeps the timers of ``StableAge`` in memory. A resource that had got an instance, and was not told
to be stable, when Orthanc ended has no timer any more; it gets one if another instance comes. So what was growing at
the start, and has got nothing for ``StableAge`` since, is told to be stable, if Orthanc says that it is.

**Deletions.** What was announced and isn't there has been deleted.

**Creations** (`orthanc_events_bridge.changes.strangers`). Where the log was not the one that was read before, what is
there and was never announced is.

While Orthanc runs, its own word on all of these may still be on its way, and nothing must be told twice: what a look
has shown is in doubt until everything that was committed before it is recorded (`Doubts`). Should Orthanc's word come
even later, which takes a callback that was held up for longer than `CALM`, it is dropped (`Repair.news`).

All of it is bounded work: a few questions at a time, from where the last look ended, also across restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from orthanc_events_bridge.changes.log import date_to_ms
from orthanc_events_bridge.changes.looks import Looks, Registry
from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.changes.questions import Orthanc, found_of
from orthanc_events_bridge.changes.strangers import Strangers
from orthanc_events_bridge.changes.walk import CALM, Doubts, Walk

__all__ = ["CALM", "Repair", "deletion"]

#: Questions to Orthanc in one step; 0.1 to 1.4 ms each.
_QUESTIONS: Final = 10
_PAGE: Final = 50
#: Facts at once, so that one transaction stays short.
_FACTS: Final = 200
#: No further looks while so many resources are missing and not told yet.
_MISSING: Final = 1000
#: So many studies are remembered before it is kept how far that has come.
_MET: Final = 500
#: So many inferred facts are remembered, in case Orthanc says them after all.
_REMEMBERED: Final = 10_000
#: Level → the change that says that one is stable.
STABLE: Final = {"series": "StableSeries", "study": "StableStudy", "patient": "StablePatient"}
_ORDER: Final = {"instance": 0, "series": 1, "study": 2, "patient": 3}
_GROWN: Final = ("series", "study", "patient")


def deletion(resource: Resource, at: int) -> Fact:
    """The deletion of a resource that follows from what exists.

    :param at: milliseconds since the epoch.
    """
    date = "" if resource.born is None else str(resource.born)
    return Fact("Deleted", resource.level, resource.id, at, None, date, None, {"inferred": True})


class Repair:
    """One start's repair. Used by capture's thread alone.

    :param registry: what was announced.
    :param orthanc: what Orthanc is asked by.
    :param now: seconds, monotonic.
    :param wall: seconds since the epoch.
    :param stable_age: Orthanc's ``StableAge``, seconds.
    :param began: when recording began, milliseconds since the epoch.
    :param instances: whether deletions of instances are inferred as well: a question for each series.
    :param place: where an earlier run ended, as `place` gave it.
    :ivar remembered: entries of the registry were lost, and so many of Orthanc's studies are remembered again; none
        where nothing was lost.
    :ivar inferred: how many facts were inferred so far, by their change.
    """

    def __init__(
        self,
        registry: Registry,
        orthanc: Orthanc,
        now: Callable[[], float],
        wall: Callable[[], float],
        *,
        stable_age: float,
        began: int = 0,
        instances: bool = False,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self._registry = registry
        self._orthanc = orthanc
        self._now = now
        self._wall = wall
        self._stable_age = stable_age
        self._instances = instances
        self._looks = Looks(registry, orthanc, instances)
        # With instances the series come first, so that those in them are told before them.
        self._levels = ("series", "study", "patient") if instances else ("study", "patient", "series")
        self._due = 0.0
        #: What may be stable without being told so, and since when at least it must have got something for that.
        self._growing: dict[str, tuple[Resource, int]] = {}
        self._resting = Doubts[tuple[str, str]](now)
        place = place or {}
        self._walk = Walk(str(place["place"])) if place.get("place") else None
        self._missing = Doubts[Resource](now)
        self.remembered: int | None = place.get("remembered")
        self._met = Doubts[Resource](now)
        self._next_met = self.remembered or 0
        self._met_enough = self._met_all = False
        #: What is looked for behind another log: received something since then. And what was told meanwhile.
        self._since = 0
        self._calmed: set[str] = set()
        self._strangers = Strangers(registry, orthanc, now, began, place.get("listed"))
        self._told_gone: dict[str, None] = {}
        self._told_there: dict[str, int] = {}
        self._heard: tuple[set[str], set[str]] = (set(), set())
        self.inferred: dict[str, int] = {}

    @property
    def active(self) -> bool:
        """Whether there is something left to do."""
        looking = self._walk or self._strangers.active or self.remembered is not None
        return bool(looking or self._growing or self._resting or self._missing)

    @property
    def place(self) -> dict[str, Any]:
        """What is to be kept over restarts."""
        place = str(self._walk) if self._walk else ""
        return {"place": place, "listed": self._strangers.place, "remembered": self.remembered}

    def begin(self) -> None:
        """Orthanc has started, and everything that it had logged by then is recorded."""
        self._due = self._now() + self._stable_age
        self._growing = {one.id: (one, 0) for one in self._registry.growing()} | self._growing
        self.compare()

    def go_on(self, registry: Registry, remembered: int | None) -> None:
        """What was announced is kept elsewhere now, and perhaps not all of it."""
        self._registry, self.remembered = registry, remembered
        self._looks.registry = self._strangers.registry = registry
        self._met = Doubts[Resource](self._now)
        self._next_met, self._met_enough = remembered or 0, False
        self.compare()

    def compare(self) -> None:
        """Something may have been missed: look for deletions, once around."""
        self._walk = Walk(str(self._walk) if self._walk else f"{self._levels[0]}:")

    def announce(self, since: int = 0) -> None:
        """The log was another one: look for what was never announced, and for deletions.

        :param since: what has received something since then (milliseconds since the epoch), and was not told to be
            stable, may be so; 0 where the callbacks have told it all.
        """
        self._since = since or self._since
        self._strangers.begin()
        self.compare()

    # -- what Orthanc says ---------------------------------------------------------------------------------------------

    def news(self, facts: Iterable[Fact]) -> list[Fact]:
        """Leave out what was inferred already, because Orthanc took very long to say it.

        Once the rest is recorded, `heard` is to be called; until then nothing has changed.
        """
        kept: list[Fact] = []
        gone, there = self._heard = set[str](), set[str]()
        for fact in facts:
            resource = fact.resource or ""
            if fact.change == "Deleted":
                there.add(resource)
                late = resource in self._told_gone and resource not in gone
                gone.add(resource)
                if late and self._registry.find(resource) is None:
                    continue
            elif fact.change.startswith("New") and fact.change != "NewChildInstance":
                gone.add(resource)
                if fact.seq is not None and resource not in there and fact.seq <= self._told_there.get(resource, 0):
                    continue
            kept.append(fact)
        return kept

    def heard(self) -> None:
        """What `news` was asked about last is recorded: Orthanc's word on it has come."""
        gone, there = self._heard
        for resource in gone:
            self._told_gone.pop(resource, None)
        for resource in there:
            self._told_there.pop(resource, None)
        self._heard = set(), set()

    def recorded(self, facts: Iterable[Fact]) -> None:
        """Facts that Orthanc told were recorded: what still grows has a timer again."""
        for fact in facts:
            resource = fact.resource or ""
            if fact.change == "NewInstance" and not fact.extra.get("inferred"):  # else it was there long before
                for level in _GROWN:
                    self._has_timer((fact.parents or {}).get(level, ""))
            elif fact.change in ("NewChildInstance", "Deleted") or fact.change.startswith("Stable"):
                self._has_timer(resource)
                if self._since and fact.change != "NewChildInstance":
                    self._calmed.add(resource)
            if fact.change == "Deleted":
                self._met.drop(resource)
            if fact.change == "Deleted" and fact.level == "study":
                self._strangers.deleted()
                self._next_met = max(0, self._next_met - 1)  # what stands behind it in Orthanc's list moves up

    def _has_timer(self, resource: str) -> None:
        self._growing.pop(resource, None)
        self._resting.drop(resource)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, cursor: int, calm: float) -> list[Fact]:
        """Do a little.

        :param cursor: the last Seq that is recorded.
        :param calm: seconds since the last callback came; none is waiting.
        :return: facts to be recorded now, and then to be handed to `done`; those that are not, come again.
        :raises LogUnavailableError: Orthanc can't answer now; call again, a while later.
        """
        facts = self._told(cursor, calm)
        if not facts:
            if self._growing and self._now() >= self._due:
                self._look_at_growing()
            elif self._strangers.looking:
                self._look_at_listed()
            elif self.remembered is not None:
                self._remember(cursor, calm)
            elif self._walk and len(self._missing) < _MISSING:
                self._look(self._walk)
        return facts

    def _told(self, cursor: int, calm: float) -> list[Fact]:
        """What can be told by now."""
        return self._deletions(cursor, calm) or self._creations(cursor, calm) or self._stable(cursor, calm)

    def done(self, facts: Iterable[Fact]) -> None:
        """What was inferred is recorded."""
        for fact in facts:
            self.inferred[fact.change] = self.inferred.get(fact.change, 0) + 1
            resource = fact.resource or ""
            self._has_timer(resource)
            if fact.change == "Deleted":
                self._missing.drop(resource)
                _remember(self._told_gone, resource, None)
            elif not fact.change.startswith("Stable"):  # a creation; it may well be stable by now
                _remember(self._told_there, resource, self._strangers.told(resource))
                self._growing[resource] = (Resource(fact.level, resource, None, None), 0)

    # -- stable --------------------------------------------------------------------------------------------------------

    def _look_at_growing(self) -> None:
        stable: list[tuple[Resource, str]] = []
        for one, since in list(islice(self._growing.values(), _QUESTIONS)):
            answer = found_of(self._orthanc, one.level, one.id)
            # What isn't there, the walk finds; what isn't stable has a timer, whose end Orthanc will tell.
            if answer is None or not answer.get("IsStable") or date_to_ms(str(answer.get("LastUpdate"))) < since:
                del self._growing[one.id]
            else:
                stable.append((one, str(answer.get("LastUpdate") or "")))
        if stable:
            tip = self._orthanc.tip()
            for one, date in stable:
                del self._growing[one.id]
                self._resting.add(one.id, (one.level, date), tip)

    def _stable(self, cursor: int, calm: float) -> list[Fact]:
        return [
            Fact(STABLE[level], level, one, date_to_ms(date), None, date, None, {"inferred": True})
            for one, (level, date), _ in self._resting.settled(cursor, calm)[:_FACTS]
        ]

    # -- deletions -----------------------------------------------------------------------------------------------------

    def _look(self, walk: Walk) -> None:
        """A few questions about the next ones."""
        missing: list[Resource] = []
        page = self._registry.page(walk.level, walk.after, _QUESTIONS if walk.level == self._levels[0] else _PAGE)
        last = page[-1].id if page else ""
        questions = 0
        for one in page:
            if walk.level == "study":
                missing += self._looks.of_study(one)
            elif walk.level == "series" and self._instances:
                missing += self._looks.of_series(one)
            elif not self._looks.is_loose(one):
                continue
            elif self._looks.is_gone(one):
                missing.append(one)
            questions += 1
            if questions == _QUESTIONS:
                last = one.id
                break
        self._doubt(missing)
        if walk.go_on(last, self._levels):
            self._walk = None

    def _doubt(self, missing: Sequence[Resource]) -> None:
        if missing:
            tip = self._orthanc.tip()
            for one in missing:
                self._missing.add(one.id, one, tip)

    def _deletions(self, cursor: int, calm: float) -> list[Fact]:
        """Of what is missing, that of which nobody can say anything any more."""
        gone: list[Resource] = []
        for resource, one, _ in self._missing.settled(cursor, calm):
            if self._registry.find(resource) != one:  # its deletion was told, or it is there again
                self._missing.drop(resource)
            else:
                gone.append(one)
        gone.sort(key=lambda one: _ORDER[one.level])
        at = int(self._wall() * 1000)
        return [deletion(one, at) for one in gone[:_FACTS]]

    # -- creations -----------------------------------------------------------------------------------------------------

    def _look_at_listed(self) -> None:
        for study, answer in self._strangers.look():
            if not self._since or date_to_ms(str(answer.get("LastUpdate"))) < self._since:
                continue
            known = [("patient", str(answer.get("ParentPatient"))), ("study", study)]
            known += [("series", one) for one in answer.get("Series", ())]
            for level, one in reversed(known):
                if one not in self._calmed:
                    self._growing.setdefault(one, (Resource(level, one, None, None), self._since))
        if not self._strangers.looking:
            self._since = 0
            self._calmed.clear()

    def _creations(self, cursor: int, calm: float) -> list[Fact]:
        return self._strangers.facts(cursor, calm, _QUESTIONS // 2)

    # -- entries that were lost ----------------------------------------------------------------------------------------

    def _remember(self, cursor: int, calm: float) -> None:
        """A few of the studies that Orthanc has, without a word: they may well have been announced.

        Not at once: what was created a moment ago has its creation on its way, which would seem to be a second one.
        """
        found = self._met.settled(cursor, calm)
        self._registry.meet([resource for _, resource, _ in found])
        for resource, _, _ in found:
            self._met.drop(resource)
        if self._met_enough:
            if not self._met:
                self.remembered, self._met_enough = None if self._met_all else self._next_met, False
            return
        page = self._orthanc.studies(self._next_met, _QUESTIONS)
        met: list[Resource] = []
        for study in page:
            answer = found_of(self._orthanc, "study", study)
            if answer is not None:
                patient = str(answer["ParentPatient"])
                met += [Resource("patient", patient, None, None), Resource("study", study, patient, None)]
                met += [Resource("series", str(one), study, None) for one in answer.get("Series", ())]
        if met:
            tip = self._orthanc.tip()
            for one in met:
                self._met.add(one.id, one, tip)
        self._next_met += len(page)
        self._met_all = not page
        self._met_enough = self._met_all or self._next_met - (self.remembered or 0) >= _MET


def _remember(where: dict[str, Any], resource: str, what: Any) -> None:
    where[resource] = what
    if len(where) > _REMEMBERED:
        del where[next(iter(where))]
