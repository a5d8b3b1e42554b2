"""The benchmarks on small numbers: that they run, and that what they compare is the same work."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from benchmarks import drain, fan_out, sending
from benchmarks.raw import raw_class
from benchmarks.report import table
from orthanc_events_bridge.bridge.config import load
from orthanc_events_bridge.testing.brokers import Broker, make_broker
from orthanc_events_bridge.testing.brokers.webhook import WebhookBroker
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.transports import create

pytestmark = pytest.mark.bench

_PROGRAMS = {"nats": ["nats-server"], "rabbitmq": ["rabbitmq-server"], "kafka": ["kafka"], "webhook": []}
_EVENTS, _ALONE = 2000, 3

#: Address (with Kafka: and partition), body, headers.
_Message = tuple[str, bytes, frozenset[tuple[str, str]]]


async def _tail(config: Path, count: int) -> list[_Message]:
    transport = create(load(config).transports[0])
    found: list[_Message] = []
    await transport.connect()
    try:
        async with asyncio.timeout(60), aclosing(transport.tail(oldest=True)) as messages:
            async for one in messages:
                partition = one.position.rpartition(":")[0]
                found.append((f"{one.address} {partition}", one.body, frozenset(one.headers.items())))
                if len(found) == count:
                    break
    finally:
        await transport.close()
    return found


def _stored(broker: Broker, config: Path, count: int) -> set[_Message]:
    """What was sent last, as it was stored."""
    if isinstance(broker, WebhookBroker):  # what is in other headers is HTTP's, or names the program
        return {
            (
                one.place,
                one.body,
                frozenset(item for item in one.headers.items() if item[0].startswith(("content-type", "orthanc-"))),
            )
            for one in broker.server.received()[-count:]
        }
    return set(asyncio.run(_tail(config, count)))


@pytest.mark.parametrize("kind", _PROGRAMS)
def test_plain_clients_send_what_the_bridge_sends(kind: str, tmp_path: Path) -> None:
    require(*_PROGRAMS[kind])
    found, stored = drain.Comparison(kind, _EVENTS, _ALONE), {}
    with make_broker(kind, tmp_path / kind) as broker:
        for way, sent in drain.measure(broker, tmp_path, _EVENTS, _ALONE):
            found.add(way, sent)
            count = _ALONE if way == sending.ALONE else _EVENTS
            stored[way] = _stored(broker, tmp_path / "orthanc-events.yaml", count)
    by_bridge = stored[drain.BRIDGE]
    assert len(by_bridge) == _EVENTS
    for way in raw_class(kind).ways:
        assert stored[way] == by_bridge, way
    assert len(stored[sending.ALONE]) == _ALONE
    assert stored[sending.ALONE] <= by_bridge
    section = drain.section([found])
    assert len(section.rows) == len(raw_class(kind).ways) + 2
    assert table(section.tables[0]).count(f"\n| {found.title}, ") == len(found.runs)


def test_ingest_with_three_transports_at_once() -> None:
    require("orthanc", "orthanc-python", "nats-server", "rabbitmq-server", "kafka")
    plain, bridge = sides = fan_out.compare(1, 40)
    assert (plain.refused, bridge.refused) == (0, 0)
    section = fan_out.section(sides, 1, 40)
    assert {"NATS", "RabbitMQ", "Kafka"} <= bridge.cpu.keys()
    assert len(section.tables[0]) == 3
