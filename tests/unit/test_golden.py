"""The golden vectors, `tests/golden/`: what the encoders give today, and what our own decoder finds in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.events.catalog import TYPES
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.transports.base import Escaped, Incoming
from tools import golden

each_file = pytest.mark.parametrize("path", sorted(golden.files()), ids=lambda path: path.name)


@each_file
def test_the_encoders_still_give_them_to_the_byte(path: Path) -> None:
    assert path.read_text("utf-8") == golden.files()[path]


def test_no_other_file_is_there_but_what_a_real_orthanc_tells() -> None:
    assert {*golden.FOLDER.iterdir()} == {*golden.files(), golden.FOLDER / "orthanc.json"}


def test_every_type_is_there_once_and_one_with_odd_characters() -> None:
    names = [one["type"] for one in golden.events()]
    assert names == [*(f"io.orthanc-events.{one.name}.v1" for one in TYPES), "io.orthanc-events.study.stable.v1"]
    assert golden.events()[-1]["source"] == golden.ODD_SOURCE


@pytest.mark.parametrize("mode", golden.MODES)
@pytest.mark.parametrize("transport", golden.TRANSPORTS)
def test_what_is_in_them_is_the_same_everywhere(transport: str, mode: str) -> None:
    vectors: list[dict[str, Any]] = json.loads((golden.FOLDER / f"{transport}-{mode}.json").read_text("utf-8"))
    for vector, event in zip(vectors, golden.events(), strict=True):
        headers = {name.lower(): value for name, value in vector["headers"].items()}
        headers |= {"content-type": one["content_type"]} if (one := vector.get("properties")) else {}
        kind = Escaped if transport in ("nats", "webhook") else Incoming
        assert event_of(kind("", vector["body"].encode(), headers)) == event
