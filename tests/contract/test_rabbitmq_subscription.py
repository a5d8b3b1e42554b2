"""What only RabbitMQ has: a name's queues, the past that is copied into one of them, waits that delays are made of."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import random
import time
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pamqp.frame
import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer
from orthanc_events_bridge.transports import rabbitmq_beginning, rabbitmq_subscription
from orthanc_events_bridge.transports.base import Delivery, Outgoing, Subscription, Transport
from orthanc_events_bridge.transports.rabbitmq import RabbitTransport
from orthanc_events_bridge.transports.rabbitmq_connection import ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_queues import STEPS, Queues
from tests.contract.harness import CONTENT_TYPE, SECRET, Harness, events, failing, run
from tests.contract.rabbitmq_harness import RabbitHarness, administrate, there
from tests.contract.rabbitmq_tools import rabbit_transport

KEYS = [f"study-{number}" for number in range(7)]
#: Seconds for what takes moments on a machine that is not busy.
PATIENCE = 90.0
#: Two clocks may differ by so much.
CLOCKS = 0.05
_names = itertools.count(1)


@pytest.fixture
def rabbit(brokers: Callable[[str], Harness]) -> Iterator[RabbitHarness]:
    harness = brokers("rabbitmq")
    assert isinstance(harness, RabbitHarness)
    harness.new_place()
    yield harness
    harness.tidy()


@pytest.fixture
def queues(rabbit: RabbitHarness) -> Queues:
    """Of a consumer that no other test has."""
    return Queues(f"own-{next(_names)}", rabbit.inboxes, rabbit.dead)


def server(rabbit: RabbitHarness) -> RabbitServer:
    assert isinstance(rabbit._server, RabbitServer)
    return rabbit._server


async def do(rabbit: RabbitHarness, *work: Callable[[AbstractChannel], Awaitable[Any]]) -> Any:
    return await asyncio.to_thread(administrate, rabbit.url, *work)


@contextlib.asynccontextmanager
async def connected(transport: Transport) -> AsyncGenerator[Transport]:
    await transport.connect()
    try:
        yield transport
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def subscribed(transport: Transport, queues: Queues, *, oldest: bool = True) -> AsyncGenerator[Subscription]:
    subscription = await transport.subscribe(queues.name, oldest=oldest)
    try:
        yield subscription
    finally:
        await subscription.close()


async def collect(subscription: Subscription, count: int, *, ack: bool = True) -> list[Delivery]:
    found: list[Delivery] = []
    end = time.monotonic() + PATIENCE
    while len(found) < count:
        assert time.monotonic() < end, f"only {len(found)} came"
        some = await subscription.receive(count - len(found), 1.0)
        for delivery in some if ack else ():
            await delivery.ack()
        found += some
    return found


async def deleting(queue: str, channel: AbstractChannel) -> None:
    await channel.queue_delete(queue)


async def publishing(queue: str, body: bytes, properties: Basic.Properties | None, channel: AbstractChannel) -> None:
    await channel.basic_publish(body, routing_key=queue, properties=properties)


async def taking(queue: str, channel: AbstractChannel) -> DeliveredMessage:
    return await channel.basic_get(queue, no_ack=True)


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [str(json.loads(one.message.body)["id"]) for one in deliveries]


async def nothing_left(transport: Transport, subscription: Subscription) -> None:
    """What comes next is what is published now."""
    last = events(1, start=9_000_000)
    await transport.publish(last)
    assert ids(await collect(subscription, 1)) == [last[0].id]


# A name's queues.


def test_queues_are_made_where_that_is_wanted_only(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        rabbit.make_place()
        async with connected(rabbit.transport(declare=False)) as strict:
            with failing(rabbit, TransportConfigurationError) as caught:
                await strict.subscribe(queues.name)
            assert all(queue in str(caught[0]) for queue in queues.lasting)
            assert "declare" in str(caught[0])
            async with connected(rabbit.transport()) as transport, subscribed(transport, queues, oldest=False):
                pass
            await strict.publish(events(3))
            async with subscribed(strict, queues) as subscription:
                assert ids(await collect(subscription, 3)) == [one.id for one in events(3)]

    run(main(), seconds=PATIENCE)


@pytest.mark.parametrize("kind", ["live", "inbox", "retry"])
def test_a_queue_with_other_settings_is_named_and_left_alone(rabbit: RabbitHarness, queues: Queues, kind: str) -> None:
    queue = queues.retry(STEPS[0]) if kind == "retry" else str(getattr(queues, kind))

    async def main() -> None:
        await do(
            rabbit,
            lambda channel: channel.queue_declare(queue, durable=True),
            functools.partial(publishing, queue, b"theirs", None),
        )
        async with connected(rabbit.transport()) as transport:
            with failing(rabbit, TransportConfigurationError) as caught:
                await transport.subscribe(queues.name, oldest=True)
            assert queue in str(caught[0])
            await transport.publish(events(1))  # over the same connection
        taken: DeliveredMessage = await do(rabbit, lambda channel: channel.basic_get(queue))
        assert taken.body == b"theirs"

    run(main(), seconds=PATIENCE)


def test_a_user_who_may_not_have_queues_is_told(rabbit: RabbitHarness, queues: Queues) -> None:
    user = f"reader-{queues.name}"
    server(rabbit).ctl("add_user", user, SECRET)
    # Of the place everything, and of all else nothing.
    place = rf"^orthanc\.{rabbit.place}.*"
    server(rabbit).ctl("set_permissions", user, place, place, place)
    options = {"user": user, "password": SECRET, "exchange": rabbit.exchange, "history": rabbit.history}

    async def main() -> None:
        async with connected(rabbit_transport(f"amqp://127.0.0.1:{rabbit.port}", **options)) as transport:
            with failing(rabbit, TransportConfigurationError) as caught:
                await transport.subscribe(queues.name)
            assert queues.inbox in str(caught[0]) or queues.live in str(caught[0])

    run(main(), seconds=PATIENCE)


def test_a_queue_that_is_deleted_underneath(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            for queue in (queues.live, queues.inbox):
                async with subscribed(transport, queues, oldest=False) as subscription:
                    await nothing_left(transport, subscription)
                    waiting = asyncio.create_task(subscription.receive(1, 2 * PATIENCE))
                    await do(rabbit, functools.partial(deleting, queue))
                    with failing(rabbit, NotConnectedError) as caught:
                        async with asyncio.timeout(PATIENCE):
                            await waiting
                    assert queue in str(caught[0])
            async with subscribed(transport, queues, oldest=False) as subscription:
                await nothing_left(transport, subscription)

    run(main(), seconds=4 * PATIENCE)


def test_an_exchange_that_is_deleted_alone_takes_nothing_with_it(rabbit: RabbitHarness, queues: Queues) -> None:
    """The bindings go with it; who subscribes next gets what the history holds."""

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            async with subscribed(transport, queues, oldest=False) as subscription:
                await nothing_left(transport, subscription)
            await do(rabbit, lambda channel: channel.exchange_delete(rabbit.exchange))
        async with connected(rabbit.transport()) as transport:  # makes it again
            await transport.publish(events(3))
            async with subscribed(transport, queues, oldest=False) as subscription:
                found = ids(await collect(subscription, 4))
                assert found[1:] == [one.id for one in events(3)]
            async with subscribed(transport, queues, oldest=False) as subscription:
                await nothing_left(transport, subscription)

    run(main(), seconds=4 * PATIENCE)


def test_who_was_stopped_when_its_queues_were_just_made_does_not_begin_anew(
    rabbit: RabbitHarness, queues: Queues
) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await transport.publish(events(3))
            last = f"{queues.live}.made"  # made behind all others, and here somebody else's
            await do(rabbit, lambda channel: channel.queue_declare(last, durable=True))
            with failing(rabbit, TransportConfigurationError) as caught:
                await transport.subscribe(queues.name)
            assert last in str(caught[0])
            await do(rabbit, functools.partial(deleting, last))
            async with subscribed(transport, queues, oldest=False) as subscription:
                await nothing_left(transport, subscription)

    run(main(), seconds=2 * PATIENCE)


def test_a_message_is_kept_however_often_its_subscribers_die(rabbit: RabbitHarness, queues: Queues) -> None:
    """From 4.0 on RabbitMQ drops it after 20 times, where nothing else is said."""
    times = 25

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            async with subscribed(transport, queues, oldest=False):
                await transport.publish(events(1))
            for number in range(times):
                async with subscribed(transport, queues) as subscription:
                    (delivery,) = await collect(subscription, 1, ack=False)
                    assert delivery.attempt > number
            async with subscribed(transport, queues) as subscription:
                assert ids(await collect(subscription, 1)) == [events(1)[0].id]
                await nothing_left(transport, subscription)

    run(main(), seconds=2 * PATIENCE)


def test_who_leaves_is_given_nothing_more_and_hands_on_without_an_attempt(
    rabbit: RabbitHarness, queues: Queues
) -> None:
    """However long it still works on something."""
    first, later = events(4, keys=KEYS), events(6, start=4, keys=KEYS)

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            one = await transport.subscribe(queues.name, in_flight=4)
            await transport.publish(first)
            (held, *back) = await collect(one, 4, ack=False)
            address = {id_: delivery.message.address for delivery in back for id_ in ids([delivery])}
            async with subscribed(transport, queues) as other:
                await one.leave(back)
                await transport.publish(later)
                await held.ack()  # there would be room
                found = await collect(other, 3 + 6)
                assert {*ids(found)} == {event.id for event in (*first, *later)} - {*ids([held])}
                assert {delivery.attempt for delivery in found} == {1}
                assert not any("orthanc-operation" in delivery.message.headers for delivery in found)
                assert address.items() <= {ids([delivery])[0]: delivery.message.address for delivery in found}.items()
                await one.close()
                await nothing_left(transport, other)

    run(main(), seconds=2 * PATIENCE)


# The past.


def check_order(found: Sequence[str], sent: Sequence[Outgoing]) -> None:
    for key in KEYS:
        mine = [one.id for one in sent if one.key == key]
        assert [one for one in found if one in set(mine)] == mine


@pytest.mark.parametrize("before", [0, 1, 450])
def test_the_past_comes_first_and_everything_once_while_events_go_on_coming(
    rabbit: RabbitHarness, queues: Queues, before: int
) -> None:
    sent = events(before + 900, keys=KEYS)

    async def main() -> list[str]:
        async with connected(rabbit.transport()) as publisher, connected(rabbit.transport()) as transport:
            await publisher.publish(sent[:before])

            async def publish() -> None:
                for first in range(before, len(sent), 5):
                    await publisher.publish(sent[first : first + 5])

            publishing = asyncio.create_task(publish())
            async with subscribed(transport, queues) as subscription:
                found = await collect(subscription, len(sent))
                await publishing
                await nothing_left(transport, subscription)
        return ids(found)

    found = run(main(), seconds=3 * PATIENCE)
    assert sorted(found) == [one.id for one in sent]
    check_order(found, sent)


def test_many_begin_together_and_share_the_past(rabbit: RabbitHarness, queues: Queues) -> None:
    sent = events(1200, keys=KEYS)

    async def main() -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            transports = [await stack.enter_async_context(connected(rabbit.transport())) for _ in range(4)]
            await transports[0].publish(sent)
            # Two of them over one connection.
            starting = [one.subscribe(queues.name, oldest=True) for one in (*transports, transports[0])]
            subscriptions = await asyncio.gather(*starting)
            found: list[str] = []

            async def work(subscription: Subscription) -> None:
                while len(found) < len(sent):
                    for delivery in await subscription.receive(20, 0.2):
                        await delivery.ack()
                        found.extend(ids([delivery]))
                        await asyncio.sleep(0)

            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*map(work, subscriptions))
            for subscription in subscriptions[1:]:
                await subscription.close()
            await nothing_left(transports[0], subscriptions[0])
            await subscriptions[0].close()
            return found

    assert sorted(run(main(), seconds=3 * PATIENCE)) == [one.id for one in sent]


def test_the_past_is_copied_to_its_end_whoever_dies_meanwhile(rabbit: RabbitHarness, queues: Queues) -> None:
    """What comes again is what the one that died was about to copy, or had in hand."""
    sent, chance, deaths, in_hand = events(4000, keys=KEYS), random.Random(5), 8, 10
    found: list[str] = []

    async def main() -> None:
        async with connected(rabbit.transport()) as publisher:
            for first in range(0, len(sent), 500):
                await publisher.publish(sent[first : first + 500])
            for _ in range(deaths):
                with rabbit.slow(0.0) as (transport, cut, _):
                    await transport.connect()
                    subscription = await transport.subscribe(queues.name, oldest=True)
                    end = time.monotonic() + chance.uniform(0, 0.5)
                    while time.monotonic() < end:
                        for delivery in await subscription.receive(in_hand, 0.05):
                            await delivery.ack()
                            found.extend(ids([delivery]))
                    cut()
                    await subscription.close()
                    await transport.close()
            async with subscribed(publisher, queues) as subscription:
                last = events(1, start=8_000_000)
                await publisher.publish(last)
                while last[0].id not in found[-1:]:
                    found.extend(ids(await collect(subscription, 1)))
        assert {*found} == {one.id for one in (*sent, *last)}
        assert len(found) - len({*found}) <= deaths * (rabbitmq_beginning._STEP + in_hand)
        assert not await asyncio.to_thread(there, rabbit.url, queues.beginning)

    run(main(), seconds=4 * PATIENCE)


def test_a_past_may_take_longer_than_the_server_lets_a_consumer_hold_a_message(
    rabbit: RabbitHarness, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says how far it has come is held for all that time."""
    held, sent = 3.0, events(10, keys=KEYS)

    def timeout(seconds: float, look: float) -> None:
        text = (
            "application:set_env(rabbit, consumer_timeout, {}), application:set_env(rabbit, channel_tick_interval, {})."
        )
        server(rabbit).ctl("eval", text.format(int(seconds * 1000), int(look * 1000)))

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await transport.publish(sent)
            subscription = await transport.subscribe(queues.name, oldest=True, in_flight=1)
            for one in sent:
                (delivery,) = await collect(subscription, 1, ack=False)
                assert ids([delivery]) == [one.id]
                await asyncio.sleep(held / 4)
                await delivery.ack()
            await nothing_left(transport, subscription)
            await subscription.close()
            assert not await asyncio.to_thread(there, rabbit.url, queues.beginning)

    monkeypatch.setattr(rabbitmq_beginning, "_KEEP", held / 6)
    timeout(held, 0.2)
    try:
        run(main(), seconds=2 * PATIENCE)
    finally:
        timeout(1800, 60)


