"""Every kind of change of a real Orthanc, read back from the stream and compared with the wire contract.

What was to be told comes from Orthanc itself: its log, and a user's own callback that writes down every call.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.bridged import SOURCE
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import free_port, wait_until
from tests.integration.whole import Message, messages, started

pytestmark = pytest.mark.integration

NAMESPACE = uuid.UUID("8be797cd-5573-46b7-8097-bea664a99a80")
LEVELS = {0: "patient", 1: "study", 2: "series", 3: "instance"}
PLURALS = {
    "patient": "patients",
    "study": "studies",
    "series": "series",
    "instance": "instances",
    "job": "jobs",
}
ABOVE = {
    "patient": set(),
    "study": {"patient"},
    "series": {"patient", "study"},
    "instance": {"patient", "study", "series"},
}

#: Orthanc's ChangeType → its name, the levels at which the story below shows it, and the verb.
KINDS: dict[int, tuple[str, set[str], str]] = {
    0: ("CompletedSeries", {"series"}, "completed"),
    1: ("Deleted", {"patient", "study", "series", "instance"}, "deleted"),
    2: ("NewChildInstance", {"patient", "study", "series"}, "instance-added"),
    3: ("NewInstance", {"instance"}, "created"),
    4: ("NewPatient", {"patient"}, "created"),
    5: ("NewSeries", {"series"}, "created"),
    6: ("NewStudy", {"study"}, "created"),
    7: ("StablePatient", {"patient"}, "stable"),
    8: ("StableSeries", {"series"}, "stable"),
    9: ("StableStudy", {"study"}, "stable"),
    10: ("OrthancStarted", {"server"}, "started"),
    11: ("OrthancStopped", {"server"}, "stopped"),
    12: ("UpdatedAttachment", {"patient", "study", "series", "instance"}, "attachment-updated"),
    13: ("UpdatedMetadata", {"patient", "study", "series", "instance"}, "metadata-updated"),
    14: ("UpdatedPeers", {"server"}, "peers-updated"),
    15: ("UpdatedModalities", {"server"}, "modalities-updated"),
    16: ("JobSubmitted", {"job"}, "submitted"),
    17: ("JobSuccess", {"job"}, "succeeded"),
    18: ("JobFailure", {"job"}, "failed"),
}
LOGGED = {0, 3, 4, 5, 6, 7, 8, 9, 12, 13}
JOBS = {16, 17, 18}

#: What of a job may be told.
JOB_FIELDS = {
    "type", "state", "progress", "errorCode", "created", "completed", "runtime", "localAet", "remoteAet",
    "targetAet", "peer", "instances", "failedInstances", "parentResources",
}  # fmt: skip

#: A user's callback that writes down every call, and a way to call ours as an Orthanc of the future would.
WITNESS = """\
import json
import orthanc

def on_change(kind, level, resource):
    with open({path!r}, "a") as file:
        file.write(json.dumps([int(kind), int(level), resource]) + "\\n")

orthanc.RegisterOnChangeCallback(on_change)
"""
FUTURE = """\
import json
register = orthanc.RegisterOnChangeCallback
def keeping(callback):
    def future(output, uri, **request):
        callback(*json.loads(request["body"]))
        output.AnswerBuffer("{}", "application/json")
    keeping.future = future  # or it is freed without the interpreter's lock when Orthanc ends
    orthanc.RegisterRestCallback("/test/future", future)
    register(callback)
orthanc.RegisterOnChangeCallback = keeping
"""


@dataclass
class Story:
    """What happened, and what the stream says of it."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    calls: list[tuple[int, int, str]] = field(default_factory=list)
    parents: dict[str, dict[str, str]] = field(default_factory=dict)
    #: What Orthanc answered about a job.
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    future: list[tuple[int, int, str]] = field(default_factory=list)
    told: list[Message] = field(default_factory=list)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    recorder: str = ""

    def of(self, change: str) -> list[Message]:
        return [message for message in self.told if message.event["data"]["change"] == change]


