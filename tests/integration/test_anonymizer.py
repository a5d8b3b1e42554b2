"""The anonymizer at a real Orthanc, on every broker: each study once, nothing of the patient left, and results back."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from orthanc_events_bridge.testing.dicom import make_study, orthanc_id
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.postgresql import PostgresServer
from tests.integration.anonymized import (
    NAME,
    PATIENT_ID,
    ROOT,
    Anonymizers,
    as_dataset,
    elements,
    files,
    full_of_canaries,
    results_of,
    tells,
)
from tests.integration.routers import PATIENCE, gateway, stored, wait_for
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")
RULES = """
projects:
  trial: {secret_file: secret, profile: trial}
profiles:
  trial: {dates: shift, retain: [device], keep: [StudyDescription]}
rules:
  - {name: pictures, when: {not: {tag: Modality, is: [SR, DOC]}}, to: [trial]}
"""
#: Of pydicom's own data: CT, MR, ultrasound, a compressed one, one with overlays, radiotherapy.
SAMPLES = (
    "CT_small.dcm",
    "MR_small_implicit.dcm",
    "JPEG2000.dcm",
    "examples_overlay.dcm",
    "rtplan.dcm",
    "rtdose.dcm",
)


@contextlib.contextmanager
def memory(folder: Path, kind: str) -> Iterator[str | None]:
    """Where an anonymizer remembers: a PostgreSQL with RabbitMQ, else a file."""
    if kind != "rabbitmq":
        yield None
        return
    with PostgresServer(folder / "postgres") as server:
        yield f"postgresql://postgres@127.0.0.1:{server.port}/postgres"


def uids(data: bytes) -> list[str]:
    """All UIDs in a file, in its order."""
    return [str(one.value) for one in elements(as_dataset(data)) if one.VR == "UI"]


class Watched:
    """A line, and what was put into it.

    :ivar originals: Orthanc's ids of the studies, and the files of each.
    """

    def __init__(self, line: Line) -> None:
        self.orthanc = line.orthanc
        self.originals: dict[str, list[bytes]] = {}

    def upload(self, *data: bytes) -> str:
        """Put instances of one study there; its id."""
        for one in data:
            self.orthanc.upload(one)
        first = as_dataset(data[0])
        study = orthanc_id(str(first.PatientID), str(first.StudyInstanceUID))
        self.originals[study] = list(data)
        return study

    def pseudonymised(self) -> dict[str, list[bytes]]:
        """The files of all other studies, by their ids."""
        others = set(self.orthanc.get("/studies")) - set(self.originals)
        return {study: files(self.orthanc, study) for study in sorted(others)}


@pytest.mark.parametrize(
    ("studies", "kills"),
    [pytest.param(4, 4, id="4-studies"), pytest.param(60, 20, id="60-studies", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_study_is_pseudonymised_once_and_its_results_come_back_whoever_is_killed(
    tmp_path: Path, kind: str, studies: int, kills: int
) -> None:
    broker_or_skip(kind)
    chance = random.Random(7)
    with (
        memory(tmp_path, kind) as store,
        gateway(tmp_path / "line", kind) as line,
        Anonymizers(tmp_path / "anonymizers", line, RULES, store) as workers,
    ):
        watched = Watched(line)
        workers.start(2)

        def kill() -> None:
            for _ in range(kills // 2):
                time.sleep(chance.uniform(0.2, 1.0))
                workers.kill(chance.randrange(len(workers)))
                workers.start()

        canary = make_study(study_uid=f"{ROOT}.1", patient_id=PATIENT_ID, instances=2)
        wanted = {watched.upload(*(full_of_canaries(one.data) for one in canary))}
        for number in range(studies):
            made = make_study(modality=("CT", "MR", "US", "CR")[number % 4], series=2, instances=3)
            wanted.add(watched.upload(*(one.data for one in made)))
        for name in SAMPLES:
            wanted.add(watched.upload(Path(str(get_testdata_file(name))).read_bytes()))
        left = watched.upload(Path(str(get_testdata_file("reportsi.dcm"))).read_bytes())
        kill()
        count = sum(len(watched.originals[study]) for study in wanted)
        wait_for(lambda: len(line.orthanc.get("/instances")) >= 2 * count + 1, "all are there", 2 * PATIENCE)
        wait_for(lambda: len({one["id"] for one in workers.audit("pseudonymised")}) == len(wanted), "all are noted")
        there = watched.pseudonymised()
        assert len(there) == len(wanted) and sum(map(len, there.values())) == count
        assert {one["id"] for one in workers.audit("pseudonymised")} == wanted
        assert not [found for content in there.values() for file in content for found in tells(file)]
        # As many as there were, in as many series; pixels and kinds as they were.
        before = [[as_dataset(file) for file in watched.originals[study]] for study in wanted]
        after = [[as_dataset(file) for file in content] for content in there.values()]
        assert sorted(map(shape, before)) == sorted(map(shape, after))

        # Results.
        before_them = len(workers.log())
        for content in there.values():
            for result in results_of(content):
                line.orthanc.upload(result)
        kill()
        total = 2 * count + 1 + 4 * len(there)
        wait_for(lambda: len(line.orthanc.get("/instances")) >= total, "all came back", 2 * PATIENCE)
        # Until all that this has caused was looked at: originals once more, with results in them.
        looked = [f"subject='studies/{study}')" for study in wanted]
        wait_for(lambda: all(text in workers.log()[before_them:] for text in looked), "all is looked at again")
        assert workers.stop() == [0, 0]
        assert len(line.orthanc.get("/instances")) == total
        assert len(line.orthanc.get("/studies")) == 2 * len(wanted) + 1
        assert set(stored(line.orthanc).values()) == {1}
        assert len(files(line.orthanc, left)) == 1
        for study in wanted:
            check_results(files(line.orthanc, study), watched.originals[study])
        assert NAME not in workers.log() and PATIENT_ID not in workers.log()


def shape(study: list[Any]) -> str:
    """What a study keeps of itself."""
    series = len({one.SeriesInstanceUID for one in study})
    pictures = sorted((str(one.SOPClassUID), hash(one.get("PixelData"))) for one in study)
    return f"{series} {pictures}"


def check_results(found: list[bytes], original: list[bytes]) -> None:
    """The two results are there beside the original, and all that they name is its own."""
    own = {str(as_dataset(file).SOPInstanceUID) for file in original}
    results = {one.Modality: one for one in map(as_dataset, found) if str(one.SOPInstanceUID) not in own}
    assert set(results) == {"OT", "SR"}, results
    source = as_dataset(original[0])
    capture, report = results["OT"], results["SR"]
    for one in (capture, report):
        assert (one.PatientID, one.PatientName) == (source.PatientID, source.PatientName)
        assert one.StudyInstanceUID == source.StudyInstanceUID
        for keyword in ("StudyDate", "AccessionNumber", "PatientBirthDate"):
            assert (one.get(keyword) or "") == (source.get(keyword) or "")
        assert one.get("FrameOfReferenceUID") == source.get("FrameOfReferenceUID")
        assert one.PatientIdentityRemoved == "NO"
    assert {str(one.ReferencedSOPInstanceUID) for one in capture.SourceImageSequence} == own
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == source.StudyInstanceUID
    series = evidence.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID in {as_dataset(file).SeriesInstanceUID for file in original}
    assert {str(one.ReferencedSOPInstanceUID) for one in series.ReferencedSOPSequence} == own
    assert report.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == capture.SOPInstanceUID
    assert str(report.ContentSequence[1].UID) in own
    assert capture.SeriesInstanceUID not in {as_dataset(file).SeriesInstanceUID for file in original}
    assert capture.PixelData == b"AI!!"
