"""`orthanc-events derive` beside a real Orthanc, on every broker: each study is told ready once, whoever is killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from orthanc_events_bridge.events.derived import derived_type, schema
from orthanc_events_bridge.testing.brokers.events import Event
from orthanc_events_bridge.testing.dicom import Instance, Study, make_study
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.reacting import consumer_url
from tests.integration.commands import PATIENCE, Started, wait_for
from tests.integration.routers import Receiver, Routers, gateway, running
from tests.integration.test_verify import Verified
from tests.integration.whole import broker_or_skip, started

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")
#: Where what differs between brokers is asked by others: the other ones are the long form.
FIRST = ["nats", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]

#: A consumer of somebody else's, who knows nothing of the one that tells.
READER = """\
import json, sys
from orthanc_events_bridge.consumers import Consumer

app = Consumer("reader", broker=sys.argv[1], start="oldest")

@app.on("study.ready", "study.upd*")
def read(event):
    print(json.dumps([event.name, event.study_id, event.id, event.correlation_id, dict(event.data)]), flush=True)

app.run()
"""

#: One that dies behind the first event that it has published, before anything is noted; without a protection.
DYING = """\
import os, sys, uuid
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.consumers import publishing

if sys.argv[1] == "id":
    publishing.uuid.uuid5 = lambda namespace, name: uuid.uuid4()
if sys.argv[2] == "dies":
    send = publishing.Publisher.send

    async def dying(self, event):
        await send(self, event)
        os._exit(9)

    publishing.Publisher.send = dying
sys.exit(main(["derive", "--config", sys.argv[3]]))
"""


class Derivers(Started):
    """Processes of one configuration. Used as a context manager, which ends them.

    :param rules: the rest of the file.
    """

    def __init__(self, folder: Path, line: Line, rules: str) -> None:
        super().__init__(folder, line, "derive", rules)


def upload(line: Line, study: list[Instance] | Study) -> None:
    for instance in study:
        line.ledger.stored(line.orthanc.upload(instance.data))


def more_of(study: Study, **options: Any) -> Study:
    return make_study(patient_id=study.patient_id, study_uid=study.study_uid, **options)


def derived(line: Line) -> list[Event]:
    """What was published, as a plain client reads it: each right by its schema."""
    found = [event for event in line.events() if event.producer]
    for event in found:
        kind = derived_type(event.kind)
        assert kind is not None
        jsonschema_rs.Draft202012Validator(schema(kind, "")).validate(dict(event.data))
        # As any language finds it; Kafka has no such addresses.
        if line.broker.kind != "kafka":
            assert event.address.split(".")[-4:-1] == ["main", *event.kind.split(".")]
    return found


def told(line: Line, kind: str) -> Callable[[], list[Event]]:
    def find() -> list[Event]:
        firsts = {event.id: event for event in reversed(derived(line)) if event.kind == kind}
        return list(firsts.values())

    return find


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_in_two_halves_is_ready_once_and_late_images_update_it(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broker_or_skip(kind)
    rules = """
rules:
  - name: both
    quiet: 2s
    series:
      first: {tag: Modality, is: CT}
      second: {tag: Modality, is: SR}
