"""``orthanc-events verify`` on real servers: all is right, or each kind of difference is found."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest

from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.orthanc_api import OrthancApi
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.brokers.nats import NatsBroker
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.testing.programs import MissingComponentError, require, skip_or_fail
from orthanc_events_bridge.verify import Findings
from orthanc_events_bridge.verify.orthanc import OrthancCheck
from tests.faults.test_repair import without_bridge

pytestmark = pytest.mark.integration


@pytest.fixture
def make_line(tmp_path: Path) -> Iterator[Callable[..., Line]]:
    require("orthanc", "orthanc-python")
    with ExitStack() as stack:

        def make(broker: str = "nats", **options: Any) -> Line:
            try:
                return stack.enter_context(Line(tmp_path / "line", broker=broker, **options))
            except MissingComponentError as error:
                skip_or_fail(error)

        yield make


class Verified:
    """What the command has said."""

    def __init__(self, line: Line, capsys: pytest.CaptureFixture[str], *more: str, transport: bool = True) -> None:
        arguments = ["--orthanc", line.orthanc.url, "--outbox", str(line.folder.path)]
        if transport:
            arguments += ["--config", str(line.config), "--transport", line.broker.kind]
        capsys.readouterr()
        self.code = main(["verify", *arguments, "--json", *more])
        said = capsys.readouterr()
        assert said.err == ""
        self.document = json.loads(said.out)
        print(json.dumps(self.document, indent=1))

    @property
    def differences(self) -> dict[str, int]:
        return {kind: count for kind, count in self.document["differences"].items() if count}

    def reasons(self, what: str) -> str:
        return "; ".join(one["why"] for one in self.document["reasons"] if one["what"] == what)

    def about(self, what: str) -> set[str]:
        return {one["subject"] for one in self.document["first"] if one["what"] == what}


def fill(line: Line, studies: int = 3) -> list[dicom.Study]:
    made = [dicom.make_study(series=2, instances=2) for _ in range(studies)]
    for study in made:
        for instance in study:
            line.orthanc.upload(instance.data)
    return made


@pytest.mark.parametrize(
    "broker", ["nats", *(pytest.param(one, marks=pytest.mark.slow) for one in ("rabbitmq", "kafka"))]
)
def test_all_is_right_also_while_clients_are_at_work(
    make_line: Callable[..., Line], broker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = make_line(broker, transport=BROKERS[broker].impatient)
    studies = fill(line)
    line.orthanc.delete("studies", studies[0].id)
    line.orthanc.delete("series", studies[1].series[0])
    line.settle()
    found = Verified(line, capsys)
    assert found.code == 0 and found.differences == {}
    assert found.document["checked"]["resources"] == 2 + 2 + 3
    assert found.document["checked"]["announced"] == 7
    assert found.document["checked"]["read"] >= found.document["checked"]["expected"] > 50
    with Clients(line, adders=2, loopers=1, pause=0.05):
        before = line.status()["outbox"]["last_position"]
        found = Verified(line, capsys)
        assert found.code == 0, found.document
        assert line.status()["outbox"]["last_position"] > before + 10, "nobody was at work"


def test_what_the_bridge_has_not_seen_is_missing_and_what_is_gone_is_extra(
    make_line: Callable[..., Line], capsys: pytest.CaptureFixture[str]
) -> None:
    line = make_line()
    studies = fill(line)
    line.settle()
    line.orthanc.stop()
    new = dicom.make_study()
    with without_bridge(line):
        line.orthanc.delete("studies", studies[0].id)
        line.orthanc.upload(new.instances[0].data)
        found = Verified(line, capsys, "--wait", "1", "--limit", "100")
        assert found.code == 1
        gone = {f"studies/{studies[0].id}", f"patients/{studies[0].patient}"}
        gone |= {f"series/{series}" for series in studies[0].series}
        assert found.about("extra") == gone
        unseen = {f"studies/{new.id}", f"patients/{new.patient}", f"series/{new.series[0]}"}
        assert unseen < found.about("missing")
        rows = {about for about in found.about("missing") if about.startswith("Seq ")}
        assert len(rows) >= 4 and found.about("missing") == unseen | rows
        assert "not recorded yet: capture is at Seq" in found.reasons("missing")
        assert "stopped" in found.reasons("missing")
    line.orthanc.start()
    line.settle()
    line.wait(lambda document: not document["capture"]["repairing"])
    line.settle()
    found = Verified(line, capsys)
    assert found.code == 0, "it was caught up with, and repaired"


def test_what_was_there_before_recording_is_no_difference(
    make_line: Callable[..., Line], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orthanc_events_bridge.testing.servers import OrthancServer

    with OrthancServer(tmp_path / "line" / "orthanc", stable_age=60) as plain:
        for instance in dicom.make_study(instances=3):
            plain.upload(instance.data)
    time.sleep(1.1)  # LastUpdate has whole seconds
    line = make_line(stable_age=60)
    fill(line, 1)
    line.settle()
    found = Verified(line, capsys)
    assert found.code == 0
    assert found.document["notes"]["resources of Orthanc from before recording began"] == 3
    assert found.document["notes"]["rows of Orthanc's log from before what the outbox keeps"] == 6


def test_what_a_broker_and_an_outbox_lose_is_found(
    make_line: Callable[..., Line], capsys: pytest.CaptureFixture[str]
) -> None:
    line = make_line()
    fill(line)
    line.settle()
    events = line.events()
    deleted, unrecorded = events[10], next(event for event in events[15:] if event.seq)
    moved, behind = next(
        (one, other)
        for one in events[20:]
        for other in events
        if other.key == one.key and other.sequence > one.sequence
    )
    bodies: list[bytes] = []

    async def spoil(jetstream: Any) -> None:
        stream = "ORTHANC_EVENTS"
        await jetstream.delete_msg(stream, deleted.position)
        message = await jetstream.get_msg(stream, moved.position)
        bodies.append(message.data)
        await jetstream.delete_msg(stream, moved.position)
        await jetstream.publish(message.subject, message.data, headers={"content-type": "application/cloudevents+json"})

    assert isinstance(line.broker, NatsBroker)
    line.broker.administrate(spoil)
    with closing(sqlite3.connect(line.folder.outbox, isolation_level=None)) as db:
        db.execute("DELETE FROM rows WHERE position = ?", (unrecorded.sequence,))
    found = Verified(line, capsys, "--wait", "3")
    assert found.code == 1
    assert found.differences == {"missing": 2, "extra": 1, "out_of_order": 1}
    by_event = {one["event"]: one for one in found.document["first"]}
    assert by_event[deleted.id]["what"] == "missing" and by_event[deleted.id]["sequence"] == deleted.sequence
    assert by_event[unrecorded.id]["what"] == "extra"
    assert by_event[moved.id]["what"] == "out_of_order" and behind.key == moved.key
    assert any(about.startswith(f"Seq {unrecorded.seq} of") for about in found.about("missing"))


def test_what_was_not_sent_is_missing_with_its_reason(
    make_line: Callable[..., Line], capsys: pytest.CaptureFixture[str]
) -> None:
    line = make_line(settings='events:\n  exclude: ["instance.*"]\n')
    fill(line, 1)
    line.settle()
    assert main(["transports", "pause", "nats", "--outbox", str(line.folder.path)]) == 0
    fill(line, 1)
    line.wait(lambda document: document["capture"]["state"] == "following" and not document["capture"]["waiting"])
    found = Verified(line, capsys, "--wait", "2")
    assert found.code == 1 and set(found.differences) == {"missing"}
    assert "paused: nats is at" in found.reasons("missing")
    assert found.document["notes"]["events that the configuration filters out"] >= 4
    assert main(["transports", "resume", "nats", "--outbox", str(line.folder.path)]) == 0
    line.settle()
    assert Verified(line, capsys).code == 0


def test_the_table_and_what_can_not_be_compared(
    make_line: Callable[..., Line], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = make_line(stable_age=60)
    fill(line, 1)
    line.settle()
    monkeypatch.setenv("ORTHANC_EVENTS_ORTHANC_URL", line.orthanc.url)
    monkeypatch.setenv("ORTHANC_EVENTS_OUTBOX", str(line.folder.path))
    monkeypatch.setenv("ORTHANC_EVENTS_CONFIG", str(line.config))
    capsys.readouterr()
    assert main(["verify"]) == 0
    assert "0 missing, 0 extra, 0 out of order" in capsys.readouterr().out
    line.orthanc.stop()
    with closing(sqlite3.connect(line.folder.outbox, isolation_level=None)) as db:
        db.execute("DELETE FROM resources WHERE level = 'patient'")
    with without_bridge(line):
        assert main(["verify", "--wait", "1"]) == 1
        said = capsys.readouterr().out
        assert "never recorded" in said or "not recorded yet" in said
        assert "1 missing, 0 extra, 0 out of order" in said
        assert main(["verify", "--transport", "other"]) == 2
        assert "there is no transport other" in capsys.readouterr().err
    monkeypatch.setenv("ORTHANC_EVENTS_ORTHANC_URL", f"http://127.0.0.1:{free_port()}")
    assert main(["verify"]) == 1
    assert "can't be reached" in capsys.readouterr().err
    monkeypatch.delenv("ORTHANC_EVENTS_ORTHANC_URL")
    assert main(["verify"]) == 2
    assert "which Orthanc is not said" in capsys.readouterr().err
    assert main(["verify", "--transport", "nats"]) == 0, "without Orthanc, what was sent can be compared"


# -- what is on its way ----------------------------------------------------------------------------------------


class Changing:
    """An Orthanc that changes while it is looked at: `sleep` is when time goes by.

    :param steps: done one after the other, at each sleep.
    """

    def __init__(self, writer: OutboxWriter, *steps: Callable[[], object]) -> None:
        self.studies: dict[str, str] = {}  # id → LastUpdate
        self.log: list[dict[str, Any]] = []
        self.writer = writer
        self._steps = list(steps)

    def sleep(self, _seconds: float) -> None:
        if self._steps:
            self._steps.pop(0)()

    def get(self, path: str) -> bytes:
        return json.dumps(self.json(path)).encode()

    def json(self, path: str) -> Any:
        name, _, query = path.partition("?")
        since = int(query.partition("=")[2].partition("&")[0] or 0)
        if name == "/changes":
            rows = [row for row in self.log if row["Seq"] > since]
            return {"Changes": rows, "Last": max([0, *(row["Seq"] for row in self.log)])}
        if name == "/statistics":
            return {"CountStudies": len(self.studies)}
        if name == "/studies":
            page = list(self.studies)[since:]
            return [{"ID": one, "ParentPatient": "patient", "Series": []} for one in page]
        if name.startswith("/studies/"):
            if (one := name.removeprefix("/studies/")) not in self.studies:
                raise GoneError(name)
            return {"LastUpdate": self.studies[one]}
        return {"LastUpdate": "20260101T000000"}  # the patient was there before recording began

    def store(self, study: str, second: int) -> None:
        self.studies[study] = f"20261123T2006{second:02d}"
        self.log.append({**ROW, "Seq": len(self.log) + 1, "Date": self.studies[study], "ID": study})

    def record(self) -> None:
        """Capture has caught up with the log."""
        rows = [row for row in self.log if row["Seq"] > (self.writer.cursor or 0)]
        facts = [Fact("NewStudy", "study", r["ID"], 0, r["Seq"], r["Date"], {"patient": "patient"}) for r in rows]
        self.writer.append(facts, len(self.log), 1, lambda *_: None)


ROW = {"ChangeType": "NewStudy", "ResourceType": "Study"}
BEGAN = 1_795_464_000.0  # 23 November 2026, 20:00


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Changing]:
    writer = OutboxWriter(tmp_path / "outbox.db", lambda: BEGAN)
    writer.move_cursor(0)
    yield Changing(writer)
    writer.abandon()


def compared(changing: Changing, tmp_path: Path, *steps: Callable[[], object]) -> dict[str, int]:
    """The differences that are found while steps are done."""
    changing._steps = list(steps)
    clock = iter(range(1000))
    with closing(OutboxReader(tmp_path / "outbox.db")) as outbox, Findings() as findings:
        check = OrthancCheck(
            cast(OrthancApi, changing),
            outbox,
            findings,
            lambda *_: None,
            wait=3,
            sleep=changing.sleep,
            now=lambda: float(next(clock)),
        )
        check.run()
        print(list(findings.first(20)), findings.notes)
        return {what: count for what, count in findings.counts().items() if count}


def test_what_is_recorded_a_moment_later_is_no_difference(changing: Changing, tmp_path: Path) -> None:
    changing.store("one", 1)
    assert compared(changing, tmp_path, changing.record) == {}


def test_what_is_never_recorded_is_missing_once_with_its_row(changing: Changing, tmp_path: Path) -> None:
    changing.store("one", 1)
    assert compared(changing, tmp_path) == {"missing": 2}


def test_what_comes_and_goes_is_no_difference(changing: Changing, tmp_path: Path) -> None:
    """At every look it is there and not recorded, each time as another one."""

    def again(second: int) -> Callable[[], None]:
        def step() -> None:
            changing.record()
            changing.writer.append([Fact("Deleted", "study", "one", 1)], len(changing.log), 1, lambda *_: None)
            changing.log.clear()
            changing.store("one", second)
            changing.writer.move_cursor(1)

        return step

    changing.store("one", 1)
    changing.record()
    again(2)()
    # Its row of the log is the same to the eye each time: only its date is another.
    changing.writer.move_cursor(0)
    assert compared(changing, tmp_path, again(3), again(4), again(5), again(6)) == {}


def test_a_deletion_that_is_recorded_a_moment_later_is_no_difference(changing: Changing, tmp_path: Path) -> None:
    changing.store("one", 1)
    changing.record()
    changing.studies.clear()
    deletion = Fact("Deleted", "study", "one", 1)
    assert compared(changing, tmp_path, lambda: changing.writer.append([deletion], 1, 1, lambda *_: None)) == {}


def test_a_deletion_that_is_never_recorded_is_found(changing: Changing, tmp_path: Path) -> None:
    changing.store("one", 1)
    changing.record()
    changing.studies.clear()
    assert compared(changing, tmp_path) == {"extra": 1}
