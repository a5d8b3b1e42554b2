"""The ledger itself: each kind of harm is found and named, and nothing else is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orthanc_events_bridge.consumers.publishing import derive
from orthanc_events_bridge.testing import event as made
from orthanc_events_bridge.testing.brokers.events import MalformedEventError, decode
from orthanc_events_bridge.testing.dicom import Instance, Study, make_study, orthanc_id
from orthanc_events_bridge.testing.ledger import Event, Ledger, Report

PARENTS = ("series", "study", "patient")
CHANGES = {
    "instance.created": "NewInstance",
    "series.created": "NewSeries",
    "study.created": "NewStudy",
    "patient.created": "NewPatient",
    "study.stable": "StableStudy",
}


class Told:
    """A small Orthanc with a bridge that makes no mistake: what it does is told in the right order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.instances: dict[str, Instance] = {}
        self.study_of: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def tell(self, kind: str, resource: str) -> None:
        number = len(self.events) + 1
        level = kind.partition(".")[0]
        seq = None
        if kind in CHANGES:
            seq = 100 + number
            self.rows.append({"Seq": seq, "ChangeType": CHANGES[kind], "ResourceType": level.title(), "ID": resource})
        self.events.append(
            Event(
                id=f"event-{number}",
                kind=kind,
                resource=resource,
                source="urn:uuid:one",
                recorder="recorder",
                sequence=number,
                key=self.study_of.get(resource, resource or "server"),
                change=CHANGES.get(kind, "Other"),
                seq=seq,
                position=number,
            )
        )

    def existing(self) -> set[str]:
        return {resource for one in self.instances.values() for resource in ids(one)}

    def store(self, instance: Instance) -> None:
        there = self.existing()
        self.instances[instance.id] = instance
        for resource in (instance.id, instance.series, instance.study):
            self.study_of[resource] = instance.study
        self.tell("instance.created", instance.id)
        for level in PARENTS:
            if (parent := getattr(instance, level)) not in there:
                self.tell(f"{level}.created", parent)
        for level in PARENTS:
            self.tell(f"{level}.instance-added", getattr(instance, level))

    def delete(self, resource: str) -> None:
        before = self.existing()
        gone = [one for one in self.instances.values() if resource in ids(one)]
        for one in gone:
            del self.instances[one.id]
            self.tell("instance.deleted", one.id)
        for level in PARENTS:
            for parent in dict.fromkeys(getattr(one, level) for one in gone):
                if parent in before - self.existing():
                    self.tell(f"{level}.deleted", parent)
        self.rows = [row for row in self.rows if row["ID"] in self.existing()]


def ids(instance: Instance) -> tuple[str, str, str, str]:
    return instance.id, instance.series, instance.study, instance.patient


def answer(instance: Instance, status: str = "Success") -> dict[str, str]:
    """What Orthanc answers to an upload."""
    return {
        "ID": instance.id,
        "ParentSeries": instance.series,
        "ParentStudy": instance.study,
        "ParentPatient": instance.patient,
        "Path": f"/instances/{instance.id}",
        "Status": status,
    }


