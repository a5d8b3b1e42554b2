"""What only Orthanc knows: parents, job snapshots without patient data, allow-listed tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from orthanc_events_bridge.changes.model import Callback, ChangeKind, Fact
from orthanc_events_bridge.errors import GoneError, LogUnavailableError, NotAnsweredError, PassedOverError
from orthanc_events_bridge.plugin.lookup import Lookup, job_snapshot, without_user
from orthanc_events_bridge.plugin.unanswered import ASK_AGAIN, IN_A_ROW, TIMES

TREE: dict[str, Any] = {
    "/instances/i": {"ParentSeries": "se", "MainDicomTags": {"SOPInstanceUID": "1.1.1"}},
    "/series/se": {"ParentStudy": "st", "MainDicomTags": {"Modality": "CT", "SeriesInstanceUID": "1.1"}},
    "/studies/st": {
        "ParentPatient": "pa",
        "MainDicomTags": {"StudyInstanceUID": "1", "StudyDescription": "study's"},
        "PatientMainDicomTags": {"PatientName": "CANARY^ONE", "PatientID": "CANARY-ID"},
    },
    "/patients/pa": {"MainDicomTags": {"PatientName": "CANARY^ONE", "PatientID": "CANARY-ID"}},
    "/series/se/metadata?expand": {"RemoteAET": "SCANNER", "LastUpdate": "20261123T200627"},
}


class Orthanc:
    """Answers from a table; what isn't there is gone."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.asked: list[str] = []
        self.broken = False
        self.mute: set[str] = set()
        self.time = 0.0
        self.said: list[str] = []

    def tip(self) -> int:
        if self.broken:
            raise LogUnavailableError("2038")
        return 7

    def get(self, path: str) -> bytes:
        self.asked.append(path)
        if self.broken:
            raise RuntimeError("2038")
        if path in self.mute:
            raise RuntimeError("500")
        if path not in self.answers:
            raise GoneError(f"{path} is not there")
        answer = self.answers[path]
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


def lookup(answers: Mapping[str, Any] = TREE, **allowed: list[str]) -> tuple[Lookup, Orthanc]:
    orthanc = Orthanc(answers)
    made = Lookup(orthanc.get, orthanc.tip, lambda: orthanc.time, orthanc.said.append)
    if allowed:
        made.allow(json.dumps(allowed))
    return made, orthanc


# -- parents -------------------------------------------------------------------------------------------------


def test_parents_of_each_level() -> None:
    made, _ = lookup()
    assert made.parents("instance", "i") == {"series": "se", "study": "st", "patient": "pa"}
    assert made.parents("series", "se") == {"study": "st", "patient": "pa"}
    assert made.parents("study", "st") == {"patient": "pa"}
    assert made.parents("patient", "pa") == {}


def test_parents_of_series_and_studies_are_asked_once() -> None:
    made, orthanc = lookup({**TREE, "/instances/j": {"ParentSeries": "se"}})
    made.parents("instance", "i")
    orthanc.asked.clear()
    assert made.parents("instance", "j") == {"series": "se", "study": "st", "patient": "pa"}
    assert orthanc.asked == ["/instances/j"]


def test_parents_of_what_is_gone() -> None:
    made, _ = lookup({"/instances/i": {"ParentSeries": "se"}})
    assert made.parents("instance", "x") is None
    assert made.parents("instance", "i") == {"series": "se"}  # the rest went meanwhile


def test_parents_are_remembered_though_they_are_gone() -> None:
    """An id is a hash over the parents' identifiers: it can't move."""
    made, orthanc = lookup()
    made.parents("series", "se")
    orthanc.answers.clear()
    assert made.parents("series", "se") == {"study": "st", "patient": "pa"}


@pytest.mark.parametrize("answer", [b"no JSON", b"[1]", b"", b'"text"'])
def test_strange_answers_mean_unavailable(answer: bytes) -> None:
    made, _ = lookup({"/series/se": answer})
    with pytest.raises(LogUnavailableError, match="can't be asked for series"):
        made.parents("series", "se")


def test_orthanc_that_can_not_answer_means_unavailable_and_tells_no_id() -> None:
    made, orthanc = lookup()
    orthanc.broken = True
    with pytest.raises(LogUnavailableError) as caught:
        made.parents("instance", "the-id")
    assert "the-id" not in str(caught.value)


# -- jobs ----------------------------------------------------------------------------------------------------

SUBMITTED = Callback(ChangeKind.JOB_SUBMITTED, 4, "job", 1.0)
SUCCESS = Callback(ChangeKind.JOB_SUCCESS, 4, "job", 2.0)


