"""The pace of a replay, what it marks, and the times that the command line takes."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence

import pytest

from orthanc_events_bridge import cli_options
from orthanc_events_bridge.bridge.replay import Again, Pace
from orthanc_events_bridge.bridge.replays import Run
from orthanc_events_bridge.errors import RefusedError
from orthanc_events_bridge.transports.base import Outgoing, Place, PublishError
from tests.contract.harness import events


class Clock:
    """Time that passes only while somebody sleeps, or when it is said."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def seconds(rate: float, portions: Sequence[int], busy: float = 0.0) -> float:
    """How long it takes until the last portion may go.

    :param busy: that sending one takes.
    """
    clock = Clock()
    pace = Pace(rate, clock, clock.sleep)

    async def main() -> None:
        for portion in portions:
            await pace.take(portion)
            clock.now += busy

    asyncio.run(main())
    return clock.now - 100.0 - busy


def test_events_go_at_the_rate_that_was_asked_for() -> None:
    assert seconds(10, [1] * 101) == pytest.approx(10.0)
    assert seconds(100, [25] * 41) == pytest.approx(10.0)
    assert seconds(0.5, [1] * 6) == pytest.approx(10.0)
    assert seconds(0, [1000] * 100) == 0.0


def test_sending_counts_and_what_was_missed_is_not_caught_up_in_a_burst() -> None:
    assert seconds(10, [1] * 101, busy=0.05) == pytest.approx(10.0)
    assert seconds(10, [1] * 101, busy=0.2) == pytest.approx(20.0)


@pytest.mark.parametrize(("rate", "portion"), [(0, 500), (1, 1), (100, 25), (100_000, 500)])
def test_events_are_spread_over_the_second(rate: float, portion: int) -> None:
    assert Pace(rate).portion(500) == portion


class Broker(Place):
    def __init__(self) -> None:
        self.got: list[Outgoing] = []
        self.fails: PublishError | None = None

    async def connect(self) -> str:
        return "here"

    async def publish(self, events: Sequence[Outgoing]) -> None:
        if self.fails is not None:
            raise self.fails
        self.got += events

    async def close(self) -> None:
        pass


def run(consumer: str = "one") -> Run:
    return Run(77, "nats", consumer, "recorder", [], "", 0, 0, 100)


def test_events_are_marked_and_nothing_else_of_them_is_changed() -> None:
    broker, sent = Broker(), events(3)
    asyncio.run(Again(broker, run(), Pace(0)).publish(sent))
    for one, before in zip(broker.got, sent, strict=True):
        assert one.dedupe == f"{before.id}:replay:77"
        assert dict(one.headers) == {"orthanc-event-id": before.id, "orthanc-operation": "replay"}
        assert one._replace(dedupe="", headers=()) == before


def test_what_is_confirmed_is_counted() -> None:
    broker, mine, sent = Broker(), run(), events(6)
    place = Again(broker, mine, Pace(0))
    asyncio.run(place.publish(sent))
    assert mine.sent == {"study.created": 2, "instance.instance-added": 2, "job.failed": 2}
    broker.fails = PublishError(1, RefusedError("full", "make room"), [4, 5])
    with pytest.raises(PublishError):
        asyncio.run(place.publish(sent))
    assert mine.sent == {"study.created": 3, "instance.instance-added": 3, "job.failed": 3}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90m", 1_000_000_000.0 - 90 * 60),
        ("1h30m", 1_000_000_000.0 - 90 * 60),
        ("7d", 1_000_000_000.0 - 7 * 86400),
        ("2001-09-09T01:46:39Z", 999_999_999.0),
        ("2001-09-09T01:46:39", 999_999_999.0),
        ("2001-09-09T03:46:39.5+02:00", 999_999_999.5),
        ("2001-09-09", 999_993_600.0),
    ],
)
def test_times_are_moments_or_how_long_ago(text: str, found: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    assert cli_options.moment(text) == found * 1000


@pytest.mark.parametrize("text", ["", "90", "yesterday", "2001-09-31", "-3h", "2h ago", "2001-09-09T01:46:41Z"])
def test_what_is_no_time_or_yet_to_come_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    with pytest.raises(argparse.ArgumentTypeError, match=r"no time|yet to come"):
        cli_options.moment(text)
