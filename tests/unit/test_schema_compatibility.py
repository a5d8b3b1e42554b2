"""What may change in the events' schemas, and what the comparison with the last release finds: rule by rule."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.events.described import names, schema
from tools import schema_compatibility
from tools.schema_compatibility import OPEN, RELEASED, breaks, last_release

RELEASED_ONE: dict[str, Any] = {
    "$id": "urn:x:study.made.v1",
    "title": "study.made",
    "description": "A study was made.",
    "type": "object",
    "properties": {
        "level": {"const": "study"},
        "id": {"type": "string", "format": "uuid", "description": "Which."},
        "seq": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["a", "b"]},
        "reason": {"type": "string", OPEN: ["emptied", "reused"]},
        "names": {"type": "array", "items": {"type": "string"}},
        "trace": {"type": "string", "pattern": "^00-"},
        "parents": {
            "type": "object",
            "properties": {"patient": {"type": "string"}},
            "additionalProperties": False,
        },
        "tags": {"type": "object", "additionalProperties": {"type": "string"}},
        "log": {"type": "object", "properties": {"counter": {"type": "integer"}}, "required": ["counter"]},
    },
    "required": ["level", "id"],
}
GONE = object()


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The schema with something else at some places."""
    found = copy.deepcopy(RELEASED_ONE)
    for place, value in changes:
        node: Any = found
        *above, last = place.split("/")
        for key in above:
            node = node[key]
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    return found


def compared(*changes: tuple[str, Any]) -> list[str]:
    return breaks({"study.made": RELEASED_ONE}, {"study.made": changed(*changes)})


@pytest.mark.parametrize(
    "change",
    [
        ("description", "A study came to be."),
        ("title", "Made"),
        ("properties/id/description", "Which one."),
        ("properties/id/examples", ["x"]),
        ("properties/seq/deprecated", True),
        ("properties/new", {"type": "string"}),
        ("properties/log/properties/new", {"type": "string"}),
        (f"properties/reason/{OPEN}", ["emptied", "reused", "restored"]),
        (f"properties/id/{OPEN}", ["x"]),
    ],
)
def test_what_may_change(change: tuple[str, Any]) -> None:
    assert compared(change) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        # Properties.
        (("properties/seq", GONE), "the property seq is gone"),
        (("properties/parents/properties/patient", GONE), "parents: the property patient is gone"),
        (
            ("properties/parents/properties/study", {"type": "string"}),
            "parents: the property study is new, and consumers were told that there are no others",
        ),
        (("properties/tags/properties", {"x": {}}), "tags: the property x is new, and consumers were told that there"),
        (("required", ["level"]), "the property id was always there, and need not be any more"),
        (("properties/log/required", []), "log: the property counter was always there, and need not be any more"),
        (
            ("required", ["level", "id", "seq"]),
            "the property seq has to be there, and is not in events that were sent before",
        ),
        (("additionalProperties", False), "additionalProperties was not there, and is false"),
        (
            ("properties/parents/additionalProperties", GONE),
            "parents: additionalProperties was false, and is not there",
        ),
        (
            ("properties/tags/additionalProperties", {"type": "integer"}),
            'tags: additionalProperties was {"type": "string"}, and is {"type": "integer"}',
        ),
        # Types.
        (("properties/seq/type", "string"), 'seq: type was "integer", and is "string"'),
        (("properties/seq/type", "number"), 'seq: type was "integer", and is "number"'),
        (("properties/id/type", ["string", "null"]), 'id: type was "string", and is ["string", "null"]'),
        (("properties/id/type", GONE), 'id: type was "string", and is not there'),
        (("properties/names/items/type", "integer"), 'names: items: type was "string", and is "integer"'),
        (("properties/names/items", GONE), 'names: items was {"type": "string"}, and is not there'),
        (("properties/seq", True), 'seq: {"type": "integer", "minimum": 0} became true'),
        # Values.
        (("properties/level/const", "series"), 'level: const was "study", and is "series"'),
        (("properties/level", {"type": "string"}), 'level: const was "study", and is not there'),
        (("properties/level", {"type": "string"}), 'level: type was not there, and is "string"'),
        (("properties/kind/enum", ["a"]), 'kind: the value "b" is gone, and is in events that were sent before'),
        (
            ("properties/kind/enum", ["a", "b", "c"]),
            f'kind: the value "c" is new, and consumers were told that there are no others ({OPEN})',
        ),
        (("properties/kind/enum", GONE), 'kind: enum was ["a", "b"], and is not there'),
        (("properties/id/enum", ["x"]), 'id: enum was not there, and is ["x"]'),
        (
            (f"properties/reason/{OPEN}", ["emptied"]),
            'reason: the value "reused" is gone, and consumers may wait for it',
        ),
        ((f"properties/reason/{OPEN}", GONE), f'reason: {OPEN} was ["emptied", "reused"], and is not there'),
        # Further constraints.
        (("properties/id/format", "uri"), 'id: format was "uuid", and is "uri"'),
        (("properties/id/format", GONE), 'id: format was "uuid", and is not there'),
        (("properties/trace/pattern", "^01-"), 'trace: pattern was "^00-", and is "^01-"'),
        (("properties/id/pattern", "x"), 'id: pattern was not there, and is "x"'),
        (("properties/seq/minimum", 1), "seq: minimum was 0, and is 1"),
        (("properties/seq/minimum", GONE), "seq: minimum was 0, and is not there"),
        (("properties/seq/oneOf", [{}]), "seq: oneOf was not there, and is [{}]"),
        (("$id", "urn:x:study.made.v2"), '$id was "urn:x:study.made.v1", and is "urn:x:study.made.v2"'),
    ],
)
def test_what_breaks(change: tuple[str, Any], line: str) -> None:
    assert any(one.startswith(f"study.made: {line}") for one in compared(change)), compared(change)


def test_every_break_is_told() -> None:
    assert len(compared(("properties/seq", GONE), ("properties/id/format", GONE), ("required", ["level"]))) == 3


def test_types_may_come_and_must_not_go() -> None:
    both = {"a": RELEASED_ONE, "b": RELEASED_ONE}
    assert breaks({"a": RELEASED_ONE}, both) == []
    assert breaks(both, {"a": RELEASED_ONE}) == ["b: the type is gone"]


def test_the_last_release_is_the_highest_version(tmp_path: Path) -> None:
    for name in ("0.9.0.json", "0.10.0.json", "0.2.11.json", "README.md", "draft.json"):
        (tmp_path / name).touch()
    assert last_release(tmp_path).name == "0.10.0.json"
    with pytest.raises(SystemExit, match="has no released schemas"):
        last_release(tmp_path / "none")


def test_the_present_schemas_keep_what_was_released() -> None:
    done = subprocess.run([sys.executable, schema_compatibility.__file__], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_change_of_a_present_schema_is_found() -> None:
    released = json.loads(last_release(RELEASED).read_text("utf-8"))
    assert released.keys() <= set(names())
    present = {name: schema(name) for name in names()}
    present["study.stable"]["properties"]["parents"]["properties"]["patient"]["type"] = "integer"
    present["cloudevent"]["required"].remove("sequence")
    assert breaks(released, present) == [
        "cloudevent: the property sequence was always there, and need not be any more",
        'study.stable: parents: patient: type was "string", and is "integer"',
    ]