def look(line: Line, story: Story) -> None:
    """Write down Orthanc's log and who is whose parent: a deletion erases both."""
    story.rows |= {row["Seq"]: row for row in line.orthanc.changes()}
    for instance in line.orthanc.get("/instances"):
        series = line.orthanc.get(f"/instances/{instance}")["ParentSeries"]
        study = line.orthanc.get(f"/series/{series}")["ParentStudy"]
        patient = line.orthanc.get(f"/studies/{study}")["ParentPatient"]
        story.parents[instance] = {"series": series, "study": study, "patient": patient}
        story.parents[series] = {"study": study, "patient": patient}
        story.parents[study] = {"patient": patient}
        story.parents[patient] = {}


def series_of_two() -> list[dicom.Instance]:
    """A series that is complete with its second instance, and says so."""
    patient, study, series = "SERIES OF TWO", dicom.new_uid(), dicom.new_uid()
    made = []
    for number in (1, 2):
        uid, tags = dicom.new_uid(), {"InstanceNumber": number, "CardiacNumberOfImages": 2}
        data = dicom.instance_bytes(patient, study, series, uid, modality="MR", tags=tags)
        made.append(dicom.Instance(patient, study, series, uid, data))
    return made


def finished(line: Line, job: str) -> dict[str, Any]:
    def ended() -> bool:
        return line.orthanc.get(f"/jobs/{job}")["State"] in ("Success", "Failure")

    assert wait_until(ended, 20), "the job did not end"
    answer: dict[str, Any] = line.orthanc.get(f"/jobs/{job}")
    return answer


def put(line: Line, path: str, body: str) -> None:
    line.orthanc.client.put(path, content=body.encode()).raise_for_status()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("changes")
    script, calls = folder / "witness.py", folder / "calls.jsonl"
    script.write_text(WITNESS.format(path=str(calls)), "utf-8")
    story = Story()
    # Not UTC: what is told has to be.
    with started(folder / "line", script=script, before=FUTURE, environment={"TZ": "ABC5"}) as line:
        orthanc = line.orthanc
        for instance in series_of_two():
            orthanc.upload(instance.data)
        study = dicom.make_study(instances=2, series=2)
        for instance in study:
            orthanc.upload(instance.data)
        first = study.instances[0]
        for level, resource in (
            ("patients", study.patient),
            ("studies", study.id),
            ("series", first.series),
            ("instances", first.id),
        ):
            put(line, f"/{level}/{resource}/attachments/1025", "an attachment")
            put(line, f"/{level}/{resource}/metadata/1024", "a metadata")
        put(
            line,
            "/peers/away",
            json.dumps(
                {"Url": f"http://who:secret-1@127.0.0.1:{free_port()}/", "Username": "who", "Password": "secret-2"}
            ),
        )
        put(line, "/modalities/away", json.dumps(["AWAY", "127.0.0.1", free_port()]))
        for path, body in (
            (f"/studies/{study.id}/archive", {"Asynchronous": True}),
            ("/modalities/away/store", {"Resources": [study.id], "Asynchronous": True}),
            ("/peers/away/store", {"Resources": [study.id], "Asynchronous": True}),
        ):
            job = orthanc.post(path, body)["ID"]
            story.jobs[job] = finished(line, job)
        story.future = [(99, 1, study.id), (99, 4, ""), (100, 4, "something")]
        for kind in story.future:
            orthanc.post("/test/future", kind)
        line.wait(lambda document: len({row["ChangeType"] for row in orthanc.changes()}) == len(LOGGED))
        time.sleep(0.5)  # the stable events of the other patient
        look(line, story)
        orthanc.delete("studies", study.id)
        line.settle()
        story.recorder = line.status()["outbox"]["recorder"]
        orthanc.stop()
        assert wait_until(lambda: not orthanc.children(), 10)
        story.told = messages(line.broker.url)
        story.calls = [tuple(json.loads(text)) for text in calls.read_text("utf-8").splitlines()]
    return story


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind}-{KINDS[kind][0]}")
def test_every_kind_of_change_becomes_its_event(story: Story, kind: int) -> None:
    change, levels, verb = KINDS[kind]
    told = story.of(change)
    called = [
        (LEVELS.get(level, "job" if kind in JOBS else "server"), resource)
        for k, level, resource in story.calls
        if k == kind
    ]
    assert called, f"Orthanc never called back for {change}"
    assert [(m.event["data"]["level"], m.event["data"]["id"] or "") for m in told] == called, (
        "as often, and in Orthanc's order"
    )
    assert {level for level, _ in called} == levels
    if kind in LOGGED:
        rows = [row for row in story.rows.values() if row["ChangeType"] == change]
        assert [message.event["data"]["seq"] for message in told] == [row["Seq"] for row in rows]
    for message in told:
        check(story, message, verb)