def test_job_is_taken_once_for_each_of_its_callbacks() -> None:
    made, orthanc = lookup({"/jobs/job": {"State": "Pending"}})
    assert made.take_job(SUBMITTED)
    orthanc.answers["/jobs/job"] = {"State": "Success"}
    assert made.take_job(SUBMITTED)  # the batch came back: what was seen first counts
    assert made.take_job(SUCCESS)
    assert made.job_taken(SUBMITTED) == {"state": "Pending"}
    assert made.job_taken(SUCCESS) == {"state": "Success"}
    assert orthanc.asked == ["/jobs/job"] * 2


def test_job_that_orthanc_has_forgotten() -> None:
    made, _ = lookup({})
    assert not made.take_job(SUBMITTED)
    assert made.job_taken(SUBMITTED) is None


def test_jobs_are_forgotten_with_their_batch() -> None:
    made, _ = lookup({"/jobs/job": {"State": "Pending"}})
    made.take_job(SUBMITTED)
    made.forget_jobs()
    assert made.job_taken(SUBMITTED) is None


#: As Orthanc 1.10.1 answers, with canaries wherever something of a patient could be.
STORE_JOB = {
    "CompletionTime": "20261123T200628.000001",
    "Content": {
        "Description": "CANARY",
        "FailedInstancesCount": 0,
        "InstancesCount": 2,
        "LocalAet": "ORTHANC",
        "ParentResources": ["st"],
        "Query": {"PatientName": "CANARY"},
        "RemoteAet": "WORKSTATION",
        "TargetAet": "ARCHIVE",
    },
    "CreationTime": "20261123T200627.512345",
    "EffectiveRuntime": 0.487,
    "ErrorCode": 0,
    "ErrorDescription": "CANARY",
    "ErrorDetails": "CANARY",
    "ID": "job",
    "Priority": 0,
    "Progress": 100,
    "State": "Success",
    "Timestamp": "20261123T200629.000000",
    "Type": "DicomModalityStore",
}


def test_snapshot_is_an_allow_list() -> None:
    assert job_snapshot(STORE_JOB) == {
        "type": "DicomModalityStore",
        "state": "Success",
        "progress": 100,
        "errorCode": 0,
        "created": "20261123T200627.512345",
        "completed": "20261123T200628.000001",
        "runtime": 0.487,
        "localAet": "ORTHANC",
        "remoteAet": "WORKSTATION",
        "targetAet": "ARCHIVE",
        "instances": 2,
        "failedInstances": 0,
        "parentResources": ["st"],
    }


@pytest.mark.parametrize("content", [None, [], "text", {}, {"Peer": []}, {"Peer": {}}, {"Peer": 5}])
def test_snapshot_of_a_job_without_the_usual_content(content: object) -> None:
    assert job_snapshot({"State": "Failure", "Content": content}) == {"state": "Failure"}


@pytest.mark.parametrize(
    "peer",
    [
        ["https://alice:CANARY@peer.example.org:8042/orthanc/?key=CANARY", "alice", "CANARY"],
        {"Url": "https://peer.example.org:8042/orthanc/", "Username": "alice", "Password": "CANARY"},
        "https://peer.example.org:8042/orthanc/#CANARY",
    ],
)
def test_peer_is_told_without_user_and_password(peer: object) -> None:
    snapshot = job_snapshot({"Content": {"Peer": peer}})
    assert snapshot == {"peer": "https://peer.example.org:8042/orthanc/"}


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h", "http://h"),
        ("http://u:p@h:1/x?y#z", "http://h:1/x"),
        ("http://u:p@ss@h/", "http://h/"),
        ("http://u:p/w@h/", "http://h/"),
        ("u:p@h:8042", "h:8042"),
        ("name", "name"),
        ("http://[broken", "http://[broken"),
        ("http://h?u:p@x", "http://h"),
        ("", ""),
    ],
)
def test_without_user(url: str, told: str) -> None:
    assert without_user(url) == told


# -- tags and metadata ---------------------------------------------------------------------------------------


def described(made: Lookup, change: str, level: str, resource: str | None) -> dict[str, Any]:
    fact = Fact(change, level, resource, 0)
    made.describe([fact])
    return fact.extra


def test_nothing_is_added_and_nothing_asked_by_default() -> None:
    made, orthanc = lookup()
    assert described(made, "NewInstance", "instance", "i") == {}
    assert orthanc.asked == []


def test_empty_allow_lists_add_nothing() -> None:
    made, orthanc = lookup(tags=[], metadata=[])
    assert described(made, "NewInstance", "instance", "i") == {}
    assert orthanc.asked == []


def test_allowed_tags_come_from_the_resource_and_its_parents_nearest_first() -> None:
    made, _ = lookup(tags=["StudyDescription", "Modality", "SOPInstanceUID", "Absent"])
    extra = described(made, "NewInstance", "instance", "i")
    assert extra == {"tags": {"StudyDescription": "study's", "Modality": "CT", "SOPInstanceUID": "1.1.1"}}
    assert list(extra["tags"]) == [
        "StudyDescription",
        "Modality",
        "SOPInstanceUID",
    ]  # the same bytes each time


