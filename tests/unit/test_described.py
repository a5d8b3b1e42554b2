"""The schemas that come with the package, and ``orthanc-events schema`` that prints them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
import yaml

from orthanc_events_bridge.cli import main
from orthanc_events_bridge.events.catalog import TYPES
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.events.described import WHOLE, WHOLE_DERIVED, asyncapi_text, names, schema

ALL = {one.name for one in (*TYPES, *DERIVED)} | {WHOLE, WHOLE_DERIVED}


def test_each_type_has_one() -> None:
    assert set(names()) == ALL


@pytest.mark.parametrize("name", sorted(ALL))
def test_each_is_one_of_2020_12_with_an_address_of_its_own(name: str) -> None:
    document = schema(name)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (document["$id"], document["title"]) == (f"urn:orthanc-events:schema:{name}.v1", name)
    jsonschema_rs.meta.validate(document)
    assert set(document["required"]) <= document["properties"].keys()
    assert document["description"].endswith(".")


@pytest.mark.parametrize(
    "name",
    [
        "study.stable",
        "study.stable.v1",
        "study.stable.v1.json",
        "io.orthanc-events.study.stable.v1",
        "org.example.pacs.study.stable.v1",
        "urn:orthanc-events:schema:study.stable.v1",
        "https://example.org/schemas/study.stable.v1",
    ],
)
def test_it_is_found_by_every_name_that_events_give_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", name]) == 0
    assert json.loads(capsys.readouterr().out) == schema("study.stable")


def test_all_are_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--all"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed == {name: schema(name) for name in ALL}


def test_the_asyncapi_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--asyncapi"]) == 0
    printed = capsys.readouterr().out
    assert printed == asyncapi_text()
    assert yaml.safe_load(printed)["asyncapi"] == "3.0.0"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("study.stabel", "near it are study.stable, "),
        ("Study.Stable", "near it are study.stable, "),
        ("jobs.failed", "near it are job.failed, "),
        ("cloud-event", "near it are cloudevent, "),
        ("study.stable.v2", "near it are "),
        ("xyz", "`orthanc-events schema --all` has them all"),
        ("../asyncapi.yaml", "`orthanc-events schema --all` has them all"),
    ],
)
def test_a_name_that_no_event_has_is_one_error_with_those_near_it(
    name: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"orthanc-events: no event is called {name!r} (")
    assert near in line


def test_only_one_thing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["study.stable", "--all"], ["--all", "--asyncapi"], ["study.stable", "--router"]):
        with pytest.raises(SystemExit) as ended:
            main(["schema", *arguments])
        assert ended.value.code == 2
        assert "not allowed with argument" in capsys.readouterr().err
