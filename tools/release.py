"""Compare what was built with the tag that it was built of, before anybody gets it (docs/releasing.md).

    python tools/release.py v1.2.3 [--notes FILE]

The source distribution and the wheel in ``dist/`` have the tag's version, and nothing else is there; CHANGELOG.md tells
of it, with a date; and the events' schemas are written down as this release's. It exits with 1 if something is
otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.schema_compatibility import RELEASED, contract  # noqa: E402


def notes(version: str, changelog: str) -> str:
    """What the changelog tells of a version; empty where it tells nothing, or not yet with a date."""
    found = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |^\[|\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    return found[1].strip() + "\n" if found and found[1].strip() else ""


def faults(version: str, root: Path = ROOT, released: Path = RELEASED) -> list[str]:
    """What is not as it has to be, a line each, with its remedy."""
    found = []
    wanted = {f"orthanc_events_bridge-{version}.tar.gz", f"orthanc_events_bridge-{version}-py3-none-any.whl"}
    there = {path.name for path in (root / "dist").glob("*")}
    if there != wanted:
        remedy = "`rm -rf dist`, and `make build` on a clean checkout of the tag"
        found.append(
            f"dist/ has {', '.join(sorted(there)) or 'nothing'} in place of {', '.join(sorted(wanted))}: {remedy}"
        )
    if not notes(version, (root / "CHANGELOG.md").read_text("utf-8")):
        found.append(f"CHANGELOG.md has nothing below `## [{version}] - ` and a date: name what is new")
    path = released / f"{version}.json"
    store = f"`.venv/bin/python tools/schema_compatibility.py --store {version}`"
    if not path.exists():
        found.append(f"the schemas are not written down as this release's: {store}, and tag that")
    elif json.loads(path.read_text("utf-8")) != contract():
        found.append(f"the schemas are others than {path.name} has: {store}, and tag that")
    return found


def main() -> int:
    """Compare, and write the notes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="such as v1.2.3")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="write what the changelog tells of it there")
    options = parser.parse_args()
    if not re.fullmatch(r"v\d+\.\d+\.\d+", options.tag):
        parser.error(f"{options.tag} is no tag of a release: v1.2.3, say")
    version = options.tag.removeprefix("v")
    found = faults(version)
    for line in found:
        print(f"{options.tag}: {line}", file=sys.stderr)
    if not found and options.notes is not None:
        options.notes.write_text(notes(version, (ROOT / "CHANGELOG.md").read_text("utf-8")), "utf-8")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
