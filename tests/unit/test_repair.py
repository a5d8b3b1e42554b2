"""What follows from what Orthanc has: stable events, deletions and creations that nobody told."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.changes.repair import CALM, Repair
from orthanc_events_bridge.errors import LogUnavailableError, PassedOverError
from orthanc_events_bridge.resources import SCHEMA, Resources

DATE = "20261124T080000"
AT = 1795507200000


R = TypeVar("R", bound=Repair)


class World:
    """An Orthanc, what was announced of it, and a clock."""

    def __init__(self) -> None:
        db = sqlite3.connect(":memory:", isolation_level=None)
        db.executescript(SCHEMA)
        self.registry = Resources(db)
        self.there: dict[str, dict[str, Any]] = {}
        self.stable = True
        self.seq = 0
        self.time = 0.0
        self.broken = False
        self.mute: set[str] = set()
        self.hidden = False
        self.asked = 0
        self.dates: dict[str, str] = {}

    def store(self, patient: str, study: str, series: str, instance: str, *, told: bool = True) -> list[Fact]:
        """Orthanc stores an instance; its facts."""
        facts = []
        parents = {"series": series, "study": study, "patient": patient}
        levels = {"instance": instance, **parents}
        for level, one in levels.items():
            if one not in self.there:
                above = dict(list(levels.items())[list(levels).index(level) + 1 :])
                self.seq += 1
                change = f"New{level.capitalize()}"
                facts.append(Fact(change, level, one, AT, self.seq, DATE, above))
                self.there[one] = {"level": level, "LastUpdate": DATE, "Series": [], "Instances": [], "Studies": []}
        self.there[study]["Series"] = sorted({*self.there[study]["Series"], series})
        self.there[series]["Instances"] = sorted({*self.there[series]["Instances"], instance})
        self.there[patient]["Studies"] = sorted({*self.there[patient]["Studies"], study})
        self.there[study]["ParentPatient"] = patient
        self.there[series]["ParentStudy"] = study
        if told:
            self.record(facts)
        return facts

    def record(self, facts: Sequence[Fact]) -> list[Fact]:
        """What the outbox does; all that it records."""
        recorded = []
        for index, given in enumerate(facts):
            for fact in (*self.registry.lost_deletions(facts, index), given):
                self.registry.remember(fact, frozenset(), lambda level, resource: None)
                recorded.append(fact)
        return recorded

    def resource(self, level: str, resource: str) -> dict[str, Any] | None:
        self.asked += 1
        if self.broken:
            raise LogUnavailableError("busy")
        if resource in self.mute:
            raise PassedOverError("Orthanc can't be asked for it")
        found = self.there.get(resource)
        assert found is None or found["level"] == level
        return {**found, "IsStable": self.stable} if found else None

    def repair(self, **options: Any) -> Repair:
        return self.make(Repair, **options)

    def studies(self, since: int, limit: int) -> list[str]:
        if self.hidden:
            return []
        return [one for one, found in self.there.items() if found["level"] == "study"][since : since + limit]

    def count_studies(self) -> int:
        return len(self.studies(0, len(self.there)))

    def received(self, instance: str) -> str | None:
        if instance in self.mute:
            raise PassedOverError("Orthanc can't be asked for it")
        return self.dates.get(instance, DATE)

    def tip(self) -> int:
        if self.broken:
            raise LogUnavailableError("busy")
        return self.seq

    def make(self, kind: type[R], **options: Any) -> R:
        return kind(
            self.registry,
            self,
            lambda: self.time,
            lambda: AT / 1000,
            **{"stable_age": 60.0, **options},
        )

    def run(self, repair: Repair, *, cursor: int = 0, calm: float = 100.0) -> list[tuple[str, str]]:
        """Step until there is nothing left to do but wait; what was inferred, as (change, id)."""
        said: list[tuple[str, str]] = []
        for _ in range(200):
            self.time += 0.1
            facts = repair.step(cursor, calm)
            self.record(facts)
            repair.done(facts)
            said += [(fact.change, str(fact.resource)) for fact in facts]
        return said


@pytest.fixture
def world() -> World:
    return World()


def first(world: World, repair: Repair) -> list[Fact]:
    """What is inferred first, not recorded yet."""
    for _ in range(100):
        world.time += 0.1
        if facts := repair.step(0, 100.0):
            return facts
    return []


# -- stable ------------------------------------------------------------------------------------------------------------


def test_what_was_growing_at_the_end_is_stable_after_stable_age(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair()
    repair.begin()
    assert world.run(repair) == []  # 20 seconds
    world.time = 60
    wanted = [("StableSeries", "e"), ("StableStudy", "s"), ("StablePatient", "p")]
    assert world.run(repair) == wanted
    assert not repair.active
    assert repair.inferred == {"StableSeries": 1, "StableStudy": 1, "StablePatient": 1}
    again = world.repair()
    again.begin()
    world.time = 200
    assert world.run(again) == []


def test_an_inferred_stable_event_is_the_same_whoever_infers_it(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair(stable_age=0)
    repair.begin()
    one, other = first(world, repair), first(world, repair)
    assert one == other
    assert [(fact.at, fact.seq, fact.date, fact.extra) for fact in one] == [(AT, None, DATE, {"inferred": True})] * 3


@pytest.mark.parametrize("change", ["NewInstance", "NewChildInstance", "StableStudy"])
def test_what_is_heard_of_again_has_a_timer_of_orthancs(world: World, change: str) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair(stable_age=0)
    repair.begin()
    parents = {"series": "e", "study": "s", "patient": "p"}
    resource = "j" if change == "NewInstance" else "s"
    level = "instance" if change == "NewInstance" else "study"
    repair.recorded([Fact(change, level, resource, AT, 9, DATE, parents)])
    told = {resource for _, resource in world.run(repair)}
    assert told == (set() if change == "NewInstance" else {"e", "p"})


def test_an_instance_that_a_backfill_announces_starts_no_timer(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair(stable_age=0)
    repair.begin()
    parents = {"series": "e", "study": "s", "patient": "p"}
    repair.recorded([Fact("NewInstance", "instance", "old", AT, None, DATE, parents, {"inferred": True})])
    assert {resource for _, resource in world.run(repair)} == {"e", "s", "p"}


def test_what_orthanc_does_not_call_stable_is_left_to_it(world: World) -> None:
    world.store("p", "s", "e", "i")
    world.stable = False
    repair = world.repair(stable_age=0)
    repair.begin()
    assert world.run(repair) == []
    assert not repair.active


def test_a_stable_event_that_was_told_is_not_inferred(world: World) -> None:
    world.store("p", "s", "e", "i")
    world.record([Fact("StableSeries", "series", "e", AT, 5, DATE), Fact("StableStudy", "study", "s", AT, 6, DATE)])
    repair = world.repair(stable_age=0)
    repair.begin()
    assert world.run(repair) == [("StablePatient", "p")]


def test_nothing_is_forgotten_while_orthanc_can_not_answer(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair(stable_age=0)
    repair.begin()
    world.broken = True
    for _ in range(3):
        with pytest.raises(LogUnavailableError):
            repair.step(0, 0)
    world.broken = False
    assert len(world.run(repair)) == 3


def test_what_could_not_be_recorded_comes_again(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair(stable_age=0)
    repair.begin()
    assert first(world, repair) == first(world, repair) != []


def test_a_stable_event_on_its_way_is_not_told_twice(world: World) -> None:
    """Orthanc calls it stable, and its own event, or that of an instance, has only not been heard of yet."""
    world.store("p", "s", "e", "i")
    repair = world.repair(stable_age=0)
    repair.begin()
    assert world.run(repair, cursor=world.seq, calm=0.0) == []
    heard = [Fact("StableStudy", "study", "s", AT, world.seq + 1, DATE), Fact("Deleted", "series", "e", AT)]
    world.record(heard)
    repair.recorded(heard)
    assert world.run(repair, cursor=world.seq + 1, calm=0.0) == [("StablePatient", "p")]


def test_what_orthanc_never_answers_about_holds_up_nothing(world: World) -> None:
    stored(world)
    world.store("p", "s", "e", "i")
    world.mute = {"s", "s1"}
    remove(world, "e2.0")
    repair = world.repair(stable_age=0)
    repair.begin()
    world.run(repair)
    assert repair.inferred == {"StableSeries": 1, "StablePatient": 1, "Deleted": 1}
    assert not repair.active


@pytest.mark.parametrize("mute", ["e", "s", "p", "i"])
def test_of_strangers_that_orthanc_can_not_describe_the_others_are_announced(world: World, mute: str) -> None:
    world.store("p", "s", "e", "i", told=False)
    world.store("p1", "s1", "e1", "i1", told=False)
    world.mute = {mute}
    repair = world.repair()
    repair.announce()
    told = [one for change, one in world.run(repair) if change.startswith("New")]
    assert [one for one in told if one.endswith("1")] == ["e1", "s1", "p1"]
    assert mute not in told and not repair.active


def test_what_orthanc_can_not_describe_is_not_taken_for_deleted(world: World) -> None:
    stored(world, studies=2, series=1)
    remove(world, "e0.0", "s0", "p0", "e1.0", "s1", "p1")
    world.mute = {"p0", "s1"}
    repair = world.repair()
    repair.begin()
    assert world.run(repair) == [("Deleted", "e0.0"), ("Deleted", "s0")]


# -- deletions ---------------------------------------------------------------------------------------------------------


def stored(world: World, studies: int = 3, series: int = 2) -> None:
    for number in range(studies):
        for at in range(series):
            world.store(f"p{number}", f"s{number}", f"e{number}.{at}", f"i{number}.{at}")
    for level, change in (("series", "StableSeries"), ("study", "StableStudy"), ("patient", "StablePatient")):
        for one, found in world.there.items():
            if found["level"] == level:
                world.record([Fact(change, level, one, AT, 100, DATE)])


def remove(world: World, *ids: str) -> None:
    for one in ids:
        del world.there[one]
        for found in world.there.values():
            found["Series"] = [series for series in found["Series"] if series != one]
            found["Instances"] = [instance for instance in found["Instances"] if instance != one]


def test_what_is_gone_is_told_from_below(world: World) -> None:
    stored(world)
    remove(world, "p1", "s1", "e1.0", "e1.1", "e2.0")
    repair = world.repair()
    repair.begin()
    said = world.run(repair)
    assert sorted(said[:3]) == [("Deleted", one) for one in ("e1.0", "e1.1", "e2.0")]
    assert said[3:] == [("Deleted", "s1"), ("Deleted", "p1")]
    repair.compare()
    assert world.run(repair) == []
    assert not repair.active


def test_a_deletion_on_its_way_is_not_told_twice(world: World) -> None:
    stored(world)
    remove(world, "p1", "s1", "e1.0", "e1.1")
    repair = world.repair()
    repair.begin()
    assert world.run(repair, cursor=world.seq, calm=0.0) == []  # callbacks keep coming, none younger than the look
    assert repair.active
    gone = [Fact("Deleted", level, one, AT) for level, one in (("series", "e1.0"), ("series", "e1.1"), ("study", "s1"))]
    world.record(gone)  # Orthanc's own; the patient's was lost
    assert world.run(repair, cursor=world.seq + 1, calm=0.0) == [("Deleted", "p1")]


def test_calm_is_counted_from_the_look(world: World) -> None:
    stored(world)
    remove(world, "e1.0")
    repair = world.repair()
    repair.begin()
    began = world.time
    while not repair.step(0, 100.0):
        world.time += 0.1
    assert world.time - began >= CALM


def test_an_inferred_deletions_date_is_the_seq_of_the_creation(world: World) -> None:
    stored(world)
    born = world.registry.find("e1.0")
    remove(world, "e1.0")
    repair = world.repair()
    repair.begin()
    facts: list[Fact] = []
    while not facts:
        world.time += 1
        facts = repair.step(0, 100.0)
    assert born is not None
    assert [(fact.seq, fact.date, fact.extra) for fact in facts] == [(None, str(born.born), {"inferred": True})]


def test_what_hangs_in_the_air_is_found_too(world: World) -> None:
    """A patient whose study's deletion was heard of, a series whose parents are not known."""
    stored(world)
    world.record([Fact("Deleted", "study", "s0", AT), Fact("Deleted", "series", "e0.0", AT)])
    world.record([Fact("Deleted", "series", "e0.1", AT)])
    remove(world, "p0", "s0", "e0.0", "e0.1")
    world.record([Fact("UpdatedMetadata", "series", "alone", AT, 60, DATE, {})])
    repair = world.repair()
    repair.begin()
    assert sorted(world.run(repair)) == [("Deleted", "alone"), ("Deleted", "p0")]


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_a_walk_goes_on_where_it_was_and_goes_all_around(world: World, steps: int) -> None:
    stored(world, studies=30, series=1)
    remove(world, "e07.0" if "e07.0" in world.there else "e7.0", "e29.0")
    repair = world.repair()
    repair.begin()
    for _ in range(steps):
        repair.step(0, 0.0)
    again = world.repair(place=repair.place)
    again.begin()
    assert sorted(world.run(again)) == [("Deleted", "e29.0"), ("Deleted", "e7.0")]
    assert again.place == {"place": "", "listed": None, "remembered": None}