def test_only_what_is_allowed_is_added() -> None:
    made, _ = lookup(tags=["Modality"], metadata=["RemoteAET"])
    assert described(made, "NewSeries", "series", "se") == {
        "tags": {"Modality": "CT"},
        "metadata": {"RemoteAET": "SCANNER"},
    }


def test_patient_tags_of_a_study_when_they_are_allowed() -> None:
    made, _ = lookup(tags=["PatientName"])
    assert described(made, "StableStudy", "study", "st") == {"tags": {"PatientName": "CANARY^ONE"}}


@pytest.mark.parametrize(
    ("change", "level", "resource"),
    [("Deleted", "study", "st"), ("JobSuccess", "job", "job"), ("OrthancStarted", "server", None)],
)
def test_what_is_no_resource_any_more_is_not_asked_for(change: str, level: str, resource: str | None) -> None:
    made, orthanc = lookup(tags=["Modality"], metadata=["RemoteAET"])
    assert described(made, change, level, resource) == {}
    assert orthanc.asked == []


def test_resource_that_is_gone_has_no_tags_and_is_no_error() -> None:
    made, _ = lookup(tags=["Modality"], metadata=["RemoteAET"])
    assert described(made, "StableSeries", "series", "gone") == {"tags": {}, "metadata": {}}


def test_resource_is_asked_once_in_a_batch() -> None:
    alone, orthanc_of_one = lookup(tags=["Modality"])
    described(alone, "NewSeries", "series", "se")
    made, orthanc = lookup(tags=["Modality"])
    facts = [Fact("NewSeries", "series", "se", 0), Fact("NewChildInstance", "series", "se", 0)]
    made.describe(facts)
    assert orthanc.asked == orthanc_of_one.asked
    assert facts[0].extra == facts[1].extra == {"tags": {"Modality": "CT"}}


def test_orthanc_that_can_not_answer_is_asked_again_later() -> None:
    made, orthanc = lookup(tags=["Modality"])
    orthanc.broken = True
    with pytest.raises(LogUnavailableError):
        described(made, "NewSeries", "series", "se")


def test_text_that_is_no_utf_8_does_not_stop_the_record() -> None:
    made, _ = lookup({"/patients/pa": b'{"MainDicomTags": {"PatientName": "M\xfcller"}}'}, tags=["PatientName"])
    assert described(made, "NewPatient", "patient", "pa") == {"tags": {"PatientName": "M\ufffdller"}}


def test_allow_lists_are_replaced() -> None:
    made, _ = lookup(tags=["Modality"])
    made.allow("{}")
    assert described(made, "NewSeries", "series", "se") == {}


# -- what Orthanc can't describe --------------------------------------------------------------------------------------


def tries(made: Lookup, orthanc: Orthanc, most: int = 10, expected: dict[str, Any] | None = None) -> int:
    """How often a series is described until nothing is waited for."""
    for number in range(1, most + 1):
        try:
            found = described(made, "NewSeries", "series", "se")
        except NotAnsweredError:
            orthanc.time += 1
        else:
            assert found == (expected or {})
            return number
    raise AssertionError("it is asked for ever")


_PATIENT, _SERIES = {"PatientID": "CANARY-ID"}, {"Modality": "CT"}
_RECEIVED = {"metadata": {"RemoteAET": "SCANNER"}}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/series/se", _RECEIVED),  # nor are its parents known
        ("/series/se/metadata?expand", {"tags": {**_SERIES, **_PATIENT}}),
        ("/studies/st", {"tags": _SERIES, **_RECEIVED}),
    ],
)
def test_what_orthanc_can_not_describe_goes_without_it_after_some_tries(path: str, expected: dict[str, Any]) -> None:
    made, orthanc = lookup(tags=["Modality", "PatientID"], metadata=["RemoteAET"])
    orthanc.mute = {path}
    assert tries(made, orthanc, expected=expected) == TIMES
    assert orthanc.asked.count(path) == TIMES
    assert len(orthanc.said) == 1 and "se" not in orthanc.said[0].split()
    assert described(made, "NewPatient", "patient", "pa")["tags"] == {"PatientID": "CANARY-ID"}  # as ever


def test_what_was_passed_over_is_asked_again_later_and_then_once() -> None:
    made, orthanc = lookup(tags=["Modality"])
    orthanc.mute = {"/series/se"}
    tries(made, orthanc)
    orthanc.asked.clear()
    assert tries(made, orthanc) == 1 and orthanc.asked == []
    orthanc.time += ASK_AGAIN
    assert tries(made, orthanc) == 1 and orthanc.asked == ["/series/se"]
    assert len(orthanc.said) == 1
    orthanc.time += ASK_AGAIN
    orthanc.mute.clear()
    assert described(made, "NewSeries", "series", "se") == {"tags": {"Modality": "CT"}}


