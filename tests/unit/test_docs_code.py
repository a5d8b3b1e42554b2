"""The code on the pages for users' tests: each block is a file, and pytest runs them in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orthanc_events_bridge.bridge.config import parse

ROOT = Path(__file__).resolve().parents[2]
#: Page → tests on it.
PAGES = {"testing.md": 12, "migrating-from-orthanc-server-extensions.md": 11}


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


def test_the_configuration_on_the_page_is_one() -> None:
    page = "migrating-from-orthanc-server-extensions.md"
    text = (ROOT / "docs" / page).read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [one.type for one in parse(block, page, {}).transports] == ["nats", "rabbitmq", "kafka"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_on_the_page_passes(page: str, tmp_path: Path) -> None:
    for name, text in files(page).items():
        (tmp_path / name).write_text(text, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{PAGES[page]} passed" in done.stdout, done.stdout
