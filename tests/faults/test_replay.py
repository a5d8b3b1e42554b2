"""Replays and backfills under faults."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.ledger import Report
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.processes import wait_until
from tests.integration.replay_tools import LONG, Command, everyones, inbox

pytestmark = pytest.mark.fault

MakeLine = Callable[..., Line]


@pytest.mark.parametrize(
    "broker", ["nats", *(pytest.param(one, marks=pytest.mark.slow) for one in ("rabbitmq", "kafka"))]
)
def test_a_replay_outlives_its_broker(make_line: MakeLine, broker: str) -> None:
    """Frozen and killed in the middle: it waits, and goes on by itself."""
    line = make_line(broker=broker, transport=BROKERS[broker].impatient)
    for _ in range(20):
        for instance in dicom.make_study(instances=5):
            line.ledger.stored(line.orthanc.upload(instance.data))
    line.settle()
    command = Command(line.folder.path, line.config)
    process = command.begin("replay", "--all", "--to", "archive", "--rate", "30", "--json")
    try:
        assert wait_until(lambda: len(inbox(line.broker, "archive")) > 50, LONG, every=0.1)
        line.broker.settle()
        line.broker.freeze()
        time.sleep(2)
        line.broker.kill()
        time.sleep(1)
        assert process.poll() is None
        line.broker.start()
        out, err = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert BROKERS[broker].title in err and "well again" in err, err
    assert json.loads(out)["done"]
    line.settle()
    got, through = inbox(line.broker, "archive"), json.loads(out)["through"]
    told = {one.position: one.body for one in everyones(line.broker)}
    assert {one.position: one.body for one in got} == {at: body for at, body in told.items() if at <= through}
    if line.broker.deduplicates:
        assert len(got) == len({one.position for one in got})
    assert not any(one.replayed for one in everyones(line.broker))
    line.report().assert_clean()


def backfill_while_receiving(line: Line) -> Report:
    """Ask for everything that was never announced, again and again, while everything is."""
    command = Command(line.folder.path, line.config)
    with Clients(line, adders=1, loopers=1, pause=0.02):
        for _ in range(2):
            command.run("backfill", "--level", "instance")
    return line.report()


def test_a_backfill_tells_nothing_that_orthanc_tells(make_line: MakeLine) -> None:
    backfill_while_receiving(make_line()).assert_clean()
