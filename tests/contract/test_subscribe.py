"""What a consumer may rely on, whichever broker it subscribes to; nothing here knows which one it asks.

Brokers may take seconds until several subscribers of a name share its events. So nothing is concluded from silence:
that something doesn't come is shown by what was sent behind it and does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

import pytest

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.base import Delivery, Outgoing, PublishError, Subscription, Transport
from tests.contract.harness import CONTENT_TYPE, Harness, event, events, failing, run

pytestmark = pytest.mark.needs("subscribable")

KEYS = [f"study-{number}" for number in range(10)]
#: Seconds for what takes a broker moments, and a rebalance on a busy machine.
PATIENCE = 90.0
#: The clocks of a broker and of a test may differ by so much.
CLOCKS = 0.05
#: How much longer a call may take than it promises.
GRACE = 5.0
#: Short, for tests that wait until it is over.
ACK_WAIT = 3.0
#: Numbers of events that only show that a subscriber has seen what was sent before.
PROBES = 1_000_000
_probes = itertools.count(PROBES)


def name_of(harness: Harness, consumer: str = "router") -> str:
    """A consumer's name that no other test uses."""
    return f"{consumer}-{harness.place}_1"


def id_of(delivery: Delivery) -> str:
    return str(json.loads(delivery.message.body)["id"])


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    return [id_of(one) for one in deliveries]


@contextlib.asynccontextmanager
async def connected(harness: Harness) -> AsyncGenerator[Transport]:
    transport = harness.transport()
    try:
        await transport.connect()
        yield transport
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def subscribed(
    transport: Transport, name: str, *, oldest: bool = True, in_flight: int = 256, ack_wait: float = 30.0
) -> AsyncGenerator[Subscription]:
    subscription = await transport.subscribe(name, oldest=oldest, in_flight=in_flight, ack_wait=ack_wait)
    try:
        yield subscription
    finally:
        await subscription.close()


async def receive(subscription: Subscription, limit: int = 100, wait: float = 1.0) -> list[Delivery]:
    found = await subscription.receive(limit, wait)
    assert len(found) <= limit
    assert all(one.attempt >= 1 for one in found)
    return found


async def drain(
    subscription: Subscription, until: Callable[[list[Delivery]], bool], *, ack: bool = True, limit: int = 100
) -> list[Delivery]:
    """Receive until what has come is enough."""
    found: list[Delivery] = []
    end = time.monotonic() + PATIENCE
    while not until(found):
        assert time.monotonic() < end, f"only {len(found)} came: {ids(found)[-10:]}"
        some = await receive(subscription, limit)
        if ack:
            for one in some:
                await one.ack()
        found += some
    return found


async def collect(subscription: Subscription, count: int, *, ack: bool = True) -> list[Delivery]:
    """Receive so many, and not one more than that."""
    found: list[Delivery] = []
    while len(found) < count:
        found += await drain(subscription, bool, ack=ack, limit=count - len(found))
    return found


async def remaining(transport: Transport, *subscriptions: Subscription) -> list[str]:
    """Acknowledge all that is left for a name's only subscribers; the ids of what is no probe."""
    probes = [event(next(_probes), key) for key in KEYS]
    await transport.publish(probes)
    missing, found = {one.id for one in probes}, []
    end = time.monotonic() + PATIENCE
    while missing:
        assert time.monotonic() < end, f"{len(missing)} of {len(probes)} did not come"
        for subscription in subscriptions:
            for delivery in await receive(subscription, wait=0.2):
                await delivery.ack()
                found.append(id_of(delivery))
                missing.discard(id_of(delivery))
    return [one for one in found if int(one[:8]) < PROBES]


async def over_new_connections(work: Callable[[bool], Awaitable[None]]) -> None:
    """Do something, from the beginning where the connection is lost: a server that has just started may end it.

    :param work: told whether this is the first time.
    """
    end, first = time.monotonic() + PATIENCE, True
    while True:
        try:
            return await work(first)
        except (NotConnectedError, PublishError) as error:
            lost = error.error if isinstance(error, PublishError) else error
            if not isinstance(lost, NotConnectedError) or time.monotonic() > end:
                raise
            first = False
            await asyncio.sleep(0.1)


