"""No patient data leaves Orthanc by default: canaries in all that can hold text, and a look into all that is ours.

Orthanc's own database, its files and its own log lines are its own affair.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pydicom
import pytest
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import free_port, wait_until
from tests.integration.whole import messages, started

pytestmark = pytest.mark.integration

#: VRs of text, and the most that each can hold where that is less than a canary's length.
TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
#: What Orthanc must be able to read.
MEANT = {"SpecificCharacterSet", "PatientID", "Modality", "TransferSyntaxUID"}
#: Distinct dates, numbers and UIDs: canaries of kinds that can't hold letters.
BIRTH, WEIGHT, ROOT = "19110307", "71.391847", "2.25.7710077100771007"


@dataclass
class Aviary:
    """The canaries: each of its own, so that the finder can say which it has found."""

    names: dict[bytes, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value, name in ((BIRTH, "PatientBirthDate"), (WEIGHT, "PatientWeight"), (ROOT, "UIDs")):
            self.names[value.encode()] = name

    def canary(self, name: str) -> str:
        value = f"CNRY{len(self.names):06d}"
        self.names[value.encode()] = name
        return value

    def found_in(self, content: bytes) -> set[str]:
        """The names of the canaries in some bytes: as they are, in any case, in UTF-16; or how they are disguised."""
        found = {disguise for disguise, needle in DISGUISES if needle in content}
        for form in (content.upper(), content.replace(b"\0", b"").upper()):
            for mark in MARKS:
                start = form.find(mark)
                while start >= 0:
                    whole = form[start : start + 10] if mark == MARKS[0] else mark
                    found.add(self.names.get(whole, f"a part of {whole!r}"))
                    start = form.find(mark, start + 1)
        return found


def disguises() -> Iterator[tuple[str, bytes]]:
    mark = MARKS[0]
    yield "in hex", mark.hex().encode()
    yield "in hex", mark.hex().upper().encode()
    for shift in range(3):  # three bytes are four digits: only whole digits of the mark are looked for
        digits = base64.b64encode(b"\0" * shift + mark)
        yield "in base64", digits[-(-8 * shift // 6) : 8 * (shift + len(mark)) // 6]


#: What each canary begins with, or is.
MARKS = [b"CNRY", BIRTH.encode(), WEIGHT.encode(), ROOT.encode()]
DISGUISES = [*disguises()]


def keywords() -> list[tuple[str, str]]:
    """Every element of the standard that holds text, by keyword and VR, but file meta and the retired."""
    return [
        (keyword, vr)
        for tag, (vr, _, _, retired, keyword) in DicomDictionary.items()
        if vr in TEXT and not retired and keyword and tag >> 16 not in (0x0000, 0x0002) and keyword not in MEANT
    ]


def fill(dataset: Dataset, aviary: Aviary, prefix: str = "") -> None:
    for keyword, vr in keywords():
        value = aviary.canary(prefix + keyword)
        setattr(dataset, keyword, f"http://x/{value}" if vr == "UR" else value)


def file_of(aviary: Aviary, number: int) -> tuple[dicom.Instance, str]:
    """A file with a canary in every element that can hold one, in nested sequences and in private ones."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    fill(dataset, aviary)
    patient = aviary.canary("PatientID")
    dataset.PatientID = patient
    dataset.Modality = "CT"
    dataset.PatientBirthDate, dataset.PatientWeight = BIRTH, WEIGHT
    dataset.SOPClassUID = dicom.SOP_CLASSES["CT"]
    study, series, sop = (f"{ROOT}{number}{index}" for index in range(3))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = study, series, sop
    inner, outer = Dataset(), Dataset()
    fill(inner, aviary, "inner ")
    outer.ReferencedPatientSequence = Sequence([inner])
    outer.PatientID = aviary.canary("outer PatientID")
    dataset.OtherPatientIDsSequence = Sequence([outer])
    block = dataset.private_block(0x0011, aviary.canary("private creator"), create=True)
    block.add_new(0x01, "LO", aviary.canary("private LO"))
    block.add_new(0x02, "UN", aviary.canary("private UN").encode())
    block.add_new(0x03, "SQ", Sequence([inner]))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return dicom.Instance(patient, study, series, sop, buffer.getvalue()), patient


def live(line: Line, aviary: Aviary) -> None:
    """Everything that Orthanc can be made to do with these files, and some mishaps."""
    orthanc = line.orthanc
    for number in (1, 2):
        instance, patient = file_of(aviary, number)
        answer = orthanc.upload(instance.data)
        assert answer["Status"] == "Success"
    study = answer["ParentStudy"]
    put = orthanc.client.put
    for path, content in (
        (f"/studies/{study}/attachments/1025", aviary.canary("attachment")),
        (f"/studies/{study}/metadata/1025", aviary.canary("metadata")),
        (f"/series/{answer['ParentSeries']}/metadata/1026", aviary.canary("metadata of a series")),
        ("/modalities/self", json.dumps(["ORTHANC", "127.0.0.1", orthanc.dicom_port])),
        ("/modalities/away", json.dumps(["AWAY", "127.0.0.1", free_port()])),
    ):
        put(path, content=content.encode()).raise_for_status()
    secret, token = aviary.canary("password of a peer"), aviary.canary("token of a peer")
    peer = {"Url": f"http://127.0.0.1:{free_port()}/?token={token}", "Username": secret, "Password": secret}
    put("/peers/away", content=json.dumps(peer).encode()).raise_for_status()
    replace = {"PatientName": aviary.canary("replaced name"), "StudyDescription": aviary.canary("replaced text")}
    wanted = {"PatientID": patient, "StudyInstanceUID": f"{ROOT}20"}
    query = "/queries/" + orthanc.post("/modalities/self/query", {"Level": "Study", "Query": wanted})["ID"]
    described = {"Asynchronous": True, "Priority": 1, "Description": aviary.canary("description of a job")}
    for path, body in (
        (f"/studies/{study}/archive", {}),
        (f"/studies/{study}/anonymize", {"Replace": replace}),
        (f"/studies/{study}/modify", {"Replace": replace, "KeepSource": True}),
        (f"/studies/{study}/split", {"Series": [answer["ParentSeries"]], "Replace": replace, "KeepSource": True}),
        ("/modalities/away/store", {"Resources": [study], "MoveOriginatorAet": "MOVER"}),
        (f"{query}/retrieve", {"TargetAet": "TARGET"}),
        ("/peers/away/store", {"Resources": [study]}),
    ):
        job = orthanc.post(path, {**body, **described})["ID"]
        assert wait_until(partial(ended, line, job), 20), path
    line.broker.kill()
    orthanc.delete("studies", study)
    line.wait(lambda document: bool(document["transports"][0]["last_error"]))
    line.broker.start()
    assert wait_until(lambda: any(row["ChangeType"] == "StableStudy" for row in orthanc.changes()), 20, every=0.1)
    line.settle()


