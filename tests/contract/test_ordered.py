"""Order across all subscribers of a name: the questions that every broker with consumers has to answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator

import pytest

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.base import Delivery, Outgoing, Subscription, Transport
from tests.contract.harness import Harness, event, events, failing, run
from tests.contract.test_subscribe import PATIENCE, connected, id_of, name_of

pytestmark = pytest.mark.needs("subscribable")

#: One of each partition, so that all 64 are in use.
KEYS = [f"study-{number}" for number in range(400)]


@contextlib.asynccontextmanager
async def in_order(
    transport: Transport, name: str, *, in_flight: int = 256, ack_wait: float = 30.0
) -> AsyncGenerator[Subscription]:
    subscription = await transport.subscribe(name, oldest=True, in_flight=in_flight, ack_wait=ack_wait, ordered=True)
    try:
        yield subscription
    finally:
        await subscription.close()


async def take(subscription: Subscription, count: int) -> list[Delivery]:
    """Receive so many, without settling them."""
    found: list[Delivery] = []
    end = time.monotonic() + PATIENCE
    while len(found) < count:
        assert time.monotonic() < end, f"only {len(found)} of {count} came"
        found += await subscription.receive(count - len(found), 1.0)
    return found


def test_the_next_of_a_partition_comes_when_the_one_before_is_settled(harness: Harness) -> None:
    one, other = [event(number, "study-1") for number in range(5)], [event(number, "study-2") for number in range(5, 8)]
    assert one[0].partition != other[0].partition

    async def main() -> None:
        async with connected(harness) as transport, in_order(transport, name_of(harness)) as subscription:
            await transport.publish([*one, *other])
            held = await take(subscription, 2)  # the first of each
            assert {id_of(delivery) for delivery in held} == {one[0].id, other[0].id}
            assert await subscription.receive(10, 1.0) == []
            mine, theirs = sorted(held, key=id_of)
            for sent in other[1:]:  # a partition that stands still holds up no other
                await theirs.ack()
                (theirs,) = await take(subscription, 1)
                assert id_of(theirs) == sent.id
            for sent in one[1:]:
                await mine.ack()
                (mine,) = await take(subscription, 1)
                assert id_of(mine) == sent.id
            await mine.ack()
            await theirs.ack()
            assert await subscription.receive(10, 1.0) == []

    run(main(), seconds=120)


def test_what_waits_to_be_given_again_keeps_its_partition_waiting(harness: Harness) -> None:
    one, other = events(3, keys=["study-1"]), event(10, "study-2")

    async def main() -> None:
        async with connected(harness) as transport, in_order(transport, name_of(harness)) as subscription:
            await transport.publish(one)
            (delivery,) = await take(subscription, 1)
            began = time.monotonic()
            await delivery.nack(2.0, {"orthanc-first-failure": "2026-11-27T08:00:00.000Z"})
            await transport.publish([other])
            (delivery,) = await take(subscription, 1)
            assert id_of(delivery) == other.id
            await delivery.ack()
            (delivery,) = await take(subscription, 1)
            assert time.monotonic() - began >= 1.95
            assert id_of(delivery) == one[0].id
            assert delivery.attempt == 2
            await delivery.ack()
            for sent in one[1:]:
                (delivery,) = await take(subscription, 1)
                assert id_of(delivery) == sent.id and delivery.attempt == 1
                await delivery.ack()

    run(main(), seconds=120)


def test_a_rejected_one_makes_way_for_the_next(harness: Harness) -> None:
    sent = events(2, keys=["study-1"])

    async def main() -> None:
        async with connected(harness) as transport, in_order(transport, name_of(harness)) as subscription:
            await transport.publish(sent)
            (delivery,) = await take(subscription, 1)
            await delivery.reject({"orthanc-reason": "no"})
            (delivery,) = await take(subscription, 1)
            assert id_of(delivery) == sent[1].id
            await delivery.ack()

    run(main(), seconds=120)


def test_a_name_is_ordered_or_not_for_good(harness: Harness) -> None:
    async def main() -> None:
        async with connected(harness) as transport:
            async with in_order(transport, name_of(harness, "a")):
                pass
            with failing(harness, TransportConfigurationError):
                await transport.subscribe(name_of(harness, "a"))
            subscription = await transport.subscribe(name_of(harness, "b"))
            await subscription.close()
            with failing(harness, TransportConfigurationError):
                await transport.subscribe(name_of(harness, "b"), ordered=True)

    run(main(), seconds=120)


def test_the_inbox_stands_outside_the_order(harness: Harness) -> None:
    live, replayed, name = event(0, "study-1"), event(1, "study-1"), name_of(harness)

    async def main() -> None:
        async with connected(harness) as transport, in_order(transport, name) as subscription:
            await transport.publish([live])
            (held,) = await take(subscription, 1)
            inbox = transport.inbox(name)
            await inbox.connect()
            try:
                await inbox.publish([replayed._replace(dedupe=f"{replayed.id}:replay:1")])
            finally:
                await inbox.close()
            (delivery,) = await take(subscription, 1)
            assert id_of(delivery) == replayed.id
            await delivery.ack()
            await held.ack()

    run(main(), seconds=120)


async def work(
    harness: Harness, name: str, seen: list[str], done: asyncio.Event, running: dict[str, str], chance: random.Random
) -> None:
    """One subscriber: takes, works for a moment, settles; now and then gives back, or goes and comes again."""
    while not done.is_set():
        with contextlib.suppress(NotConnectedError):
            async with connected(harness) as transport, in_order(transport, name, in_flight=40) as subscription:
                end = time.monotonic() + chance.uniform(2, 8)
                while not done.is_set() and time.monotonic() < end:
                    for delivery in await subscription.receive(10, 0.5):
                        partition = delivery.message.address
                        await asyncio.sleep(chance.uniform(0, 0.002))
                        if chance.random() < 0.02:
                            await delivery.nack(0.05)
                        else:
                            seen.append(f"{id_of(delivery)} {partition}")
                            await delivery.ack()


def test_order_holds_while_subscribers_come_and_go(harness: Harness) -> None:
    sent: list[Outgoing] = events(3000, keys=KEYS)
    name, seen = name_of(harness), list[str]()

    async def main() -> None:
        done = asyncio.Event()
        async with connected(harness) as transport:
            async with in_order(transport, name):
                pass
            await transport.publish(sent)
            workers = [
                asyncio.create_task(work(harness, name, seen, done, {}, random.Random(number))) for number in range(4)
            ]
            end = time.monotonic() + 4 * PATIENCE
            while len({one.split()[0] for one in seen}) < len(sent):
                assert time.monotonic() < end, f"{len(set(seen))} of {len(sent)} came"
                await asyncio.sleep(0.1)
            done.set()
            await asyncio.gather(*workers)

    run(main(), seconds=400)
    firsts: dict[str, list[str]] = defaultdict(list)
    by_id = {one.id: one for one in sent}
    met: set[str] = set()
    for line in seen:
        found = line.split()[0]
        if found not in met:  # what was settled while its subscriber went can come again
            met.add(found)
            firsts[by_id[found].key].append(found)
    assert met == by_id.keys()
    for key, order in firsts.items():
        assert order == [one.id for one in sent if one.key == key]


def test_workers_share_the_partitions(harness: Harness) -> None:
    name = name_of(harness)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            transports = [await stack.enter_async_context(connected(harness)) for _ in range(4)]
            subscriptions = [await stack.enter_async_context(in_order(one, name)) for one in transports]
            end = time.monotonic() + PATIENCE
            number = 0
            while True:  # until each gets something of what is sent at a time
                await transports[0].publish(events(256, start=number, keys=KEYS[:256]))
                shares = [0, 0, 0, 0]
                left = 256
                while left and time.monotonic() < end:
                    for place, subscription in enumerate(subscriptions):
                        for delivery in await subscription.receive(64, 0.01):
                            await delivery.ack()
                            shares[place] += 1
                            left -= 1
                number += 256
                if min(shares) >= 16:
                    return
                assert time.monotonic() < end, f"the shares are {shares}"

    run(main(), seconds=300)