def test_where_nothing_can_be_described_not_each_is_waited_for() -> None:
    answers: dict[str, Any] = {f"/series/{number}": {} for number in range(100)}
    made, orthanc = lookup(answers, tags=["Modality"])
    orthanc.mute = set(answers)
    waited = 0
    for number in range(100):
        for _ in range(TIMES):
            try:
                assert described(made, "NewSeries", "series", str(number)) == {}
                break
            except NotAnsweredError:
                waited += 1
                orthanc.time += 1
    assert waited == IN_A_ROW * (TIMES - 1) and len(orthanc.said) == 100
    answers |= {"/series/x": {}, "/patients/y": {}}
    orthanc.mute.add("/series/x")
    described(made, "NewPatient", "patient", "y")  # which is answered
    with pytest.raises(NotAnsweredError):
        described(made, "NewSeries", "series", "x")


def test_an_orthanc_that_is_away_is_waited_for_however_long() -> None:
    made, orthanc = lookup(tags=["Modality"])
    orthanc.broken = True
    for _ in range(20):
        with pytest.raises(LogUnavailableError) as caught:
            described(made, "NewSeries", "series", "se")
        assert not isinstance(caught.value, NotAnsweredError)
        orthanc.time += 60
    orthanc.broken = False
    assert described(made, "NewSeries", "series", "se") == {"tags": {"Modality": "CT"}}
    assert orthanc.said == []


def test_an_answer_in_between_begins_the_count_anew() -> None:
    made, orthanc = lookup(tags=["Modality"])
    for _ in range(5):
        orthanc.mute = {"/series/se"}
        for _ in range(TIMES - 1):
            with pytest.raises(NotAnsweredError):
                described(made, "NewSeries", "series", "se")
        orthanc.mute.clear()
        assert described(made, "NewSeries", "series", "se") == {"tags": {"Modality": "CT"}}


def test_parents_and_jobs_that_orthanc_can_not_describe_are_not_known() -> None:
    made, orthanc = lookup({**TREE, "/jobs/job": {"Type": "x"}})
    orthanc.mute = {"/instances/i", "/jobs/job"}
    for _ in range(TIMES - 1):
        with pytest.raises(NotAnsweredError):
            made.parents("instance", "i")
    assert made.parents("instance", "i") is None
    for _ in range(TIMES - 1):
        with pytest.raises(NotAnsweredError):
            made.take_job(SUBMITTED)
    assert not made.take_job(SUBMITTED) and made.job_taken(SUBMITTED) is None
    assert made.take_job(SUBMITTED)  # it is counted once
    with pytest.raises(PassedOverError):
        made.resource("instance", "i")


# -- many new instances at once ----------------------------------------------------------------------------------------


def test_the_series_of_many_new_instances_is_asked_for_in_place_of_each() -> None:
    many = [f"i{number}" for number in range(20)]
    answers = {
        **TREE,
        **{f"/instances/{one}": {"ParentSeries": "se"} for one in many},
        "/series/se": {"ParentStudy": "st", "Instances": many},
    }
    made, orthanc = lookup(answers)
    facts = [Fact("NewInstance", "instance", one, 0) for one in many]
    made.foresee(facts)
    for one in many:
        assert made.parents("instance", one) == {"series": "se", "study": "st", "patient": "pa"}
    assert orthanc.asked == ["/instances/i0", "/series/se", "/studies/st"]


def test_what_is_gone_or_alone_is_asked_for_itself() -> None:
    answers = {
        **{f"/instances/i{n}": {"ParentSeries": f"se{n}"} for n in range(3)},
        **{f"/series/se{n}": {"ParentStudy": "st", "Instances": [f"i{n}"]} for n in range(1, 3)},
        "/studies/st": TREE["/studies/st"],
    }
    made, orthanc = lookup(answers)
    made.foresee([Fact("NewInstance", "instance", f"i{n}", 0) for n in (9, 0, 1, 2)])
    assert made.parents("instance", "i1") == {"series": "se1", "study": "st", "patient": "pa"}
    assert made.parents("instance", "i9") is None
    made.foresee([Fact("NewInstance", "instance", one, 0) for one in ("i1", "i2")])
    made.foresee([Fact("NewInstance", "instance", one, 0, parents={}) for one in ("i1", "i2", "i9")])
    assert "/instances/i2" not in orthanc.asked


def test_counts_are_numbers_as_the_dicomweb_plugin_spells_them() -> None:
    content = {"InstancesCount": "4", "FailedInstancesCount": "many"}
    assert job_snapshot({"Type": "DicomWebStowClient", "Content": content}) == {
        "type": "DicomWebStowClient",
        "instances": 4,
    }
