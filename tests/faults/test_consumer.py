"""Consumers outside Orthanc: workers killed, frozen, started and stopped, and their broker killed underneath."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.consumers import RetryPolicy
from orthanc_events_bridge.transports.base import Outgoing, Transport
from orthanc_events_bridge.transports.options import TransportOptions
from tests.contract.harness import Harness
from tests.contract.table import TABLE
from tests.faults.consumers import Group, cloud_event, judge

pytestmark = pytest.mark.fault

KEYS = [f"study-{number}" for number in range(200)]
QUICK = RetryPolicy(max_attempts=20, initial=0.1, maximum=1.0)
BROKERS = [name for name, (_, can) in TABLE.items() if can.subscribable and can.durable]


@pytest.fixture(params=BROKERS)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    kind, _ = TABLE[request.param]
    found = kind(tmp_path / "broker")
    found.new_place()
    try:
        yield found
    finally:
        found.tidy()
        found.close()


def options(harness: Harness) -> TransportOptions:
    """What workers of their own processes need to reach the broker."""
    return harness.transport()._options  # type: ignore[attr-defined,no-any-return]  # every transport's own name


def publish(harness: Harness, sent: Sequence[Outgoing]) -> None:
    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        try:
            for start in range(0, len(sent), 500):
                await transport.publish(sent[start : start + 500])
        finally:
            await transport.close()

    asyncio.run(main())


def dead(harness: Harness, name: str) -> list[dict[str, str]]:
    async def read(transport: Transport) -> list[dict[str, str]]:
        await transport.connect()
        letters = await transport.dead_letters(name)
        try:
            return [one.message.headers async for one in letters.read()]
        finally:
            await letters.close()
            await transport.close()

    return asyncio.run(read(harness.transport()))


def events(count: int, *, poison: int = 0) -> list[Outgoing]:
    """In order, their keys in turn; each so many-th is poison."""
    return [
        cloud_event(number, KEYS[number % len(KEYS)], poison=bool(poison) and number % poison == 7)
        for number in range(count)
    ]


def trouble(group: Group, chance: random.Random, seconds: float, workers: int, ack_wait: float) -> None:
    """Kill, freeze, stop and start workers at random."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(chance.uniform(0.3, 1.0))
        alive = group.alive
        if len(alive) < workers:
            group.start(workers - len(alive))
            continue
        victim, what = chance.choice(alive), chance.random()
        if what < 0.4:
            group.send(victim, signal.SIGKILL)
        elif what < 0.7:
            group.send(victim, signal.SIGTERM)
        else:
            group.send(victim, signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 1.5 * ack_wait))
            group.send(victim, signal.SIGCONT)