def check(story: Story, message: Message, verb: str) -> None:
    """Compare a message with the wire contract, attribute by attribute."""
    event = message.event
    data = event["data"]
    level, resource = data["level"], data["id"]
    row = story.rows.get(data.get("seq", -1))
    name = f"{level}.{verb}"

    # The envelope.
    assert message.headers == {"content-type": "application/cloudevents+json", "Nats-Msg-Id": event["id"]}
    optional = {"subject"} if level in PLURALS else set()
    assert event.keys() == optional | {
        "specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "recorder", "sequence",
        "partitionkey", "recordedtime", "traceparent", "data",
    }  # fmt: skip
    assert event["specversion"] == "1.0"
    assert event["source"] == SOURCE
    assert event["type"] == f"io.orthanc-events.{name}.v1"
    assert event["dataschema"] == f"urn:orthanc-events:schema:{name}.v1"
    assert event["datacontenttype"] == "application/json"
    if level in PLURALS:
        assert event["subject"] == f"{PLURALS[level]}/{resource}"

    # The identity, and the times.
    if row is not None:
        spelt = [SOURCE, str(row["Seq"]), row["Date"], row["ChangeType"], row["ResourceType"], row["ID"]]
        assert (data["change"], resource) == (row["ChangeType"], row["ID"])
        assert event["id"] == str(uuid.uuid5(NAMESPACE, "\n".join(spelt)))
        at = datetime.strptime(row["Date"], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        assert event["time"] == at.strftime("%Y-%m-%dT%H:%M:%SZ")
    else:
        assert uuid.UUID(event["id"]).version == 4
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["recordedtime"])
    at, recorded = (datetime.fromisoformat(event[attribute]) for attribute in ("time", "recordedtime"))
    assert story.began - timedelta(seconds=1) <= at <= recorded <= datetime.now(UTC)
    trace = hashlib.sha256(b"trace" + event["id"].encode()).hexdigest()
    assert event["traceparent"] == f"00-{trace[:32]}-{trace[32:48]}-01"

    # The order, and the address.
    assert event["recorder"] == story.recorder
    assert re.fullmatch(r"\d{20}", event["sequence"])
    parents = story.parents.get(resource or "", {})
    key = resource if level in ("patient", "study", "job") else parents["study"] if parents else "server"
    assert event["partitionkey"] == key
    partition = f"{zlib.crc32(key.encode()) % 64:02d}"
    assert message.subject == f"orthanc.events.main.{level}.{verb}.{partition}"

    # The data.
    assert data["parents"] == parents
    assert data["parents"].keys() == ABOVE.get(level, set())
    assert data.keys() == {"change", "level", "id", "parents"} | ({"seq"} if row else set()) | (
        {"job"} if level == "job" else set()
    )
    if level == "server":
        assert resource is None


def test_events_are_in_the_order_of_orthancs_callbacks_and_each_has_its_own_number(story: Story) -> None:
    told = [(m.event["data"]["change"], m.event["data"]["id"] or "") for m in story.told if m.kind[-7:] != "unknown"]
    assert told == [(KINDS[kind][0], resource) for kind, _, resource in story.calls if kind in KINDS]
    numbers = [int(message.event["sequence"]) for message in story.told]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len({message.event["id"] for message in story.told}) == len(story.told)