class Run:
    """A ledger and the events that belong to it."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.told = Told()

    def store(self, *instances: Instance) -> None:
        for instance in instances:
            self.told.store(instance)
            self.ledger.stored(answer(instance))

    def delete(self, level: str, resource: str) -> None:
        self.told.delete(resource)
        self.ledger.deleted(level, resource)

    def index(self, kind: str, resource: str | None = None) -> int:
        """Where the last event of a kind is."""
        return max(
            i for i, event in enumerate(self.told.events) if event.kind == kind and resource in (None, event.resource)
        )

    def drop(self, kind: str, resource: str | None = None) -> Event:
        return self.told.events.pop(self.index(kind, resource))

    def compare(self, **options: Any) -> Report:
        return self.ledger.compare(self.told.events, **options)


def numbers(report: Report) -> dict[str, int]:
    names = ("lost", "repeated", "unexpected", "out_of_order", "duplicated", "unrecoverable")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


@pytest.fixture
def study() -> Study:
    return make_study(series=2, instances=2)


@pytest.fixture
def run(study: Study) -> Run:
    """A study that was stored, deleted and stored again; it is there at the end."""
    run = Run()
    run.store(*study)
    run.delete("studies", study.id)
    run.store(*study)
    return run


# ---------------------------------------------------------------------------------- what must come is derived


def test_what_is_right_is_clean(run: Run, study: Study) -> None:
    report = run.compare(existing=run.told.existing(), log=run.told.rows)
    assert report.ok and numbers(report) == {}
    # Twice: 4 instances, each with three additions, and 4 parents; once: 8 deletions.
    assert report.required == report.received == run.ledger.required == 2 * (4 * 4 + 4) + 8
    report.assert_clean(unrecoverable=0)
    assert run.compare(kills=3, existing=run.told.existing(), log=run.told.rows).ok


@pytest.mark.parametrize("level", ["instances", "series", "studies", "patients"])
def test_deletions_take_children_and_empty_parents_along(study: Study, level: str) -> None:
    other = make_study(patient_id=study.patient_id)
    run = Run()
    run.store(*study, *other)
    one = study.instances[0]
    run.delete(
        level,
        {"instances": one.id, "series": one.series, "studies": one.study, "patients": one.patient}[level],
    )
    assert numbers(run.compare()) == {}
    deleted = {"instances": 1, "series": 3, "studies": 7, "patients": 11}[level]
    assert sum(event.kind.endswith(".deleted") for event in run.told.events) == deleted
    run.store(*(instance for instance in study if instance.id not in run.told.instances))
    for resource in [instance.id for instance in study]:
        run.delete("instance", resource)
    assert numbers(run.compare()) == {}
    run.store(*study)
    assert numbers(run.compare()) == {}


def test_an_instance_that_is_there_brings_nothing_when_it_is_sent_again(run: Run, study: Study) -> None:
    run.ledger.stored(answer(study.instances[0], "AlreadyStored"))
    assert numbers(run.compare()) == {}


def test_an_overwritten_instance_is_deleted_and_created(study: Study) -> None:
    run = Run()
    run.store(*study)
    run.told.delete(study.instances[0].id)
    run.store(study.instances[0])
    assert numbers(run.compare()) == {}
    # The only one of its patient takes them all along.
    only = make_study()
    run.store(*only)
    run.told.delete(only.id)
    run.store(*only)
    assert numbers(run.compare()) == {}


def test_what_was_there_from_the_start_is_not_asked_for() -> None:
    old = make_study(instances=2)
    run = Run()
    for instance in old:
        run.told.store(instance)
        run.ledger.existed(*ids(instance))
    run.told.events.clear()
    run.store(make_study(patient_id=old.patient_id).instances[0])
    run.delete("studies", old.id)
    run.store(*old)
    assert numbers(run.compare()) == {}
    run.told.events[0] = replace(run.told.events[0], key="nonsense")
    assert numbers(run.compare()) == {"unexpected": 1}


def test_other_events_are_asked_for_by_name(run: Run, study: Study) -> None:
    run.ledger.expect("server.started")
    run.ledger.expect("job.succeeded", "job-1", times=2)
    assert numbers(run.compare()) == {"lost": 3}
    run.told.tell("server.started", "")
    run.told.tell("job.succeeded", "job-1")
    run.told.tell("job.succeeded", "job-1")
    assert numbers(run.compare()) == {}


def test_kinds_that_are_not_judged_may_come_or_not(run: Run, study: Study) -> None:
    run.told.tell("study.stable", study.id)
    run.told.tell("study.stable", study.id)
    assert numbers(run.compare()) == {"unexpected": 2}
    run.ledger.allow("*.stable", "*.created")
    run.drop("study.created")
    assert numbers(run.compare()) == {}


def test_clients_may_write_at_the_same_time() -> None:
    run = Run()
    studies = [make_study(instances=20) for _ in range(8)]

    def work(study: Study) -> None:
        for _ in range(3):
            for instance in study:
                run.ledger.stored(answer(instance))
            run.ledger.deleted("studies", study.id)

    threads = [threading.Thread(target=work, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for study in studies:
        for _ in range(3):
            for instance in study:
                run.told.store(instance)
            run.told.delete(study.id)
    assert numbers(run.compare()) == {}


# --------------------------------------------------------------------------------------- each harm has a name


def test_every_event_that_is_missing_is_lost(run: Run) -> None:
    events = list(run.told.events)
    for i, event in enumerate(events):
        run.told.events = events[:i] + events[i + 1 :]
        report = run.compare(existing=run.told.existing(), log=run.told.rows)
        assert numbers(report) == {"lost": 1}, event
        assert event.resource in str(report) and event.kind in str(report)


def test_everything_missing_is_lost(run: Run) -> None:
    required = run.ledger.required
    run.told.events.clear()
    assert numbers(run.compare()) == {"lost": required}


def test_a_fact_told_again_under_another_id_is_repeated(run: Run) -> None:
    events = list(run.told.events)
    for event in events:
        run.told.events = [*events, replace(event, id="another", sequence=1_000)]
        assert numbers(run.compare(existing=run.told.existing(), log=run.told.rows)) == {"repeated": 1}, event
        # Without the log's number too.
        run.told.events = [*events, replace(event, id="another", sequence=1_000, seq=None)]
        assert numbers(run.compare()) == {"repeated": 1}, event


def test_a_row_of_the_log_told_twice_is_repeated_even_if_its_kind_is_not_judged(run: Run, study: Study) -> None:
    run.ledger.allow("*.stable")
    run.told.tell("study.stable", study.id)
    run.told.events.append(replace(run.told.events[-1], id="another", sequence=1_000))
    assert numbers(run.compare()) == {"repeated": 1}


def test_a_second_delivery_with_the_same_id_is_a_duplicate(run: Run) -> None:
    run.told.events += [replace(event, position=event.position + 100) for event in run.told.events[:3]]
    report = run.compare()
    assert numbers(report) == {"duplicated": 3}
    assert report.ok


def test_an_event_about_something_unknown_is_unexpected(run: Run) -> None:
    run.told.tell("study.created", orthanc_id("nobody", "1.2"))
    assert numbers(run.compare()) == {"unexpected": 1}


def test_two_facts_with_one_id_or_one_sequence_are_unexpected(run: Run) -> None:
    events = list(run.told.events)
    run.told.events[4] = replace(events[4], id=events[3].id)
    assert numbers(run.compare()) == {"unexpected": 1, "lost": 1}
    run.told.events[4] = replace(events[4], sequence=events[3].sequence)
    assert numbers(run.compare()) == {"unexpected": 1}
    # Another recorder counts for itself.
    run.told.events[4] = replace(events[4], sequence=events[3].sequence, recorder="another")
    assert numbers(run.compare()) == {}


def test_a_wrong_partition_key_is_unexpected(run: Run) -> None:
    at = run.index("series.created")
    run.told.events[at] = replace(run.told.events[at], key="elsewhere")
    assert numbers(run.compare()) == {"unexpected": 1}


def test_swapped_deliveries_are_out_of_order(run: Run, study: Study) -> None:
    one, other = run.index("instance.created"), run.index("series.instance-added")
    events = run.told.events
    assert events[one].key == events[other].key
    events[one], events[other] = events[other], events[one]
    assert run.compare().out_of_order >= 1
    assert set(numbers(run.compare())) == {"out_of_order"}


def test_order_is_not_asked_for_across_partition_keys() -> None:
    run = Run()
    run.store(*make_study(), *make_study())
    first = run.told.events[0].key
    run.told.events.sort(key=lambda event: event.key != first)
    assert numbers(run.compare()) == {}


@pytest.mark.parametrize(
    ("kind", "move"),
    [
        ("study.deleted", lambda run: len(run.told.events)),
        ("study.deleted", lambda run: 0),
        ("instance.deleted", lambda run: 0),
        ("study.created", lambda run: run.index("study.deleted")),
        ("patient.instance-added", lambda run: 0),
        ("series.instance-added", lambda run: run.index("patient.deleted")),
    ],
)
def test_a_story_that_cannot_be_is_out_of_order(kind: str, move: Callable[[Run], int], study: Study) -> None:
    run = Run()
    run.store(*study)
    run.delete("studies", study.id)
    run.store(*study)
    at = move(run)
    run.told.events.insert(at, run.drop(kind) if at else run.told.events.pop(run.index(kind)))
    # Captured in the wrong order: the sequence is in order, the story is not.
    run.told.events = [replace(event, sequence=i) for i, event in enumerate(run.told.events)]
    found = numbers(run.compare())
    assert set(found) == {"out_of_order"} and found["out_of_order"] >= 1


# ----------------------------------------------------------------------------------- what is not acknowledged


def test_what_is_not_acknowledged_may_come_or_not(study: Study) -> None:
    one, other = study.instances[0], study.instances[1]
    for happened in (False, True):
        run = Run()
        run.store(one)
        run.ledger.maybe_stored(*ids(other))
        if happened:
            run.told.store(other)
        assert numbers(run.compare()) == {}
        if happened:
            run.told.events.append(replace(run.told.events[-1], id="another", sequence=1_000))
            assert numbers(run.compare()) == {"repeated": 1}


def test_an_upload_that_turns_out_to_have_been_done_is_asked_for(study: Study) -> None:
    run = Run()
    one = study.instances[0]
    run.ledger.maybe_stored(*ids(one))
    run.told.store(one)
    assert run.ledger.required == 0
    run.ledger.stored(answer(one, "AlreadyStored"))
    assert run.ledger.required == 7
    assert numbers(run.compare()) == {}
    run.drop("instance.created")
    assert numbers(run.compare()) == {"lost": 1}


def test_an_upload_that_is_there_at_the_end_is_asked_for(study: Study) -> None:
    run = Run()
    one = study.instances[0]
    run.ledger.maybe_stored(*ids(one))
    assert numbers(run.compare(kills=1, existing=())) == {}
    report = run.compare(kills=1, existing=ids(one))
    assert numbers(report) == {"lost": 4}


def test_an_upload_that_was_done_by_the_second_request_is_told_once(study: Study) -> None:
    run = Run()
    one, other = study.instances[:2]
    run.ledger.maybe_stored(*ids(one))
    run.store(one)
    assert numbers(run.compare()) == {}
    run.ledger.maybe_stored(*ids(other))
    run.delete("studies", study.id)
    assert numbers(run.compare()) == {}
    run.store(other)
    assert numbers(run.compare()) == {}


@pytest.mark.parametrize("happened", [False, True])
def test_a_deletion_that_is_not_acknowledged_may_come_or_not(study: Study, happened: bool) -> None:
    run = Run()
    run.store(*study)
    run.ledger.maybe_deleted("studies", study.id)
    if happened:
        run.told.delete(study.id)
    assert numbers(run.compare()) == {}
    if happened:
        run.store(*study)
    else:
        run.delete("studies", study.id)
    assert numbers(run.compare()) == {}
    run.store(*make_study(patient_id=study.patient_id))
    assert numbers(run.compare()) == {}


def test_a_deletion_that_did_not_happen_is_not_excused(study: Study) -> None:
    run = Run()
    run.store(*study)
    run.ledger.maybe_deleted("studies", study.id)
    for instance in study:
        run.ledger.stored(answer(instance, "AlreadyStored"))
    assert numbers(run.compare()) == {}
    run.told.tell("study.deleted", study.id)
    assert numbers(run.compare()) == {"unexpected": 1}


# ------------------------------------------------------------------------------------------------- with kills


def test_what_only_callbacks_show_is_unrecoverable_under_kills_only(run: Run, study: Study) -> None:
    run.drop("study.instance-added")
    run.drop("series.deleted")
    assert numbers(run.compare()) == {"lost": 2}
    report = run.compare(kills=1, existing=run.told.existing(), log=run.told.rows)
    assert numbers(report) == {"unrecoverable": 2}
    assert report.ok
    with pytest.raises(AssertionError, match="more than 1 events are unrecoverable"):
        report.assert_clean(unrecoverable=1)


def test_a_logged_change_whose_resource_exists_is_lost_under_kills_too(run: Run, study: Study) -> None:
    for kind in ("instance.created", "series.created", "study.created", "patient.created"):
        kept = list(run.told.events)
        run.drop(kind)
        report = run.compare(kills=1, existing=run.told.existing(), log=run.told.rows)
        assert numbers(report) == {"lost": 1}, kind
        run.told.events = kept


def test_without_the_log_at_least_one_creation_of_what_exists_is_asked_for(run: Run, study: Study) -> None:
    run.drop("study.created", study.id)
    assert numbers(run.compare(kills=1, existing=run.told.existing())) == {"unrecoverable": 1}
    run.drop("study.created", study.id)
    assert numbers(run.compare(kills=1, existing=run.told.existing())) == {"unrecoverable": 1, "lost": 1}


def test_a_whole_life_that_a_kill_took_is_unrecoverable(run: Run, study: Study) -> None:
    run.delete("studies", study.id)
    run.drop("study.created")
    run.drop("study.deleted")
    report = run.compare(kills=1, existing=(), log=[])
    assert numbers(report) == {"unrecoverable": 2}


def test_kills_ask_for_what_exists(run: Run) -> None:
    with pytest.raises(ValueError, match="known what exists"):
        run.compare(kills=1)


def test_disorder_shows_under_kills_too(run: Run, study: Study) -> None:
    run.drop("instance.created", study.instances[0].id)
    at = run.index("study.deleted")
    run.told.events.append(run.told.events.pop(at))
    run.told.events = [replace(event, sequence=i) for i, event in enumerate(run.told.events)]
    assert run.compare(kills=1, existing=run.told.existing()).out_of_order == 1


# ---------------------------------------------------------------------------------------- report and decoding


def test_the_report_is_one_table_with_examples(run: Run, study: Study) -> None:
    for _ in range(12):
        run.told.tell("study.deleted", study.id)
        run.told.tell("study.created", orthanc_id("nobody", str(len(run.told.events))))
    run.drop("series.created", study.series[0])
    report = run.compare()
    with pytest.raises(AssertionError) as error:
        report.assert_clean()
    lines = str(error.value).splitlines()
    assert lines[0] == "the ledger does not balance"
    assert "lost                   1" in lines
    assert f"    series.created {study.series[0]}: 1 of 2 came" in lines
    assert "repeated              12" in lines
    assert "unexpected            12" in lines
    assert len(report.examples["unexpected"]) == 10


def document(**changes: Any) -> dict[str, Any]:
    kind = ".".join(str(changes.get("type", "io.orthanc-events.study.instance-added.v1")).split(".")[-3:])
    return {
        "specversion": "1.0",
        "id": "2f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
        "source": "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
        "type": "io.orthanc-events.study.instance-added.v1",
        "subject": "studies/abc",
        "time": "2024-01-02T03:04:05.678Z",
        "datacontenttype": "application/json",
        "dataschema": f"urn:orthanc-events:schema:{kind}",
        "recorder": "0d3a3d8f-0000-4000-8000-000000000000",
        "sequence": "00000000000000000042",
        "partitionkey": "abc",
        "recordedtime": "2024-01-02T03:04:05.679Z",
        "traceparent": "00-8886c6e5063dbc1d21772efd48294da5-c1f0f98f3b39a058-01",
        "data": {"change": "NewChildInstance", "level": "study", "id": "abc", "parents": {}},
    } | changes


def test_events_are_decoded() -> None:
    event = decode(json.dumps(document()).encode(), "orthanc.events.main.study.instance-added.07", 9)
    assert (event.kind, event.resource, event.key) == ("study.instance-added", "abc", "abc")
    assert (event.sequence, event.seq, event.change, event.position) == (42, None, "NewChildInstance", 9)
    server: dict[str, Any] = {"change": "OrthancStarted", "level": "server", "id": None, "parents": {}}
    body = document(type="org.example.server.started.v1", subject=None, partitionkey="server", data=server)
    del body["subject"]
    assert decode(json.dumps(body).encode()).resource == ""
    logged = {"change": "NewStudy", "level": "study", "id": "abc", "seq": 7, "parents": {}}
    body = document(type="io.orthanc-events.study.created.v1", data=logged)
    assert decode(json.dumps(body).encode()).seq == 7


@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        b"[]",
        json.dumps(document(specversion="0.3")).encode(),
        json.dumps(document(subject="series/abc")).encode(),
        json.dumps(document(type="io.orthanc-events.series.created.v1")).encode(),
        json.dumps(document(type="io.orthanc-events.study.created.v2")).encode(),
        json.dumps(document(type="created")).encode(),
        json.dumps(document(sequence="x")).encode(),
        json.dumps({k: v for k, v in document().items() if k != "recorder"}).encode(),
    ],
)
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedEventError):
        decode(body, "subject", 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recordedtime": "yesterday"}, "recordedtime"),
        ({"id": "of-no-uuid"}, "id: "),
        ({"traceparent": "00"}, "traceparent"),
        ({"dataschema": "urn:orthanc-events:schema:study.stable.v1"}, "not that of its type"),
        ({"type": "io.orthanc-events.study.celebrated.v1"}, "no event is called 'study.celebrated'"),
        ({"undescribed": "x"}, "'undescribed' was unexpected"),
        ({"data": {"change": "NewChildInstance", "level": "study", "id": "abc"}}, '"parents" is a required'),
        ({"data": document()["data"] | {"seq": "7"}}, "data/seq"),
        ({"data": document()["data"] | {"undescribed": 1}}, "'undescribed' was unexpected"),
        ({"data": document()["data"] | {"parents": {"series": "abc"}}}, "data/parents"),
    ],
)
def test_what_is_not_as_the_schema_says_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MalformedEventError, match=r"message 3 at subject is not as its schema says: ") as caught:
        decode(json.dumps(document(**changes)).encode(), "subject", 3)
    assert words in str(caught.value)


def test_what_is_derived_is_judged_by_its_own_schema_and_types_of_others_by_their_attributes() -> None:
    cause = made("study.stable")
    ready = {"rule": "all", "complete": True, "series": 2, "instances": 40}
    body = json.loads(derive("study.ready", ready, cause, producer="derive", now=0.0).body)
    assert decode(json.dumps(body).encode()).kind == "study.ready"
    for wrong in (
        {**body, "data": {**body["data"], "instances": "40"}},
        {**body, "data": {**body["data"], "undescribed": 1}},
        {name: value for name, value in body.items() if name != "recordedtime"},
    ):
        with pytest.raises(MalformedEventError, match="not as its schema says"):
            decode(json.dumps(wrong).encode())
    own = json.loads(derive("org.example.report.signed.v1", {"x": 1}, cause, producer="reports", now=0.0).body)
    assert decode(json.dumps(own).encode()).kind == "report.signed"
    with pytest.raises(MalformedEventError, match="'undescribed' was unexpected"):
        decode(json.dumps({**own, "undescribed": 1}).encode())