def ended(line: Line, job: str) -> bool:
    return line.orthanc.get(f"/jobs/{job}")["State"] in ("Success", "Failure")


def everything(line: Line) -> Iterator[tuple[str, bytes]]:
    """All that we have written anywhere: a name and its bytes."""
    told = messages(line.broker.url)
    assert {"job.succeeded", "job.failed", "study.stable", "instance.deleted"} <= {message.kind for message in told}
    for message in told:
        head = json.dumps([message.subject, message.headers])
        yield f"event {message.kind}", message.body
        yield f"headers of {message.kind}", head.encode()
    yield from files("outbox", line.orthanc.outbox)
    yield "the status", json.dumps(line.status()).encode()
    for options in ((), ("--json",)):
        command = [
            sys.executable,
            "-m",
            "orthanc_events_bridge",
            "status",
            "--outbox",
            str(line.orthanc.outbox),
            *options,
        ]
        yield "the status of the command line", subprocess.run(command, capture_output=True, check=True).stdout
    yield "the bridge's command line", Path(f"/proc/{line.bridge_pid()}/cmdline").read_bytes()
    line.orthanc.stop()
    yield from files("outbox of a stopped Orthanc", line.orthanc.outbox)
    line.broker.stop()
    yield from files("NATS", line.broker.server.folder)
    ours = [text for text in line.orthanc.log_text().splitlines() if "orthanc-events" in text]
    assert any("is running: nats" in text for text in ours), "also what isn't shown by default"
    for text in ours:
        # The path of the outbox tells Orthanc's own lines from ours.
        if "orthanc-events: " in text:
            yield "Orthanc's log", text.encode()


def files(name: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert found
    for path in found:
        yield f"{name}: {path.name}", path.read_bytes()


def search(aviary: Aviary, places: Iterable[tuple[str, bytes]]) -> dict[str, set[str]]:
    """Which canaries were found where."""
    result: dict[str, set[str]] = {}
    for place, content in places:
        if birds := aviary.found_in(content):
            result.setdefault(place, set()).update(birds)
    return result


def test_the_finder_finds_canaries_in_disguise() -> None:
    aviary = Aviary()
    bird = aviary.canary("bird")
    for disguised, name in (
        (bird.encode(), "bird"),
        (bird.lower().encode(), "bird"),
        (bird.encode("utf-16-le"), "bird"),
        (bird.encode().hex().encode(), "in hex"),
        *((base64.b64encode(b"x" * shift + bird.encode()), "in base64") for shift in range(3)),
    ):
        assert aviary.found_in(b"before" + disguised + b"behind") == {name}
    assert aviary.found_in(b"nothing of the kind") == set()


def test_the_finder_finds_what_is_allow_listed_and_nothing_else(tmp_path: Path) -> None:
    asked = "data:\n  tags: [PatientName, AccessionNumber, StudyDescription, StudyInstanceUID]\n  metadata: [Mine]\n"
    aviary = Aviary()
    own = {"UserMetadata": {"Mine": 1025}}
    with started(tmp_path / "line", settings=asked + "log_level: debug\n", orthanc=own, verbose=True) as line:
        live(line, aviary)
        found = search(aviary, everything(line))
    allowed = {
        "PatientName",
        "AccessionNumber",
        "StudyDescription",
        "UIDs",
        "metadata",
        "replaced name",
        "replaced text",
    }
    assert found["event study.created"] == allowed - {"metadata"}
    assert found["event study.metadata-updated"] >= {"metadata"}
    assert found.get("outbox: outbox.db", set()) | found["outbox: outbox.db-wal"] == allowed
    assert found["outbox of a stopped Orthanc: outbox.db"] == allowed
    assert any(place.startswith("NATS: ") for place in found)
    assert set().union(*found.values()) == allowed
    for place in found:
        assert place.startswith(("event ", "outbox", "NATS: ")), f"{place}: {found[place]}"


def test_by_default_no_canary_is_anywhere(tmp_path: Path) -> None:
    aviary = Aviary()
    own = {"UserMetadata": {"Mine": 1025}}
    with started(tmp_path / "line", settings="log_level: debug\n", orthanc=own, verbose=True) as line:
        live(line, aviary)
        print(f"\n{len(aviary.names)} canaries")
        assert len(aviary.names) > 4000
        log = line.orthanc.log_text().encode() + json.dumps(line.orthanc.get("/jobs?expand")).encode()
        assert {"token of a peer", "PatientID", "UIDs"} <= aviary.found_in(log), "Orthanc itself does tell of them"
        assert search(aviary, everything(line)) == {}
