"""Dead letters by the thousand, at real brokers: the commands hold a few of them at a time only."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.cli import main
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer
from orthanc_events_bridge.testing.servers import require
from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters, Incoming, Transport
from orthanc_events_bridge.transports.kafka_dead import KafkaDeadLetters
from orthanc_events_bridge.transports.nats_dead import NatsDeadLetters
from orthanc_events_bridge.transports.rabbitmq_dead import RabbitDeadLetters
from tests.contract.harness import events, run
from tests.contract.kafka_tools import kafka_transport
from tests.contract.nats_tools import nats_server, nats_transport
from tests.contract.rabbitmq_tools import rabbit_server, rabbit_transport

pytestmark = pytest.mark.integration

COUNTS = {"nats": 5_000, "rabbitmq": 2_000, "kafka": 2_000}
#: What is shown, moved or removed in one go, and as much again that is just being read.
FEW = 250


class Held(Incoming):
    """A message that knows how many of its kind there are.

    :cvar alive: now.
    :cvar peak: at most.
    :cvar read: in all.
    """

    alive = peak = read = 0

    @classmethod
    def of(cls, message: Incoming) -> Held:
        cls.read += 1
        cls.alive += 1
        cls.peak = max(cls.peak, cls.alive)
        return cls(message.address, message.body, message.headers, message.position)

    def __del__(self) -> None:
        Held.alive -= 1


class Raw:
    """The same of what RabbitMQ's client has received, and of what is read of it."""

    alive = peak = 0

    @classmethod
    def came(cls, raw: DeliveredMessage) -> None:
        cls.alive += 1
        cls.peak = max(cls.peak, cls.alive)
        weakref.finalize(raw, cls.gone)

    @classmethod
    def gone(cls) -> None:
        cls.alive -= 1


def count_them(monkeypatch: pytest.MonkeyPatch, kind: type[DeadLetters]) -> None:
    read, on_message = kind.read, RabbitDeadLetters._on_message

    def received(self: RabbitDeadLetters, raw: DeliveredMessage) -> None:
        Raw.came(raw)
        on_message(self, raw)

    monkeypatch.setattr(RabbitDeadLetters, "_on_message", received)

    async def counted(self: DeadLetters) -> AsyncGenerator[DeadLetter]:
        async for one in read(self):
            yield DeadLetter(Held.of(one.message), one.mark)

    monkeypatch.setattr(kind, "read", counted)


async def reject_many(transport: Transport, count: int) -> None:
    """Half of them of studies, half of series."""
    await transport.connect()
    subscription = await transport.subscribe("one", in_flight=1000)
    rejected = 0
    for start in range(0, count, 500):
        kind = "study" if start < count // 2 else "series"
        text = json.dumps({"specversion": "1.0", "source": "urn:o", "type": f"io.orthanc-events.{kind}.stable.v1"})
        sent = events(500, start=start)
        await transport.publish([one._replace(body=(text[:-1] + f', "id": "{one.id}"}}').encode()) for one in sent])
        while rejected < start + 500:
            found = await subscription.receive(500, 5.0)
            await asyncio.gather(*(one.reject({"orthanc-reason": "no"}) for one in found))
            rejected += len(found)
    await subscription.close()
    await transport.close()


@pytest.mark.parametrize("kind", COUNTS)
def test_as_many_as_there_are_are_listed_given_again_and_deleted_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    count = COUNTS[kind]

    def dlq(broker: str, *arguments: str) -> str:
        Held.peak = Held.read = Raw.peak = 0
        assert main(["dlq", arguments[0], "--consumer", "one", "--broker", broker, *arguments[1:]]) == 0
        return capsys.readouterr().out

    def listed(broker: str) -> int:
        return len(json.loads(dlq(broker, "list", "--json")))

    def check(broker: str, transport: Transport, letters: type[DeadLetters]) -> None:
        run(reject_many(transport, count), seconds=300)
        count_them(monkeypatch, letters)
        lines = dlq(broker, "list").splitlines()
        assert len(lines) == count + 1 and Held.read == count and max(Held.peak, Raw.peak) <= FEW
        assert bool(Raw.peak) == (letters is RabbitDeadLetters)
        assert len({line.index("no") for line in lines[1:200]}) == 1  # under each other
        rows = json.loads(dlq(broker, "list", "--json", "--type", "study.*"))
        assert len(rows) == count // 2 and max(Held.peak, Raw.peak) <= FEW
        assert dlq(broker, "redrive", "--type", "study.*") == f"{count // 2} given to consumer one again\n"
        assert max(Held.peak, Raw.peak) <= FEW
        assert run(given_again(transport, count // 2), seconds=300) == count // 2
        assert listed(broker) == count // 2
        assert dlq(broker, "discard", "--all", "--yes") == f"{count // 2} of consumer one deleted\n"
        assert max(Held.peak, Raw.peak) <= FEW
        assert listed(broker) == 0

    SERVERS[kind](tmp_path, check)


async def given_again(transport: Transport, count: int) -> int:
    """How many different events their consumer gets."""
    await transport.connect()
    subscription = await transport.subscribe("one", in_flight=1000)
    found: set[str] = set()
    while len(found) < count:
        for one in await subscription.receive(500, 5.0):
            found.add(str(json.loads(one.message.body)["id"]))
            await one.ack()
    found |= {str(one) for one in await subscription.receive(1, 1.0)}
    await subscription.close()
    await transport.close()
    return len(found)


Check = Callable[[str, Transport, type[DeadLetters]], None]


def on_nats(folder: Path, check: Check) -> None:
    with nats_server(folder) as server:
        check(
            server.url,
            nats_transport(server, limits={"max_bytes": 2**28}, inbox_max_bytes=2**28, dead_max_bytes=2**28),
            NatsDeadLetters,
        )


def on_rabbitmq(folder: Path, check: Check) -> None:
    with rabbit_server(folder) as server:
        check(f"amqp://127.0.0.1:{server.port}", rabbit_transport(server), RabbitDeadLetters)


def on_kafka(folder: Path, check: Check) -> None:
    require("kafka")
    with KafkaServer(folder / "kafka") as server:
        check(f"kafka://127.0.0.1:{server.port}", kafka_transport(server.port), KafkaDeadLetters)


SERVERS = {"nats": on_nats, "rabbitmq": on_rabbitmq, "kafka": on_kafka}
