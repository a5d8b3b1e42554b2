"""The wire contract, event by event: the same row gives the same bytes, for good.

`golden/events.jsonl` holds one event of each type, byte by byte, and was compared with section 3 of the
design by eye. A difference is a change of the contract, not of a test.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import pytest
from cloudevents.core.bindings import rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from orthanc_events_bridge.changes.model import KNOWN_NAMES, LEGACY_NAMES, LOGGED, NAMES, ChangeKind
from orthanc_events_bridge.events.catalog import TYPES, UNKNOWN, EventType, schema
from orthanc_events_bridge.events.mapping import (
    NAMESPACE,
    data_of,
    event_id,
    partition,
    partition_key,
    short_name,
    to_event,
    to_outgoing,
    trace_parent,
)
from orthanc_events_bridge.outbox_schema import OutboxRow

GOLDEN: Final = Path(__file__).parent / "golden" / "events.jsonl"
RECORDER: Final = "0b7a3c1e-55aa-4f0e-8f83-9d3a4f6d1c02"
SOURCE: Final = "https://pacs.example.org/orthanc/main"
SHAPE: Final[dict[str, Any]] = {
    "source": SOURCE,
    "site": "main",
    "type_prefix": "io.orthanc-events",
    "schema_base": "urn:orthanc-events:schema:",
    "tags": [],
    "metadata": [],
}

#: Orthanc ids of a study made up for this, by level.
IDS: Final = {
    "instance": "66a662ce-7430e543-bad44d47-0dc5a943-ec7a538d",
    "series": "f2635388-f01d497a-15f7c06b-ad7dba06-c4c599fe",
    "study": "27f7126f-4f66fb14-03f4081b-f9341db2-53925988",
    "patient": "16738bc3-e47ed42a-43ce044c-a3414a45-cb069bd0",
    "job": "f7e4f7f5-3a5b-4a80-8d0e-3a2b3c9d1e11",
}
ABOVE: Final = {
    "instance": ("series", "study", "patient"),
    "series": ("study", "patient"),
    "study": ("patient",),
}
JOB: Final = {
    "type": "DicomModalityStore",
    "state": "Success",
    "progress": 100,
    "errorCode": 0,
    "created": "20261123T200627.512345",
    "completed": "20261123T200628.000001",
    "runtime": 0.487,
    "localAet": "ORTHANC",
    "remoteAet": "WORKSTATION",
    "instances": 2,
    "failedInstances": 0,
    "parentResources": [IDS["study"]],
}
LOGGED_NAMES: Final = {NAMES[kind] for kind in LOGGED} | LEGACY_NAMES

#: 2026-11-23T20:06:27Z
AT: Final = 1795464387000


def row(change: str, level: str, **fields: Any) -> OutboxRow:
    """A row as capture writes it."""
    extra: dict[str, Any] = {}
    if level in IDS and level != "job":
        extra["parents"] = {above: IDS[above] for above in ABOVE.get(level, ())}
    if level == "job":
        extra["job"] = JOB
    logged = change in LOGGED_NAMES
    values: dict[str, Any] = {
        "position": 1_000_042,
        "change": change,
        "level": level,
        "resource": IDS.get(level),
        "at": AT if logged else AT + 83,
        "seq": 4711 if logged else None,
        "date": "20261123T200627" if logged else None,
        "minted": None if logged else "5a0c7f5e-91f9-4b0f-8c39-14b1f1f24b6a",
        "recorded": AT + 90,
        "settings": 1,
        "extra": extra,
    }
    return OutboxRow(**{**values, **fields})


def change_of(event_type: EventType) -> str:
    """A change that becomes this type."""
    if event_type.verb == UNKNOWN:
        return "99"
    if event_type.verb == "log-discontinuity":
        return "LogDiscontinuity"
    for change in sorted(KNOWN_NAMES):
        fits = change not in LEGACY_NAMES | {"NewInstance", "NewSeries", "NewStudy", "NewPatient"} and not (
            change.startswith("Stable")
        )
        if short_name(row(change, event_type.level)) == event_type.name and (
            fits or change.lower().endswith(event_type.level)
        ):
            return change
    raise AssertionError(event_type.name)


def rows() -> list[OutboxRow]:
    return [row(change_of(event_type), event_type.level) for event_type in TYPES]


def golden_lines() -> list[bytes]:
    return GOLDEN.read_bytes().splitlines()


# -- golden --------------------------------------------------------------------------------------------------


def test_golden_has_every_type_once() -> None:
    names = [json.loads(line)["type"] for line in golden_lines()]
    assert names == [f"io.orthanc-events.{event_type.name}.v1" for event_type in TYPES]


@pytest.mark.parametrize("index", range(len(TYPES)), ids=lambda index: TYPES[index].name)
def test_bytes_are_the_golden_ones(index: int) -> None:
    assert to_outgoing(rows()[index], SHAPE, RECORDER).body == golden_lines()[index]


@pytest.mark.parametrize("index", range(len(TYPES)), ids=lambda index: TYPES[index].name)
def test_golden_data_fits_its_schema(index: int) -> None:
    event = json.loads(golden_lines()[index])
    document = schema(TYPES[index], SHAPE["schema_base"])
    assert event["dataschema"] == document["$id"]
    jsonschema_rs.Draft202012Validator(document).validate(event["data"])


@pytest.mark.parametrize("line", golden_lines(), ids=lambda line: json.loads(line)["type"])
def test_sdk_reads_it_as_a_valid_cloudevent(line: bytes) -> None:
    event = JSONFormat().read(None, line)
    assert isinstance(event, CloudEvent)  # its constructor has checked every attribute
    assert event.get_specversion() == "1.0"
    assert event.get_datacontenttype() == "application/json"
    assert JSONFormat().read(None, JSONFormat().write(event)).get_attributes() == event.get_attributes()


@pytest.mark.parametrize("index", range(len(TYPES)), ids=lambda index: TYPES[index].name)
def test_attributes_pass_the_checks_of_the_sdk_s_own_class(index: int) -> None:
    event = to_event(rows()[index], SHAPE, RECORDER)
    attributes = {**event.get_attributes()}
    attributes["time"] = datetime.fromisoformat(attributes["time"])
    assert CloudEvent(attributes, event.get_data()).get_type() == event.get_type()


def test_bytes_are_those_that_the_sdk_writes() -> None:
    awkward = row("NewInstance", "instance", extra={"parents": {}, "tags": {"PatientName": 'Ä "\\\n\u2028 😀'}})
    for each in [*rows(), awkward]:
        event = to_event(each, SHAPE, RECORDER)
        assert to_outgoing(each, SHAPE, RECORDER).body == JSONFormat().write(event)


def test_same_row_same_bytes() -> None:
    first = [to_outgoing(each, SHAPE, RECORDER) for each in rows()]
    assert [to_outgoing(each, dict(SHAPE), RECORDER) for each in rows()] == first


def test_row_is_not_changed_by_mapping() -> None:
    each = row("NewInstance", "instance")
    before = json.dumps(each)
    to_outgoing(each, SHAPE, RECORDER)
    assert json.dumps(each) == before


# -- id and trace --------------------------------------------------------------------------------------------


def independent_id(*spelt: str) -> str:
    return str(uuid.uuid5(uuid.UUID("8be797cd-5573-46b7-8097-bea664a99a80"), "\n".join(spelt)))


def test_namespace_is_the_contract_s() -> None:
    assert str(NAMESPACE) == "8be797cd-5573-46b7-8097-bea664a99a80"


@pytest.mark.parametrize(
    ("level", "spelt"),
    [("instance", "Instance"), ("series", "Series"), ("study", "Study"), ("patient", "Patient")],
)
def test_id_of_a_logged_change_is_derived_from_its_row(level: str, spelt: str) -> None:
    each = row("UpdatedMetadata", level)
    expected = independent_id(SOURCE, "4711", "20261123T200627", "UpdatedMetadata", spelt, IDS[level])
    assert event_id(each, SOURCE) == expected
    assert uuid.UUID(expected).version == 5


def test_id_does_not_depend_on_what_a_second_capture_would_see_differently() -> None:
    one = row("NewStudy", "study")
    other = one._replace(position=7, recorded=1, extra={"parents": {}, "tags": {"Modality": "CT"}}, settings=3)
    assert event_id(one, SOURCE) == event_id(other, SOURCE)


def test_id_depends_on_each_part_of_the_log_s_row() -> None:
    each = row("NewStudy", "study")
    others = [
        each._replace(seq=4712),
        each._replace(date="20261123T200628"),
        each._replace(change="StableStudy"),
        each._replace(level="patient"),
        each._replace(resource=IDS["patient"]),
    ]
    ids = {event_id(other, SOURCE) for other in (each, *others)}
    assert len({*ids, event_id(each, SOURCE + "2")}) == 7


def test_minted_id_is_the_one_that_was_stored() -> None:
    each = row("Deleted", "study")
    assert event_id(each, SOURCE) == each.minted
    vanished = row("NewStudy", "study", date=None, minted="an id")  # its row was gone when the log was read
    assert event_id(vanished, SOURCE) == "an id"


def test_id_of_an_inferred_change_has_no_seq() -> None:
    each = row("StableStudy", "study", seq=None, extra={"parents": {}, "inferred": True})
    expected = independent_id(SOURCE, "inferred", "20261123T200627", "StableStudy", "Study", IDS["study"])
    assert event_id(each, SOURCE) == expected


def test_trace_is_derived_from_the_id() -> None:
    digest = hashlib.sha256(b"trace" + b"an id").hexdigest()
    assert trace_parent("an id") == f"00-{digest[:32]}-{digest[32:48]}-01"
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace_parent("other"))


# -- partitions ----------------------------------------------------------------------------------------------


def independent_crc32(data: bytes) -> int:
    """Bit by bit, as ISO 3309 has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_independent_crc32_is_right() -> None:
    assert independent_crc32(b"123456789") == 0xCBF43926  # the check value of CRC-32/ISO-HDLC