def test_instances_are_asked_for_by_option_only(world: World) -> None:
    stored(world)
    remove(world, "i1.0")
    repair = world.repair()
    repair.begin()
    assert world.run(repair) == []
    remove(world, "e2.0", "i2.0")
    world.registry.index_instances(True)
    repair = world.repair(instances=True)
    repair.begin()
    assert world.run(repair) == [("Deleted", "i1.0"), ("Deleted", "i2.0"), ("Deleted", "e2.0")]
    world.registry.index_instances(False)


def test_a_step_asks_little(world: World) -> None:
    stored(world, studies=100)
    repair = world.repair()
    repair.begin()
    most = 0
    while repair.active:
        before = world.asked
        repair.step(0, 100.0)
        world.time += 1
        most = max(most, world.asked - before)
    assert most <= 20
    assert world.asked <= 110  # one question for each study


def test_a_deletion_that_orthanc_tells_very_late_is_not_told_twice(world: World) -> None:
    stored(world)
    remove(world, "e1.0")
    repair = world.repair()
    repair.begin()
    assert world.run(repair) == [("Deleted", "e1.0")]
    late = Fact("Deleted", "series", "e1.0", AT)
    for _ in range(2):  # what could not be recorded comes again
        assert repair.news([late]) == []
    assert repair.news([late, late]) == [late]
    repair.heard()
    assert repair.news([late]) == [late]  # but one is one


