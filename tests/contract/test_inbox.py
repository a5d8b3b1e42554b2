"""What is sent to one consumer alone: the questions that every broker with inboxes has to answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator

import pytest

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.transports.base import Outgoing, Place, PublishError, Subscription, Transport
from tests.contract.harness import CONTENT_TYPE, Harness, Stored, event, events, failing, run
from tests.contract.table import TABLE
from tests.contract.test_subscribe import (
    CLOCKS,
    PATIENCE,
    collect,
    connected,
    drain,
    id_of,
    ids,
    name_of,
    over_new_connections,
    remaining,
    subscribed,
)

needs_inboxes = pytest.mark.needs("has_inboxes")
KEYS = [f"study-{number}" for number in range(7)]


def again(sent: list[Outgoing], number: int = 1) -> list[Outgoing]:
    """As a replay sends events again."""
    return [
        one._replace(
            headers=(("orthanc-event-id", one.id), ("orthanc-operation", "replay")), dedupe=f"{one.id}:replay:{number}"
        )
        for one in sent
    ]


def by_key(stored: list[Stored]) -> dict[str, list[bytes]]:
    """The bodies in their order, by their keys: one order over all of them is more than is asked of an inbox."""
    found: dict[str, list[bytes]] = {}
    for one in stored:
        found.setdefault(str(json.loads(one.body)["key"]), []).append(one.body)
    return found


def bodies(sent: list[Outgoing]) -> dict[str, list[bytes]]:
    return by_key([Stored("", one.body, "", "") for one in sent])


async def send(place: Place, sent: list[Outgoing]) -> str:
    """Connect, send, close; the place's identity."""
    try:
        identity = await place.connect()
        await place.publish(sent)
        return identity
    finally:
        await place.close()


@needs_inboxes
def test_only_one_consumer_gets_it_with_the_same_bytes(harness: Harness) -> None:
    live, replayed, other = events(10, keys=KEYS), events(300, keys=KEYS), events(2, start=400)

    async def main() -> None:
        transport = harness.transport()
        await send(transport, live)
        await send(transport.inbox("one"), again(replayed))
        await send(transport.inbox("two"), again(other))
        await transport.close()

    run(main())
    assert by_key(harness.read()) == bodies(live)
    assert by_key(harness.read_inbox("two")) == bodies(other)
    stored = harness.read_inbox("one")
    assert by_key(stored) == bodies(replayed)
    sent = {one.id: one for one in replayed}
    deduplicates = harness.transport().capabilities.deduplicates
    for one in stored:
        mine = sent[json.loads(one.body)["id"]]
        assert one.content_type == CONTENT_TYPE
        assert one.dedupe_key == (f"{mine.id}:replay:1" if deduplicates else mine.id)
        assert one.headers["orthanc-event-id"] == mine.id
        assert one.headers["orthanc-operation"] == "replay"
        assert one.headers["orthanc-consumer"] == "one"
        assert one.headers["orthanc-address"].endswith(harness.address(mine))
        assert not any(name.startswith(("ce-", "ce_")) for name in one.headers)


@needs_inboxes
def test_attributes_as_headers_get_there_too(harness: Harness) -> None:
    sent = event(0)._replace(attributes=(("id", "the-id"), ("type", "io.orthanc-events.study.created.v1")))

    async def main() -> None:
        await send(harness.transport().inbox("one"), again([sent]))

    run(main())
    (stored,) = harness.read_inbox("one")
    assert stored.headers[f"{harness.attribute_prefix}id"] == "the-id"
    assert stored.headers["orthanc-operation"] == "replay"


def test_what_is_sent_to_everyone_again_is_there_again_and_says_so(harness: Harness) -> None:
    sent = events(3)

    async def main() -> None:
        transport = harness.transport()
        await send(transport, sent)
        await send(transport, again(sent, 1))
        await send(transport, again(sent, 2))
        await transport.close()

    run(main())
    stored = harness.read()
    assert [one.body for one in stored] == 3 * [one.body for one in sent]
    operations = [one.headers.get("orthanc-operation") for one in stored]
    assert operations == [None] * 3 + ["replay"] * 6
    assert [one.headers["orthanc-event-id"] for one in stored[3:]] == 2 * [one.id for one in sent]


@needs_inboxes
@pytest.mark.needs("deduplicates")
def test_what_one_replay_sends_twice_is_there_once(harness: Harness) -> None:
    sent = events(5)

    async def main() -> None:
        inbox = harness.transport().inbox("one")
        for number in (1, 1, 2, 1):
            await send(inbox, again(sent, number))

    run(main())
    assert [one.body for one in harness.read_inbox("one")] == 2 * [one.body for one in sent]


