"""How tests are dealt out to several runs side by side (``tests/conftest.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

ROOT = Path(__file__).parents[2]
TESTS = """
import os

import pytest

@pytest.fixture(scope="module")
def server(): ...

@pytest.mark.parametrize("number", range(6))
def test_one(server, number):
    with open("runs", "a") as runs:
        runs.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


def test_tests_that_share_servers_are_done_by_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "test_sharing.py").write_text(TESTS, "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-n",
        "2",
        str(tmp_path),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert "6 passed" in done.stdout, done.stdout + done.stderr
    assert len(set((tmp_path / "runs").read_text("utf-8").split())) == 1
