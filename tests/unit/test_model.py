"""The words for a change: numbers as the plugin gives them, names as Orthanc's log spells them."""

from __future__ import annotations

import pytest

from orthanc_events_bridge.changes.model import (
    KNOWN_NAMES,
    LEGACY_NAMES,
    LOGGED,
    NAMES,
    Callback,
    ChangeKind,
    Fact,
    ResourceLevel,
)

#: OrthancPluginChangeType and EnumerationToString(ChangeType) of Orthanc's sources.
ORTHANC = {
    0: "CompletedSeries",
    1: "Deleted",
    2: "NewChildInstance",
    3: "NewInstance",
    4: "NewPatient",
    5: "NewSeries",
    6: "NewStudy",
    7: "StablePatient",
    8: "StableSeries",
    9: "StableStudy",
    10: "OrthancStarted",
    11: "OrthancStopped",
    12: "UpdatedAttachment",
    13: "UpdatedMetadata",
    14: "UpdatedPeers",
    15: "UpdatedModalities",
    16: "JobSubmitted",
    17: "JobSuccess",
    18: "JobFailure",
}
NEVER_LOGGED = {1, 2, 10, 11, 14, 15, 16, 17, 18}


def test_numbers_and_names_are_orthanc_s() -> None:
    assert dict(NAMES) == ORTHANC
    assert {level.name: level.value for level in ResourceLevel} == {
        "PATIENT": 0,
        "STUDY": 1,
        "SERIES": 2,
        "INSTANCE": 3,
        "NONE": 4,
    }


def test_known_names_are_all_of_them_and_those_of_old_databases() -> None:
    assert set(ORTHANC.values()) | LEGACY_NAMES == KNOWN_NAMES
    assert {
        "AnonymizedPatient",
        "AnonymizedStudy",
        "AnonymizedSeries",
        "ModifiedPatient",
        "ModifiedStudy",
        "ModifiedSeries",
    } == LEGACY_NAMES


@pytest.mark.parametrize("kind", ORTHANC)
def test_which_kinds_are_logged(kind: int) -> None:
    assert Callback(kind, 3, "a", 0.0).logged is (kind not in NEVER_LOGGED)
    assert (kind in LOGGED) is (kind not in NEVER_LOGGED)


@pytest.mark.parametrize(("level", "name"), [(0, "patient"), (1, "study"), (2, "series"), (3, "instance")])
def test_level_names(level: int, name: str) -> None:
    assert Callback(ChangeKind.DELETED, level, "a", 0.0).level_name == name


@pytest.mark.parametrize("kind", [16, 17, 18])
def test_jobs_are_a_level_of_their_own(kind: int) -> None:
    assert Callback(kind, ResourceLevel.NONE, "a", 0.0).level_name == "job"


@pytest.mark.parametrize("kind", [10, 11, 14, 15])
def test_the_rest_is_the_server_s(kind: int) -> None:
    assert Callback(kind, ResourceLevel.NONE, "", 0.0).level_name == "server"


def test_unknown_kinds_and_levels_are_no_error() -> None:
    callback = Callback(1000, 42, "x", 0.0)
    assert (callback.change, callback.level_name, callback.logged) == ("1000", "server", False)
    assert Callback(19, 1, "x", 0.0).level_name == "study"


def test_facts_share_nothing() -> None:
    one, other = Fact("Deleted", "study", "a", 1), Fact("Deleted", "study", "b", 1)
    one.extra["job"] = {}
    assert other.extra == {}