async def join(transport: Transport, *subscriptions: Subscription) -> None:
    """Wait until each of a name's subscribers gets a share."""
    waiting = set(subscriptions)
    end = time.monotonic() + PATIENCE
    while waiting:
        assert time.monotonic() < end, f"{len(waiting)} of {len(subscriptions)} subscribers get nothing"
        await transport.publish([event(next(_probes), key) for key in KEYS * 2])
        for subscription in subscriptions:
            # One at a time: nobody takes it all.
            for delivery in await receive(subscription, 1, 0.1):
                await delivery.ack()
                waiting.discard(subscription)
    await remaining(transport, *subscriptions)


def check_order(found: Iterable[str], sent: Sequence[Outgoing]) -> None:
    """The first of each come in the order of their keys."""
    seen = list(dict.fromkeys(found))
    for key in {one.key for one in sent}:
        mine = [one.id for one in sent if one.key == key]
        assert [one for one in seen if one in set(mine)] == [one for one in mine if one in set(seen)]


# What is received.


def test_what_is_received_is_what_was_published(harness: Harness) -> None:
    sent = [*events(300, keys=KEYS), event(300, size=30_000), event(301, content={"t": "\r\n\r\n"})]

    async def main() -> list[Delivery]:
        async with connected(harness) as transport:
            await transport.publish(sent)
            async with subscribed(transport, name_of(harness)) as subscription:
                found = await collect(subscription, len(sent))
                assert await remaining(transport, subscription) == []
        return found

    found = run(main(), seconds=2 * PATIENCE)
    assert sorted(ids(found)) == sorted(one.id for one in sent)
    check_order(ids(found), sent)
    outgoing = {one.id: one for one in sent}
    for delivery in found:
        message, original = delivery.message, outgoing[id_of(delivery)]
        assert message.body == original.body
        assert message.headers["content-type"] == CONTENT_TYPE
        assert message.headers[harness.id_header] == original.id
        assert message.address.endswith(harness.address(original))
        assert all(name == name.lower() for name in message.headers)
        assert delivery.attempt == 1


@pytest.mark.parametrize("oldest", [False, True])
def test_where_a_name_begins_and_goes_on(harness: Harness, oldest: bool) -> None:
    sent = events(60, keys=KEYS)

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            await transport.publish(sent[:20])
            async with subscribed(transport, name, oldest=oldest) as subscription:
                await transport.publish(sent[20:40])
                wanted = sent[:40] if oldest else sent[20:40]
                found = await collect(subscription, len(wanted))
                assert sorted(ids(found)) == sorted(one.id for one in wanted)
        async with connected(harness) as transport:
            await transport.publish(sent[40:])  # while nobody is there
        for last in (sent[40:], []):
            async with connected(harness) as transport, subscribed(transport, name) as subscription:
                assert sorted(await remaining(transport, subscription)) == [one.id for one in last]

    run(main(), seconds=3 * PATIENCE)


def test_a_name_that_never_received_anything_goes_on_all_the_same(harness: Harness) -> None:
    sent = events(20, keys=KEYS)

    async def main() -> None:
        async with connected(harness) as transport:
            await transport.publish(events(20, start=20, keys=KEYS))
            async with subscribed(transport, name_of(harness), oldest=False):
                pass
            await transport.publish(sent)
            async with subscribed(transport, name_of(harness), oldest=True) as subscription:
                assert sorted(await remaining(transport, subscription)) == [one.id for one in sent]

    run(main(), seconds=2 * PATIENCE)


def test_publishing_and_looking_beside_a_subscription(harness: Harness) -> None:
    sent = events(600, keys=KEYS)

    async def main() -> None:
        async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:

            async def publish() -> None:
                for first in range(0, len(sent), 50):
                    await transport.publish(sent[first : first + 50])

            publishing = asyncio.create_task(publish())
            async with contextlib.aclosing(transport.tail(oldest=transport.capabilities.replayable)) as tail:
                found = await collect(subscription, len(sent))
                await publishing
                if transport.capabilities.replayable:
                    assert (await anext(tail)).body
            assert sorted(ids(found)) == [one.id for one in sent]
            assert await remaining(transport, subscription) == []

    run(main(), seconds=2 * PATIENCE)


