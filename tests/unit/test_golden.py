"""The golden vectors, `tests/golden/`: what the encoders give today, and what our own decoder finds in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.events.catalog import TYPES
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.testing.brokers.contract import fault
from orthanc_events_bridge.transports.base import Escaped, Incoming
from tools import golden

each_file = pytest.mark.parametrize("path", sorted(golden.files()), ids=lambda path: path.name)


@each_file
def test_the_encoders_still_give_them_to_the_byte(path: Path) -> None:
    assert path.read_text("utf-8") == golden.files()[path]


def test_no_other_file_is_there_but_what_a_real_orthanc_tells() -> None:
    assert {*golden.FOLDER.iterdir()} == {*golden.files(), golden.FOLDER / "orthanc.json"}


def test_every_type_is_there_once_one_with_odd_characters_and_what_consumers_publish() -> None:
    events = golden.events()
    names = [*(one.name for one in TYPES), "study.stable", *(one.name for one in DERIVED)]
    assert [one["type"] for one in events] == [f"io.orthanc-events.{name}.v1" for name in names]
    assert events[len(TYPES)]["source"] == golden.ODD_SOURCE
    assert [("producer" in one) for one in events] == [False] * (len(TYPES) + 1) + [True] * len(DERIVED)


@pytest.mark.parametrize("event", golden.events(), ids=lambda event: event["type"])
def test_each_is_as_the_schemas_say(event: dict[str, Any]) -> None:
    assert not fault(event)


@pytest.mark.parametrize("mode", golden.MODES)
@pytest.mark.parametrize("transport", golden.TRANSPORTS)
def test_what_is_in_them_is_the_same_everywhere(transport: str, mode: str) -> None:
    vectors: list[dict[str, Any]] = json.loads((golden.FOLDER / f"{transport}-{mode}.json").read_text("utf-8"))
    for vector, event in zip(vectors, golden.events(), strict=True):
        headers = {name.lower(): value for name, value in vector["headers"].items()}
        headers |= {"content-type": one["content_type"]} if (one := vector.get("properties")) else {}
        kind = Escaped if transport in ("nats", "webhook") else Incoming
        assert event_of(kind("", vector["body"].encode(), headers)) == event
