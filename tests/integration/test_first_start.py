"""What the first start records, and what a lost outbox begins with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers.nats import wait_nats
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import OrthancServer

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("start", ["now", "log"])
def test_first_start_records_from_now_or_the_whole_log(tmp_path: Path, start: str) -> None:
    require("nats-server", "orthanc", "orthanc-python")
    with OrthancServer(tmp_path / "line" / "orthanc", stable_age=10) as plain:
        before = [plain.upload(instance.data) for instance in dicom.make_study(instances=3)]
    settings = "capture:\n  start: log\n" if start == "log" else ""
    with Line(tmp_path / "line", settings=settings, stable_age=10) as line:
        after = [line.orthanc.upload(instance.data) for instance in dicom.make_study(instances=2)]
        line.settle()
        told = [event.resource for event in line.events() if event.kind == "instance.created"]
    expected = (before if start == "log" else []) + after
    assert told == [answer["ID"] for answer in expected]


def test_a_lost_outbox_goes_on_where_the_transports_are(tmp_path: Path) -> None:
    require("nats-server", "orthanc", "orthanc-python")
    with Line(tmp_path / "line", stable_age=10) as line:
        for instance in dicom.make_study(instances=3):
            line.ledger.stored(line.orthanc.upload(instance.data))
        line.settle()
        line.orthanc.stop()
        for path in line.folder.path.glob("outbox.db*"):
            path.unlink()
        # Meanwhile Orthanc goes on without the bridge: its log is all that tells of it.
        aside = tmp_path / "aside.py"
        shutil.move(line.orthanc.shim_path, aside)
        line.orthanc.shim_path.write_text("", "utf-8")
        line.orthanc.start()
        answer = line.orthanc.upload(dicom.make_study().instances[0].data)
        line.orthanc.kill()
        shutil.move(aside, line.orthanc.shim_path)
        line.orthanc.start()
        line.settle()
        wait_nats(line.broker.url, quiet=0.5)
        events = line.events()
    assert answer["ID"] in {event.resource for event in events}, "what came while the outbox was lost"
    created = [event for event in events if event.kind == "instance.created"]
    assert len(created) == 4
    assert len({event.id for event in events}) == len(events)


def test_an_older_database_behind_a_lost_outbox_is_recognised(tmp_path: Path) -> None:
    require("nats-server", "orthanc", "orthanc-python")
    with Line(tmp_path / "line", stable_age=10) as line:
        for instance in dicom.make_study(instances=5):
            line.orthanc.upload(instance.data)
        line.settle()
        line.orthanc.stop()
        for path in line.folder.path.glob("outbox.db*"):
            path.unlink()
        for path in line.orthanc.database.glob("index*"):
            path.unlink()
        line.orthanc.start()
        line.wait(lambda document: document["capture"]["state"] == "following")
        answer = line.orthanc.upload(dicom.make_study().instances[0].data)
        line.settle()
        assert line.status()["capture"]["discontinuities"] == 1
        assert "not the one that was read before" in line.orthanc.log_text()
        assert answer["ID"] in {event.resource for event in line.events()}