# Settling.


def test_what_is_not_acknowledged_comes_again_and_what_is_does_not(harness: Harness) -> None:
    sent = events(30, keys=KEYS)
    done = [one.id for one in sent[::3]]  # with holes between them

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            await transport.publish(sent)
            async with subscribed(transport, name) as subscription:
                for delivery in await collect(subscription, len(sent), ack=False):
                    if id_of(delivery) in done:
                        await delivery.ack()
            async with subscribed(transport, name) as subscription:
                found = await collect(subscription, len(sent) - len(done))
                assert sorted(ids(found)) == [one.id for one in sent if one.id not in done]
                if transport.capabilities.counts_deliveries:
                    assert min(one.attempt for one in found) >= 2
                assert await remaining(transport, subscription) == []
        async with connected(harness) as transport, subscribed(transport, name) as subscription:
            assert await remaining(transport, subscription) == []

    run(main(), seconds=4 * PATIENCE)


@pytest.mark.needs("durable")
def test_settling_outlasts_the_broker(harness: Harness) -> None:
    sent = events(30, keys=KEYS)

    async def main() -> None:
        name, began, delay = name_of(harness), 0.0, 4.0
        async with connected(harness) as transport:
            await transport.publish(sent)
            async with subscribed(transport, name, ack_wait=ACK_WAIT) as subscription:
                found = {id_of(one): one for one in await collect(subscription, len(sent), ack=False)}
                for one in sent[:20]:
                    await found[one.id].ack()
                began = time.monotonic()
                await found[sent[20].id].nack(delay)
            await asyncio.to_thread(harness.settled, name)
        harness.kill()
        harness.start()
        came: dict[str, float] = {}

        async def consume(first: bool) -> None:
            async with connected(harness) as transport, subscribed(transport, name) as subscription:
                while len(came) < len(sent[20:]):
                    for delivery in await drain(subscription, bool):
                        assert not first or id_of(delivery) not in came
                        came.setdefault(id_of(delivery), time.monotonic())
                        assert not first or delivery.attempt == 2 or id_of(delivery) != sent[20].id
                again = await remaining(transport, subscription)
                assert again == [] if first else {*again} <= {*came}

        await over_new_connections(consume)
        assert sorted(came) == [one.id for one in sent[20:]]
        assert came[sent[20].id] - began >= delay - CLOCKS

    run(main(), seconds=3 * PATIENCE)


def test_what_is_given_back_comes_again_at_once(harness: Harness) -> None:
    sent = events(5)

    async def main() -> None:
        async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:
            await transport.publish(sent)
            for attempt in (1, 2, 3):
                found = await collect(subscription, len(sent), ack=False)
                assert sorted(ids(found)) == [one.id for one in sent]
                assert {one.attempt for one in found} == {attempt}
                for one in found:
                    await one.nack()
            assert sorted(await remaining(transport, subscription)) == [one.id for one in sent]
            assert await remaining(transport, subscription) == []

    run(main(), seconds=2 * PATIENCE)


def test_a_delay_is_kept_and_holds_nothing_up(harness: Harness) -> None:
    sent, later = events(10, keys=KEYS), events(20, start=10, keys=KEYS)
    delays = {sent[0].id: 4.0, sent[1].id: 0.3, sent[2].id: 5.5}

    async def main() -> None:
        async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:
            await transport.publish(sent)
            given: dict[str, float] = {}
            for delivery in await collect(subscription, len(sent), ack=False):
                if id_of(delivery) in delays:
                    given[id_of(delivery)] = time.monotonic()
                    await delivery.nack(delays[id_of(delivery)])
                else:
                    await delivery.ack()
            await transport.publish(later)
            came: dict[str, float] = {}
            while len(came) < len(later) + len(delays):
                for delivery in await drain(subscription, bool):
                    assert id_of(delivery) not in came
                    came[id_of(delivery)] = time.monotonic()
                    assert delivery.attempt == (2 if id_of(delivery) in delays else 1)
            for one, delay in delays.items():
                assert came[one] - given[one] >= delay - CLOCKS
            assert set(list(came)[: len(later)]) <= {sent[1].id, *(one.id for one in later)}
            assert await remaining(transport, subscription) == []

    run(main(), seconds=2 * PATIENCE)