def test_a_second_deletion_is_told(world: World) -> None:
    stored(world)
    remove(world, "e1.0")
    repair = world.repair()
    repair.begin()
    assert world.run(repair) == [("Deleted", "e1.0")]
    facts = world.store("p1", "s1", "e1.0", "i1.7", told=False)
    late = Fact("Deleted", "series", "e1.0", AT)
    assert repair.news([*facts, late]) == [*facts, late]


def test_a_million_that_are_missing_are_told_in_small_lots(world: World) -> None:
    stored(world, studies=3000, series=1)
    world.there.clear()
    repair = world.repair()
    repair.begin()
    most = total = 0
    while repair.active:
        world.time += 0.1
        facts = repair.step(0, 100.0)
        world.record(facts)
        repair.done(facts)
        most, total = max(most, len(facts)), total + len(facts)
    assert total == 9000
    assert most <= 200


# -- creations ---------------------------------------------------------------------------------------------------------


def test_a_second_creation_proves_a_deletion(world: World) -> None:
    stored(world, studies=1)
    world.there.clear()
    facts = world.store("p0", "s0", "e0.0", "i0.0", told=False)
    said = [(fact.change, fact.resource) for fact in world.record(facts)]
    assert said[:5] == [("Deleted", one) for one in ("i0.0", "e0.0", "e0.1", "s0", "p0")]
    assert [change for change, _ in said[5:]] == ["NewInstance", "NewSeries", "NewStudy", "NewPatient"]


