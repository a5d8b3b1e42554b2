"""What may change in the events' schemas, and what the comparison with the last release finds: rule by rule."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import schema_compatibility
from tools.schema_compatibility import OPEN, RELEASED, breaks, contract, faults, releases, store

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository's, with nothing in it."""
    (tmp_path / "released").mkdir()
    return tmp_path / "released"


def written(folder: Path, version: str, **schemas: Any) -> Path:
    path = folder / f"{version}.json"
    path.write_text(json.dumps(schemas), "utf-8")
    return path


def git(root: Path, *arguments: str) -> None:
    mine = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *mine, *arguments], cwd=root, check=True, capture_output=True)


def test_all_releases_are_compared_with_and_the_newest_is_named(folder: Path) -> None:
    for name in ("README.md", "draft.json"):
        (folder / name).touch()
    with pytest.raises(SystemExit, match="has no released schemas"):
        releases(folder)
    # What 0.9.0 broke unnoticed is still found, and what both have is told once.
    written(folder, "0.2.11", old={"type": "object"}, both={"type": "object"})
    written(folder, "0.10.0", both={"type": "object"})
    assert [path.stem for path in releases(folder)] == ["0.10.0", "0.2.11"]
    assert faults({}, folder, folder.parent) == [
        "since 0.10.0: both: the type is gone",
        "since 0.2.11: old: the type is gone",
    ]


def test_what_was_released_stays_as_its_tag_has_it(folder: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed: apt-get install git")
    root = folder.parent
    git(root, "init", "-q")
    path = written(folder, "0.1.0", made={"type": "object"})
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Release")
    assert store("0.1.0", {"made": {"type": "array"}}, folder, root) == path  # not tagged yet
    git(root, "checkout", "-q", str(path))
    git(root, "tag", "v0.1.0")
    with pytest.raises(SystemExit, match=r"0\.1\.0 is released, and what it was stays"):
        store("0.1.0", {}, folder, root)
    assert faults({"made": {"type": "object"}}, folder, root) == []
    written(folder, "0.1.0", made={"type": "array"})
    assert faults({"made": {"type": "array"}}, folder, root) == [
        "released/0.1.0.json is not what was released: `git checkout v0.1.0 -- released/0.1.0.json`",
        'since 0.1.0: made: type was "object", and is "array"',
    ]
    with pytest.raises(SystemExit, match=r"v0\.2 is no version of a release"):
        store("v0.2", {}, folder, root)


def test_the_present_schemas_keep_what_was_released() -> None:
    done = subprocess.run([sys.executable, schema_compatibility.__file__], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_change_of_what_there_is_is_found() -> None:
    present = copy.deepcopy(contract())
    present["study.stable"]["properties"]["parents"]["properties"]["patient"]["type"] = "integer"
    present["cloudevent"]["required"].remove("sequence")
    present["addresses"]["properties"]["kafkaInbox"]["const"] = "orthanc.mail.{consumer}"
    present["types"]["properties"]["studyStable"]["const"] = "io.elsewhere.study.stable.v1"
    del present["headers"]["properties"]["orthanc-due"]
    newest = releases(RELEASED)[0].stem
    assert faults(present) == [
        f"since {newest}: {line}"
        for line in (
            "cloudevent: the property sequence was always there, and need not be any more",
            'study.stable: parents: patient: type was "string", and is "integer"',
            'addresses: kafkaInbox: const was "orthanc.inbox.{consumer}", and is "orthanc.mail.{consumer}"',
            "headers: the property orthanc-due is gone",
            'types: studyStable: const was "io.orthanc-events.study.stable.v1", and is "io.elsewhere.study.stable.v1"',
        )
    ]