@pytest.mark.parametrize("end", ["subscription", "transport"])
def test_a_delay_outlasts_its_subscriber(harness: Harness, end: str) -> None:
    (sent,) = events(1)

    async def main() -> None:
        name, delay = name_of(harness), 3.0
        async with connected(harness) as transport, subscribed(transport, name, ack_wait=ACK_WAIT) as subscription:
            await transport.publish([sent])
            (delivery,) = await collect(subscription, 1, ack=False)
            began = time.monotonic()
            await delivery.nack(delay)
            await asyncio.to_thread(harness.settled, name)
            await (subscription if end == "subscription" else transport).close()
        async with connected(harness) as transport, subscribed(transport, name) as subscription:
            (delivery,) = await collect(subscription, 1)
            assert time.monotonic() - began >= delay - CLOCKS
            assert id_of(delivery) == sent.id
            assert delivery.attempt == 2
            assert await remaining(transport, subscription) == []

    run(main(), seconds=2 * PATIENCE)


# Sharing.


def test_subscribers_of_one_name_share_and_another_name_gets_all(harness: Harness) -> None:
    sent = events(600, keys=[f"study-{number}" for number in range(100)])

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            one, two, three = [await stack.enter_async_context(connected(harness)) for _ in range(3)]
            sharing = [await stack.enter_async_context(subscribed(it, name_of(harness))) for it in (one, two)]
            await join(three, *sharing)
            other = await stack.enter_async_context(subscribed(three, name_of(harness, "other"), oldest=False))
            shares: list[list[str]] = [[], []]

            async def work(subscription: Subscription, share: list[str]) -> None:
                while sum(map(len, shares)) < len(sent):
                    for delivery in await receive(subscription, 10, 0.2):
                        await asyncio.sleep(0.001)
                        await delivery.ack()
                        share.append(id_of(delivery))

            await three.publish(sent)
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*map(work, sharing, shares))
            assert all(shares)
            assert sorted([*shares[0], *shares[1]]) == [one.id for one in sent]
            assert await remaining(three, *sharing) == []
            assert sorted(await remaining(three, other)) == [one.id for one in sent]

    run(main(), seconds=5 * PATIENCE)


@pytest.mark.parametrize("end", ["subscription", "transport", "line"])
def test_what_a_subscriber_held_when_it_died_goes_to_another(harness: Harness, end: str) -> None:
    sent = events(20, keys=KEYS)

    async def main() -> None:
        name = name_of(harness)
        with harness.slow(0.0) as (transport, cut, _):
            await transport.connect()
            await transport.publish(sent)
            subscription = await transport.subscribe(name, oldest=True, ack_wait=ACK_WAIT)
            first = await collect(subscription, len(sent), ack=False)
            for delivery in first[:5]:
                await delivery.ack()
            await asyncio.to_thread(harness.settled, name)
            if end == "subscription":
                await subscription.close()
            elif end == "transport":
                await transport.close()
            else:
                cut()
            async with connected(harness) as another, subscribed(another, name, ack_wait=ACK_WAIT) as heir:
                found = await collect(heir, len(sent) - 5)
                assert sorted(ids(found)) == sorted(ids(first[5:]))
                if another.capabilities.counts_deliveries:
                    assert min(one.attempt for one in found) >= 2
                assert await remaining(another, heir) == []
            await subscription.close()
            await transport.close()

    run(main(), seconds=3 * PATIENCE)