def test_a_whole_run_proves_the_deletion_of_what_was_there_before_us(world: World) -> None:
    world.record([Fact("StableStudy", "study", "s0", AT, 7, DATE, {"patient": "p0"})])
    facts = world.store("p0", "s0", "e0.0", "i0.0", told=False)
    assert [(one.change, one.resource) for one in world.record(facts)][:2] == [("Deleted", "s0"), ("Deleted", "p0")]


def test_a_deletion_that_was_told_is_not_proved_again(world: World) -> None:
    stored(world, studies=1, series=1)
    world.there.clear()
    order = (("instance", "i0.0"), ("series", "e0.0"), ("study", "s0"), ("patient", "p0"))
    world.record([Fact("Deleted", level, one, AT) for level, one in order])
    facts = world.store("p0", "s0", "e0.0", "i0.0", told=False)
    assert world.record(facts) == facts


def test_an_instance_alone_may_have_gone(world: World) -> None:
    stored(world, studies=1)
    remove(world, "i0.0")
    facts = world.store("p0", "s0", "e0.0", "i0.0", told=False)
    assert [(fact.change, fact.resource) for fact in world.record(facts)] == [
        ("Deleted", "i0.0"),
        ("NewInstance", "i0.0"),
    ]


def test_behind_another_log_what_was_never_announced_is(world: World) -> None:
    stored(world, studies=1)
    world.store("p9", "s9", "e9", "i9", told=False)
    world.store("p0", "s0", "e0.9", "i0.9", told=False)
    repair = world.repair(stable_age=0)
    repair.announce()
    said = world.run(repair)
    assert [one for one in said if one[0].startswith("New")] == [
        ("NewSeries", "e0.9"),
        ("NewSeries", "e9"),
        ("NewStudy", "s9"),
        ("NewPatient", "p9"),
    ]
    assert {("StableStudy", "s9"), ("StableSeries", "e9"), ("StablePatient", "p9")} <= set(said)
    repair.announce()
    assert world.run(repair) == []