def test_deletions_name_the_parents_of_what_is_gone(story: Story) -> None:
    deleted = {m.event["data"]["id"]: m.event["data"]["parents"] for m in story.of("Deleted")}
    assert len(deleted) == 4 + 2 + 1 + 1
    assert deleted == {resource: story.parents[resource] for resource in deleted}
    assert sorted(map(len, deleted.values())) == [0, 1, 2, 2, 3, 3, 3, 3]


def test_jobs_are_told_as_orthanc_has_them_and_only_what_is_allowed(story: Story) -> None:
    types = set()
    for message in story.told:
        data = message.event["data"]
        if data["level"] != "job":
            continue
        job, answer = data["job"], story.jobs[data["id"]]
        assert job.keys() <= JOB_FIELDS
        assert (job["type"], job["created"]) == (answer["Type"], answer["CreationTime"])
        types.add(job["type"])
        if message.kind == "job.submitted":
            assert job["state"] in ("Pending", "Running", "Success", "Failure")
            continue
        assert job["state"] == answer["State"] == {"job.succeeded": "Success", "job.failed": "Failure"}[message.kind]
        assert job["progress"] == answer["Progress"]
        assert job["errorCode"] == answer["ErrorCode"]
        assert job["completed"] == answer["CompletionTime"]
        content = answer["Content"]
        if job["type"] == "DicomModalityStore":
            assert (job["localAet"], job["remoteAet"]) == ("ORTHANC", "AWAY")
            assert job["parentResources"] == content["ParentResources"]
        if job["type"] == "OrthancPeerStore":
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", job["peer"])
    assert types == {"Archive", "DicomModalityStore", "OrthancPeerStore"}


def test_what_a_peers_url_says_of_its_user_is_told_to_nobody(story: Story) -> None:
    assert any("secret-1" in json.dumps(answer) for answer in story.jobs.values()), "Orthanc itself shows it"
    everything = b"".join(message.body for message in story.told)
    assert b"OrthancPeerStore" in everything
    for secret in (b"secret-1", b"secret-2", b"who"):
        assert secret not in everything


def test_kinds_of_the_future_are_told_with_what_was_given(story: Story) -> None:
    told = [message for message in story.told if message.kind.endswith(".unknown")]
    given = [(m.kind, m.event["data"]["change"], m.event["data"]["id"]) for m in told]
    assert given == [
        ("study.unknown", "99", story.future[0][2]),
        ("server.unknown", "99", None),
        ("server.unknown", "100", "something"),
    ]
    for message in told[:2]:
        check(story, message, "unknown")
    assert "subject" not in told[2].event


def test_allow_listed_tags_and_metadata_are_told_and_no_others(tmp_path: Path) -> None:
    asked = "data:\n  tags: [Modality, StudyInstanceUID, PatientID, NoSuchTag]\n  metadata: [RemoteAET, Mine]\n"
    with started(tmp_path / "line", settings=asked, orthanc={"UserMetadata": {"Mine": 1025}}) as line:
        study = dicom.make_study(modality="MR")
        line.orthanc.upload(study.instances[0].data)
        put(line, f"/studies/{study.id}/metadata/Mine", "a value")
        line.settle()
        line.orthanc.delete("patients", study.patient)
        line.settle()
        told = {message.kind: message.event["data"] for message in messages(line.broker.url)}
    uid = study.study_uid
    assert told["patient.created"]["tags"] == {"PatientID": study.patient_id}
    assert told["study.created"]["tags"] == {"StudyInstanceUID": uid, "PatientID": study.patient_id}
    wanted = {"Modality": "MR", "StudyInstanceUID": uid, "PatientID": study.patient_id}
    for kind in ("series.created", "series.instance-added", "instance.created"):
        assert told[kind]["tags"] == wanted
    assert told["study.created"]["metadata"].keys() <= {"Mine"}
    assert told["study.metadata-updated"]["metadata"] == {"Mine": "a value"}
    assert told["instance.created"]["metadata"].keys() <= {"RemoteAET"}
    # Of what is gone only the UIDs are known, which the outbox keeps for this.
    assert told["study.deleted"]["tags"] == {"StudyInstanceUID": uid}
    assert told["study.deleted"]["parents"] == {"patient": study.patient}
    assert "tags" not in told["server.started"]
