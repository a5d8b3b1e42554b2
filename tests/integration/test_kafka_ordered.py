"""What is Kafka's own in order across subscribers: partitions that move, and what their next subscriber knows."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from orthanc_events_bridge.testing.brokers.kafka import KafkaServer
from orthanc_events_bridge.transports.base import Delivery, Subscription
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from tests.contract.harness import event, events, run
from tests.contract.kafka_tools import kafka_server

pytestmark = pytest.mark.integration

PATIENCE = 90.0
KEYS = [f"study-{number}" for number in range(400)]
FIRST = {"orthanc-first-failure": "2026-11-27T08:00:00.000Z"}


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    # The longest session is that of a subscriber here: a delivery may be held for longer than any.
    with kafka_server(tmp_path_factory.mktemp("kafka"), "group.max.session.timeout.ms=6000\n") as server:
        yield server


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """For a topic and a consumer that no other test uses."""
    return re.sub("[^a-z0-9_]+", "-", str(request.node.name))[:100]


@contextlib.asynccontextmanager
async def in_order(kafka: KafkaServer, name: str, *, partitions: int = 8) -> AsyncIterator[Any]:
    """A transport and its subscription."""
    options = {"servers": [kafka.url], "topic": name, "connect_timeout": 20, "ack_timeout": 20}
    transport = KafkaTransport(KafkaOptions.model_validate({**options, "partitions": partitions}))
    try:
        await transport.connect()
        yield transport, await transport.subscribe(name, oldest=True, ack_wait=5.0, ordered=True)
    finally:
        await transport.close()


async def take(subscription: Subscription) -> Delivery:
    async with asyncio.timeout(PATIENCE):
        while True:
            for found in await subscription.receive(1, 1.0):
                return found


def test_who_comes_next_knows_when_and_how_often(kafka: KafkaServer, name: str) -> None:
    async def main() -> None:
        async with in_order(kafka, name) as (transport, subscription):
            await transport.publish([event(0, "study-1"), event(1, "study-1")])
            delivery = await take(subscription)
            await delivery.nack(0.0, FIRST)
            delivery = await take(subscription)
            began = time.time()
            await delivery.nack(4.0, {"orthanc-reason": "b"})
        async with in_order(kafka, name) as (transport, subscription):
            delivery = await take(subscription)
            assert time.time() - began >= 4.0
            assert delivery.attempt == 3
            assert delivery.message.body == event(0, "study-1").body
            said = {**FIRST, "orthanc-reason": "b", "orthanc-attempts": "2", "orthanc-operation": "retry"}
            assert delivery.message.headers.items() >= said.items()
        async with in_order(kafka, name) as (transport, subscription):  # it was held, and not settled
            delivery = await take(subscription)
            assert delivery.attempt == 3
            await delivery.reject({"orthanc-reason": "c"})
            delivery = await take(subscription)
            assert delivery.message.body == event(1, "study-1").body and delivery.attempt == 1
            (letter,) = [one async for one in (await transport.dead_letters(name)).read()]
            assert letter.message.headers.items() >= {**FIRST, "orthanc-reason": "c", "orthanc-attempts": "3"}.items()

    run(main(), seconds=3 * PATIENCE)


def test_what_is_in_hand_for_long_stays_when_another_joins(kafka: KafkaServer, name: str) -> None:
    """For longer than ``ack_wait``, and than any session that the server allows; also where its partition is to go."""
    long = 15.0
    sent = [event(number, f"study-{number}") for number in range(6)]

    async def main() -> None:
        async with in_order(kafka, name, partitions=2) as (transport, subscription):
            await transport.publish(sent)
            held = [await take(subscription), await take(subscription)]  # one of each partition
            async with in_order(kafka, name, partitions=2) as (_, other):
                end = time.monotonic() + long
                while time.monotonic() < end:
                    assert await other.receive(10, 0.5) == []
                    assert await subscription.receive(10, 0.5) == []
                    for one in held:
                        await one.extend()
                for one in held:
                    await one.ack()
                mine, others = list[Delivery](), list[Delivery]()
                async with asyncio.timeout(PATIENCE):
                    while len(held) + len(mine) + len(others) < len(sent):
                        for who, found in ((subscription, mine), (other, others)):
                            for one in await who.receive(10, 0.2):
                                found.append(one)
                                await one.ack()
                bodies = sorted(one.message.body for one in (*held, *mine, *others))
                assert bodies == sorted(one.body for one in sent)

    run(main(), seconds=3 * PATIENCE)


def test_what_waits_to_be_given_again_does_not_hold_up_its_move(kafka: KafkaServer, name: str) -> None:
    """A partition whose event waits for long goes to who joins, and the wait with it."""

    async def main() -> None:
        async with in_order(kafka, name, partitions=2) as (transport, subscription):
            await transport.publish(
                [event(0, "study-1"), event(1, "study-2"), event(2, "study-3"), event(3, "study-4")]
            )
            for delivery in [await take(subscription), await take(subscription)]:  # one of each partition
                await delivery.nack(6.0, FIRST)
            again = time.time() + 6.0
            async with in_order(kafka, name, partitions=2) as (_, other):
                one, two = await asyncio.gather(take(subscription), take(other))
                assert time.time() >= again - 0.1
                assert one.attempt == two.attempt == 2
                assert one.message.headers.items() >= FIRST.items() <= two.message.headers.items()

    run(main(), seconds=3 * PATIENCE)


def test_eight_workers_have_eight_partitions_each(kafka: KafkaServer, name: str) -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            pairs = [await stack.enter_async_context(in_order(kafka, name, partitions=64)) for _ in range(8)]
            transport, began, number = pairs[0][0], time.monotonic(), 0
            while True:  # until what is sent comes to all of them evenly
                assert time.monotonic() < began + PATIENCE
                await transport.publish(events(len(KEYS), start=number, keys=KEYS))
                number += len(KEYS)
                shares: list[set[str]] = [set() for _ in pairs]
                left = len(KEYS)
                async with asyncio.timeout(PATIENCE):
                    while left:
                        for share, (_, subscription) in zip(shares, pairs, strict=True):
                            for delivery in await subscription.receive(64, 0.01):
                                share.add(delivery.message.position.partition(":")[0])
                                await delivery.ack()
                                left -= 1
                if [len(share) for share in shares] == [8] * 8:
                    assert len(set[str]().union(*shares)) == 64
                    print(f"after {time.monotonic() - began:.1f} s")
                    return

    run(main(), seconds=3 * PATIENCE)