def test_what_was_there_before_recording_began_is_not_announced(world: World) -> None:
    world.store("p9", "s9", "e9", "i9", told=False)
    repair = world.repair(began=AT + 1000)
    repair.announce()
    assert world.run(repair) == []


def test_what_was_there_before_recording_began_and_has_grown_is_not_announced(world: World) -> None:
    world.store("p9", "s9", "e9", "i9", told=False)
    world.store("p9", "s9", "e8", "i8", told=False)
    world.dates["i9"] = "20200101T000000"
    world.there["s9"]["Series"] = ["e9", "e8"]  # in the order in which they came
    repair = world.repair(began=AT, stable_age=1000)
    repair.begin()
    repair.announce()
    assert world.run(repair) == [("NewSeries", "e8")]


def test_a_creation_that_orthanc_tells_very_late_is_not_told_twice(world: World) -> None:
    facts = world.store("p9", "s9", "e9", "i9", told=False)
    repair = world.repair(stable_age=1000)
    repair.begin()
    repair.announce()
    assert [change for change, _ in world.run(repair)] == ["NewSeries", "NewStudy", "NewPatient"]
    assert [fact.change for fact in repair.news(facts)] == ["NewInstance"]
    repair.heard()
    again = Fact("NewSeries", "series", "e9", AT, world.seq + 1, DATE)
    assert repair.news([again]) == [again]


def test_looking_for_strangers_goes_on_where_it_was(world: World) -> None:
    stored(world, studies=500, series=1)
    world.store("p", "s", "e", "i", told=False)
    repair = world.repair(stable_age=1000)
    repair.begin()
    repair.announce()
    for _ in range(30):
        repair.step(0, 0.0)
    place = repair.place
    assert place["listed"] > 0
    again = world.repair(place=place, stable_age=1000)
    before = world.asked
    assert [one for one in world.run(again) if one[0].startswith("New")] == [
        ("NewSeries", "e"),
        ("NewStudy", "s"),
        ("NewPatient", "p"),
    ]
    assert again.place["listed"] is None
    assert world.asked - before < 501 + 500


