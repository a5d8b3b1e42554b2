"""``python tools/matrix_table.py JUNIT…``: what `make test-matrix` has found, as a table in README.md.

The result is recorded in tests/matrix/RESULT.json, from which a test of the documents makes the table again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).parents[1]
RESULT: Final = ROOT / "tests" / "matrix" / "RESULT.json"
README: Final = ROOT / "README.md"
#: Where the table is.
PLACE: Final = re.compile(r"(?s)(<!-- make test-matrix writes this table -->\n).*?(<!-- end of the table -->)")
#: What a test records of its cell.
_FIELDS: Final = ("orthanc", "python", "broker", "version")
#: In the order of the columns.
_BROKERS: Final = ("NATS", "RabbitMQ", "Kafka")


def cells(junit: str) -> list[dict[str, Any]]:
    """Read pytest's result: for each cell that was tried the versions, and whether it passed.

    :raises ValueError: there is no cell, or one ended before it knew its versions.
    """
    found = []
    for case in ElementTree.fromstring(junit).iter("testcase"):  # noqa: S314  # we have written it ourselves
        if case.find("skipped") is not None:
            continue
        known = {one.get("name"): one.get("value") for one in case.iter("property")}
        if not known.keys() >= set(_FIELDS):
            raise ValueError(f"{case.get('name')} ended before it knew its versions: see pytest's output")
        passed = case.find("failure") is None and case.find("error") is None
        found.append({**{name: known[name] for name in _FIELDS}, "passed": passed})
    if not found:
        raise ValueError("no cell was tried")
    return found


def _by_number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def table(cells: Iterable[dict[str, Any]]) -> str:
    """A row for each Orthanc, a column for each broker's version. Of a pair that was tried twice a failure stays."""
    found: dict[tuple[str, ...], bool] = {}
    for one in cells:
        key = (one["orthanc"], one["python"], one["broker"], one["version"])
        found[key] = one["passed"] and found.get(key, True)
    rows = sorted({key[:2] for key in found}, key=lambda row: _by_number(row[0]))
    columns = sorted({key[2:] for key in found}, key=lambda one: (_BROKERS.index(one[0]), _by_number(one[1])))
    words = {True: "passed", False: "**failed**", None: "not tried"}
    lines = [
        ["Orthanc (its Python)", *(" ".join(column) for column in columns)],
        ["---"] * (len(columns) + 1),
        *([f"{row[0]} ({row[1]})", *(words[found.get((*row, *column))] for column in columns)] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(readme: str, cells: Iterable[dict[str, Any]]) -> str:
    """README.md with the table in its place."""
    return PLACE.sub(lambda match: f"{match[1]}\n{table(cells)}\n{match[2]}", readme)


def main() -> int:
    """Record a result, and write the table."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = [one for path in sys.argv[1:] for one in cells(Path(path).read_text("utf-8"))]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        print(f"{' '.join(sys.argv[1:])}: {error}", file=sys.stderr)
        return 1
    found.sort(key=lambda one: (_by_number(one["orthanc"]), _BROKERS.index(one["broker"]), _by_number(one["version"])))
    RESULT.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    README.write_text(with_table(README.read_text("utf-8"), found), "utf-8")
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
