"""The event types: each of Orthanc's changes has one, and a schema."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest

from orthanc_events_bridge.changes.model import KNOWN_NAMES, LEGACY_NAMES
from orthanc_events_bridge.events.catalog import LEVELS, TYPES, UNKNOWN, EventType, schema, verb

BASE = "urn:orthanc-events:schema:"

#: Change → the type's name, by section 3 of the design.
SPECIFIED = {
    "NewInstance": "instance.created",
    "NewSeries": "series.created",
    "NewStudy": "study.created",
    "NewPatient": "patient.created",
    "CompletedSeries": "series.completed",
    "StableSeries": "series.stable",
    "StableStudy": "study.stable",
    "StablePatient": "patient.stable",
    "OrthancStarted": "server.started",
    "OrthancStopped": "server.stopped",
    "UpdatedPeers": "server.peers-updated",
    "UpdatedModalities": "server.modalities-updated",
    "JobSubmitted": "job.submitted",
    "JobSuccess": "job.succeeded",
    "JobFailure": "job.failed",
    "LogDiscontinuity": "server.log-discontinuity",
    "AnonymizedPatient": "patient.anonymized",
    "AnonymizedStudy": "study.anonymized",
    "AnonymizedSeries": "series.anonymized",
    "ModifiedPatient": "patient.modified",
    "ModifiedStudy": "study.modified",
    "ModifiedSeries": "series.modified",
}
#: Those that several levels have.
BY_LEVEL = {
    "Deleted": ("deleted", LEVELS),
    "UpdatedAttachment": ("attachment-updated", LEVELS),
    "UpdatedMetadata": ("metadata-updated", LEVELS),
    "NewChildInstance": ("instance-added", LEVELS[:3]),
}
NAMES = {event_type.name for event_type in TYPES}


def test_the_specification_names_every_change() -> None:
    assert SPECIFIED.keys() | BY_LEVEL.keys() == KNOWN_NAMES | {"LogDiscontinuity"}
    assert set(SPECIFIED) >= LEGACY_NAMES


@pytest.mark.parametrize(("change", "name"), SPECIFIED.items())
def test_verb_of_a_change(change: str, name: str) -> None:
    assert verb(change) == name.partition(".")[2]
    assert name in NAMES


@pytest.mark.parametrize("change", BY_LEVEL)
def test_verb_of_a_change_of_several_levels(change: str) -> None:
    word, levels = BY_LEVEL[change]
    assert verb(change) == word
    assert {f"{level}.{word}" for level in levels} <= NAMES


@pytest.mark.parametrize("change", ["99", "", "NewThing", "StableThing", "deleted", "Modified"])
def test_a_kind_of_the_future_is_unknown_and_no_error(change: str) -> None:
    assert verb(change) == UNKNOWN


def test_each_type_is_there_once_and_explained() -> None:
    assert len(NAMES) == len(TYPES)
    specified = set(SPECIFIED.values()) | {f"{level}.{word}" for word, levels in BY_LEVEL.values() for level in levels}
    assert {f"{level}.{UNKNOWN}" for level in (*LEVELS, "job", "server")} | specified == NAMES
    assert all(event_type.meaning.endswith(").") or event_type.meaning.endswith(".") for event_type in TYPES)


@pytest.mark.parametrize("event_type", TYPES, ids=lambda event_type: event_type.name)
def test_schema_is_one_and_has_a_name_of_its_own(event_type: EventType) -> None:
    document = schema(event_type, BASE)
    jsonschema_rs.meta.validate(document)
    assert document["$id"] == f"{BASE}{event_type.name}.v1"


@pytest.mark.parametrize("event_type", TYPES, ids=lambda event_type: event_type.name)
def test_schema_refuses_what_is_not_the_contract(event_type: EventType) -> None:
    validator = jsonschema_rs.Draft202012Validator(schema(event_type, BASE))
    identifier = None if event_type.level == "server" else "an id"
    right: dict[str, Any] = {"change": "X", "level": event_type.level, "id": identifier, "parents": {}}
    assert validator.is_valid(right)
    assert validator.is_valid({**right, "seq": 5, "inferred": True, "of the future": 1})
    for wrong in (
        {**right, "level": "elsewhere"},
        {**right, "id": 5},
        {**right, "seq": "5"},
        {**right, "parents": {"instance": "an id"}},
        {**right, "inferred": False},
        {k: v for k, v in right.items() if k != "parents"},
        {k: v for k, v in right.items() if k != "id"},
    ):
        assert not validator.is_valid(wrong), wrong


def test_schema_of_parents_has_the_levels_above() -> None:
    levels = {
        event_type.level: set(schema(event_type, BASE)["properties"]["parents"]["properties"]) for event_type in TYPES
    }
    assert levels == {
        "instance": {"patient", "study", "series"},
        "series": {"patient", "study"},
        "study": {"patient"},
        "patient": set(),
        "job": set(),
        "server": set(),
    }


def test_only_resources_have_tags_and_only_jobs_a_job() -> None:
    for event_type in TYPES:
        properties = schema(event_type, BASE)["properties"]
        assert ("tags" in properties) == ("metadata" in properties) == (event_type.level in LEVELS)
        assert ("job" in properties) == (event_type.level == "job")


def test_schema_base_is_configurable() -> None:
    assert schema(TYPES[0], "https://x/")["$id"] == "https://x/patient.created.v1"