def test_a_subscriber_that_is_waiting_gets_what_another_held(harness: Harness) -> None:
    sent = events(20, keys=KEYS)

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as one, connected(harness) as two, subscribed(two, name) as heir:
            dying = await one.subscribe(name)
            await join(two, dying, heir)
            await two.publish(sent)
            held: list[Delivery] = []
            got: list[str] = []
            while len(held) + len(got) < len(sent):  # each has its share
                held += await receive(dying, wait=0.2)
                for delivery in await receive(heir, wait=0.2):
                    await delivery.ack()
                    got.append(id_of(delivery))
            waiting = asyncio.create_task(drain(heir, lambda found: len(found) >= len(held)))
            await dying.close()
            got += ids(await waiting)
            assert sorted(got) == [one.id for one in sent]
            assert await remaining(two, heir) == []

    run(main(), seconds=4 * PATIENCE)


# How much is received.


def test_what_is_held_is_bounded(harness: Harness) -> None:
    sent = events(16, keys=KEYS)

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport, subscribed(transport, name, in_flight=7) as subscription:
            for _ in range(3):  # what was asked for and given up counts as well
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await subscription.receive(7, PATIENCE)
            await transport.publish(sent)
            held = await collect(subscription, 7, ack=False)
            got = ids(held)
            while len(got) < len(sent):
                for wait in (0.0, 0.2):
                    began = time.monotonic()
                    assert await subscription.receive(100, wait) == []
                    assert time.monotonic() - began >= wait - CLOCKS
                waiting = asyncio.create_task(subscription.receive(100, PATIENCE))
                await asyncio.sleep(0.05)
                await held.pop(0).ack()  # wakes it up
                some = await waiting
                assert len(some) == 1
                held += some
                got += ids(some)
            assert sorted(got) == [one.id for one in sent]
            for delivery in held:
                await delivery.ack()
            assert await remaining(transport, subscription) == []

    run(main(), seconds=2 * PATIENCE)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_is_received_than_was_asked_for(harness: Harness, limit: int) -> None:
    sent = events(20)

    async def main() -> None:
        async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:
            await transport.publish(sent)
            found = await drain(subscription, lambda found: len(found) == len(sent), limit=limit)
            assert ids(found) == [one.id for one in sent]

    run(main(), seconds=2 * PATIENCE)


def test_waiting_ends_with_the_first_event_or_in_time(harness: Harness) -> None:
    async def main() -> None:
        async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:
            assert await remaining(transport, subscription) == []  # from now on nothing is slow
            for wait in (0.0, 0.3):
                began = time.monotonic()
                assert await subscription.receive(10, wait) == []
                assert time.monotonic() - began >= wait - CLOCKS
            await transport.publish(events(1))
            found: list[Delivery] = []
            while not found:
                found = await subscription.receive(10, 0)  # what a broker has may still be on its way
                await asyncio.sleep(0.01)
            await found[0].ack()
            waiting = asyncio.create_task(subscription.receive(10, 10 * PATIENCE))
            await asyncio.sleep(0.2)
            await transport.publish(events(1, start=1))
            (delivery,) = await waiting
            await delivery.ack()
            assert await remaining(transport, subscription) == []

    run(main(), seconds=2 * PATIENCE)


def test_waiting_that_is_cancelled_loses_nothing(harness: Harness) -> None:
    sent, chance = events(300, keys=KEYS), random.Random(7)

    async def main() -> None:
        async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:
            got: list[str] = []

            async def publish() -> None:
                for first in range(0, len(sent), 10):
                    await transport.publish(sent[first : first + 10])
                    await asyncio.sleep(0.01)

            publishing = asyncio.create_task(publish())
            end = time.monotonic() + PATIENCE
            while len(got) < len(sent):
                assert time.monotonic() < end
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(chance.uniform(0, 0.03)):
                        some = await subscription.receive(20, 10)
                    for delivery in some:
                        await delivery.ack()
                        got.append(id_of(delivery))
            await publishing
            assert sorted(got) == [one.id for one in sent]
            assert await remaining(transport, subscription) == []

    run(main(), seconds=3 * PATIENCE)


# Leaving.