@needs_inboxes
@pytest.mark.needs("declares_topology")
def test_what_is_missing_is_made_or_named(harness: Harness) -> None:
    async def main() -> None:
        await send(harness.transport(), [])  # the place for everybody is there
        strict = harness.transport(declare=False).inbox("one")
        with failing(harness, TransportConfigurationError) as caught:
            await strict.connect()
        assert "declare is false" in str(caught[0])
        await strict.close()
        await send(harness.transport().inbox("one"), events(1))
        await send(strict, events(1, start=1))

    run(main())
    assert len(harness.read_inbox("one")) == 2


@needs_inboxes
@pytest.mark.needs("declares_topology")
def test_an_inbox_with_other_settings_is_named_and_left_alone(harness: Harness) -> None:
    async def main() -> str:
        await send(harness.transport(), [])
        words = harness.make_other_inbox("one")
        inbox = harness.transport().inbox("one")
        with failing(harness, TransportConfigurationError) as caught:
            await inbox.connect()
        await inbox.close()
        missing = [word for word in words if word not in str(caught[0])]
        assert not missing, f"{missing} not in: {caught[0]}"
        return str(caught[0])

    run(main())
    assert harness.read_inbox("one") == []


@needs_inboxes
def test_an_inbox_that_was_deleted_is_made_again_and_is_another_one(harness: Harness) -> None:
    async def main() -> None:
        inbox = harness.transport().inbox("one")
        first = await inbox.connect()
        await inbox.publish(again(events(3)))
        harness.remove_inbox("one")
        for _ in range(50):  # the deletion may be noticed with the first event only
            try:
                second = await inbox.connect()
                await inbox.publish(again(events(3), 2))
                break
            except (NotConnectedError, PublishError):
                await inbox.close()
                await asyncio.sleep(0.1)
        assert first and second and first != second
        await inbox.close()

    run(main())
    assert len(harness.read_inbox("one")) == 3


@needs_inboxes
def test_an_event_that_is_too_large_for_an_inbox(harness: Harness) -> None:
    sent = again(events(3))
    sent[1] = sent[1]._replace(body=b" " * harness.too_large() * 2)

    async def main() -> None:
        inbox = harness.transport().inbox("one")
        await inbox.connect()
        with failing(harness, EventRejectedError, confirmed=1):
            await inbox.publish(sent)
        await inbox.publish(sent[2:])
        await inbox.close()

    run(main())
    assert by_key(harness.read_inbox("one")) == bodies([sent[0], sent[2]])


@needs_inboxes
@pytest.mark.needs("durable")
def test_nothing_confirmed_is_lost_in_an_inbox_when_the_broker_is_killed(harness: Harness) -> None:
    sent = again(events(200, keys=KEYS))

    async def main() -> None:
        inbox = harness.transport().inbox("one")
        await inbox.connect()
        await inbox.publish(sent[:100])
        await asyncio.to_thread(harness.kill)
        with failing(harness, NotConnectedError, confirmed=0):
            await inbox.publish(sent[100:])
        await inbox.close()
        await asyncio.to_thread(harness.start)
        for _ in range(300):
            try:
                await inbox.connect()
                await inbox.publish(sent[100:])
                break
            except (NotConnectedError, PublishError):
                await inbox.close()
                await asyncio.sleep(0.1)
        await inbox.close()

    run(main(), seconds=120)
    assert by_key(harness.read_inbox("one")) == bodies(sent)


@needs_inboxes
def test_a_frozen_broker_is_given_up_and_gets_the_rest_when_it_is_thawed(harness: Harness) -> None:
    sent = again(events(60, keys=KEYS))

    async def main() -> None:
        transport = harness.transport(impatient=True)
        inbox, other = transport.inbox("one"), transport.inbox("one")
        await inbox.connect()
        await inbox.publish(sent[:30])
        harness.freeze()
        with failing(harness, NotConnectedError, confirmed=0):
            await inbox.publish(sent[30:])
        for one in (inbox, other):
            with failing(harness, NotConnectedError):
                await one.connect()
            await one.close()
        harness.thaw()
        patient = harness.transport().inbox("one")
        await patient.connect()
        await patient.publish(sent[30:])
        await patient.close()

    run(main(), seconds=120)
    stored = harness.read_inbox("one")
    assert {one.body for one in stored} == {one.body for one in sent}


@needs_inboxes
def test_a_consumer_may_not_be_called_anything(harness: Harness) -> None:
    transport = harness.transport()
    for name in ("", "a.b", "a b", ">", "*", "ü", "n" * 129):
        with pytest.raises(TransportConfigurationError, match="name of a consumer"):
            transport.inbox(name)


