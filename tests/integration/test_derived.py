"""`orthanc-events derive` beside a real Orthanc, on every broker: each study is told ready once, whoever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jsonschema
import pytest

from orthanc_events_bridge.events.derived import derived_type, schema
from orthanc_events_bridge.testing.brokers.events import Event
from orthanc_events_bridge.testing.dicom import Instance, Study, make_study
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.reacting import consumer_url
from tests.integration.routers import PATIENCE, wait_for
from tests.integration.whole import broker_or_skip, started

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")

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


class Derivers:
    """Processes of one configuration. Used as a context manager, which ends them.

    :param rules: the rest of the file.
    """

    def __init__(self, folder: Path, line: Line, rules: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "derive.yaml"
        self._log = folder / "derive.log"
        self._running: list[subprocess.Popen[bytes]] = []
        store = "" if line.broker.kind == "nats" else f"store: sqlite:///{folder}/derive.db\n"
        self.path.write_text(
            f"broker: {consumer_url(line.broker)}\northanc: {line.orthanc.url}\nstart: oldest\nack_wait: 5s\n"
            f"{store}{rules}",
            "utf-8",
        )

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "orthanc_events_bridge", "derive", "--config", str(self.path), *more]

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(self.command(*more), capture_output=True, text=True, timeout=PATIENCE, check=False)

    def start(self, count: int = 1, *more: str) -> None:
        """Start some more."""
        for _ in range(count):
            with self._log.open("ab") as log:
                self._running.append(subprocess.Popen(self.command(*more), stdout=log, stderr=log))

    def kill(self, number: int = 0) -> None:
        """Kill one at once, as `kill -9` does."""
        one = self._running.pop(number)
        one.kill()
        one.wait()

    def stop(self) -> list[int]:
        """Stop all as a user does; their exit codes."""
        for one in self._running:
            one.terminate()
        codes = [one.wait(PATIENCE) for one in self._running]
        self._running.clear()
        return codes

    def log(self) -> str:
        return self._log.read_text("utf-8") if self._log.exists() else ""

    def __len__(self) -> int:
        return len(self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._running:
            self.kill()


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
        jsonschema.Draft202012Validator(schema(kind, "")).validate(dict(event.data))
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
def test_a_study_in_two_halves_is_ready_once_and_late_images_update_it(tmp_path: Path, kind: str) -> None:
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
        derivers.start(2)
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
            # Nobody takes them for Orthanc's.
            line.settle()
            line.ledger.allow("*.stable", "server.*", "*.completed")
            line.report().assert_clean()
            assert derivers.stop() == [0, 0]
        finally:
            reading.kill()
            reading.wait()
