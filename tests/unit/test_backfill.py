"""What was there before recording began, found a little at a time and announced once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from orthanc_events_bridge.changes.backfill import Backfill, Request
from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.errors import LogUnavailableError, PassedOverError

DATE = "20261101T120000"


class Registry:
    """What was announced, by id."""

    def __init__(self) -> None:
        self.known: dict[str, Resource] = {}

    def find(self, resource: str) -> Resource | None:
        return self.known.get(resource)

    def record(self, facts: Sequence[Fact]) -> None:
        """As the outbox does."""
        for fact in facts:
            if fact.change.startswith("New"):
                parent = (fact.parents or {}).get({"study": "patient", "series": "study"}.get(fact.level, ""))
                self.known[fact.resource or ""] = Resource(fact.level, fact.resource or "", parent, 1)
            elif fact.change == "Deleted":
                self.known.pop(fact.resource or "", None)


class Orthanc:
    """Studies with two series of two instances each; two studies to a patient."""

    def __init__(self, count: int) -> None:
        self.there = [f"study{n}" for n in range(count)]
        self.dates: dict[str, str] = {}
        self.moving: set[str] = set()
        self.questions = 0
        self.counter = 7
        self.silent = 0
        self.mute: set[str] = set()

    def tip(self) -> int:
        return self.counter

    def _asked(self) -> None:
        self.questions += 1
        if self.silent:
            self.silent -= 1
            raise LogUnavailableError("not now")

    def _described(self, resource: str) -> None:
        if resource in self.mute:
            raise PassedOverError("Orthanc can't be asked for it")

    def studies(self, since: int, limit: int) -> Sequence[str]:
        self._asked()
        return self.there[since : since + limit]

    def count_studies(self) -> int:
        return len(self.there)

    def received(self, instance: str) -> str | None:
        self._asked()
        self._described(instance)
        return DATE if instance.split(".")[0] in self.there else None

    def resource(self, level: str, resource: str) -> Mapping[str, Any] | None:
        self._asked()
        self._described(resource)
        study = resource.split(".")[0]
        if level != "patient" and study not in self.there:
            return None
        answer = {"LastUpdate": self.dates.get(resource, DATE), "IsStable": resource not in self.moving}
        if level == "study":
            number = int(study.removeprefix("study"))
            return {**answer, "ParentPatient": f"patient{number // 2}", "Series": [f"{study}.1", f"{study}.2"]}
        if level == "series":
            return {**answer, "Instances": [f"{resource}.1", f"{resource}.2"]}
        return answer


class Scene:
    def __init__(self, count: int, **request: Any) -> None:
        self.registry, self.orthanc = Registry(), Orthanc(count)
        self.cursor = 7
        self.told: list[Fact] = []
        self.backfill: Backfill
        self.ask(**request)

    def ask(self, **request: Any) -> None:
        request = {"number": 1, **request}
        self.backfill = Backfill(Request(**request), self.registry, self.orthanc)

    def step(self) -> list[Fact]:
        facts = self.backfill.step(self.cursor)
        self.registry.record(facts)
        self.told += facts
        self.backfill.done(facts)
        return facts

    def run(self, steps: int = 10_000) -> Counter[str]:
        """To the end; how often each change was told."""
        while not self.backfill.over:
            self.step()
            steps -= 1
            assert steps, "no end"
        return Counter(fact.change for fact in self.told)


@pytest.mark.parametrize(
    ("level", "changes"),
    [
        ("patient", {"NewPatient": 5}),
        ("study", {"NewPatient": 5, "NewStudy": 10}),
        ("series", {"NewPatient": 5, "NewStudy": 10, "NewSeries": 20}),
        ("instance", {"NewPatient": 5, "NewStudy": 10, "NewSeries": 20, "NewInstance": 40}),
    ],
)
def test_everything_down_to_a_level_is_told_once(level: str, changes: dict[str, int]) -> None:
    scene = Scene(10, level=level)
    stable = {change.replace("New", "Stable"): count for change, count in changes.items() if change != "NewInstance"}
    assert scene.run() == {**changes, **stable}
    assert len({(fact.change, fact.resource) for fact in scene.told}) == len(scene.told)
    assert all(fact.extra == {"inferred": True} and fact.seq is None and fact.date == DATE for fact in scene.told)
    assert scene.backfill.announced == Counter(fact.change for fact in scene.told)
    scene.ask(number=2, level=level)
    assert scene.run() == {**changes, **stable}, "told twice"


def test_order_is_that_of_orthanc() -> None:
    scene = Scene(1, level="instance")
    scene.run()
    assert [(fact.change, fact.resource) for fact in scene.told if fact.change.startswith("New")] == [
        ("NewInstance", "study0.1.1"),
        ("NewInstance", "study0.1.2"),
        ("NewSeries", "study0.1"),
        ("NewInstance", "study0.2.1"),
        ("NewInstance", "study0.2.2"),
        ("NewSeries", "study0.2"),
        ("NewStudy", "study0"),
        ("NewPatient", "patient0"),
    ]
    assert scene.told[0].parents == {"series": "study0.1", "study": "study0", "patient": "patient0"}


def test_what_is_not_stable_yet_is_left_to_orthanc() -> None:
    scene = Scene(2)
    scene.orthanc.moving = {"study1", "patient0"}
    assert scene.run() == {"NewStudy": 2, "NewPatient": 1, "StableStudy": 1}


def test_only_what_got_something_since() -> None:
    scene = Scene(4, since=1_793_534_400_000 + 1)
    scene.orthanc.dates = {"study2": "20261102T000000", "patient1": "20261102T000000"}
    assert scene.run() == {"NewStudy": 1, "StableStudy": 1, "NewPatient": 1, "StablePatient": 1}


def test_a_dry_run_counts_the_same_and_tells_nothing() -> None:
    scene = Scene(10, level="instance", dry_run=True)
    assert scene.run() == {}
    counted = scene.backfill.announced
    scene.ask(number=2, level="instance")
    assert scene.run() == counted


def test_what_the_log_has_still_to_tell_is_not_told_twice() -> None:
    """A study whose creation is committed and not recorded yet is Orthanc's to tell."""
    scene = Scene(2)
    scene.orthanc.counter = 9
    for _ in range(20):
        assert not scene.step()
    scene.registry.record([Fact("NewStudy", "study", "study1", 0, 8, DATE, {"patient": "patient0"})])
    scene.registry.record([Fact("NewPatient", "patient", "patient0", 0, 9, DATE, {})])
    scene.cursor = 9
    scene.run()
    assert [fact.resource for fact in scene.told] == ["study0", "study0"]


