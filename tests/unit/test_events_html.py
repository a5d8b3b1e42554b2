"""docs/events.html: whole, of every type, with examples that are right, and with nothing that it has to load."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orthanc_events_bridge.events.described import WHOLE, WHOLE_DERIVED, names, schema
from orthanc_events_bridge.testing.brokers import contract

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "events.html").read_text("utf-8")
TYPES = sorted(set(names()) - {WHOLE, WHOLE_DERIVED})


class Page(HTMLParser):
    """What is on the page."""

    #: Elements without an end.
    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.elements: set[str] = set()
        self.text: dict[str, list[str]] = {}
        self._section = ""
        self.feed(TEXT)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements |= {tag, *(f"{tag}[{name}]" for name in given)}
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "section":
            self._section = given["id"]
        if tag == "a":
            self.links.append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(f"{self._section} {self.open[-1]}", []).append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


def test_it_is_whole(page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(TYPES) <= set(page.ids)


def test_its_links_lead_somewhere(page: Page) -> None:
    assert {f"#{name}" for name in TYPES} <= set(page.links)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert link.startswith("https://") or (DOCS / link).is_file(), link


def test_it_loads_nothing(page: Page) -> None:
    assert not [one for one in page.elements if re.match(r"(script|link|img|iframe|object)\b|\w+\[src\]", one)]
    assert not re.search(r"url\(|@import", TEXT)


@pytest.mark.parametrize("name", TYPES)
def test_each_type_has_its_properties_and_an_example_that_is_right(page: Page, name: str) -> None:
    told = set(page.text[f"{name} code"])
    assert schema(name)["properties"].keys() <= told
    assert f"io.orthanc-events.{name}.v1" in told
    example = json.loads("".join(page.text[f"{name} pre"]))
    assert example["type"] == f"io.orthanc-events.{name}.v1"
    assert contract.fault(example) == ""