@pytest.mark.parametrize("ordered", [False, True])
def test_what_has_not_begun_is_given_to_another_at_once(harness: Harness, ordered: bool) -> None:
    """While one that leaves still works on something, others get the rest."""
    sent = events(60, keys=KEYS)

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            one = await transport.subscribe(name, oldest=True, ordered=ordered)
            await transport.publish(sent)
            held, *back = await collect(one, 2 if ordered else 40, ack=False)
            other = await transport.subscribe(name, oldest=True, ordered=ordered)
            await one.leave(back)
            # What shares a partition with the one that is at work may have to wait for that.
            found = await drain(other, lambda found: {*ids(found)} >= {*ids(back)} or len({*ids(found)}) > 30, ack=True)
            await held.ack()
            while {*ids(found)} < {one.id for one in sent} - {id_of(held)}:
                found += await drain(other, bool)
            assert sorted(ids(found)) == sorted({one.id for one in sent} - {id_of(held)})
            if ordered:  # else what is given back stands outside the order
                check_order(ids(found), sent)
            assert max(one.attempt for one in found) <= 2  # by brokers that count themselves
            await one.close()
            assert await remaining(transport, other) == []
            await other.close()

    run(main(), seconds=3 * PATIENCE)


# The time that a delivery may take.


def test_work_that_goes_on_is_not_given_to_another(harness: Harness) -> None:
    async def main() -> None:
        name = name_of(harness)
        async with (
            connected(harness) as transport,
            subscribed(transport, name, ack_wait=ACK_WAIT) as one,
            subscribed(transport, name, ack_wait=ACK_WAIT) as other,
        ):
            await join(transport, one, other)
            await transport.publish(events(1))
            held: list[tuple[Subscription, Delivery]] = []
            while not held:
                held = [(by, delivery) for by in (one, other) for delivery in await receive(by, 10, 0.1)]
            ((holder, delivery),) = held
            began = time.monotonic()
            while time.monotonic() - began < 1.5 * ACK_WAIT:
                await delivery.extend()
                assert await receive(other if holder is one else one, 10, 0.2) == []
            await delivery.ack()
            assert await remaining(transport, one, other) == []

    run(main(), seconds=4 * PATIENCE)


def test_work_that_takes_too_long_is_given_to_another(harness: Harness) -> None:
    if not harness.takes_back:
        return  # a delivery is its subscriber's as long as that lives
    sent = events(2)

    async def main() -> None:
        name, wait = name_of(harness), 1.0
        async with connected(harness) as transport:
            await transport.publish(sent)
            async with subscribed(transport, name, ack_wait=wait) as slow:
                began = time.monotonic()
                late = await collect(slow, len(sent), ack=False)
                async with subscribed(transport, name, ack_wait=wait) as other:
                    found = await collect(other, len(sent), ack=False)
                    assert time.monotonic() - began >= wait - CLOCKS
                    assert min(one.attempt for one in found) >= 2
                    # What the late one says doesn't count, nor does anybody take it for the other's word.
                    for settle in (late[0].extend, late[0].ack, late[1].nack):
                        with failing(harness, NotConnectedError):
                            await settle()
                async with subscribed(transport, name) as third:
                    found = await drain(third, lambda found: {*ids(found)} == {one.id for one in sent})
                    assert min(one.attempt for one in found) >= 3
                    assert await remaining(transport, third) == []

    run(main(), seconds=3 * PATIENCE)


# A connection that goes away.


@pytest.mark.parametrize("end", ["broker", "line", "transport"])
def test_a_connection_that_is_lost_while_waiting(harness: Harness, end: str) -> None:
    async def main() -> None:
        with harness.slow(0.0) as (transport, cut, _):
            await transport.connect()
            subscription = await transport.subscribe(name_of(harness), oldest=True)
            await transport.publish(events(4))
            held = await collect(subscription, 4, ack=False)
            waiting = asyncio.create_task(subscription.receive(10, 10 * PATIENCE))
            await asyncio.sleep(0.2)
            if end == "broker":
                harness.kill()
            elif end == "line":
                cut()
            else:
                await transport.close()
            with failing(harness, NotConnectedError):
                async with asyncio.timeout(PATIENCE):
                    await waiting
            for use in (held[0].ack, held[1].nack, lambda: held[2].nack(1.0), held[3].extend):
                with failing(harness, NotConnectedError):
                    await use()
            for wait in (0.0, 1.0):
                with failing(harness, NotConnectedError):
                    await subscription.receive(10, wait)
            await subscription.close()
            await transport.close()

    run(main(), seconds=2 * PATIENCE)


