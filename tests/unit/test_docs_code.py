"""The code on the pages for users' tests: each block is a file, and pytest runs them in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.bridge.config import parse
from orthanc_events_bridge.testing import event

ROOT = Path(__file__).resolve().parents[2]
#: Page → tests on it.
PAGES = {"once.md": 2, "testing.md": 13, "migrating-from-orthanc-server-extensions.md": 11}


def files(page: str) -> dict[str, str]:
    """The blocks of Python by the name in their first line."""
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    named: dict[str, str] = {}
    for block in found:
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None, f"a block of {page} has no name:\n{block}"
        assert name[1] not in named, f"{page} has {name[1]} twice"
        named[name[1]] = block
    return named


def test_the_consumer_of_the_readme_works() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^app\.run\(\)\n```$", text, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)  # noqa: S102
    study = event("study.stable", study="study-1")
    with found["app"].test() as kit:
        store = kit.orthanc.post("/modalities/pacs/store").respond(json={})
        kit.send(study, study)
        kit.assert_handled()
        assert [call.request.content for call in store.calls] == [b"study-1"]


def test_the_configuration_on_the_page_is_one() -> None:
    page = "migrating-from-orthanc-server-extensions.md"
    text = (ROOT / "docs" / page).read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [one.type for one in parse(block, page, {}).transports] == ["nats", "rabbitmq", "kafka"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_on_the_page_passes(page: str, tmp_path: Path) -> None:
    for name, text in files(page).items():
        (tmp_path / name).write_text(text, "utf-8")
    assert f"{PAGES[page]} passed" in run(tmp_path)


def test_the_example_passes() -> None:
    assert "1 passed" in run(ROOT / "examples" / "hello")


def run(folder: Path) -> str:
    """What pytest says in a folder, where all passes."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
