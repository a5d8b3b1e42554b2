"""The API reference: everything public says what it is, what it takes and what it raises, and is on the page."""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge import consumers, errors, testing
from tools import api_page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def public() -> Iterator[tuple[str, Any]]:
    """All that is public, by its name on the page."""
    for _, _, parts in api_page.PARTS:
        for one in parts:
            yield one.__name__, one
            for name, member in api_page.members(one) if inspect.isclass(one) else ():
                yield f"{one.__name__}.{name}", member


PUBLIC = dict(public())


def test_what_can_be_imported_is_among_it() -> None:
    for package in (consumers, testing):
        assert {*package.__all__} <= PUBLIC.keys()
        for name in package.__all__:
            assert PUBLIC[name] is getattr(package, name)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_says_what_it_is_and_what_it_takes(name: str) -> None:
    text = api_page.text_of(PUBLIC[name])
    assert text, f"{name} has no docstring"
    if not text.startswith("As `"):  # then that says it
        missing = [one.name for one in api_page.parameters(PUBLIC[name]) if not re.search(rf"\b{one.name}\b", text)]
        assert not missing, f"{name} doesn't say what {', '.join(missing)} is"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_raises_is_there(name: str) -> None:
    for said in re.findall(r":raises ([^:]+):", api_page.text_of(PUBLIC[name])):
        module = importlib.import_module(getattr(PUBLIC[name], "__module__", "builtins"))
        kind = next((vars(place)[said] for place in (builtins, errors, module) if said in vars(place)), None)
        kind = kind or PUBLIC.get(said)
        assert inspect.isclass(kind) and issubclass(kind, BaseException), f"{name} raises {said}, which is no exception"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_raises_itself_is_said(name: str) -> None:
    """As far as it is written in it: errors of ours that it raises, and not those that it passes on."""
    one = PUBLIC[name]
    code = getattr(one, "__func__", one.fget if isinstance(one, property) else one)
    if inspect.isfunction(code):
        raised = {*re.findall(r"\braise (?:self\._)?([A-Z]\w+Error)\b", inspect.getsource(code))}
        said = api_page.text_of(one)
        assert not raised or ":raises" in said or "see `" in said.lower(), f"{name} doesn't say that it raises {raised}"


def test_the_page_has_it_and_can_be_reached() -> None:
    page = (DOCS / "api.md").read_text("utf-8")
    assert page == api_page.page()
    for name in PUBLIC:
        assert re.search(rf"^###+ `{re.escape(name)}[`(]", page, re.MULTILINE), name
    for guide in ("consumers.md", "testing.md"):
        assert "](api.md" in (DOCS / guide).read_text("utf-8")