async def work_until_done(
    harness: Harness,
    make: Callable[[], Transport],
    sent: Sequence[Outgoing],
    acknowledged: set[str],
    go: asyncio.Event | None = None,
) -> list[Delivery]:
    """As a consumer does it: whatever the connection does, until every event is acknowledged.

    :param go: while it isn't set, the consumer holds what it has.
    """
    found: list[Delivery] = []
    while len(acknowledged) < len(sent):
        transport = make()
        try:
            await transport.connect()
            async with subscribed(transport, name_of(harness), ack_wait=ACK_WAIT) as subscription:
                while len(acknowledged) < len(sent):
                    for delivery in await receive(subscription, 10, 0.5):
                        found.append(delivery)
                        await asyncio.sleep(0.002)
                        if go is not None:
                            await go.wait()
                        await delivery.ack()
                        acknowledged.add(id_of(delivery))
        except NotConnectedError:
            await asyncio.sleep(0.05)
        finally:
            await transport.close()
    return found


async def reach(acknowledged: set[str], enough: int, working: asyncio.Task[list[Delivery]]) -> None:
    """Wait until so many are acknowledged, or the work has ended."""
    while len(acknowledged) < enough and not working.done():
        await asyncio.wait([working], timeout=0.01)


def check_first_deliveries(found: Sequence[Delivery], sent: Sequence[Outgoing]) -> None:
    """Nothing is lost, and what is given for the first time is in the order of its key."""
    assert {*ids(found)} == {one.id for one in sent}
    check_order(ids(one for one in found if one.attempt == 1), sent)


@pytest.mark.needs("durable")
def test_a_broker_that_is_killed_in_mid_consume(harness: Harness) -> None:
    sent = events(600, keys=KEYS)

    async def main() -> list[Delivery]:
        acknowledged: set[str] = set()
        async with connected(harness) as transport:
            await transport.publish(sent)
        go = asyncio.Event()
        go.set()
        working = asyncio.create_task(work_until_done(harness, harness.transport, sent, acknowledged, go))
        for enough in (50, 200, 350):
            await reach(acknowledged, enough, working)
            go.clear()
            await asyncio.to_thread(harness.settled, name_of(harness))
            await asyncio.to_thread(harness.kill)
            go.set()
            await asyncio.to_thread(harness.start)
        found = await working

        async def look(first: bool) -> None:
            async with connected(harness) as transport, subscribed(transport, name_of(harness)) as subscription:
                again = await remaining(transport, subscription)  # what was acknowledged in the moment of a kill
                assert {*again} <= {*acknowledged}

        await over_new_connections(look)
        return found

    check_first_deliveries(run(main(), seconds=6 * PATIENCE), sent)


def test_a_line_that_is_cut_in_mid_consume(harness: Harness) -> None:
    sent, chance = events(600, keys=KEYS), random.Random(3)

    async def main() -> list[Delivery]:
        acknowledged: set[str] = set()
        async with connected(harness) as transport:
            await transport.publish(sent)
        cuts: list[Callable[[], None]] = []
        with contextlib.ExitStack() as stack:

            def make() -> Transport:
                transport, cut, _ = stack.enter_context(harness.slow(0.001))
                cuts[:] = [cut]
                return transport

            working = asyncio.create_task(work_until_done(harness, make, sent, acknowledged))
            for enough in range(40, 400, 60):
                await reach(acknowledged, enough, working)
                await asyncio.sleep(chance.uniform(0, 0.03))
                cuts[0]()
            return await working

    check_first_deliveries(run(main(), seconds=6 * PATIENCE), sent)


# Its end, and mistakes.