# What is tried again.


def test_a_delay_is_made_of_several_waits(rabbit: RabbitHarness, queues: Queues) -> None:
    (sent,) = events(1)
    delay = STEPS[1] + STEPS[0] + 0.4

    async def main() -> None:
        async with connected(rabbit.transport()) as transport, subscribed(transport, queues) as subscription:
            await transport.publish([sent])
            (first,) = await collect(subscription, 1, ack=False)
            began = time.monotonic()
            await first.nack(delay)
            (second,) = await collect(subscription, 1, ack=False)
            assert time.monotonic() - began >= delay - CLOCKS
            assert second.attempt == 2
            assert second.message.body == sent.body
            assert second.message.address == first.message.address
            said = second.message.headers
            assert said["content-type"] == CONTENT_TYPE
            assert {"orthanc-event-id": sent.id, "orthanc-operation": "retry", "orthanc-attempts": "1"}.items() <= (
                said.items()
            )
            assert said["orthanc-consumer"] == queues.name
            assert said["orthanc-due"].endswith("Z")
            await second.nack()
            (third,) = await collect(subscription, 1)
            assert third.attempt == 3
            assert "orthanc-due" not in third.message.headers
            assert not [name for name in third.message.headers if name.startswith("x-")]
            await nothing_left(transport, subscription)

    run(main(), seconds=2 * PATIENCE)


