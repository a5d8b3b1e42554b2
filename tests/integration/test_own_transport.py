"""A package of somebody else's adds a transport, from outside: `examples/own-transport`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.beside import Beside

pytestmark = pytest.mark.integration

PACKAGE = Path(__file__).parents[2] / "examples" / "own-transport"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, installed by pip where the programs of this test find it."""
    pytest.importorskip("hatchling", reason="requirements/build.txt is not installed")
    folder, tree = tmp_path / "packages", tmp_path / "tree"
    tree.mkdir()
    for file in PACKAGE.glob("*.*"):
        (tree / file.name).write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", "--target", folder, tree], check=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return folder


def check(beside: Beside, *options: str) -> tuple[int, str]:
    """Exit code, and what it says."""
    command = [sys.executable, "-m", "orthanc_events_bridge", "check", str(beside.config), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def ids(path: Path) -> list[str]:
    return [json.loads(line)["data"]["id"] for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def test_it_is_configured_checked_published_to_and_read_like_the_others(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Beside(tmp_path / "beside") as beside:
        beside.configure({"type": "file", "path": str(path)})
        code, said = check(beside, "--connect")
        assert code == 0, said
        assert "a file of 0 bytes" in said
        beside.start()
        beside.record(3)
        beside.wait_delivered("file")
        assert ids(path) == ["study-1", "study-2", "study-3"]
        beside.kill()
        beside.start()
        beside.record(2)
        beside.wait_delivered("file")
        assert ids(path) == [f"study-{n}" for n in range(1, 6)]
        assert beside.transport("file")["type"] == "file"


def test_its_options_are_checked_like_those_of_the_others(tmp_path: Path) -> None:
    with Beside(tmp_path / "beside") as beside:
        beside.configure({"type": "file", "paht": "x"})
        code, said = check(beside)
        assert code == 2
        assert "transports[0].paht: there is no such option; did you mean path?" in said


def test_one_that_can_not_be_loaded_is_named(tmp_path: Path, installed: Path) -> None:
    (installed / "file_options.py").write_text("import a_client_that_is_missing\n", "utf-8")
    with Beside(tmp_path / "beside") as beside:
        beside.configure({"type": "file", "path": "x"})
        code, said = check(beside)
        assert code == 2
        assert "the transport type file of the package orthanc-events-file can't be loaded" in said