@needs_inboxes
@pytest.mark.needs("subscribable")
def test_a_subscriber_gets_what_is_in_its_inbox(harness: Harness) -> None:
    """Also what is put there while it listens, beside what is for everybody; and nobody else gets it."""
    live = events(30, keys=KEYS)
    replayed = again(events(300, keys=KEYS))

    async def main() -> None:
        mine, others = name_of(harness), name_of(harness, "other")
        async with (
            connected(harness) as transport,
            subscribed(transport, mine) as subscription,
            subscribed(transport, others) as other,
        ):
            await send(transport.inbox(mine), replayed[:150])
            await transport.publish(live)
            sending = asyncio.create_task(send(transport.inbox(mine), replayed[150:]))
            found = await collect(subscription, len(live) + len(replayed))
            await sending
            got = [one.message for one in found if one.message.headers.get("orthanc-operation") == "replay"]
            sent = {one.id: one for one in replayed}
            assert by_key([Stored("", one.body, "", "") for one in got]) == bodies(replayed)
            for one in got:
                original = sent[one.headers["orthanc-event-id"]]
                assert one.body == original.body
                assert one.address == one.headers["orthanc-address"]
                assert one.address.endswith(harness.address(original))
                assert one.headers["content-type"] == CONTENT_TYPE
                assert one.headers["orthanc-consumer"] == mine
            assert await remaining(transport, subscription) == []
            assert sorted(await remaining(transport, other)) == [one.id for one in live]
        async with connected(harness) as transport, subscribed(transport, mine) as subscription:
            assert await remaining(transport, subscription) == []

    run(main(), seconds=4 * PATIENCE)


@needs_inboxes
@pytest.mark.needs("subscribable")
def test_what_is_in_an_inbox_is_settled_like_anything_else(harness: Harness) -> None:
    replayed = again(events(3))

    async def main() -> None:
        name, delay = name_of(harness), 1.5
        async with connected(harness) as transport:
            async with subscribed(transport, name) as subscription:
                await send(transport.inbox(name), replayed)
                first = await collect(subscription, 3, ack=False)
                assert {one.attempt for one in first} == {1}
                began = time.monotonic()
                await first[0].nack(delay)
                await first[1].ack()
                await first[2].extend()
                (again_,) = await collect(subscription, 1, ack=False)
                assert time.monotonic() - began >= delay - CLOCKS
                assert (id_of(again_), again_.attempt) == (id_of(first[0]), 2)
                assert again_.message.address == first[0].message.address
                await again_.ack()
            async with subscribed(transport, name) as subscription:  # what was held when its subscriber ended
                (last,) = await collect(subscription, 1)
                assert id_of(last) == id_of(first[2])
                assert await remaining(transport, subscription) == []

    run(main(), seconds=3 * PATIENCE)


@needs_inboxes
@pytest.mark.needs("subscribable")
@pytest.mark.parametrize("in_flight", [1, 7])
@pytest.mark.parametrize("flooded", ["inbox", "rest"])
def test_neither_an_inbox_nor_the_rest_waits_for_the_other(harness: Harness, flooded: str, in_flight: int) -> None:
    """Of the one there is always more than was received; the other comes all the same. Together they are bounded."""

    async def main() -> None:
        name = name_of(harness)
        async with (
            connected(harness) as transport,
            subscribed(transport, name, oldest=False, in_flight=in_flight) as subscription,
        ):
            inbox = transport.inbox(name)
            await inbox.connect()
            flood, other = (inbox, transport) if flooded == "inbox" else (transport, inbox)
            (wanted,) = again(events(1, start=500_000))
            sent, got = 0, list[str]()
            end = time.monotonic() + PATIENCE
            while wanted.id not in got:
                assert time.monotonic() < end, f"it waits for the other {len(got)}"
                if sent - len(got) < 100:
                    await flood.publish(again(events(200, start=sent, keys=KEYS)))
                    if sent == 200:  # it is in full flood
                        await other.publish([wanted])
                    sent += 200
                held = await drain(subscription, bool, ack=False)
                assert len(held) <= in_flight
                if len(held) == in_flight:
                    assert await subscription.receive(10, 0) == []
                for delivery in held:
                    await delivery.ack()
                got += ids(held)
            await inbox.close()

    run(main(), seconds=3 * PATIENCE)


@needs_inboxes
@pytest.mark.needs("subscribable")
def test_an_inbox_that_is_deleted_under_its_subscriber_is_made_again(harness: Harness) -> None:
    live, replayed = events(3), again(events(5, start=3, keys=KEYS))

    async def main() -> None:
        name, found = name_of(harness), set[str]()
        async with connected(harness) as transport, subscribed(transport, name, oldest=False) as subscription:
            await transport.publish(live)
            await collect(subscription, len(live))
            await asyncio.to_thread(harness.remove_inbox, name)
            with failing(harness, NotConnectedError):
                await drain(subscription, bool)
        wanted = {one.id for one in replayed}

        async def consume(first: bool) -> None:
            async with connected(harness) as transport, subscribed(transport, name, oldest=False) as subscription:
                if first:
                    await send(transport.inbox(name), replayed)
                found.update(ids(await drain(subscription, lambda some: {*ids(some), *found} >= wanted)))
                assert await remaining(transport, subscription) == []  # and nothing of before

        await over_new_connections(consume)
        assert found == wanted

    run(main(), seconds=4 * PATIENCE)


