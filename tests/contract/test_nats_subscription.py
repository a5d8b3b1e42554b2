"""What only NATS has: durable consumers with settings, a limit that headers count for, settling by number."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.transports.base import Delivery, Subscription
from tests.contract.harness import Harness, event, events, failing, run
from tests.contract.nats_harness import NatsHarness
from tests.contract.nats_tools import nats_server, nats_transport
from tests.contract.raw_nats import RawNats, ask

SECOND = 1_000_000_000


@pytest.fixture
def nats(brokers: Callable[[str], Harness]) -> Iterator[NatsHarness]:
    harness = brokers("nats")
    assert isinstance(harness, NatsHarness)
    harness.new_place()
    yield harness
    harness.tidy()


def administrate(nats: NatsHarness, what: str, **document: Any) -> dict[str, Any]:
    return ask(nats.port, what, nats.login, **document)


def make_consumer(nats: NatsHarness, name: str, *, inbox: bool = False, **different: Any) -> None:
    """As the transport would."""
    stream = f"{nats.place}_INBOX" if inbox else nats.place
    config = {
        "durable_name": name,
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": 30 * SECOND,
        "filter_subject": f"orthanc.inbox.{nats.place}.{name}" if inbox else f"orthanc.events.{nats.place}.>",
        "max_deliver": -1,
        "max_ack_pending": -1,
    }
    what = f"CONSUMER.DURABLE.CREATE.{stream}.{name}"
    administrate(nats, what, stream_name=stream, config=config | different)


async def make_inboxes(nats: NatsHarness) -> None:
    """Let the stream be made with which inboxes begin."""
    inbox = nats.transport().inbox("anybody")
    await inbox.connect()
    await inbox.close()


async def collect(subscription: Subscription, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await subscription.receive(count - len(found), 1.0)
    return found


@pytest.mark.parametrize("value", ["a", "%", "é"])
def test_attributes_count_for_the_largest_payload(nats: NatsHarness, value: str) -> None:
    """Whatever has to be encoded: one too large is refused by us, not by the server, who would hang up."""

    def sized(number: int, length: int) -> Any:
        same = event(0)._replace(content_type="application/json", attributes=(("source", value * length),))
        return same._replace(id=event(number).id)

    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        per = len(value.encode()) * (1 if value == "a" else 3)
        most = (nats.too_large() - len(event(0).body)) // per
        refused = 0
        for number, length in enumerate(
            [*range(most - 400 // per, most - 200 // per, 1 + 10 // per), most, most + 100]
        ):
            try:
                await transport.publish([sized(number, length)])
            except Exception:
                with failing(nats, EventRejectedError, confirmed=0) as caught:
                    await transport.publish([sized(number, length)])
                assert "max_payload" in str(caught[0])
                refused += 1
            else:
                assert not refused
        assert refused
        await transport.publish(events(1, start=1000))  # over the same connection
        await transport.close()

    run(main())
    assert len(nats.read()) > 1


# The consumer.


def test_a_consumer_is_made_where_that_is_wanted_only(nats: NatsHarness) -> None:
    async def main() -> None:
        nats.make_place()
        strict = nats.transport(declare=False)
        await strict.connect()

        async def missing(*words: str) -> None:
            with failing(nats, TransportConfigurationError) as caught:
                await strict.subscribe("router")
            assert all(word in str(caught[0]) for word in (*words, "declare is false")), caught[0]

        await missing(f"{nats.place} ", "router")
        make_consumer(nats, "router", ack_wait=7 * SECOND)
        await missing(f"stream {nats.place}_INBOX")
        await make_inboxes(nats)
        await missing(f"{nats.place}_INBOX ", "router")
        make_consumer(nats, "router", inbox=True)
        await strict.publish(events(2))
        subscription = await strict.subscribe("router")  # begins where the consumer does
        for delivery in await collect(subscription, 2):
            await delivery.ack()
        await subscription.close()
        await strict.close()

    run(main())
    config = administrate(nats, f"CONSUMER.INFO.{nats.place}.router")["config"]
    assert config["ack_wait"] == 7 * SECOND  # nobody has changed it


@pytest.mark.parametrize(
    "different",
    [
        {"ack_policy": "all"},
        {"max_deliver": 5},
        {"max_ack_pending": 100},
        {"deliver_subject": "somewhere"},
        {"headers_only": True},
        {"backoff": [SECOND, 2 * SECOND]},
        {"filter_subject": "orthanc.events.{place}.other.>"},
    ],
    ids=lambda different: next(iter(different)),
)
def test_a_consumer_that_would_lose_events_is_named_and_not_changed(
    nats: NatsHarness, different: dict[str, Any]
) -> None:
    different = {
        name: value.format(place=nats.place) if isinstance(value, str) else value for name, value in different.items()
    }

    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        make_consumer(nats, "router", **different)
        for _ in range(2):
            with failing(nats, TransportConfigurationError) as caught:
                await transport.subscribe("router")
            for word in (nats.place, "router", "filter" if "filter_subject" in different else next(iter(different))):
                assert word in str(caught[0])
        administrate(nats, f"CONSUMER.DELETE.{nats.place}.router")
        await (await transport.subscribe("router")).close()
        await transport.close()

    run(main())


def test_a_consumer_of_an_inbox_that_would_lose_events_is_named_and_not_changed(nats: NatsHarness) -> None:
    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        await make_inboxes(nats)
        make_consumer(nats, "router", inbox=True, max_deliver=5)
        for _ in range(2):
            with failing(nats, TransportConfigurationError) as caught:
                await transport.subscribe("router")
            for word in (f"{nats.place}_INBOX", "router", "max_deliver is 5"):
                assert word in str(caught[0])
        await transport.close()

    run(main())


# Where a name begins whose consumers are there by half.


def test_who_was_stopped_when_half_of_it_was_made_does_not_begin_anew(nats: NatsHarness) -> None:
    """The consumer of what is for everybody is made first: alone, it says where the name has begun."""
    sent = events(6)

    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        await transport.publish(sent[:2])
        await make_inboxes(nats)
        stream = f"{nats.place}_INBOX"
        config = administrate(nats, f"STREAM.INFO.{stream}")["config"]
        administrate(nats, f"STREAM.DELETE.{stream}")
        administrate(nats, f"STREAM.CREATE.{stream}", **(config | {"max_consumers": 1}))
        make_consumer(nats, "another", inbox=True)
        with failing(nats, TransportConfigurationError) as caught:
            await transport.subscribe("router")
        assert stream in str(caught[0])
        await transport.publish(sent[2:4])
        administrate(nats, f"CONSUMER.DELETE.{stream}.another")
        subscription = await transport.subscribe("router")
        await transport.publish(sent[4:])
        found = await collect(subscription, 4)
        assert [one.message.body for one in found] == [one.body for one in sent[2:]]
        assert administrate(nats, f"CONSUMER.NAMES.{stream}")["consumers"] == ["router"]
        await subscription.close()
        await transport.close()

    run(main())


def test_a_message_in_the_inbox_of_a_new_name_does_not_make_it_an_old_one(nats: NatsHarness) -> None:
    sent, waiting = events(4), event(9)

    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        await transport.publish(sent[:2])
        inbox = transport.inbox("router")
        await inbox.connect()
        await inbox.publish([waiting])
        await inbox.close()
        subscription = await transport.subscribe("router")
        await transport.publish(sent[2:])
        found = await collect(subscription, 3)
        assert sorted(one.message.body for one in found) == sorted(one.body for one in (*sent[2:], waiting))
        await subscription.close()
        await transport.close()

    run(main())


@pytest.mark.parametrize("what", ["STREAM.DELETE.{place}", "CONSUMER.DELETE.{place}.router"])
def test_what_is_deleted_underneath_ends_the_subscription(nats: NatsHarness, what: str) -> None:
    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        for waiting_already in (True, False):
            subscription = await transport.subscribe("router")
            await transport.publish(events(1))
            waiting = asyncio.create_task(subscription.receive(10, 60)) if waiting_already else None
            await asyncio.sleep(0.1)
            await asyncio.to_thread(administrate, nats, what.format(place=nats.place))
            with failing(nats, NotConnectedError):
                async with asyncio.timeout(30):
                    for delivery in await (waiting or subscription.receive(10, 60)):
                        await delivery.ack()
                    await subscription.receive(10, 60)
            with failing(nats, NotConnectedError):
                await subscription.receive(10, 0)
            await subscription.close()
            await transport.close()
            await transport.connect()  # makes what is missing
        subscription = await transport.subscribe("router", oldest=True)
        await transport.publish(events(1, start=1))
        await (await collect(subscription, 1))[0].ack()
        await subscription.close()
        await transport.close()

    run(main())


def test_subscribing_to_a_stream_that_was_deleted(nats: NatsHarness) -> None:
    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        nats.remove_place()
        with failing(nats, NotConnectedError):
            await transport.subscribe("router")
        await transport.connect()
        await (await transport.subscribe("router")).close()
        await transport.close()

    run(main())


def test_more_subscribers_than_the_server_lets_wait(nats: NatsHarness) -> None:
    sent = events(40)

    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        make_consumer(nats, "router", max_waiting=1)
        subscriptions = [await transport.subscribe("router") for _ in range(3)]
        got: list[Delivery] = []

        async def work(subscription: Subscription) -> None:
            while len(got) < len(sent):
                for delivery in await subscription.receive(1, 0.3):
                    await delivery.ack()
                    got.append(delivery)

        working = [asyncio.create_task(work(one)) for one in subscriptions]
        await asyncio.sleep(0.2)
        await transport.publish(sent)
        async with asyncio.timeout(60):
            await asyncio.gather(*working)
        assert len(got) == len(sent)
        for subscription in subscriptions:
            await subscription.close()
        await transport.close()

    run(main(), seconds=90)


def test_what_is_not_asked_for_is_left_to_others(nats: NatsHarness) -> None:
    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        await transport.publish(events(20))
        one, other = [await transport.subscribe("router", oldest=True) for _ in range(2)]
        (first,) = await one.receive(1, 10)
        for delivery in (first, *await collect(other, 19)):
            await delivery.ack()
        for subscription in (one, other):
            await subscription.close()
        await transport.close()

    run(main(), seconds=90)


def test_two_that_make_the_consumer_at_once(nats: NatsHarness) -> None:
    async def main() -> None:
        one, other = nats.transport(), nats.transport()
        for transport in (one, other):
            await transport.connect()
        for number in range(20):
            name = f"router-{number}"
            made = await asyncio.gather(one.subscribe(name, oldest=True), other.subscribe(name, oldest=False))
            for subscription in made:
                await subscription.close()
        for transport in (one, other):
            await transport.close()

    run(main())


@pytest.mark.parametrize("more", ["", ', "$JS.ACK.>"'])
def test_what_a_consumer_may_not_do_is_named(tmp_path: Path, more: str) -> None:
    allowed = f'publish: ["orthanc.events.>", "$JS.API.>"{more}], subscribe: "_INBOX.>"'
    config = f"authorization {{ users: [ {{ user: u, password: p, permissions: {{ {allowed} }} }} ] }}"
    with nats_server(tmp_path, config) as server:

        async def settle(subscription: Subscription) -> None:
            (delivery,) = await collect(subscription, 1)
            await delivery.ack()
            await subscription.receive(1, 2.0)

        async def main() -> None:
            transport = nats_transport(server, user="u", password="p")
            await transport.connect()
            subscription = await transport.subscribe("router")
            await transport.publish(events(1))
            if more:
                await settle(subscription)
            else:
                with pytest.raises(NotConnectedError, match=r"(?i)\$js\.ack.*let it publish to .*\$JS\.ACK"):
                    await settle(subscription)
            await subscription.close()
            await transport.close()

        run(main())


# Time that passes while nobody looks.


def test_what_a_frozen_subscriber_held_or_was_sent_is_not_its_own_any_more(nats: NatsHarness) -> None:
    """An event loop that is blocked is as frozen as a process, and what was sent meanwhile waits in the socket."""
    wait = 1.0
    subject = f"orthanc.events.{nats.place}.main.study.created.00"

    def delivered() -> int:
        return int(administrate(nats, f"CONSUMER.INFO.{nats.place}.router")["delivered"]["stream_seq"])

    async def main() -> None:
        transport = nats.transport()
        await transport.connect()
        subscription = await transport.subscribe("router", ack_wait=wait)
        sent = False
        for number in range(1, 1000, 2):
            await transport.publish(events(1, start=number))
            (held,) = await collect(subscription, 1)
            waiting = asyncio.create_task(subscription.receive(10, 60))
            await asyncio.sleep(0.01)
            with contextlib.closing(RawNats(nats.port, nats.login)) as client:
                client.requests([(subject, event(number + 1).body)])
            sent = delivered() == number + 1  # else its request had just come to its end
            if sent:
                break
            await held.ack()
            for delivery in await waiting:
                await delivery.ack()
        assert sent
        time.sleep(1.5 * wait)
        with failing(nats, NotConnectedError):
            await held.ack()
        found = await waiting
        while len(found) < 2:
            found += await subscription.receive(10, 60)
        bodies = [event(number).body, event(number + 1).body]
        assert sorted(one.message.body for one in found) == sorted(bodies)
        assert min(one.attempt for one in found) >= 2  # what was in the socket was too old to begin with
        for delivery in found:
            await delivery.ack()
        await subscription.close()
        await transport.close()

    run(main(), seconds=90)
    state = administrate(nats, f"CONSUMER.INFO.{nats.place}.router")
    assert (state["num_ack_pending"], state["num_pending"]) == (0, 0)