def test_closing_a_subscription_is_quick_and_always_possible(harness: Harness) -> None:
    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            await transport.publish(events(10))
            subscription = await transport.subscribe(name, oldest=True)
            (delivery, *_) = await collect(subscription, 5, ack=False)
            await collect(subscription, 5, ack=False)
            waiting = asyncio.create_task(subscription.receive(10, 10 * PATIENCE))
            await asyncio.sleep(0.1)
            await subscription.close()
            await subscription.close()
            with failing(harness, NotConnectedError):
                async with asyncio.timeout(PATIENCE):
                    await waiting
            with failing(harness, NotConnectedError):
                await subscription.receive(10, 0)
            with failing(harness, NotConnectedError):
                await delivery.ack()
            await transport.publish(events(3, start=10))  # the transport goes on
            async with subscribed(transport, name) as subscription:
                assert sorted(await remaining(transport, subscription)) == [one.id for one in events(13)]
            subscription = await transport.subscribe(name)
        await subscription.close()  # after its transport
        async with connected(harness) as transport:
            subscription = await transport.subscribe(name)
            assert await remaining(transport, subscription) == []
            harness.kill()
            await subscription.close()
            await subscription.close()

    run(main(), seconds=3 * PATIENCE)


def test_closing_does_not_wait_for_a_frozen_broker(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport(impatient=True)
        await transport.connect()
        await transport.publish(events(10))
        subscription = await transport.subscribe(name_of(harness), oldest=True)
        held = await collect(subscription, 5, ack=False)
        await held[0].ack()
        harness.freeze()
        async with asyncio.timeout(1 + GRACE):
            await subscription.close()
        async with asyncio.timeout(1 + GRACE):
            await transport.close()
        harness.thaw()

    run(main())


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "a*", ">", "müller", "a\n", "a\0b", "x" * 300])
def test_a_name_that_can_not_be_used(harness: Harness, name: str) -> None:
    async def main() -> None:
        async with connected(harness) as transport:
            with failing(harness, TransportConfigurationError) as caught:
                await transport.subscribe(name)
            assert "letters, digits, _ and -" in str(caught[0])
            assert "\n" not in str(caught[0])
            async with subscribed(transport, f"A-z_{harness.place}-09"):
                pass

    run(main(), seconds=PATIENCE)


def test_nobody_subscribes_without_a_connection(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport()
        for _ in range(2):
            with failing(harness, NotConnectedError):
                await transport.subscribe(name_of(harness))
            await transport.connect()
            await transport.close()
        await transport.connect()
        harness.kill()
        with failing(harness, NotConnectedError):
            await transport.subscribe(name_of(harness))
        await transport.close()

    run(main(), seconds=PATIENCE)


def test_every_error_of_a_subscription_is_one_of_ours(harness: Harness) -> None:
    """Calls in any order, while the broker goes away and comes back in between."""
    chance = random.Random(13)

    async def main() -> None:
        transport, number, up = harness.transport(), 0, True
        subscriptions: list[Subscription] = []
        held: list[Delivery] = []
        for _ in range(60):
            action = chance.choice(
                ["connect", "publish", "subscribe", *["receive"] * 3, *["settle"] * 3, "end", "turn"]
            )
            with contextlib.suppress(TransportError):
                if action == "connect":
                    await transport.connect()
                elif action == "publish":
                    number += 10
                    await transport.publish(events(10, start=number, keys=KEYS))
                elif action == "subscribe":
                    subscriptions.append(await transport.subscribe(name_of(harness), oldest=True, ack_wait=ACK_WAIT))
                elif action == "receive" and subscriptions:
                    held += await chance.choice(subscriptions).receive(5, 0.05)
                elif action == "settle" and held:
                    delivery = held.pop()
                    await chance.choice([delivery.ack, delivery.nack, delivery.extend])()
                elif action == "end" and subscriptions:
                    await subscriptions.pop(0).close()
                elif action == "turn":
                    await asyncio.to_thread(harness.kill if up else harness.start)
                    up = not up
        for subscription in subscriptions:
            await subscription.close()
        await transport.close()

    run(main(), seconds=3 * PATIENCE)