@pytest.mark.parametrize(
    ("ordered", "count", "seconds"),
    [
        (False, 1500, 14),
        (True, 1500, 14),
        pytest.param(False, 10_000, 120, marks=pytest.mark.slow),
        pytest.param(True, 10_000, 120, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_when_workers_come_and_go(
    harness: Harness, tmp_path: Path, ordered: bool, count: int, seconds: float
) -> None:
    sent, ack_wait, chance = events(count, poison=100), 3.0, random.Random(count + ordered)
    settings: dict[str, Any] = {
        "start": "oldest",
        "ordered": ordered,
        "retry": QUICK,
        "ack_wait": ack_wait,
        "drain": 2.0,
    }
    with Group(tmp_path / "workers", options(harness), "one", longest=0.05, failing=0.02, **settings) as group:
        group.start(2)
        publish(harness, sent[: count // 2])
        trouble(group, chance, seconds / 2, 4, ack_wait)
        publish(harness, sent[count // 2 :])
        trouble(group, chance, seconds / 2, 4, ack_wait)
        wanted = {one.id for number, one in enumerate(sent) if number % 100 != 7}
        group.wait(lambda: group.ended() >= wanted, 240)
        group.wait(lambda: len(dead(harness, "one")) >= len(sent) - len(wanted), 60, every=2)
        group.stop()
        letters = dead(harness, "one")
        found = judge(sent, group.notes(), [one.get("orthanc-event-id") or one["nats-msg-id"][:36] for one in letters])
        print(f"{found}; {len(group.workers)} workers, {len(letters)} dead letters")
    assert found.lost == found.unexpected == 0
    assert {one["orthanc-reason"] for one in letters} == {"poison"}
    if ordered:
        assert found.overtaken == 0


def test_nothing_is_lost_when_the_broker_is_killed_meanwhile(harness: Harness, tmp_path: Path) -> None:
    sent = events(1500)
    settings: dict[str, Any] = {"start": "oldest", "retry": QUICK, "ack_wait": 5.0}
    with Group(tmp_path / "workers", options(harness), "one", longest=0.02, failing=0.02, **settings) as group:
        group.start(2)  # they wait for the place
        publish(harness, sent)
        for _ in range(3):
            before = len(group.ended())
            group.wait(lambda before=before: len(group.ended()) > min(before + 100, len(sent) - 1), 120)  # type: ignore[misc]
            harness.kill()
            time.sleep(0.5)
            harness.start()
        group.wait(lambda: len(group.ended()) == len(sent), 240)
        group.stop()
        found = judge(sent, group.notes())
        print(found)
    assert found.lost == found.unexpected == 0


def test_a_worker_that_was_frozen_begins_nothing_stale(harness: Harness, tmp_path: Path) -> None:
    ack_wait = 3.0
    sent = events(600)
    settings: dict[str, Any] = {
        "start": "oldest",
        "retry": QUICK,
        "ack_wait": ack_wait,
        "concurrency": 4,
        "prefetch": 64,
    }
    with Group(tmp_path / "workers", options(harness), "one", longest=0.04, **settings) as group:
        group.start(2)
        group.wait(lambda: len(group.alive) == 2, 30)
        publish(harness, sent[:400])
        group.wait(lambda: {one.worker for one in group.notes()} == {0, 1}, 120)
        group.send(0, signal.SIGSTOP)
        frozen = time.clock_gettime(time.CLOCK_MONOTONIC)
        group.wait(lambda: len(group.ended()) >= 390, 120)
        time.sleep(2 * ack_wait)
        publish(harness, sent[400:])
        group.send(0, signal.SIGCONT)
        thawed = time.clock_gettime(time.CLOCK_MONOTONIC)
        group.wait(lambda: len(group.ended()) == len(sent), 240)
        group.stop()
        notes = group.notes()
    assert thawed - frozen > 2 * ack_wait
    ended_before = {one.id for one in notes if one.what == "end" and one.worker == 1 and one.at < thawed}
    stale = [
        one for one in notes if one.worker == 0 and one.what == "begin" and one.at > thawed and one.id in ended_before
    ]
    assert stale == []
    assert judge(sent, notes).lost == 0


def test_workers_more_and_fewer_share_the_events(harness: Harness, tmp_path: Path) -> None:
    sent = events(1200)
    settings: dict[str, Any] = {"start": "oldest", "retry": QUICK, "ack_wait": 5.0, "concurrency": 2, "prefetch": 4}
    with Group(tmp_path / "workers", options(harness), "one", longest=0.02, **settings) as group:
        group.start(1)
        publish(harness, sent[:400])
        group.wait(lambda: len(group.ended()) >= 100, 120)
        group.start(7)
        publish(harness, sent[400:])
        group.wait(lambda: len({one.worker for one in group.notes()}) == 8, 120)
        for number in range(1, 8):
            group.send(number, signal.SIGTERM)
        group.wait(lambda: len(group.ended()) == len(sent), 240)
        group.stop()
        found = judge(sent, group.notes())
        print(found)
        assert all(worker.returncode == 0 for worker in group.workers)
    assert found.lost == found.unexpected == 0