def test_studies_that_are_deleted_meanwhile_hide_no_strangers(world: World) -> None:
    stored(world, studies=800, series=1)
    world.store("p", "s", "e", "i", told=False)
    repair = world.repair(stable_age=1000)
    repair.announce()
    repair.step(0, 0.0)
    for number in range(300):
        remove(world, f"e{number}.0", f"s{number}")
        gone = [Fact("Deleted", "series", f"e{number}.0", AT), Fact("Deleted", "study", f"s{number}", AT)]
        world.record(gone)
        repair.recorded(gone)
    assert ("NewStudy", "s") in world.run(repair)
    assert repair.place["listed"] is None


def test_what_has_received_something_behind_an_emptied_log_is_told_to_be_stable(world: World) -> None:
    stored(world)
    later = "20261124T080100"
    for one in ("s1", "e1.0", "p1"):
        world.there[one]["LastUpdate"] = later  # an instance came, and the log was emptied: nobody has told
    told = [Fact("StablePatient", "patient", "p1", AT + 60_000, 300, later)]
    repair = world.repair(stable_age=0)
    repair.announce(since=AT + 30_000)
    world.record(told)
    repair.recorded(told)  # this one was behind it
    repair.begin()
    assert world.run(repair) == [("StableSeries", "e1.0"), ("StableStudy", "s1")]


def test_a_stranger_whose_creation_is_on_its_way_is_not_announced(world: World) -> None:
    facts = world.store("p9", "s9", "e9", "i9", told=False)
    repair = world.repair()
    repair.announce()
    assert world.run(repair, cursor=0, calm=0.0) == []
    world.record(facts)
    assert world.run(repair, cursor=world.seq, calm=0.0) == []


# -- entries that were lost --------------------------------------------------------------------------------------------


def test_lost_entries_are_remembered_without_a_word_and_their_end_is_told(world: World) -> None:
    for number in range(25):
        world.store("p", f"s{number}", f"e{number}", f"i{number}", told=False)
    world.store("q", "known", "f", "j")
    repair = world.repair(place={"remembered": 0})
    assert world.run(repair) == []
    assert repair.remembered is None and not repair.active
    assert world.registry.find("s7") == Resource("study", "s7", "p", None)
    known = world.registry.find("known")
    assert known is not None and known.born is not None, "what is known stays as it is"
    assert world.registry.count == 1 + 25 + 25 + 4
    for one in ("s7", "e7"):
        del world.there[one]
    again = world.repair()
    again.begin()
    assert world.run(again) == [("Deleted", "e7"), ("Deleted", "s7")]


def test_remembering_goes_on_where_it_was(world: World) -> None:
    for number in range(1000):
        world.store("p", f"s{number}", f"e{number}", f"i{number}", told=False)
    repair = world.repair(place={"remembered": 0})
    while not repair.remembered:
        world.time += 0.1
        repair.step(0, 100.0)
    assert 400 < repair.remembered < 600 and world.asked == repair.remembered
    world.run(world.repair(place=repair.place))
    assert world.asked == 1000
    assert all(world.registry.find(f"e{number}") for number in range(1000))


def test_what_is_remembered_is_no_reason_to_take_its_creation_for_a_second_one(world: World) -> None:
    facts = world.store("p", "s", "e", "i", told=False)
    repair = world.repair(place={"remembered": 0})
    for _ in range(5):
        assert repair.step(0, 0.0) == []
    assert world.record(facts) == facts, "no deletion in front of it"
    repair.recorded(facts)
    assert world.run(repair, cursor=world.seq + 1) == []
    known = world.registry.find("s")
    assert known is not None and known.born is not None
    assert repair.remembered is None


def test_what_goes_on_elsewhere_is_compared_there(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = world.repair()
    repair.go_on(world.registry, None)
    for one in ("p", "s", "e", "i"):
        del world.there[one]
    assert world.run(repair) == [("Deleted", "e"), ("Deleted", "s"), ("Deleted", "p")]
