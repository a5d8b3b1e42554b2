"""Compare the events' schemas with those of all releases: what consumers count on must still be so.

Both directions count. Whoever reads was written for the released schema, and gets what is sent now. And what was sent
before lies in streams and outboxes for weeks, and is judged by today's schema, since both are called ``v1``. So within
a version nothing changes but that types, properties that need not be there, and values of open lists are added, and
that texts are worded better (docs/events.md#what-can-change-within-v1).

Beside the schemas, where events are is compared, what their types are called, and which headers they have, as the
AsyncAPI document tells it.

Without arguments it compares, and exits with 1 if something breaks, or if what was released is written down otherwise
than the release's tag has it. ``--store VERSION`` writes down what the present schemas are as those of a release,
before its tag is made (docs/releasing.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from orthanc_events_bridge.events import described  # noqa: E402

#: One file for each release, as ``orthanc-events schema --all`` prints it.
RELEASED: Final = ROOT / "tools" / "released-schemas"

#: Words for readers, which constrain nothing.
_TEXTS: Final = {"title", "description", "$comment", "examples", "default", "deprecated"}
#: A list to which values can be added: consumers are told to expect others.
OPEN: Final = "x-extensible-enum"
_OWN_RULE: Final = {"properties", "required", "enum", OPEN, "items", *_TEXTS}
_ABSENT: Final = object()

Schema = Mapping[str, Any]


def breaks(released: Mapping[str, Schema], present: Mapping[str, Schema]) -> list[str]:
    """What is not as it was released: a line each, with its place."""
    found = []
    for name, old in released.items():
        if name in present:
            found += [f"{name}: {line}" for line in _compare(old, present[name], "")]
        else:
            found.append(f"{name}: the type is gone")
    return found


def _compare(old: Any, new: Any, place: str) -> Iterator[str]:
    """
    :param place: where in the event it is, with a colon behind it; empty at the top.
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield f"{place}{_said(old)} became {_said(new)}"
        return
    yield from _properties(old, new, place)
    yield from _lists(old, new, place)
    if "items" in old and "items" in new:
        yield from _compare(old["items"], new["items"], f"{place}items: ")
    elif "items" in old or "items" in new:
        yield _changed("items", old, new, place)
    for word in dict.fromkeys((*old, *new)):
        if word not in _OWN_RULE and old.get(word, _ABSENT) != new.get(word, _ABSENT):
            yield _changed(word, old, new, place)


def _properties(old: Schema, new: Schema, place: str) -> Iterator[str]:
    before, now = old.get("properties", {}), new.get("properties", {})
    for name in before:
        if name in now:
            yield from _compare(before[name], now[name], f"{place}{name}: ")
        else:
            yield f"{place}the property {name} is gone"
    if old.get("additionalProperties", True) is not True:
        for name in now.keys() - before.keys():
            yield f"{place}the property {name} is new, and consumers were told that there are no others"
    needed, needed_now = set(old.get("required", ())), set(new.get("required", ()))
    for name in sorted(needed - needed_now):
        yield f"{place}the property {name} was always there, and need not be any more"
    for name in sorted(needed_now - needed):
        yield f"{place}the property {name} has to be there, and is not in events that were sent before"


def _lists(old: Schema, new: Schema, place: str) -> Iterator[str]:
    before, now = old.get("enum"), new.get("enum")
    if before is not None and now is not None:
        for value in (one for one in before if one not in now):
            yield f"{place}the value {_said(value)} is gone, and is in events that were sent before"
        for value in (one for one in now if one not in before):
            yield f"{place}the value {_said(value)} is new, and consumers were told that there are no others ({OPEN})"
    elif before != now:
        yield _changed("enum", old, new, place)
    if OPEN in old and OPEN not in new:
        yield _changed(OPEN, old, new, place)
    for value in (one for one in old.get(OPEN, ()) if one not in new.get(OPEN, old[OPEN])):
        yield f"{place}the value {_said(value)} is gone, and consumers may wait for it"


def _changed(word: str, old: Schema, new: Schema, place: str) -> str:
    return f"{place}{word} was {_said(old.get(word, _ABSENT))}, and is {_said(new.get(word, _ABSENT))}"


def _said(value: Any) -> str:
    return "not there" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def contract() -> dict[str, Schema]:
    """What is compared: all schemas; and, as if they were some, channels' addresses, types' names and headers."""

    def fixed(values: Mapping[str, str]) -> Schema:
        return {"type": "object", "properties": {name: {"const": value} for name, value in values.items()}}

    document = yaml.safe_load(described.asyncapi_text())
    components = document["components"]
    return {
        **{name: _without_examples(described.schema(name)) for name in described.names()},
        "addresses": fixed({name: one["address"] for name, one in document["channels"].items()}),
        "headers": components["schemas"]["Headers"],
        "types": fixed({name: one["name"] for name, one in components["messages"].items()}),
    }


def _without_examples(schema: Schema) -> Schema:
    return {word: value for word, value in schema.items() if word != "examples"}


def releases(folder: Path = RELEASED) -> list[Path]:
    """The files of all releases, the newest first.

    :raises SystemExit: there is none.
    """
    files = [path for path in folder.glob("*.json") if path.stem.replace(".", "").isdigit()]
    if not files:
        raise SystemExit(f"{folder} has no released schemas: get them from git, or write them with --store VERSION")
    return sorted(files, key=lambda path: tuple(map(int, path.stem.split("."))), reverse=True)


def as_tagged(path: Path, root: Path = ROOT) -> str | None:
    """What the release's tag has in that file; none where there is no such tag, or no git."""
    if shutil.which("git") is None:
        return None
    place = f"v{path.stem}:{path.relative_to(root).as_posix()}"
    found = subprocess.run(["git", "show", place], cwd=root, capture_output=True, check=False)
    return found.stdout.decode("utf-8") if found.returncode == 0 else None


def faults(present: Mapping[str, Schema], folder: Path = RELEASED, root: Path = ROOT) -> list[str]:
    """What is wrong, a line each with its remedy. A break is told of the newest release that has it."""
    found: dict[str, str] = {}
    for path in releases(folder):
        text, version = path.read_text("utf-8"), path.stem
        tagged = as_tagged(path, root)
        if tagged not in (None, text):
            name = path.relative_to(root)
            found[version] = f"{name} is not what was released: `git checkout v{version} -- {name}`"
        for line in breaks(json.loads(tagged or text), present):
            found.setdefault(line, f"since {version}: {line}")
    return list(found.values())


def store(version: str, present: Mapping[str, Schema], folder: Path = RELEASED, root: Path = ROOT) -> Path:
    """Write what the present schemas are down as those of a release that will be.

    :raises SystemExit: it can't be one.
    """
    if not all(part.isdigit() for part in version.split(".")) or version.count(".") != 2:
        raise SystemExit(f"{version} is no version of a release: 0.1.0, say")
    path = folder / f"{version}.json"
    if as_tagged(path, root) is not None:
        raise SystemExit(f"{version} is released, and what it was stays: take the next number")
    path.write_text(json.dumps(present, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def main() -> int:
    """Compare, or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="VERSION", help="write the present schemas down as this release's")
    version = parser.parse_args().store
    present = contract()
    if version is not None:
        print(f"{store(version, present).relative_to(ROOT)} written")
    found = faults(present)
    for line in found:
        print(line, file=sys.stderr)
    if any(line.startswith("since ") for line in found):
        print(
            "this breaks consumers: add a property or a type in its place, or make it v2"
            " (docs/events.md#what-can-change-within-v1)",
            file=sys.stderr,
        )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