@pytest.mark.parametrize("heard", [True, False])
def test_what_is_deleted_meanwhile_is_not_told_and_nothing_is_passed_over(heard: bool) -> None:
    """Orthanc's list gets shorter in front of where we are, whether or not that is recorded by the next page."""
    scene = Scene(950)
    scene.cursor = 0
    for _ in range(4):
        scene.step()
        gone = scene.orthanc.there[:20]
        del scene.orthanc.there[:20]
        if heard:
            scene.backfill.recorded([Fact("Deleted", "study", study, 0) for study in gone])
    scene.cursor = 7
    for number in range(10_000):
        if number % 100 == 50 and len(scene.orthanc.there) > 700:
            gone = scene.orthanc.there[:20]
            del scene.orthanc.there[:20]
            if heard:
                scene.backfill.recorded([Fact("Deleted", "study", study, 0) for study in gone])
        scene.step()
        if scene.backfill.over:
            break
    told = Counter(fact.resource for fact in scene.told if fact.change == "NewStudy")
    assert set(scene.orthanc.there) <= told.keys() and set(told.values()) == {1}


def test_facts_that_could_not_be_recorded_come_again() -> None:
    scene = Scene(3)
    while not (facts := scene.backfill.step(7)):
        pass
    assert scene.backfill.step(7) == facts  # the disk was full, say
    scene.run()
    assert Counter((fact.change, fact.resource) for fact in scene.told).most_common(1)[0][1] == 1


def test_an_orthanc_that_cannot_answer_is_asked_again() -> None:
    scene = Scene(30, level="series")
    for number in range(60):
        scene.orthanc.silent = number % 2
        try:
            scene.step()
        except LogUnavailableError:
            continue
    scene.orthanc.silent = 0
    scene.run()
    told = Counter(fact.resource for fact in scene.told if fact.change in ("NewStudy", "NewSeries"))
    assert set(told.values()) == {1} and len(told) == 90


@pytest.mark.parametrize(
    ("mute", "missing"),
    [
        ("study3", {"study3", "study3.1", "study3.2"}),
        ("study3.1", {"study3.1"}),
        ("study3.1.1", {"study3.1.1"}),
        ("patient1", {"patient1"}),
    ],
)
def test_what_orthanc_can_not_describe_is_passed_over(mute: str, missing: set[str]) -> None:
    scene, whole = (Scene(10, level="instance") for _ in range(2))
    scene.orthanc.mute = {mute}
    scene.run()
    whole.run()
    told, all_told = ({fact.resource or "" for fact in one.told} for one in (scene, whole))
    assert {one for one in all_told - told if one.count(".") < 2 or one == mute} == missing


def test_a_step_is_little_work() -> None:
    scene = Scene(300, level="instance")
    while not scene.backfill.over:
        before = scene.orthanc.questions
        scene.step()
        assert scene.orthanc.questions - before <= 20


def test_what_is_known_costs_no_question() -> None:
    scene = Scene(200)
    scene.run()
    scene.ask(number=2)
    before = scene.orthanc.questions
    scene.run()
    assert scene.orthanc.questions - before <= 3  # the pages of Orthanc's list


def test_status_says_how_far_it_is() -> None:
    scene = Scene(4)
    assert scene.backfill.status()["state"] == "running"
    scene.run()
    assert scene.backfill.status() == {
        "number": 1,
        "state": "done",
        "level": "study",
        "since": 0,
        "dry_run": False,
        "studies": 4,
        "looked": 4,
        "announced": {"NewStudy": 4, "StableStudy": 4, "NewPatient": 2, "StablePatient": 2},
    }