@pytest.mark.parametrize("key", [*IDS.values(), "server", "", "a", "ü", "日本", "x" * 1000])
def test_partition_is_crc32_modulo_64(key: str) -> None:
    assert partition(key) == f"{independent_crc32(key.encode()) % 64:02d}"


#: Worked out once; consumers in other languages count on it.
TABLE: Final = {"server": "54", "": "00", "123456789": "38", "a": "03", "ü": "21"}


@pytest.mark.parametrize(("key", "expected"), TABLE.items())
def test_partition_table_is_fixed_for_good(key: str, expected: str) -> None:
    assert partition(key) == expected


def test_partitions_are_used_evenly() -> None:
    counts = dict.fromkeys((f"{number:02d}" for number in range(64)), 0)
    for number in range(6400):
        counts[partition(str(uuid.uuid5(NAMESPACE, str(number))))] += 1
    assert len(counts) == 64 and min(counts.values()) > 50


def test_key_of_what_belongs_to_a_study_is_the_study() -> None:
    for level in ("instance", "series", "study"):
        each = row("Deleted", level)
        assert partition_key(level, each.resource, each.extra["parents"]) == IDS["study"]


def test_key_of_patients_jobs_and_server() -> None:
    assert partition_key("patient", IDS["patient"], {}) == IDS["patient"]
    assert partition_key("job", IDS["job"], {}) == IDS["job"]
    assert partition_key("server", None, {}) == "server"


