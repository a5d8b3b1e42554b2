"""What tools/release.py lets pass, and what not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.release import faults, notes
from tools.schema_compatibility import contract

CHANGELOG = """\
# Changelog

## [Unreleased]

## [1.2.3] - 2026-12-01

### Added

- This [and that](docs/events.md).

## [1.2.2] - 2026-11-01

- Before.
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A release of 1.2.3 as it has to be."""
    for folder in ("dist", "released"):
        (tmp_path / folder).mkdir()
    for name in ("orthanc_events_bridge-1.2.3.tar.gz", "orthanc_events_bridge-1.2.3-py3-none-any.whl"):
        (tmp_path / "dist" / name).touch()
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, "utf-8")
    (tmp_path / "released" / "1.2.3.json").write_text(json.dumps(contract()), "utf-8")
    return tmp_path


def found(root: Path, version: str = "1.2.3") -> list[str]:
    return faults(version, root, root / "released")


def test_what_is_right_passes(root: Path) -> None:
    assert found(root) == []


def test_the_notes_are_the_changelog_s_part() -> None:
    assert notes("1.2.3", CHANGELOG) == "### Added\n\n- This [and that](docs/events.md).\n"
    assert notes("1.2.2", CHANGELOG) == "- Before.\n"
    assert notes("1.2", CHANGELOG) == notes("1.2.30", CHANGELOG) == ""
    assert notes("1.2.3", CHANGELOG.replace(" - 2026-12-01", "")) == ""


def test_another_version_is_told_of_everything(root: Path) -> None:
    files, changelog, schemas = found(root, "1.2.4")
    assert files.startswith("dist/ has orthanc_events_bridge-1.2.3-py3-none-any.whl, ")
    assert changelog.startswith("CHANGELOG.md has nothing below `## [1.2.4] - `")
    assert schemas.startswith("the schemas are not written down as this release's")


def test_what_lies_beside_is_not_published(root: Path) -> None:
    (root / "dist" / "orthanc_events_bridge-1.2.2.tar.gz").touch()
    (line,) = found(root)
    assert "rm -rf dist" in line


def test_other_schemas_are_told(root: Path) -> None:
    changed = contract() | {"study.stable": {}}
    (root / "released" / "1.2.3.json").write_text(json.dumps(changed), "utf-8")
    (line,) = found(root)
    assert line.startswith("the schemas are others than 1.2.3.json has")
