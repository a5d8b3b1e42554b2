"""The anonymizer at a real Orthanc, on every broker: each study once, nothing of the patient left, and results back."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from orthanc_events_bridge.testing.dicom import make_study, orthanc_id
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.workflows.deidentify import pseudonymise
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from tests.integration.anonymized import (
    NAME,
    PATIENT_ID,
    ROOT,
    Anonymizers,
    as_dataset,
    files,
    full_of_canaries,
    memory,
    results_of,
    tells,
)
from tests.integration.commands import PATIENCE, wait_for
from tests.integration.routers import gateway, stored
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


@pytest.mark.parametrize(
    "profile",
    [
        Profile(),
        Profile(dates="shift", private={"ACME KUNIGUNDE": ("all",)}, keep=("PatientComments", "OtherPatientIDs")),
    ],
    ids=["basic", "own"],
)
def test_no_identifier_is_left_wherever_it_was(profile: Profile) -> None:
    content = full_of_canaries(make_study(study_uid=f"{ROOT}.1", patient_id=PATIENT_ID).instances[0].data)
    assert len(tells(content)) > 5
    assert tells(pseudonymise(content, profile, Pseudonyms("trial", b"0123456789abcdef")).content) == []


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
        # It was told, by what was made alone.
        told = [event for event in line.events() if event.producer]
        assert {event.resource for event in told if event.kind == "study.anonymized"} == set(there)
        received = [event for event in told if event.kind == "result.received"]
        assert {event.data["parents"]["study"] for event in received} == wanted
        assert len({event.resource for event in received}) == 2 * len(wanted)  # a report's series and a picture's
        assert not any(event.cause for event in told)


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


def test_only_its_own_studies_results_are_given_back_and_nothing_twice(tmp_path: Path) -> None:
    """Instances of a stranger under the same StudyInstanceUID; a pseudonym's other study; a late image."""
    broker_or_skip("nats")
    with gateway(tmp_path / "line", "nats") as line, Anonymizers(tmp_path / "a", line, RULES) as workers:
        workers.start()
        watched = Watched(line)
        study = make_study(instances=2)
        original = watched.upload(*(one.data for one in study))
        wait_for(lambda: len(line.orthanc.get("/instances")) == 4 and workers.audit("pseudonymised"), "pseudonymised")
        ((pseudonym, made),) = watched.pseudonymised().items()
        source = as_dataset(made[0])
        stranger = make_study(patient_id="STRANGER", study_uid=str(source.StudyInstanceUID), modality="SR")
        other = make_study(patient_id=str(source.PatientID), modality="CT")
        # De-identified elsewhere: nobody's to be pseudonymised once more.
        foreign = make_study(canary={"PatientIdentityRemoved": "YES"})
        for one in (*stranger, *other, *foreign):
            line.orthanc.upload(one.data)
        wait_for(lambda: workers.audit("not given back", id=stranger.id), "the stranger's")
        wait_for(lambda: f"subject='studies/{other.id}'): it is a pseudonym's" in workers.log(), "the pseudonym's")
        wait_for(lambda: workers.audit("pseudonymised", id=foreign.id), "what was de-identified")
        (told,) = workers.audit("pseudonymised", id=foreign.id)
        assert (told["instances"], told["left_out"]) == (0, {"it is de-identified already": 1})
        result = results_of(made)[1]
        line.orthanc.upload(result)
        wait_for(lambda: len(files(line.orthanc, original)) == 3, "the result")
        wait_for(lambda: len(workers.audit("given back")) == 1, "that it is said")
        everything = set(line.orthanc.get("/instances"))
        assert len(everything) == 4 + 3 + 2
        before = len(workers.log())
        # A late image of the original: it alone is pseudonymised.
        late = make_study(patient_id=study.patient_id, study_uid=study.study_uid)
        line.orthanc.upload(late.instances[0].data)
        wait_for(lambda: len(files(line.orthanc, pseudonym)) == 4, "the late one")
        wait_for(lambda: len(workers.audit("pseudonymised", id=original)) == 2, "that it is said")
        assert [one["instances"] for one in workers.audit("pseudonymised", id=original)] == [2, 1]
        assert workers.stop() == [0]
        assert len(line.orthanc.get("/instances")) == len(everything) + 2
        assert set(stored(line.orthanc).values()) == {1}
        assert "Traceback" not in workers.log()[before:]


