"""Repair where nobody calls back: rounds for ever, instances that went with a series, stable events."""

from __future__ import annotations

from typing import Any

import pytest

from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.changes.repair import CALM
from orthanc_events_bridge.changes.rounds import SURE, Rounds
from tests.unit.test_repair import AT, DATE, World, remove


@pytest.fixture
def world() -> World:
    world = World()
    world.registry.index_instances(True)
    return world


def rounds(world: World, **options: Any) -> Rounds:
    return world.make(Rounds, **{"every": 600.0, **options})


def instances_of(world: World) -> int:
    return int(world.registry._db.execute("SELECT count(*) FROM resources WHERE level = 'instance'").fetchone()[0])


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_a_round_begins_some_time_after_the_last_has_ended(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = rounds(world, stable_age=1e9)
    world.run(repair)
    assert repair.rounds == 0
    world.time = 600
    world.run(repair)
    assert repair.rounds == 1
    world.there.clear()
    assert world.run(repair) == []  # 20 seconds later, nobody looks
    world.time = 1250
    assert world.run(repair) == [("Deleted", "e"), ("Deleted", "s"), ("Deleted", "p")]
    assert repair.rounds == 2 and not repair.suspects and not repair.active
    assert repair.inferred == {"Deleted": 3}


def test_studies_that_are_gone_as_a_whole_are_found_by_the_list(world: World) -> None:
    for number in range(1200):
        world.store(f"p{number}", f"s{number}", f"e{number}", f"i{number}")
    repair = rounds(world, stable_age=1e9)
    repair._next_round = float("inf")
    for number in (3, 700):
        for one in ("p", "s", "e", "i"):
            del world.there[f"{one}{number}"]
    world.time, world.asked = 600.0, 0
    said = world.run(repair)
    assert sorted(said) == sorted(("Deleted", f"{one}{number}") for one in "pse" for number in (3, 700))
    assert world.asked < 10 and not repair.active
    assert world.run(repair) == []


def test_what_is_not_listed_is_asked_for(world: World) -> None:
    """While something is deleted, pages shift."""
    world.store("p", "s", "e", "i")
    repair = rounds(world, stable_age=1e9)
    repair._next_round = float("inf")
    world.hidden = True
    world.time = 600.0
    assert world.run(repair) == [] and world.asked == 1 and not repair.suspects


def test_without_rounds_it_is_looked_at_a_start_only(world: World) -> None:
    world.store("p", "s", "e", "i")
    world.there.clear()
    repair = rounds(world, every=0.0, stable_age=1e9)
    world.time = 1e6
    assert world.run(repair) == []
    repair.begin()
    assert [change for change, _ in world.run(repair)] == ["Deleted"] * 3
    world.time = 2e6
    assert world.run(repair) == [] and repair.rounds == 1


def test_a_round_goes_on_where_an_earlier_process_ended(world: World) -> None:
    for number in range(25):
        world.store(f"p{number:02}", f"s{number:02}", f"e{number:02}", f"i{number:02}")
    repair = rounds(world, stable_age=1e9)
    repair.begin()
    repair.step(0, 100.0)
    assert repair.place and repair.active
    world.asked = 0
    again = rounds(world, stable_age=1e9, place=repair.place)
    world.run(again)
    assert again.rounds == 1 and world.asked >= 25


def test_a_missing_resource_is_told_a_while_after_the_look_and_not_when_it_is_back(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = rounds(world, stable_age=1e9)
    there = dict(world.there)
    world.there.clear()
    repair.begin()
    assert [repair.step(0, 1e9) for _ in range(9)] == [[]] * 9 and repair.suspects == 3
    world.time += CALM
    world.record([Fact("Deleted", "series", "e", AT)])  # told by a creation that came meanwhile
    world.there = there
    assert [fact.resource for fact in repair.step(0, 1e9)] == ["s", "p"]


def test_instances_go_with_their_series(world: World) -> None:
    world.store("p", "s", "e", "i")
    world.store("p", "s", "e", "j")
    world.store("q", "t", "f", "k")
    for one in ("p", "s", "e", "i", "j"):
        del world.there[one]
    repair = rounds(world, stable_age=1e9)
    repair.begin()
    assert world.run(repair) == [("Deleted", "e"), ("Deleted", "s"), ("Deleted", "p")]
    assert instances_of(world) == 1, "they are not kept for ever"


def test_instances_are_told_in_front_of_their_series_if_they_are_wanted(world: World) -> None:
    world.store("p", "s", "e", "i")
    world.store("p", "s", "e", "j")
    world.store("q", "t", "f", "k")
    world.store("q", "t", "f", "l")
    remove(world, "p", "s", "e", "i", "j", "l")
    recorded: list[Fact] = []
    repair = rounds(world, stable_age=1e9, instances=True)
    repair.begin()
    for _ in range(200):
        world.time += 0.1
        facts = repair.step(0, 100.0)
        recorded += facts
        world.record(facts)
        repair.done(facts)
    told = [str(fact.resource) for fact in recorded]
    assert sorted(told) == ["e", "i", "j", "l", "p", "s"]
    assert told.index("i") < told.index("e") < told.index("s") and told.index("j") < told.index("e")
    assert instances_of(world) == 1


# -- stable ------------------------------------------------------------------------------------------------------------


def stable(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [one for one in said if one[0].startswith("Stable")]


def test_a_swallowed_stable_event_is_told_once_by_orthancs_word(world: World) -> None:
    world.store("p", "s", "e", "i")
    world.stable = False
    repair = rounds(world)
    for moment in (0.0, 60.0, 120.0, 180.0):
        world.time = moment
        assert stable(world.run(repair)) == [], "its timer runs"
    world.stable = True
    world.time = 240.0
    assert sorted(stable(world.run(repair))) == [("StablePatient", "p"), ("StableSeries", "e"), ("StableStudy", "s")]
    for moment in (300.0, 360.0, 420.0):
        world.time = moment
        assert stable(world.run(repair)) == []


def test_its_row_has_time_to_be_read(world: World) -> None:
    """Orthanc calls it stable, and writes the row behind that."""
    world.store("p", "s", "e", "i")
    repair = rounds(world)
    repair.step(0, 100.0)
    world.time = 60.0
    assert repair.step(0, 100.0) == []
    world.time += SURE - 0.1
    assert repair.step(0, 100.0) == []
    world.record([Fact("StableStudy", "study", "s", AT, 9, DATE, {"patient": "p"})])
    world.time += 0.2
    assert [fact.change for fact in repair.step(0, 100.0)] == ["StableSeries", "StablePatient"]


def test_what_has_received_more_meanwhile_is_left_to_its_timer(world: World) -> None:
    world.store("p", "s", "e", "i")
    repair = rounds(world)
    repair.step(0, 100.0)
    world.time = 60.0
    assert repair.step(0, 100.0) == []
    world.store("p", "s", "e", "j")
    world.stable = False
    world.time += SURE
    assert repair.step(0, 100.0) == []
    assert stable(world.run(repair)) == []


def test_a_few_questions_at_a_time(world: World) -> None:
    for number in range(50):
        world.store(f"p{number}", f"s{number}", f"e{number}", f"i{number}")
    world.stable = False
    repair = rounds(world)
    repair.step(0, 100.0)
    world.time = 60.0
    while repair.active:
        world.asked = 0
        repair.step(0, 100.0)
        assert world.asked <= 10
