"""What is sent to one consumer alone: the questions that every broker with inboxes has to answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.transports.base import Incoming, Outgoing, Place, PublishError
from tests.contract.harness import CONTENT_TYPE, Harness, Stored, event, events, failing, run
from tests.contract.table import TABLE

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


@pytest.mark.parametrize("kind", ["rabbitmq", "kafka"])
def test_a_subscriber_gets_what_is_in_its_inbox(brokers: Callable[[str], Harness], kind: str) -> None:
    """Also what is put there while it listens. (NATS' subscribers don't look into theirs yet.)"""
    harness = brokers(kind)
    harness.new_place()
    live, replayed = events(3), again(events(5, keys=KEYS))

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        subscription = await transport.subscribe("one", oldest=True)
        await transport.publish(live)
        await send(transport.inbox("one"), replayed)
        got: list[Incoming] = []
        while len(got) < len(live) + len(replayed):
            for delivery in await subscription.receive(10, 1):
                got.append(delivery.message)
                await delivery.ack()
        mine = [one for one in got if one.headers.get("orthanc-operation") == "replay"]
        assert {one.body for one in mine} == {one.body for one in replayed}
        assert {one.address for one in mine} <= {one.headers["orthanc-address"] for one in mine}
        await subscription.close()
        await transport.close()

    try:
        run(main(), seconds=120)
    finally:
        harness.tidy()


def test_a_transport_without_inboxes_says_so(harness: Harness) -> None:
    (must,) = [must for kind, must in TABLE.values() if isinstance(harness, kind)]
    if not must.has_inboxes:
        with pytest.raises(TransportConfigurationError, match="no inbox"):
            harness.transport().inbox("one")
