"""Handlers that take far longer than a broker waits for a sign of life, and for longer than RabbitMQ waits at all."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer
from tests.contract.harness import Harness
from tests.contract.rabbitmq_harness import RabbitHarness
from tests.faults.consumers import Group, cloud_event, options, publish
from tests.faults.judging import judge

pytestmark = pytest.mark.fault

MINUTES = 60.0


@pytest.mark.parametrize(
    ("seconds", "ack_wait"),
    [pytest.param(10.0, 4.0, id="short"), pytest.param(45 * MINUTES, 30.0, id="45-minutes", marks=pytest.mark.slow)],
)
def test_a_long_handler_keeps_what_it_holds(harness: Harness, tmp_path: Path, seconds: float, ack_wait: float) -> None:
    """Of both kinds, ordered and not, while others come and go and the rest of the events go on.

    The three of 45 minutes, side by side: ``pytest -m slow -n 3 tests/faults/test_long_handlers.py``.
    """
    broker = options(harness)
    if isinstance(harness, RabbitHarness) and seconds > 25 * MINUTES:  # it would take it back after half an hour
        assert isinstance(harness._server, RabbitServer)
        harness._server.ctl("eval", "application:set_env(rabbit, consumer_timeout, 7200000).")
        broker = broker.model_copy(update={"consumer_timeout": 7200.0})
    long = [cloud_event(number, f"long-{number}", takes=seconds) for number in range(2)]
    short = [cloud_event(number, f"short-{number % 50}") for number in range(2, 302)]
    settings: dict[str, Any] = {"start": "oldest", "ack_wait": ack_wait, "longest": 1.2 * seconds, "concurrency": 4}
    kinds: dict[str, dict[str, Any]] = {"in-the-loop": {}, "in-a-thread": {"blocking": True, "ordered": True}}
    with ExitStack() as stack:
        groups = [
            stack.enter_context(Group(tmp_path / name, broker, name, **settings, **how)) for name, how in kinds.items()
        ]
        for group in groups:
            group.start(2)
        publish(broker, long)
        for group in groups:
            group.wait(lambda group=group: len(group.notes()) == len(long), 120)  # type: ignore[misc]
        began, step = time.monotonic(), len(short) // 10
        for start in range(0, len(short), step):
            publish(broker, short[start : start + step])
            for group in groups:
                if start == 4 * step:
                    group.start()
                elif start == 7 * step:
                    group.send(2, signal.SIGTERM)
            time.sleep(max(0.0, began + seconds * (start + step) / len(short) - time.monotonic()))
        for group in groups:
            group.wait(lambda group=group: len(group.ended()) == len(long) + len(short), 120)  # type: ignore[misc]
            group.stop()
            notes = group.notes()
            found = judge([*long, *short], notes)
            print(f"{harness.title}, {group.name}: {found}")
            of_long = [one.what for one in notes if one.id in {event.id for event in long}]
            assert of_long == ["begin"] * 2 + ["end"] * 2
            assert found.lost == found.unexpected == 0
        # What was acknowledged is: nothing is left for who comes next.
        last = cloud_event(302, "last")
        publish(broker, [last])
        for group in groups:
            before = len(group.notes())
            group.start()
            group.wait(lambda group=group: last.id in group.ended(), 120)  # type: ignore[misc]
            assert {one.id for one in group.notes()[before:]} == {last.id}
            group.stop()
