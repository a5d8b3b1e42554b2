"""What a relay needs, made up for tests: an outbox, a bridge.db, and waits that are short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.bridge.state import Progress
from orthanc_events_bridge.outbox_schema import OutboxRow

STUDIES = [f"{number:08x}-00000000-00000000-00000000-00000000" for number in range(20)]
SHAPE = {
    "source": "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
    "site": "main",
    "type_prefix": "io.orthanc-events",
    "schema_base": "https://example.org/schemas/",
}


class Rows:
    """An outbox that is a list."""

    recorder = "8be797cd-5573-46b7-8097-bea664a99a80"

    def __init__(self, count: int, *, large: frozenset[int] = frozenset()) -> None:
        self.all = [row(position, large=position in large) for position in range(1, count + 1)]

    def rows(self, after: int, limit: int) -> list[OutboxRow]:
        return self.all[after : after + limit]

    def shape(self, number: int) -> Mapping[str, Any]:
        assert number == 1
        return SHAPE

    def detached(self) -> int:
        return 0

    def newest(self) -> int:
        return len(self.all)


def row(position: int, *, large: bool = False) -> OutboxRow:
    study = STUDIES[position % len(STUDIES)]
    extra: dict[str, Any] = {"parents": {"study": study, "patient": study[::-1]}}
    if large:
        extra["metadata"] = {"Much": "x" * 2_000_000}
    return OutboxRow(
        position,
        "NewInstance",
        "instance",
        f"{position:08x}-{study[9:]}",
        1_700_000_000_000 + position,
        position,
        "20231114T221320",
        None,
        1_700_000_000_001 + position,
        1,
        extra,
    )


class Notebook:
    """A bridge.db that is a few attributes."""

    def __init__(self) -> None:
        self.kept = Progress(0, None, "", 0)
        self.aside: list[tuple[int, str, str]] = []

    def progress(self, name: str, recorder: str, position: int) -> Progress:
        return replace(self.kept)

    def save(self, name: str, progress: Progress) -> None:
        self.kept = replace(progress)

    def gap(self, name: str, first: int, last: int) -> None:
        raise AssertionError("nothing was given up")

    def set_aside(self, transport: str, position: int, event: str, type_name: str, reason: str) -> None:
        self.aside.append((position, event, reason))


async def quickly(seconds: float) -> None:
    """The relay's waiting, for tests: it still doubles, and ends sooner."""
    await asyncio.sleep(min(seconds, 0.1))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def reached(relay: Relay, position: int) -> bool:
    return relay.position >= position
