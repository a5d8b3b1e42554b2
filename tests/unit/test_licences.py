"""The list of licences: every locked package once, as it says itself, and none that nobody has looked at."""

from __future__ import annotations

import email.message
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import licences

ROOT = Path(__file__).resolve().parents[2]
#: What may be installed with the package. Another one is a decision: it goes here, and what it asks for into the page.
ACCEPTED = {
    "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "PSF-2.0", "MPL-2.0", "LGPL-3.0-only",
    "Apache-2.0 OR BSD-2-Clause", "Apache-2.0 AND BSD-2-Clause",
}  # fmt: skip


def rows(part: str) -> dict[str, list[str]]:
    text = (ROOT / "docs" / "licences.md").read_text("utf-8").partition(f"## {part}\n")[2].partition("\n## ")[0]
    found = (re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| "))
    return {name: rest for name, *rest in found if name != "package"}


def test_every_locked_package_is_there_once() -> None:
    with_it, beside = rows("Installed with the package"), rows("For building and development only")
    assert not with_it.keys() & beside.keys()
    locked: dict[str, str] = {}
    for name in ("bridge", "build", "dev"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
        locked |= dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE))
    assert {name: version for name, (version, *_) in (with_it | beside).items()} == locked


def test_what_comes_with_the_package_may() -> None:
    found = rows("Installed with the package")
    assert {"pydantic", "nats-py", "aiokafka", "aio-pika", "httpx", "psycopg"} <= found.keys()
    assert {licence for _, licence, _ in found.values()} <= ACCEPTED
    assert found["pydantic"][2] == "always"
    assert {name for name, (_, licence, _) in found.items() if "GPL" in licence} == {"psycopg", "psycopg-binary"}
    assert found["psycopg"][2] == "with `postgresql`"


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT OR Apache-2.0")], "MIT OR Apache-2.0"),
        ([("License", "Apache 2 License")], "Apache-2.0"),
        ([("License", "see LICENSE"), ("Classifier", "License :: OSI Approved :: MIT License")], "MIT"),
    ],
)
def test_what_packages_say(monkeypatch: pytest.MonkeyPatch, fields: list[tuple[str, str]], licence: str) -> None:
    said = email.message.Message()
    for name, value in fields:
        said[name] = value
    monkeypatch.setattr(licences, "distribution", lambda _: SimpleNamespace(metadata=said))
    assert licences.licence("x") == licence


@pytest.mark.parametrize(
    "fields", [[], [("License", "see LICENSE")], [("Classifier", "License :: Free For Educational Use")]]
)
def test_a_package_that_says_nothing_known_stops_the_list(
    monkeypatch: pytest.MonkeyPatch, fields: list[tuple[str, str]]
) -> None:
    said = email.message.Message()
    for name, value in fields:
        said[name] = value
    monkeypatch.setattr(licences, "distribution", lambda _: SimpleNamespace(metadata=said))
    with pytest.raises(SystemExit, match="x says nothing known of its licence"):
        licences.licence("x")


def test_a_package_that_is_not_installed_stops_it_too() -> None:
    with pytest.raises(SystemExit, match="no-such-package is in the lock and not installed"):
        licences.licence("no-such-package")
    assert licences.licence("pywin32") == "PSF-2.0"