def test_series_by_series_and_results_in_a_study_of_their_own(tmp_path: Path) -> None:
    broker_or_skip("nats")
    rules = f"event: series.stable\n{RULES}"
    with gateway(tmp_path / "line", "nats") as line, Anonymizers(tmp_path / "a", line, rules) as workers:
        workers.start()
        watched = Watched(line)
        study = make_study(series=2, instances=2, canary={"FrameOfReferenceUID": f"{ROOT}.7"})
        original = watched.upload(*(one.data for one in study))
        wait_for(lambda: len(workers.audit("pseudonymised")) == 2, "both series")
        assert {one["id"] for one in workers.audit("pseudonymised")} == set(study.series)
        (made,) = watched.pseudonymised().values()
        assert shape(list(map(as_dataset, made))) == shape([as_dataset(one.data) for one in study])
        for result in results_of(made, apart=True):
            line.orthanc.upload(result)
        wait_for(lambda: len(files(line.orthanc, original)) == 6, "the results")
        wait_for(lambda: len(workers.audit("given back")) == 2, "that it is said")
        check_results(files(line.orthanc, original), watched.originals[original])
        assert workers.stop() == [0]
        assert len(line.orthanc.get("/instances")) == 4 + 4 + 2 + 2


def test_it_explains_checks_says_who_it_is_and_what_is_missing(tmp_path: Path) -> None:
    broker_or_skip("nats")
    with gateway(tmp_path / "line", "nats") as line, Anonymizers(tmp_path / "a", line, RULES) as workers:
        done = workers.run("--check")
        assert done.returncode == 0, done.stderr
        assert "consumer anonymizer: " in done.stdout and done.stdout.endswith("project trial: profile trial\n")
        database = tmp_path / "a" / "anonymizer.db"
        assert database.stat().st_mode & 0o777 == 0o600
        study = make_study(patient_id="P-4711", canary={"PatientName": "Doe^John"})
        workers.start(1, "--dry-run")
        wait_for(lambda: "the consumer anonymizer-dry-run receives events" in workers.log(), "the dry run")
        line.orthanc.upload(study.instances[0].data)
        wait_for(lambda: "trial by pictures" in workers.log(), "a decision")
        assert workers.stop() == [0]
        assert not workers.audit("pseudonymised") and len(line.orthanc.get("/instances")) == 1
        done = workers.run("--explain", study.study_uid)
        assert done.stdout.endswith(
            "yes rule pictures, to trial\n  yes not\n    no  tag Modality is 'SR' or 'DOC'; there is"
            " 'CT'\nit goes to trial (by pictures)\n"
        ), done.stdout + done.stderr
        workers.start()
        wait_for(lambda: workers.audit("pseudonymised"), "pseudonymised")
        assert workers.stop() == [0]
        done = workers.run("--explain", study.id)
        assert done.stdout.endswith("1 of its study's instances are pseudonymised for trial\n"), done.stdout
        (pseudonym,) = set(line.orthanc.get("/studies")) - {study.id}
        patient = line.orthanc.get(f"/studies/{pseudonym}")["PatientMainDicomTags"]["PatientID"]
        for known in ("P-4711", patient, study.study_uid):
            found = json.loads(workers.run("--who", known, "--json").stdout)
            values = {(one["what"], one["original"], one["pseudonym"]) for one in found}
            assert {("PatientID", "P-4711", patient), ("PatientName", "Doe^John", patient)} <= values
        done = workers.run("--who", study.instances[0].sop_uid)
        assert done.stdout.startswith("PROJECT  WHAT  ORIGINAL") and study.instances[0].sop_uid in done.stdout
        assert workers.run("--who", "P-4712").returncode == 1
        assert "Doe" not in workers.log() and "P-4711" not in workers.log()

        database.chmod(0o644)
        done = workers.run()
        assert done.returncode == 1 and f"(chmod 600 {database})" in done.stderr
        database.chmod(0o600)
        (tmp_path / "a" / "secret").write_text("another-secret-of-a-project")
        done = workers.run()
        assert done.returncode == 1 and "the secret of the project trial is another one" in done.stderr
        workers.path.write_text(workers.path.read_text().replace("to: [trial]", "to: [trail]"))
        done = workers.run()
        assert done.returncode == 2 and "'trail' is no project; the projects are: trial" in done.stderr
        assert "Traceback" not in done.stderr