@contextlib.asynccontextmanager
async def inbox_only(transport: Transport, name: str) -> AsyncGenerator[Subscription]:
    subscription = await transport.subscribe(name, oldest=True, inbox_only=True)
    try:
        yield subscription
    finally:
        await subscription.close()


@needs_inboxes
@pytest.mark.needs("subscribable")
def test_a_name_can_have_its_inbox_alone(harness: Harness) -> None:
    """Nothing else comes, whatever comes for everybody; its retries come, and its subscribers share the inbox."""
    live, replayed = events(30, keys=KEYS), again(events(60, start=100, keys=KEYS))

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            await transport.publish(live[:15])
            await send(transport.inbox(name), replayed[:20])
            async with inbox_only(transport, name) as one, inbox_only(transport, name) as other:
                await transport.publish(live[15:])
                await send(transport.inbox(name), replayed[20:50])
                found, given_back = list[str](), set[str]()
                async with asyncio.timeout(PATIENCE):
                    while len(set(found)) < 50:
                        for subscription in (one, other):
                            for delivery in await subscription.receive(10, 0.2):
                                if delivery.attempt == 1 and len(given_back) < 5:
                                    given_back.add(id_of(delivery))
                                    await delivery.nack(0.5)
                                else:
                                    found.append(id_of(delivery))
                                    await delivery.ack()
                assert given_back <= set(found)
                assert sorted(found) == [one.id for one in replayed[:50]]
            async with inbox_only(transport, name) as one:  # behind what would have come before
                await send(transport.inbox(name), replayed[50:])
                assert sorted(ids(await collect(one, 10))) == [one.id for one in replayed[50:]]

    run(main(), seconds=4 * PATIENCE)


@needs_inboxes
@pytest.mark.needs("subscribable")
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_what_a_name_had_left_of_everything_is_given_up_with_its_inbox_alone(harness: Harness, ordered: bool) -> None:
    """What is in the inbox stays. A later subscription to everything is the name's first."""
    live, replayed, late = events(30, keys=KEYS), again(events(19, start=100, keys=KEYS)), events(5, start=200)

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            subscription = await transport.subscribe(name, ordered=ordered)
            await transport.publish(live[:20])
            assert await subscription.receive(3, PATIENCE)  # held, and never settled
            await send(transport.inbox(name), replayed[:5])
            await subscription.close()
            async with inbox_only(transport, name) as subscription:
                assert await asyncio.to_thread(harness.left_of, name) == []
                await transport.publish(live[20:])
                await send(transport.inbox(name), replayed[5:10])
                assert sorted(ids(await collect(subscription, 10))) == [one.id for one in replayed[:10]]
            async with inbox_only(transport, name) as subscription:
                await send(transport.inbox(name), replayed[10:15])
                assert sorted(ids(await collect(subscription, 5))) == [one.id for one in replayed[10:15]]
            await send(transport.inbox(name), replayed[15:])
            subscription = await transport.subscribe(name, ordered=ordered)
            await transport.publish(late)
            wanted = [*replayed[15:], *late]
            try:
                assert sorted(ids(await collect(subscription, len(wanted)))) == [one.id for one in wanted]
            finally:
                await subscription.close()

    run(main(), seconds=4 * PATIENCE)


@needs_inboxes
@pytest.mark.needs("subscribable")
@pytest.mark.needs("declares_topology")
def test_who_may_declare_nothing_removes_nothing_either(harness: Harness) -> None:
    """What is missing is named; what is left of everything does no harm."""
    replayed = again(events(3))

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            strict = harness.transport(declare=False)
            await strict.connect()
            with failing(harness, TransportConfigurationError) as caught:
                await strict.subscribe(name, inbox_only=True)
            assert "declare is false" in str(caught[0])
            await (await transport.subscribe(name)).close()
            left = await asyncio.to_thread(harness.left_of, name)
            await transport.publish(events(3, start=100))
            await send(transport.inbox(name), replayed)
            async with inbox_only(strict, name) as subscription:
                assert sorted(ids(await collect(subscription, 3))) == [one.id for one in replayed]
            await strict.close()
            assert await asyncio.to_thread(harness.left_of, name) == left

    run(main(), seconds=2 * PATIENCE)


def test_a_transport_without_inboxes_says_so(harness: Harness) -> None:
    (must,) = [must for kind, must in TABLE.values() if isinstance(harness, kind)]
    if not must.has_inboxes:
        with pytest.raises(TransportConfigurationError, match="no inbox"):
            harness.transport().inbox("one")
