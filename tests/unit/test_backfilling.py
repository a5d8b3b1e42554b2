"""A backfill as it is asked for: begun, ended, and gone on with when Orthanc was restarted."""

from __future__ import annotations

from typing import Any, cast

from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.backfilling import Backfilling
from orthanc_events_bridge.plugin.lookup import Lookup
from tests.unit.test_backfill import Orthanc, Registry

LIMIT = 1000


class Outbox:
    def __init__(self) -> None:
        self.recorder = "recorder"
        self.resources = Registry()
        self.notes: dict[str, Any] = {}
        self.used = 0

    def noted(self, key: str) -> dict[str, Any]:
        assert key == "backfill"
        return dict(self.notes)

    def bytes_used(self) -> int:
        return self.used


class Scene:
    """Capture, as far as it has to do with backfills."""

    def __init__(self, count: int = 30) -> None:
        self.asked: dict[str, Any] = {}
        self.outbox, self.orthanc = Outbox(), Orthanc(count)
        self.told: list[Fact] = []
        self.restart()

    @property
    def _writer(self) -> OutboxWriter:
        return cast("OutboxWriter", self.outbox)

    def restart(self) -> None:
        look_up = cast("Lookup", self.orthanc)
        self.backfilling = Backfilling(lambda: self.asked, look_up)

    def ask(self, number: int, **more: Any) -> None:
        self.asked = {"number": number, "recorder": "recorder", "level": "study", "since": 0, **more}
        self.look()

    def look(self) -> None:
        self.backfilling.look(self._writer)
        if self.backfilling.status():
            self.outbox.notes = self.backfilling.status()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            facts = self.backfilling.step(self._writer, 7, LIMIT) if self.backfilling.active else []
            self.outbox.resources.record(facts)
            self.told += facts
            self.backfilling.done(facts)
        self.look()

    @property
    def created(self) -> int:
        return sum(fact.change == "NewStudy" for fact in self.told)

    @property
    def state(self) -> str:
        return str(self.outbox.notes.get("state"))


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    scene = Scene()
    scene.run(10)
    assert not scene.told and scene.outbox.notes == {} and scene.orthanc.questions == 0


def test_what_is_asked_for_is_done_once() -> None:
    scene = Scene()
    scene.ask(5)
    scene.run(500)
    assert (scene.created, scene.state, scene.outbox.notes["number"]) == (30, "done", 5)
    questions = scene.orthanc.questions
    scene.run(10)
    scene.restart()
    scene.look()
    scene.run(10)
    assert (scene.orthanc.questions, scene.state) == (questions, "done")
    scene.ask(6)
    scene.run(500)
    assert (scene.created, scene.outbox.notes["number"], scene.state) == (30, 6, "done")


def test_it_goes_on_after_a_restart_and_goes_on_counting() -> None:
    scene = Scene()
    scene.ask(5)
    scene.run(6)
    assert 0 < scene.created < 30 and scene.state == "running"
    scene.restart()
    scene.look()
    scene.run(500)
    assert (scene.created, scene.state) == (30, "done")
    assert scene.outbox.notes["announced"] == {"NewStudy": 30, "StableStudy": 30, "NewPatient": 15, "StablePatient": 15}


def test_it_can_be_ended_for_good() -> None:
    scene = Scene()
    scene.ask(5)
    scene.run(6)
    created = scene.created
    scene.ask(6, stop=True)
    assert (scene.state, scene.outbox.notes["number"]) == ("stopped", 6)
    assert scene.outbox.notes["announced"]["NewStudy"] == created
    scene.run(20)
    scene.restart()
    scene.look()
    scene.run(20)
    assert (scene.created, scene.state) == (created, "stopped")
    scene.ask(7)
    scene.run(500)
    assert scene.created == 30


def test_ending_what_is_not_there_says_so_and_does_nothing() -> None:
    scene = Scene()
    scene.ask(5, stop=True)
    assert (scene.state, scene.outbox.notes["announced"], scene.backfilling.active) == ("stopped", {}, False)


def test_it_rests_while_the_outbox_is_half_full() -> None:
    scene = Scene()
    scene.ask(5)
    scene.outbox.used = LIMIT // 2 + 1
    scene.run(500)
    assert not scene.told and scene.state == "running" and scene.orthanc.questions == 0
    scene.outbox.used = LIMIT // 2
    scene.run(500)
    assert scene.created == 30


def test_what_was_asked_of_another_outbox_is_not_done_in_this_one() -> None:
    scene = Scene()
    scene.outbox.recorder = "a new one"
    scene.ask(5)
    scene.run(20)
    assert not scene.told and not scene.backfilling.active


def test_an_unknown_level_of_a_later_version_is_the_default() -> None:
    scene = Scene()
    scene.ask(5, level="attachment")
    scene.run(500)
    assert scene.outbox.notes["level"] == "study" and scene.created == 30
