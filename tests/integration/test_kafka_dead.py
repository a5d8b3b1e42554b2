"""What is Kafka's own in dead letters: a topic that is compacted, and what may be wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiokafka.admin import NewTopic

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer, kafka_admin
from orthanc_events_bridge.transports.base import DeadLetter, Delivery, Subscription, Transport
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from tests.contract.harness import event, events, run
from tests.contract.kafka_tools import alter_topic, kafka_server, read_topic

pytestmark = pytest.mark.integration

PATIENCE = 90.0
WHY = {"orthanc-reason": "no"}
#: Where a server's cleaner looks for something to compact every 15 seconds by itself.
EAGER = "log.cleaner.backoff.ms=200\n"


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with kafka_server(tmp_path_factory.mktemp("kafka"), EAGER) as server:
        yield server


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """For a topic and a consumer that no other test uses."""
    return re.sub("[^a-z0-9_]+", "-", str(request.node.name))[:100]


@contextlib.asynccontextmanager
async def connected(kafka: KafkaServer, name: str, **options: Any) -> AsyncIterator[KafkaTransport]:
    defaults = {"servers": [kafka.url], "topic": name, "partitions": 4, "connect_timeout": 20, "ack_timeout": 20}
    transport = KafkaTransport(KafkaOptions.model_validate(defaults | options))
    try:
        await transport.connect()
        yield transport
    finally:
        await transport.close()


async def take(subscription: Subscription, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            found += await subscription.receive(count - len(found), 1.0)
    return found


async def read(transport: Transport, consumer: str) -> list[DeadLetter]:
    return [one async for one in (await transport.dead_letters(consumer)).read()]


async def still_held(subscription: Subscription, delivery: Delivery, transport: Transport, name: str) -> None:
    """What could not be rejected can be settled otherwise, and was not given again."""
    assert await subscription.receive(10, 0.5) == []
    await delivery.extend()
    await delivery.nack(0.0, {"orthanc-reason": "later"})
    (delivery,) = await take(subscription, 1)
    assert delivery.attempt == 2
    await delivery.reject(WHY)
    assert len(await read(transport, name)) == 1


async def make_topic(kafka: KafkaServer, topic: str, **settings: str) -> None:
    async with kafka_admin(kafka.url) as admin:
        configs = {key.replace("_", "."): value for key, value in settings.items()}
        answer = await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=configs)])
        assert [code for _, code, _ in answer.topic_errors] == [0]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({"cleanup_policy": "delete"}, "change the topic"), ({"max_message_bytes": "500"}, "max.message.bytes")],
)
def test_a_topic_that_would_not_keep_them(kafka: KafkaServer, name: str, settings: dict[str, str], remedy: str) -> None:
    topic = f"orthanc.dead.{name}"

    async def main() -> None:
        await make_topic(kafka, topic, **{"cleanup_policy": "compact", **settings})
        async with connected(kafka, name) as transport:
            subscription = await transport.subscribe(name, oldest=True)
            await transport.publish([event(0)])
            (delivery,) = await take(subscription, 1)
            with pytest.raises(TransportConfigurationError, match=topic) as caught:
                await delivery.reject(WHY)
            assert remedy in caught.value.remedy
            await asyncio.to_thread(alter_topic, kafka.url, topic, cleanup_policy="compact")
            await still_held(subscription, delivery, transport, name)

    run(main(), seconds=2 * PATIENCE)


def test_a_topic_that_is_deleted_is_made_again(kafka: KafkaServer, name: str) -> None:
    topic = f"orthanc.dead.{name}"

    async def main() -> None:
        async with connected(kafka, name) as transport:
            subscription = await transport.subscribe(name, oldest=True)
            await transport.publish(events(2))
            first, second = await take(subscription, 2)
            await first.reject(WHY)
            async with kafka_admin(kafka.url) as admin:
                await admin.delete_topics([topic])
                while topic in await admin.list_topics():  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.05)
            assert await read(transport, name) == []
            await second.reject(WHY)
            assert [one.message.body for one in await read(transport, name)] == [second.message.body]

    run(main(), seconds=2 * PATIENCE)


def test_a_topic_that_is_not_to_be_made(kafka: KafkaServer, name: str) -> None:
    topic = f"orthanc.dead.{name}"

    async def main() -> None:
        async with connected(kafka, name) as transport:
            await (await transport.subscribe(name, oldest=True)).close()
        async with connected(kafka, name, declare=False) as transport:
            subscription = await transport.subscribe(name)
            await transport.publish([event(0)])
            (delivery,) = await take(subscription, 1)
            assert await read(transport, name) == []
            with pytest.raises(TransportConfigurationError, match=f"no topic {topic}, and declare is false") as caught:
                await delivery.reject(WHY)
            assert "1 partition and cleanup.policy=compact" in caught.value.remedy
            await make_topic(kafka, topic, cleanup_policy="compact,delete")
            await delivery.reject(WHY)
            assert len(await read(transport, name)) == 1

    run(main(), seconds=2 * PATIENCE)


def test_what_is_removed_is_compacted_away_and_what_is_not_stays(kafka: KafkaServer, name: str) -> None:
    """The topic is read as before where offsets are missing in it."""
    topic = f"orthanc.dead.{name}"
    sent = events(200, size=2000)

    async def main() -> None:
        async with connected(kafka, name) as transport:
            subscription = await transport.subscribe(name, oldest=True)
            await transport.publish(sent)
            for delivery in await take(subscription, len(sent)):
                await delivery.reject(WHY)
            letters = await read(transport, name)
            assert len(letters) == len(sent)
            kept = [letters[0], letters[100], letters[199]]
            dead = await transport.dead_letters(name)
            await dead.remove([one for one in letters if one not in kept])
            config = {"cleanup_policy": "compact", "min_cleanable_dirty_ratio": "0", "delete_retention_ms": "0"}
            await asyncio.to_thread(alter_topic, kafka.url, topic, segment_ms="100", **config)
            async with asyncio.timeout(PATIENCE):
                while sum(row.value is not None for row in await read_topic(kafka.url, topic)) > len(kept) + 1:
                    # What stands in the last segment is not compacted; a new one is begun by what is written.
                    await dead.remove(letters[1:2])
                    await asyncio.sleep(0.5)
            left = await read(transport, name)
            assert [one.message.body for one in left] == [one.message.body for one in kept]
            await dead.remove(left)
            assert await read(transport, name) == []

    run(main(), seconds=3 * PATIENCE)