def test_a_message_before_its_time_waits_as_long_as_it_can(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport, subscribed(transport, queues, oldest=False):
            for step in STEPS[2:]:  # in the others it would not be there long enough to be looked at
                due = datetime.now(UTC) + timedelta(seconds=1.5 * step)
                headers: dict[str, Any] = {"orthanc-due": due.isoformat(), "orthanc-attempts": "3", "kept": "so"}
                properties = Basic.Properties(headers=headers, content_type="text/plain")
                await do(rabbit, functools.partial(publishing, queues.inbox, b"later", properties))
                found: list[DeliveredMessage] = []
                end = time.monotonic() + PATIENCE
                while not found or not found[-1].body:
                    assert time.monotonic() < end
                    found.append(await do(rabbit, functools.partial(taking, queues.retry(step))))
                assert found[-1].body == b"later"
                assert found[-1].header.properties.content_type == "text/plain"
                kept = dict(found[-1].header.properties.headers or {})
                assert {name: kept[name] for name in kept if not name.startswith("x-")} == headers

    run(main(), seconds=4 * PATIENCE)


def test_attempts_are_counted_over_retries_and_deaths(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            async with subscribed(transport, queues, oldest=False) as subscription:
                await transport.publish(events(1))
                (delivery,) = await collect(subscription, 1, ack=False)
                await delivery.nack()
                (delivery,) = await collect(subscription, 1, ack=False)
                assert delivery.attempt == 2
            for attempt in (3, 4):
                async with subscribed(transport, queues) as subscription:
                    (delivery,) = await collect(subscription, 1, ack=False)
                    assert delivery.attempt == attempt
                    if attempt == 4:
                        await delivery.nack(0.1)
                        (delivery,) = await collect(subscription, 1)
                        assert delivery.attempt == 5

    run(main(), seconds=2 * PATIENCE)


def test_what_others_put_into_the_inbox_is_received_as_it_is(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport, subscribed(transport, queues) as subscription:
            headers: dict[str, Any] = {
                "orthanc-due": "soon",
                "orthanc-attempts": "many",
                "Number": 3,
                "orthanc-x": None,
            }
            properties = Basic.Properties(headers=headers)
            await do(
                rabbit,
                functools.partial(publishing, queues.inbox, b"\0", properties),
                functools.partial(publishing, queues.inbox, b"", None),
            )
            first, second = await collect(subscription, 2)
            assert (first.message.body, first.attempt, first.message.headers["number"]) == (b"\0", 1, "3")
            assert first.message.address == second.message.address == queues.inbox
            assert (second.message.body, second.message.headers) == (b"", {"content-type": ""})

    run(main(), seconds=2 * PATIENCE)


def test_what_can_not_wait_comes_again_at_once(rabbit: RabbitHarness, queues: Queues) -> None:
    sent = events(3)

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            async with subscribed(transport, queues) as subscription:
                await transport.publish(sent)
                held = await collect(subscription, 3, ack=False)
                await held[0].ack()
                await do(rabbit, functools.partial(deleting, queues.retry(STEPS[0])))
                for use in (functools.partial(held[1].nack, 1.0), held[2].ack):
                    with failing(rabbit, NotConnectedError) as caught:
                        await use()
                    assert queues.retry(STEPS[0]) in str(caught[0])
            async with subscribed(transport, queues) as subscription:  # makes it again
                again = await collect(subscription, 2, ack=False)
                assert ids(again) == [one.id for one in sent[1:]]
                await again[0].nack(1.0)
                await again[1].ack()
                assert ids(await collect(subscription, 1)) == [sent[1].id]
                await nothing_left(transport, subscription)

    run(main(), seconds=2 * PATIENCE)


def test_what_takes_longer_than_the_server_allows_is_refused_before_it_begins(
    rabbit: RabbitHarness, queues: Queues
) -> None:
    place = {"exchange": rabbit.exchange, "history": rabbit.history, "inbox_prefix": rabbit.inboxes}
    login = {"user": "contract", "password": SECRET, "limits": {"max_bytes": 2**27}}
    version = server(rabbit).ctl("version")

    async def main() -> None:
        raised = rabbit_transport(f"amqp://127.0.0.1:{rabbit.port}", **place, **login, consumer_timeout="2d")
        async with connected(rabbit.transport()) as transport, connected(raised) as other:
            longest = 1800.0 if version.startswith("3.") else 86400.0
            with failing(rabbit, TransportConfigurationError) as caught:
                await transport.subscribe(queues.name, longest=longest + 1)
            assert "takes back" in str(caught[0])
            await (await transport.subscribe(queues.name, longest=longest)).close()
            if version.startswith("3."):
                assert "consumer_timeout" in str(caught[0])
                await (await other.subscribe(queues.name, longest=2 * 86400.0)).close()

    run(main(), seconds=PATIENCE)


def test_every_name_of_a_queue_is_within_the_documented_permissions(queues: Queues) -> None:
    for own in (queues, dataclasses.replace(queues, ordered=True)):
        names = (*own.lasting, own.beginning, *own.pasts, own.told, own.dead, own.workers)
        assert all(name.startswith("orthanc.") for name in names)
    assert RabbitOptions(servers=("amqp://127.0.0.1",)).exchange.startswith("orthanc.")


# aiormq's channels.


@contextlib.asynccontextmanager
async def opened(rabbit: RabbitHarness) -> AsyncGenerator[Connection]:
    transport = rabbit.transport()
    assert isinstance(transport, RabbitTransport)
    connection = await Connection.open(transport._options, transport._options.servers[0])
    try:
        yield connection
    finally:
        await connection.give_up()


def test_who_stops_connecting_leaves_no_socket_open(rabbit: RabbitHarness) -> None:
    """At whatever point."""
    transport = rabbit.transport()
    assert isinstance(transport, RabbitTransport)
    options = transport._options

    async def main() -> None:
        turns = 0
        while True:
            opening = asyncio.ensure_future(Connection.open(options, options.servers[0]))
            for _ in range(turns):
                await asyncio.sleep(0)
            if opening.done():
                await (await opening).give_up()
                return
            opening.cancel()
            await asyncio.wait([opening])
            gc.collect()
            turns += 1 + turns // 20

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(main(), seconds=PATIENCE)
    assert not [one.message for one in caught if one.category is ResourceWarning]


@pytest.mark.parametrize("callback", ["receive", "cancelled", "on_confirm", "on_return", "on_fault"])
def test_what_a_callback_raises_ends_the_connection_and_is_said(rabbit: RabbitHarness, callback: str) -> None:
    """Else nothing would come any more, and nobody would know."""

    def raising(*arguments: object) -> None:
        raise LookupError(SECRET)

    def nothing(*arguments: object) -> None:
        pass

    async def main() -> None:
        async with opened(rabbit) as connection:
            channel = await connection.channel(confirms=True)
            queue = (await connection.ask(channel.queue_declare(exclusive=True))).queue or ""
            receive, cancelled = (raising if callback == name else nothing for name in ("receive", "cancelled"))
            await connection.ask(channel.consume(queue, receive, cancelled))
            if callback.startswith("on_"):
                setattr(channel, callback, raising)
            where = queue if callback in ("receive", "on_confirm") else "nowhere"
            if callback == "cancelled":
                await connection.ask(channel.queue_delete(queue))
            elif callback == "on_fault":
                with contextlib.suppress(TransportError, ClosedError):
                    await connection.ask(channel.queue_declare("nowhere", passive=True))
            else:
                frames = (
                    Basic.Publish(exchange="", routing_key=where, mandatory=True),
                    ContentHeader(body_size=0, properties=Basic.Properties()),
                )
                connection.write(b"".join(pamqp.frame.marshal(frame, channel.number) for frame in frames))
            with failing(rabbit, NotConnectedError) as caught:
                await connection.wait(asyncio.get_running_loop().create_future(), PATIENCE)
            assert "LookupError in test_rabbitmq_subscription.py, line" in str(caught[0])
            assert "report" in str(caught[0])

    run(main(), seconds=2 * PATIENCE)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_subscription_that_could_not_look_at_an_event_is_given_it_again(
    rabbit: RabbitHarness, queues: Queues, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    (sent,) = events(1)

    def defective(*arguments: object) -> None:
        raise LookupError(SECRET)

    async def main() -> None:
        # Of its own: who publishes may be told behind the end of the connection that is given up.
        async with connected(rabbit.transport()) as publisher, connected(rabbit.transport()) as transport:
            async with subscribed(transport, queues, oldest=False) as subscription:
                with monkeypatch.context() as patched:
                    if later:
                        patched.setattr(rabbitmq_subscription, "seconds_left", lambda raw: 0.01)
                        patched.setattr(rabbitmq_subscription, "is_end", once_then(False, defective))
                    else:
                        patched.setattr(rabbitmq_subscription, "seconds_left", defective)
                    await publisher.publish([sent])
                    with failing(rabbit, NotConnectedError) as caught:
                        async with asyncio.timeout(PATIENCE):
                            await subscription.receive(1, 2 * PATIENCE)
                    assert "LookupError" in str(caught[0])
            await transport.close()
            await transport.connect()
            async with subscribed(transport, queues) as subscription:
                assert ids(await collect(subscription, 1)) == [sent.id]
                await nothing_left(transport, subscription)

    run(main(), seconds=3 * PATIENCE)


def once_then(first: object, then: Callable[..., object]) -> Callable[..., object]:
    """A function that returns something once, and does something else from then on."""
    calls = itertools.count()
    return lambda *arguments: then(*arguments) if next(calls) else first


def test_a_history_that_is_no_stream_is_said(rabbit: RabbitHarness) -> None:
    async def main() -> None:
        await do(
            rabbit,
            lambda channel: channel.exchange_declare(rabbit.exchange, exchange_type="topic", durable=True),
            lambda channel: channel.queue_declare(rabbit.history, durable=True),
            lambda channel: channel.queue_bind(rabbit.history, rabbit.exchange, "#"),
        )
        async with connected(rabbit.transport(declare=False)) as transport:
            await transport.publish(events(3))
            with failing(rabbit, TransportConfigurationError) as caught:
                await transport.describe()
            assert "stream" in str(caught[0])

    run(main(), seconds=PATIENCE)


@pytest.mark.parametrize("turns", range(5))
def test_who_stops_asking_while_the_answer_closes_the_channel_harms_nobody_else(
    rabbit: RabbitHarness, turns: int
) -> None:
    """RabbitMQ ends a connection that closes a channel twice."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with opened(rabbit) as connection:
            channel = await connection.channel()
            asking = asyncio.ensure_future(channel.queue_declare("nowhere", passive=True))

            def stop(after: int) -> None:
                if after:
                    loop.call_soon(stop, after - 1)
                else:
                    asking.cancel()

            channel.on_fault = lambda fault: stop(turns)
            await asyncio.wait([asking])
            assert asking.cancelled() or asking.exception()
            await connection.end(channel)
            other = await connection.channel()
            await connection.ask(other.queue_declare(exclusive=True))
            assert connection.fault is None

    run(main())