def test_key_where_the_parents_are_unknown_is_the_resource_s_own() -> None:
    assert partition_key("instance", "x", {}) == "x"
    assert partition_key("series", "x", {"patient": "p"}) == "x"


# -- attributes ----------------------------------------------------------------------------------------------


def attributes(each: OutboxRow) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(to_outgoing(each, SHAPE, RECORDER).body)
    return body


@pytest.mark.parametrize(
    ("milliseconds", "logged", "text"),
    [
        (AT, True, "2026-11-23T20:06:27Z"),
        (AT, False, "2026-11-23T20:06:27.000Z"),
        (AT + 1, False, "2026-11-23T20:06:27.001Z"),
        (AT + 120, False, "2026-11-23T20:06:27.120Z"),
        (AT + 999, False, "2026-11-23T20:06:27.999Z"),
        (0, True, "1970-01-01T00:00:00Z"),
        (951782400000, True, "2000-02-29T00:00:00Z"),
    ],
)
def test_time_is_in_seconds_if_logged_and_in_milliseconds_if_not(milliseconds: int, logged: bool, text: str) -> None:
    each = row("NewStudy", "study", at=milliseconds, date="20261123T200627" if logged else None, minted="id")
    assert attributes(each)["time"] == text


def test_every_millisecond_of_a_second_is_told_exactly() -> None:
    for millisecond in range(1000):
        each = row("Deleted", "study", at=AT + millisecond)
        assert to_event(each, SHAPE, RECORDER).get_attributes()["time"] == (f"2026-11-23T20:06:27.{millisecond:03d}Z")


def test_recorded_time_has_always_three_digits() -> None:
    assert attributes(row("NewStudy", "study", recorded=AT))["recordedtime"] == "2026-11-23T20:06:27.000Z"


def test_sequence_is_twenty_digits_that_sort_as_text() -> None:
    assert attributes(row("NewStudy", "study", position=7))["sequence"] == "00000000000000000007"
    assert attributes(row("NewStudy", "study", position=2**62))["sequence"] == f"{2**62:020d}"


@pytest.mark.parametrize(
    ("level", "subject"),
    [("instance", "instances/"), ("series", "series/"), ("study", "studies/"), ("patient", "patients/")],
)
def test_subject_of_resources(level: str, subject: str) -> None:
    assert attributes(row("Deleted", level))["subject"] == subject + IDS[level]


def test_subject_of_jobs_and_none_of_the_server() -> None:
    assert attributes(row("JobSuccess", "job"))["subject"] == f"jobs/{IDS['job']}"
    assert "subject" not in attributes(row("OrthancStarted", "server"))
    assert "subject" not in attributes(row("99", "server", resource="something"))