"""
    reader = tmp_path / "reader.py"
    reader.write_text(READER)
    with (
        started(tmp_path / "line", broker=kind) as line,
        Derivers(tmp_path / "derive", line, rules) as derivers,
        (tmp_path / "read").open("w+") as read,
    ):
        derivers.start(1, "--workers", "2")
        reading = subprocess.Popen([sys.executable, str(reader), consumer_url(line.broker)], stdout=read)
        try:
            study = make_study(modality="CT", instances=2)
            other = make_study(modality="CT")
            upload(line, study)
            upload(line, other)
            wait_for(lambda: derivers.log().count("again in") > 2, "they are looked at, and waited for")
            assert not derived(line)
            upload(line, more_of(study, modality="SR"))
            wait_for(told(line, "study.ready"), "ready")
            (ready,) = told(line, "study.ready")()
            assert ready.resource == study.id
            wanted = {"rule": "both", "complete": True, "series": 2, "instances": 3}
            assert {name: ready.data[name] for name in wanted} == wanted
            upload(line, more_of(study, modality="CT", instances=2))
            wait_for(told(line, "study.updated"), "updated")
            (updated,) = told(line, "study.updated")()
            assert (updated.resource, updated.data["instances"], updated.data["series"]) == (study.id, 5, 3)
            # What they follow from can be found, and begins their chains.
            causes = {event.id: event.kind for event in line.events() if not event.producer}
            for event in (ready, updated):
                assert causes[event.cause] in ("study.created", "study.stable") and event.chain == event.cause
                assert event.key == study.id
            wait_for(lambda: len((tmp_path / "read").read_text().splitlines()) >= 2, "another process reads them")
            lines = [json.loads(text) for text in (tmp_path / "read").read_text().splitlines()]
            assert [(name, of, one) for name, of, one, _, _ in lines] == [
                ("study.ready", study.id, ready.id),
                ("study.updated", study.id, updated.id),
            ]
            for secret in (study.patient_id, study.study_uid, "Test^Patient"):
                assert secret not in str(derived(line))
            # Nobody takes them for Orthanc's.
            line.settle()
            line.ledger.allow("*.stable", "server.*", "*.completed")
            line.report().assert_clean()
            if kind == "nats":
                verified = Verified(line, capsys)
                assert (verified.code, verified.differences) == (0, {})
                assert verified.document["notes"]["events that consumers have published"] == len(derived(line))
            assert derivers.stop() == [0]
        finally:
            reading.kill()
            reading.wait()


@pytest.mark.parametrize("kind", FIRST)
def test_workers_that_are_killed_tell_everything_once(tmp_path: Path, kind: str) -> None:
    """Killed again and again, also in the midst of telling: nothing is missing, and what comes twice has one id."""
    broker_or_skip(kind)
    chance = random.Random(7)
    rules = "rules:\n  - {name: all, quiet: 1s}\n"
    with started(tmp_path / "line", broker=kind) as line, Derivers(tmp_path / "derive", line, rules) as derivers:
        derivers.start(2)
        studies = [make_study(modality="CT", instances=2) for _ in range(24)]
        for study in studies[:12]:
            upload(line, study)
        wait_for(told(line, "study.ready"), "the first is ready")
        for study in studies[12:]:
            upload(line, study)
            time.sleep(chance.uniform(0.1, 0.5))
            derivers.kill(chance.randrange(len(derivers)))
            derivers.start()
        ids = {study.id for study in studies}
        wait_for(lambda: {event.resource for event in told(line, "study.ready")()} == ids, "all are ready")
        late = studies[::4]
        for study in late:
            upload(line, more_of(study, modality="CT"))
            derivers.kill(chance.randrange(len(derivers)))
            derivers.start()
        wait_for(
            lambda: {event.resource for event in told(line, "study.updated")()} == {one.id for one in late}, "late"
        )
        assert derivers.stop() == [0, 0]
        assert Counter(event.resource for event in told(line, "study.ready")()) == dict.fromkeys(ids, 1)
        assert Counter(event.resource for event in told(line, "study.updated")()) == {one.id: 1 for one in late}
        assert {event.data["instances"] for event in told(line, "study.updated")()} == {3}


def test_the_pacs_says_how_many_instances_there_are(tmp_path: Path) -> None:
    """A study that is moved in two parts from a PACS, which knows all of it."""
    broker_or_skip("nats")
    pacs = Receiver(tmp_path / "pacs", DicomAlwaysAllowFind=True)
    rules = "rules:\n  - {name: all, quiet: 1s, instances: {modality: pacs}}\n"
    study = make_study(modality="MR", series=2, instances=2)
    with (
        running(pacs),
        gateway(tmp_path / "line", "nats", modalities=[pacs]) as line,
        Derivers(tmp_path / "derive", line, rules) as derivers,
    ):
        for instance in study:
            pacs.upload(instance.data)
        done = derivers.run("--check")
        assert done.returncode == 0 and "modality pacs: known to Orthanc" in done.stdout, done.stderr
        derivers.start()
        pacs.client.put("/modalities/line", json=["GATEWAY", "127.0.0.1", line.orthanc.dicom_port]).raise_for_status()
        first, second = pacs.get(f"/studies/{study.id}")["Series"]
        pacs.post("/modalities/line/store", {"Resources": [first]})
        wait_for(lambda: derivers.log().count("again in") > 2, "it is looked at, and waited for")
        done = derivers.run("--explain", study.study_uid)
        assert done.returncode == 0, done.stderr
        assert "yes rule all" in done.stdout and "instances: 2 of 4" in done.stdout
        data = json.loads(derivers.run("--explain", study.id, "--json").stdout)["data"]
        assert (data["complete"], data["missing"]["instances"], data["expected"]) == (False, 2, 4)
        assert not derived(line)
        pacs.post("/modalities/line/store", {"Resources": [second]})
        wait_for(told(line, "study.ready"), "ready")
        (ready,) = told(line, "study.ready")()
        assert (ready.data["complete"], ready.data["instances"], ready.data["expected"]) == (True, 4, 4)
        assert derivers.stop() == [0]
        text = derivers.path.read_text("utf-8")
        derivers.path.write_text(text.replace("modality: pacs", "modality: nobody"))
        done = derivers.run("--check")
        assert done.returncode == 1 and "add the modality nobody to Orthanc's DicomModalities" in done.stderr
        derivers.path.write_text(text.replace("quiet: 1s", "quiet: soon"))
        done = derivers.run()
        assert done.returncode == 2 and "is no duration" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", FIRST)
def test_a_broker_and_an_orthanc_that_are_killed_meanwhile_delay_it_only(tmp_path: Path, kind: str) -> None:
    broker_or_skip(kind)
    rules = "rules:\n  - {name: all, quiet: 2s}\n"
    with started(tmp_path / "line", broker=kind) as line, Derivers(tmp_path / "derive", line, rules) as derivers:
        derivers.start()
        wait_for(lambda: "receives events" in derivers.log(), "it works")
        studies = [make_study(modality="CT", instances=2) for _ in range(6)]
        for study in studies[:3]:
            upload(line, study)
        line.broker.kill()
        for study in studies[3:]:
            upload(line, study)
        wait_for(lambda: "gets no events" in derivers.log(), "it is noticed")
        line.broker.start()
        line.orthanc.kill()
        line.orthanc.start()
        ids = {study.id for study in studies}
        wait_for(
            lambda: {event.resource for event in told(line, "study.ready")()} == ids, "all are ready", 2 * PATIENCE
        )
        assert derivers.stop() == [0]
        assert Counter(event.resource for event in told(line, "study.ready")()) == dict.fromkeys(ids, 1)


def ids_of_one_whose_worker_dies(folder: Path, without: str) -> set[str]:
    """The ids under which a study is told ready, whose first worker dies behind telling it."""
    dying = folder / "dying.py"
    dying.write_text(DYING)
    rules = "rules:\n  - {name: all, quiet: 1s}\n"
    with started(folder / "line") as line, Derivers(folder / "derive", line, rules) as derivers:
        command = [sys.executable, str(dying), without]
        upload(line, make_study(modality="CT"))
        assert subprocess.run([*command, "dies", str(derivers.path)], timeout=PATIENCE, check=False).returncode == 9
        with subprocess.Popen([*command, "lives", str(derivers.path)], stderr=subprocess.PIPE, text=True) as living:
            assert living.stderr is not None
            assert any("told ready by rule all" in text for text in living.stderr), "the other tells it again"
            living.kill()
        found = derived(line)
        assert {event.kind for event in found} == {"study.ready"}
        return {event.id for event in found}


def test_one_that_dies_behind_telling_is_followed_by_one_that_tells_the_same(tmp_path: Path) -> None:
    broker_or_skip("nats")
    assert len(ids_of_one_whose_worker_dies(tmp_path, "nothing")) == 1


@pytest.mark.mutant
@pytest.mark.slow
def test_without_its_derived_id_it_would_be_told_as_two(tmp_path: Path) -> None:
    broker_or_skip("nats")
    assert len(ids_of_one_whose_worker_dies(tmp_path, "id")) == 2


@pytest.mark.parametrize("kind", FIRST)
def test_a_router_tells_what_it_has_sent_and_what_it_gives_up(tmp_path: Path, kind: str) -> None:
    broker_or_skip(kind)
    up, down = Receiver(tmp_path / "up"), Receiver(tmp_path / "down")
    rules = """
destinations:
  up: {modality: up}
  down: {modality: down, retry: {max_attempts: 2, initial: 100ms}}
rules:
  - {name: all, to: [up, down]}
"""
    with (
        running(up),
        gateway(tmp_path / "line", kind, modalities=[up, down]) as line,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        study = make_study(modality="CT", instances=2)
        upload(line, study)
        routers.start()
        wait_for(told(line, "study.routed"), "routed")
        wait_for(told(line, "transfer.failed"), "failed")
        (routed,), (failed,) = told(line, "study.routed")(), told(line, "transfer.failed")()
        (sent,) = routers.audit(destination="up")
        said = {"rule": "all", "destination": "up", "instances": 2, "job": sent["job"]}
        assert {name: routed.data[name] for name in said} == said
        assert (failed.data["destination"], failed.data["attempts"]) == ("down", 2)
        assert "failed 2 times of 2" in failed.data["reason"]
        (stable,) = [event for event in line.events() if event.kind == "study.stable"]
        for event in (routed, failed):
            assert (event.resource, event.chain) == (study.id, stable.id)
            assert event.source == stable.source and event.key == stable.key
        assert (routed.producer, failed.producer) == ("router-up", "router-down")
        assert routers.stop() == [0]
