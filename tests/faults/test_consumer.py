"""Consumers outside Orthanc: workers killed, frozen, started and stopped, and their broker killed underneath."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import Harness
from tests.faults.consumers import QUICK, Group, clock, dead, events, id_of, options, publish, trouble
from tests.faults.judging import judge

pytestmark = pytest.mark.fault


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
    broker = options(harness)
    sent, ack_wait, chance = events(count, poison=100), 3.0, random.Random(count + ordered)
    settings: dict[str, Any] = {
        "start": "oldest",
        "ordered": ordered,
        "retry": QUICK,
        "ack_wait": ack_wait,
        "drain": 2.0,
    }
    with Group(tmp_path / "workers", broker, "one", busy=0.05, failing=0.02, **settings) as group:
        group.start(2)
        publish(broker, sent[: count // 2])
        trouble(group, chance, seconds / 2, 4, 1.5 * ack_wait)
        publish(broker, sent[count // 2 :])
        trouble(group, chance, seconds / 2, 4, 1.5 * ack_wait)
        wanted = {one.id for number, one in enumerate(sent) if number % 100 != 7}
        group.wait(lambda: group.ended() >= wanted, 240)
        group.wait(lambda: len(dead(broker, "one")) >= len(sent) - len(wanted), 60, every=2)
        group.stop()
        letters = dead(broker, "one")
        found = judge(sent, group.notes(), [id_of(one) for one in letters])
        print(f"{found}; {len(group.workers)} workers, {len(letters)} dead letters")
    assert found.lost == found.unexpected == found.together == 0
    assert {one["orthanc-reason"] for one in letters} == {"poison"}
    if ordered:
        assert found.overtaken == 0


def test_nothing_is_lost_when_the_broker_is_killed_meanwhile(harness: Harness, tmp_path: Path) -> None:
    broker = options(harness)
    sent = events(1500)
    settings: dict[str, Any] = {"start": "oldest", "retry": QUICK, "ack_wait": 5.0}
    with Group(tmp_path / "workers", broker, "one", busy=0.02, failing=0.02, **settings) as group:
        group.start(2)  # they wait for the place
        publish(broker, sent)
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
    broker = options(harness)
    sent = events(600)
    settings: dict[str, Any] = {
        "start": "oldest",
        "retry": QUICK,
        "ack_wait": ack_wait,
        "concurrency": 4,
        "prefetch": 64,
    }
    with Group(tmp_path / "workers", broker, "one", busy=0.04, **settings) as group:
        group.start(2)
        group.wait(lambda: len(group.alive) == 2, 30)
        publish(broker, sent[:400])
        group.wait(lambda: {one.worker for one in group.notes()} == {0, 1}, 120)
        group.send(0, signal.SIGSTOP)
        frozen = clock()
        group.wait(lambda: len(group.ended()) >= 390, 120)
        time.sleep(2 * ack_wait)
        publish(broker, sent[400:])
        group.send(0, signal.SIGCONT)
        thawed = clock()
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
    broker = options(harness)
    sent = events(1200)
    settings: dict[str, Any] = {"start": "oldest", "retry": QUICK, "ack_wait": 5.0, "concurrency": 2, "prefetch": 4}
    with Group(tmp_path / "workers", broker, "one", busy=0.02, **settings) as group:
        group.start(1)
        publish(broker, sent[:400])
        group.wait(lambda: len(group.ended()) >= 100, 120)
        group.start(7)
        publish(broker, sent[400:])
        group.wait(lambda: len({one.worker for one in group.notes()}) == 8, 120)
        for number in range(1, 8):
            group.send(number, signal.SIGTERM)
        group.wait(lambda: len(group.ended()) == len(sent), 240)
        group.stop()
        found = judge(sent, group.notes())
        print(found)
        assert all(worker.returncode == 0 for worker in group.workers)
    assert found.lost == found.unexpected == 0