def test_settings_shape_the_event() -> None:
    shape = {
        **SHAPE,
        "type_prefix": "org.example",
        "schema_base": "https://x/",
        "source": "urn:y",
        "site": "b",
    }
    outgoing = to_outgoing(row("NewStudy", "study"), shape, RECORDER)
    event = json.loads(outgoing.body)
    assert event["type"] == "org.example.study.created.v1"
    assert event["dataschema"] == "https://x/study.created.v1"
    assert event["source"] == "urn:y"
    assert outgoing.site == "b"


def test_address_says_what_the_event_says() -> None:
    outgoing = to_outgoing(row("NewInstance", "instance"), SHAPE, RECORDER)
    event = json.loads(outgoing.body)
    assert tuple(outgoing._replace(body=b"")) == (
        event["id"],
        "main",
        "instance",
        "created",
        IDS["study"],
        partition(IDS["study"]),
        "application/cloudevents+json",
        b"",
        (),
        (),
        "",
    )
    assert event["partitionkey"] == IDS["study"]


@pytest.mark.parametrize("change", ["NewInstance", "Deleted", "JobFailure"])
def test_binary_mode_is_what_the_sdk_makes_of_the_structured_event(change: str) -> None:
    one = row(change, "job" if change.startswith("Job") else "instance")
    outgoing = to_outgoing(one, SHAPE, RECORDER, binary=True)
    document = json.loads(to_outgoing(one, SHAPE, RECORDER).body)
    data = document.pop("data")
    sdk = rabbitmq.to_binary(
        CloudEvent({**document, "time": datetime.fromisoformat(document["time"])}, data), JSONFormat()
    )
    assert {f"ce-{name}": value for name, value in outgoing.attributes} == {
        **sdk.headers,
        "ce-time": document["time"],  # the SDK would add digits
    }
    assert (outgoing.content_type, outgoing.body) == (sdk.content_type, sdk.body)


# -- data, and kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ChangeKind), ids=lambda kind: kind.name)
def test_every_kind_has_a_type_that_the_catalog_knows(kind: ChangeKind) -> None:
    change = NAMES[kind]
    level = next((name for name in IDS if change.lower().endswith(name)), "study")
    if change == "NewChildInstance":
        level = "study"
    elif change.startswith("Job"):
        level = "job"
    elif change in ("OrthancStarted", "OrthancStopped", "UpdatedPeers", "UpdatedModalities"):
        level = "server"
    assert short_name(row(change, level)) in {event_type.name for event_type in TYPES}
    assert UNKNOWN not in short_name(row(change, level))


@pytest.mark.parametrize("change", sorted(LEGACY_NAMES))
def test_names_of_old_logs_have_a_type(change: str) -> None:
    level = next(name for name in IDS if change.lower().endswith(name))
    assert short_name(row(change, level)) == f"{level}.{change.removesuffix(level.capitalize()).lower()}"


@pytest.mark.parametrize("level", ["instance", "series", "study", "patient", "job", "server"])
@pytest.mark.parametrize("change", ["99", "ShinyThing", "", "ümlaut"])
def test_kinds_of_the_future_are_told_with_what_was_given(level: str, change: str) -> None:
    each = row(change, level, resource="whatever")
    event = attributes(each)
    assert event["type"] == f"io.orthanc-events.{level}.unknown.v1"
    assert event["data"]["change"] == change
    assert event["data"]["id"] == "whatever"
    event_type = next(t for t in TYPES if t.name == f"{level}.unknown")
    jsonschema_rs.Draft202012Validator(schema(event_type, SHAPE["schema_base"])).validate(event["data"])


def test_data_has_ids_and_no_more() -> None:
    assert data_of(row("NewSeries", "series")) == {
        "change": "NewSeries",
        "level": "series",
        "id": IDS["series"],
        "seq": 4711,
        "parents": {"study": IDS["study"], "patient": IDS["patient"]},
    }
    assert data_of(row("OrthancStarted", "server")) == {
        "change": "OrthancStarted",
        "level": "server",
        "id": None,
        "parents": {},
    }


def test_data_carries_what_capture_added() -> None:
    extra = {"parents": {}, "tags": {"Modality": "CT"}, "metadata": {"RemoteAET": "A"}, "inferred": True}
    each = row("StableStudy", "study", extra=extra, seq=None)
    data = data_of(each)
    assert {key: data[key] for key in extra} == extra
    event_type = next(t for t in TYPES if t.name == "study.stable")
    jsonschema_rs.Draft202012Validator(schema(event_type, SHAPE["schema_base"])).validate(data)


def test_text_that_is_no_unicode_is_no_reason_to_stop() -> None:
    extra = {"parents": {}, "tags": {"StudyDescription": "a\ud800b\x00"}}
    body = to_outgoing(row("StableStudy", "study", extra=extra), SHAPE, RECORDER).body
    assert json.loads(body)["data"]["tags"] == extra["tags"]
