"""What Orthanc had before the bridge was there, announced on request: on a real Orthanc that has run without it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.ledger import Event
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import require
from tests.integration.replay_tools import Command, everyones
from tests.integration.whole import prepare

pytestmark = pytest.mark.integration


@contextmanager
def before(folder: Path, studies: list[dicom.Study], *, questions: int | None = None) -> Iterator[Line]:
    """A line whose Orthanc had studies before the bridge was there.

    :param questions: in a step of a backfill, so that it takes long enough to come in between.
    """
    require("nats-server", "orthanc", "orthanc-python")
    line = Line(folder)
    if questions is not None:
        slow = f"from orthanc_events_bridge.changes import backfill\nbackfill._QUESTIONS = {questions}\n"
        prepare(line.orthanc.shim_path, behind=slow)
    plugins, line.orthanc.config["Plugins"] = line.orthanc.config["Plugins"], []
    try:
        line.orthanc.start()
        for study in studies:
            for instance in study:
                line.orthanc.upload(instance.data)
        line.orthanc.stop()
    finally:
        line.orthanc._kill_all()
    line.orthanc.config["Plugins"] = plugins
    with line:
        yield line


def announced(line: Line) -> Counter[tuple[str, str]]:
    """What was told of resources: type and id."""
    return Counter((event.kind, event.resource) for event in line.events() if not event.kind.startswith("server."))


def wanted(studies: list[dicom.Study], level: str) -> set[tuple[str, str]]:
    """What is to be told of them."""
    found = {("patient.created", study.instances[0].patient) for study in studies}
    if level != "patient":
        found |= {("study.created", study.id) for study in studies}
    if level in ("series", "instance"):
        found |= {("series.created", instance.series) for study in studies for instance in study}
    found |= {(kind.replace("created", "stable"), resource) for kind, resource in found}
    if level == "instance":
        found |= {("instance.created", instance.id) for study in studies for instance in study}
    return found


def test_what_was_there_before_is_announced_once(tmp_path: Path) -> None:
    """Counted, announced down to the studies, and then down to the instances; each only once, also if asked again."""
    studies = [dicom.make_study(series=2, instances=4) for _ in range(15)]
    with before(tmp_path, studies) as line:
        line.settle()
        command = Command(line.folder.path, line.config)
        assert not announced(line)
        counted = json.loads(command.run("backfill", "--dry-run", "--json")[0])
        assert (counted["state"], counted["looked"]) == ("done", 15)
        expected = Counter(kind for kind, _ in wanted(studies, "study"))
        assert counted["announced"] == dict(expected)
        line.settle()
        assert not announced(line)

        assert "60 events were announced, of 15 studies" in command.run("backfill")[0]
        line.settle()
        assert announced(line) == Counter(wanted(studies, "study"))

        new = dicom.make_study()
        for instance in new:
            line.orthanc.upload(instance.data)
        assert json.loads(command.run("backfill", "--json")[0])["announced"] == {}
        command.run("backfill", "--level", "instance")
        line.settle()
        of_new = {instance.id for instance in new} | {new.id, new.instances[0].series, new.instances[0].patient}
        told = {one: count for one, count in announced(line).items() if one[1] not in of_new}
        assert told == Counter(wanted(studies, "instance"))
        assert announced(line)["study.created", new.id] == 1

        stable = {one for one in wanted([new], "series") if one[0].endswith(".stable")}
        line.wait(lambda document: stable <= announced(line).keys(), timeout=120)
        line.orthanc.restart()
        line.settle()
        assert line.status()["capture"]["inferred"] == {}, "what was announced to be stable was looked at again"
        assert json.loads(command.run("backfill", "--level", "instance", "--json")[0])["announced"] == {}
        line.settle()
        assert {one: count for one, count in announced(line).items() if one[1] not in of_new} == told
        inferred = [one.event for one in everyones(line.broker) if one.event["data"].get("inferred")]
        assert len(inferred) == sum(told.values())
        by_id = {event.resource: event for event in line.events() if event.kind == "instance.created"}
        check_keys(by_id, studies)


def check_keys(events: dict[str, Event], studies: list[dicom.Study]) -> None:
    """Parents are known: instances have their study's key."""
    for study in studies:
        assert {events[instance.id].key for instance in study} == {study.id}


def test_it_goes_on_when_orthanc_is_killed_and_what_is_new_is_not_held_up(tmp_path: Path) -> None:
    studies = [dicom.make_study(series=1, instances=1) for _ in range(60)]
    with before(tmp_path, studies, questions=2) as line:
        line.settle()
        command = Command(line.folder.path, line.config)
        command.run("backfill", "--level", "instance", "--no-wait")
        line.wait(lambda document: (document["capture"]["backfill"] or {}).get("looked", 0) > 10)
        deleted, new = studies.pop(), dicom.make_study()
        assert line.orthanc.delete("studies", deleted.id)
        for instance in new:
            line.orthanc.upload(instance.data)
        line.orthanc.kill()
        state = line.status()["capture"]["backfill"]["state"]
        line.orthanc.start()
        line.wait(lambda document: (document["capture"]["backfill"] or {}).get("state") == "done", timeout=120)
        line.settle()
        told = announced(line)
        assert state == "running", "the kill came too late to show anything"
        missing = wanted(studies, "instance") - told.keys()
        assert not missing
        assert not {one: count for one, count in told.items() if count > 1 and one[1] != new.id}
        assert told["study.created", new.id] == 1


def test_it_can_be_ended(tmp_path: Path) -> None:
    studies = [dicom.make_study(series=1, instances=1) for _ in range(200)]
    with before(tmp_path, studies, questions=1) as line:
        line.settle()
        command = Command(line.folder.path, line.config)
        command.run("backfill", "--no-wait")
        line.wait(lambda document: (document["capture"]["backfill"] or {}).get("looked", 0) > 5)
        assert "stopped" in command.run("backfill", "--stop")[0]
        line.settle()
        count = len(announced(line))
        assert 0 < count < len(wanted(studies, "study"))
        line.orthanc.restart()
        line.settle()
        assert len(announced(line)) == count
