"""A resource that Orthanc can't describe any more, while it answers all else, holds up nothing."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import OrthancServer
from tests.integration.replay_tools import Command
from tests.integration.whole import messages

pytestmark = pytest.mark.integration

#: How Orthanc's index comes to answer 500 to whoever asks for a resource, by its internal number.
INSTANCE = "UPDATE AttachedFiles SET fileType = 1024 WHERE id = ?"  # it knows nothing of the file
STUDY = "UPDATE Resources SET parentId = NULL WHERE internalId = ?"  # nor of the patient


def line_behind(folder: Path, studies: list[dicom.Study], damage: str, damaged: str, settings: str = "") -> Line:
    """A line, not started, whose Orthanc had studies before, and can't describe one resource any more."""
    require("nats-server", "orthanc", "orthanc-python")
    with OrthancServer(folder / "orthanc", stable_age=3) as plain:
        for study in studies:
            for instance in study:
                plain.upload(instance.data)
        index = plain.database / "index"
    with closing(sqlite3.connect(index)) as db, db:
        number = db.execute("SELECT internalId FROM Resources WHERE publicId = ?", (damaged,)).fetchone()
        assert db.execute(damage, number).rowcount == 1
    return Line(folder, settings=settings, stable_age=3)


def test_what_orthanc_can_not_describe_is_told_without_tags_and_counted(tmp_path: Path) -> None:
    study = dicom.make_study(instances=3, modality="MR")
    ids = [instance.id for instance in study]
    settings = "capture:\n  start: log\ndata:\n  tags: [Modality]\n"
    with line_behind(tmp_path / "line", [study], INSTANCE, ids[1], settings) as line:
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            line.orthanc.get(f"/instances/{ids[1]}")
        after = line.orthanc.upload(dicom.make_study(modality="CT").instances[0].data)
        line.settle()
        told = [message.event["data"] for message in messages(line.broker.url) if message.kind == "instance.created"]
        capture = line.status()["capture"]
        log = line.orthanc.log_text()
    assert [one["id"] for one in told] == [*ids, after["ID"]]
    mr, ct = {"Modality": "MR"}, {"Modality": "CT"}
    assert [one.get("tags") for one in told] == [mr, None, mr, ct]
    assert [bool(one["parents"]) for one in told] == [True, False, True, True]
    assert capture["state"] == "following" and capture["unanswered"] == 1
    assert log.count("it is passed over, and what depends on it is not told") == 1


def test_a_backfill_passes_over_what_orthanc_can_not_describe(tmp_path: Path) -> None:
    studies = [dicom.make_study() for _ in range(5)]
    with line_behind(tmp_path / "line", studies, STUDY, studies[2].id) as line:
        line.settle()
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            line.orthanc.get(f"/studies/{studies[2].id}")
        done = json.loads(Command(line.folder.path, line.config).run("backfill", "--json")[0])
        assert (done["state"], done["looked"]) == ("done", 5)
        line.settle()
        told = {event.resource for event in line.events() if event.kind == "study.created"}
        assert told == {study.id for study in studies} - {studies[2].id}
        assert line.status()["capture"]["unanswered"] == 1
