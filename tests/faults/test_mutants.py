"""Each protection switched off: the ledger must then report the harm that it prevents, or the tests prove nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from orthanc_events_bridge.testing.brokers.nats import wait_nats
from orthanc_events_bridge.testing.ledger import Report
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.mutant
_SHORT = ["ack_timeout: 1s", "connect_timeout: 1s"]


def kill_the_broker(line: Line) -> Report:
    with Clients(line, adders=2, loopers=1):
        for _ in range(3):
            time.sleep(0.5)
            line.broker.freeze()  # so that something is on its way for certain
            time.sleep(0.5)
            line.broker.kill()
            time.sleep(0.3)
            line.broker.start()
    return line.report()


def freeze_the_broker(line: Line) -> Report:
    with Clients(line, adders=2, loopers=1):
        for _ in range(2):
            time.sleep(0.5)
            line.broker.freeze()
            time.sleep(2.5)
            line.broker.thaw()
        time.sleep(0.5)
    return line.report()


def kill_the_bridge(line: Line) -> Report:
    with Clients(line, adders=2):
        for _ in range(3):
            pid = line.bridge_pid()
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            line.wait(lambda document, pid=pid: document["bridge"]["pid"] not in (None, pid))
    return compare_when_quiet(line)


def compare_when_quiet(line: Line, kills: int = 0) -> Report:
    """Without a position or a cursor that is kept, the line never says that it is at rest."""
    wait_nats(line.broker.url, quiet=3)
    return line.ledger.compare(line.events(), kills=kills, existing=line.orthanc.existing())


def kill_orthanc_without_cursor(line: Line) -> Report:
    with Clients(line, adders=2):
        for _ in range(3):
            time.sleep(0.5)
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(0.5)
    return compare_when_quiet(line, kills=3)


def kill_orthanc(line: Line, kills: int = 6, loopers: int = 2) -> Report:
    with Clients(line, adders=2, loopers=loopers):
        for _ in range(kills):
            time.sleep(random.uniform(0.2, 0.8))
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(0.5)
    return line.report(kills=kills)


def hammer_orthanc(line: Line) -> Report:
    return kill_orthanc(line, kills=20, loopers=4)


def delete_the_stream(line: Line) -> Report:
    import asyncio

    import nats

    async def delete() -> None:
        client = await nats.connect(line.broker.url)
        await client.jetstream().delete_stream("ORTHANC_EVENTS")
        await client.close()

    with Clients(line, adders=1):
        time.sleep(1)
        asyncio.run(delete())
        time.sleep(1)
    return line.report()


#: What is switched off, the fault, and where the harm must show. Those that are not `slow` run in CI.
CASES: list[Any] = [
    pytest.param(["confirm"], kill_the_broker, "lost", id="confirm"),
    pytest.param(["replay"], kill_the_broker, "lost", id="replay"),
    pytest.param(["minting"], freeze_the_broker, "repeated", id="minting"),
    pytest.param(["log"], kill_orthanc, "lost", id="log"),
    pytest.param(["dedupe"], freeze_the_broker, "duplicated", id="dedupe", marks=pytest.mark.slow),
    pytest.param(["position", "dedupe"], kill_the_bridge, "duplicated", id="position", marks=pytest.mark.slow),
    pytest.param(
        ["cursor", "dedupe"], kill_orthanc_without_cursor, "unexpected duplicated", id="cursor", marks=pytest.mark.slow
    ),
    pytest.param(["identity"], delete_the_stream, "lost", id="identity", marks=pytest.mark.slow),
    pytest.param(["anchor"], hammer_orthanc, "lost repeated unexpected", id="anchor", marks=pytest.mark.slow),
    pytest.param(["rules"], hammer_orthanc, "lost repeated unexpected", id="rules", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("without", "fault", "harm"), CASES)
def test_the_ledger_reports_what_a_protection_prevents(
    make_line: Callable[..., Line], without: list[str], fault: Callable[[Line], Report], harm: str
) -> None:
    line = make_line(transport=_SHORT, without=without)
    report = fault(line)
    print(report)
    # Under kills, far more than what can wait in memory is harm as well (tests/faults/test_capture.py).
    beyond = report.kills and report.unrecoverable > report.kills * 400
    assert beyond or sum(getattr(report, category) for category in harm.split()), f"nobody noticed\n{report}"
