"""The questions that every transport has to answer; nothing here knows which broker it asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from dataclasses import fields
from typing import Any

import pytest

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.base import Capabilities, Incoming, Outgoing, PublishError, Transport
from orthanc_events_bridge.transports.options import TransportOptions
from tests.contract.harness import CONTENT_TYPE, SECRET, Harness, event, events, failing, run
from tests.contract.table import TABLE

KEYS = [f"study-{number}" for number in range(10)]
#: A call's own deadline may pass, then some moments on a busy machine; shorter than `Harness.patience`, so that a loss
#: is noticed by itself, and not by the end of a deadline.
GRACE = 8.0


def ids(harness: Harness) -> list[str]:
    """What the broker holds, in its order."""
    return [json.loads(one.body)["id"] for one in harness.read()]


def by_key(harness: Harness, bodies: list[bytes]) -> list[bytes]:
    """Bodies as they are, but where the place has no order over all keys, key by key."""
    return bodies if harness.one_order else sorted(bodies, key=lambda body: str(json.loads(body)["key"]))


def check_all_once(harness: Harness, sent: list[Outgoing]) -> None:
    """Everything is there once, each key in its order."""
    stored = ids(harness)
    assert sorted(stored) == sorted(one.id for one in sent)
    check_order(harness, sent)


def check_all(harness: Harness, sent: list[Outgoing]) -> None:
    """Everything is there, each key in its order: once, or where the broker removes no copies, at least."""
    if harness.transport().capabilities.deduplicates:
        check_all_once(harness, sent)
    assert set(ids(harness)) == {one.id for one in sent}
    check_order(harness, sent)


def slowly(harness: Harness, count: int) -> int:
    """How many events to send over a slow line: of those that wait for each confirmation, fewer."""
    return count if harness.transport().capabilities.pipelined else count // 20


def check_order(harness: Harness, sent: list[Outgoing]) -> None:
    """The first copies of each key's events come in the order in which they were sent."""
    stored = list(dict.fromkeys(ids(harness)))
    for key in {one.key for one in sent}:
        mine = [one.id for one in sent if one.key == key]
        members = set(mine)
        assert [one for one in stored if one in members] == [one for one in mine if one in set(stored)]


async def publish_all(transport: Transport, sent: list[Outgoing], *, batch: int = 200) -> None:
    """As the relay does it, without its waiting."""
    done = 0
    while done < len(sent):
        try:
            await transport.connect()
            while done < len(sent):
                await transport.publish(sent[done : done + batch])
                done += len(sent[done : done + batch])
        except PublishError as error:
            done += error.confirmed
            if isinstance(error.error, NotConnectedError):
                await transport.close()
            await asyncio.sleep(0.05)
        except NotConnectedError:
            await transport.close()
            await asyncio.sleep(0.05)


# What it can do.


def test_capabilities_are_those_of_the_table(harness: Harness) -> None:
    (must,) = [must for kind, must in TABLE.values() if isinstance(harness, kind)]
    transport = harness.transport()
    assert transport.capabilities == must
    assert isinstance(transport.capabilities, Capabilities)
    first, *_ = fields(Capabilities)
    with pytest.raises(AttributeError):
        setattr(transport.capabilities, first.name, True)


# Connecting.


def test_connecting_twice_is_harmless(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport()
        first = await transport.connect()
        await transport.publish(events(3))
        assert await transport.connect() == first
        await transport.publish(events(3, start=3))
        await transport.close()
        assert await transport.connect() == first
        await transport.publish(events(3, start=6))
        await transport.close()

    run(main())
    check_all_once(harness, events(9))


def test_closing_is_always_possible(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport()
        await transport.close()
        await transport.connect()
        await transport.close()
        await transport.close()

    run(main())


def test_nothing_works_without_a_connection(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport()
        for _ in range(2):
            with failing(harness, NotConnectedError, confirmed=0):
                await transport.publish(events(2))
            with failing(harness, NotConnectedError):
                await transport.describe()
            for oldest in (False, True):
                async with contextlib.aclosing(transport.tail(oldest=oldest)) as subscription:
                    with failing(harness, NotConnectedError):
                        await anext(subscription)
            await transport.connect()
            await transport.close()

    run(main())


def test_a_description_for_the_operator(harness: Harness) -> None:
    async def main() -> list[str]:
        transport = harness.transport()
        await transport.connect()
        await transport.publish(events(3))
        lines = await transport.describe()
        await transport.close()
        return lines

    lines = run(main())
    assert harness.title in "\n".join(lines)
    if harness.transport().capabilities.replayable:
        assert "3 events" in "\n".join(lines)
    assert all(line and "\n" not in line and SECRET not in line for line in lines)


# Publishing.


def test_what_was_published_is_there_unchanged(harness: Harness) -> None:
    sent = [*events(12, keys=KEYS), event(12, size=30_000), event(13, content={"n": 1.5, "t": "\r\n\r\n"})]

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        await transport.publish([])
        await transport.publish(sent)
        await transport.close()

    run(main())
    stored = harness.read()
    assert by_key(harness, [one.body for one in stored]) == by_key(harness, [one.body for one in sent])
    assert {one.content_type for one in stored} == {CONTENT_TYPE}
    assert [one.dedupe_key for one in stored] == ids(harness)
    addresses = {one.id: harness.address(one) for one in sent}
    assert {one.dedupe_key: one.address for one in stored} == addresses
    # In structured mode an attribute in a header would make some SDKs take the event for a binary one.
    assert not [name for one in stored for name in one.headers if name.startswith(("ce-", "ce_"))]


@pytest.mark.needs("ordered")
def test_order_within_and_across_batches(harness: Harness) -> None:
    sent = events(900, keys=KEYS)
    random.Random(3).shuffle(sent)

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        for first in range(0, len(sent), 300):
            await transport.publish(sent[first : first + 300])
        await transport.close()

    run(main())
    stored = [one.body for one in harness.read()]
    assert by_key(harness, stored) == by_key(harness, [one.body for one in sent])


@pytest.mark.needs("pipelined")
def test_a_batch_is_pipelined(harness: Harness) -> None:
    sent, latency = events(2000, keys=KEYS), 0.05

    async def main() -> tuple[int, float]:
        with harness.slow(latency) as (transport, _, turns):
            await transport.connect()
            before, began = turns(), time.monotonic()
            await transport.publish(sent)
            result = turns() - before, time.monotonic() - began
            await transport.close()
        return result

    turns, seconds = run(main())
    # Each answer that is waited for costs one turn and two latencies.
    assert turns <= len(sent) / 10
    assert seconds / (2 * latency) <= 40
    check_all_once(harness, sent)


@pytest.mark.needs("deduplicates")
def test_an_event_that_comes_twice_is_stored_once(harness: Harness) -> None:
    sent = events(6)

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        await transport.publish(sent[:4])
        await transport.publish(sent[2:])
        await transport.publish([*sent, *sent])
        await transport.close()
        await transport.connect()
        await transport.publish(sent)
        await transport.close()

    run(main())
    assert ids(harness) == [one.id for one in sent]


def test_two_transports_do_not_disturb_each_other(harness: Harness) -> None:
    mine, yours = events(600, keys=KEYS[:5]), events(600, start=600, keys=KEYS[5:])

    async def main() -> None:
        one, other = harness.transport(), harness.transport()
        await asyncio.gather(one.connect(), other.connect())
        await asyncio.gather(publish_all(one, mine, batch=50), publish_all(other, yours, batch=70))
        await one.close()
        await other.publish(events(1, start=1200))
        await other.close()

    run(main())
    check_all_once(harness, [*mine, *yours, *events(1, start=1200)])


# What a broker refuses.


@pytest.mark.parametrize("place", [0, 1, 5, 9])
def test_an_event_that_is_too_large(harness: Harness, place: int) -> None:
    sent = events(10)
    sent[place] = event(place, size=harness.too_large())

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        with failing(harness, EventRejectedError, confirmed=place) as caught:
            await transport.publish(sent)
        assert str(harness.too_large()) in str(caught[0])
        await transport.publish(sent[place + 1 :])  # over the same connection
        await transport.close()

    run(main())
    assert ids(harness) == [one.id for one in sent if one is not sent[place]]


@pytest.mark.needs("refuses_when_full")
@pytest.mark.parametrize(("room", "batch"), [(5, 9), (1, 2), (300, 600)])
def test_a_full_place_refuses_and_goes_on_when_there_is_room(harness: Harness, room: int, batch: int) -> None:
    sent = events(batch)

    async def main() -> None:
        transport = harness.transport(room=room)
        identity = await transport.connect()
        began = time.monotonic()
        with failing(harness, RefusedError, confirmed=room) as caught:
            await transport.publish(sent)
        assert time.monotonic() - began < harness.patience / 2
        with failing(harness, RefusedError, confirmed=0) as again:
            await transport.publish(sent[room:])
        assert str(again[0]) == str(caught[0])
        assert ids(harness) == [one.id for one in sent[:room]]
        harness.make_room()
        assert await transport.connect() == identity
        await transport.publish(sent[room : 2 * room])
        await transport.close()

    run(main())
    assert ids(harness) == [one.id for one in sent[room : 2 * room]]


# A connection that goes away.


def test_closing_while_a_batch_is_under_way(harness: Harness) -> None:
    sent = events(slowly(harness, 400), keys=KEYS)

    async def main() -> None:
        with harness.slow(0.1) as (transport, _, _):
            await transport.connect()
            publishing = asyncio.create_task(transport.publish(sent))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            await transport.close()
            assert time.monotonic() - began < 1 + GRACE
            with failing(harness, NotConnectedError, confirmed=-1):
                await publishing
            assert time.monotonic() - began < 1 + GRACE
            await publish_all(transport, sent)
            await transport.close()

    run(main())
    check_all(harness, sent)


def test_cancelling_a_batch_that_is_under_way(harness: Harness) -> None:
    sent = events(slowly(harness, 400), keys=KEYS)

    async def main() -> None:
        with harness.slow(0.05) as (transport, _, _):
            await transport.connect()
            publishing = asyncio.create_task(transport.publish(sent))
            await asyncio.sleep(0.03)
            publishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await publishing
            await transport.publish(sent)
            await transport.close()

    run(main())
    check_all(harness, sent)


def test_a_connection_that_is_cut_in_mid_stream(harness: Harness) -> None:
    sent = events(slowly(harness, 3000), keys=KEYS)
    size = len(sent) // 6
    failures: list[tuple[PublishError, float]] = []

    async def main() -> None:
        with harness.slow(0.01) as (transport, cut, _):
            done, chance, longest = 0, random.Random(5), 0.04
            await transport.connect()
            while done < len(sent):
                if done < 5 * size:
                    asyncio.get_running_loop().call_later(chance.uniform(0, longest), cut)
                batch = sent[done : done + size]
                began = time.monotonic()
                try:
                    await transport.publish(batch)
                    done += len(batch)
                except PublishError as error:
                    failures.append((error, time.monotonic() - began))
                    done += error.confirmed
                    if not error.confirmed:  # the first confirmation takes longer than that here
                        longest *= 1.1
                    await transport.close()
                    while True:
                        with contextlib.suppress(NotConnectedError):
                            await transport.connect()
                            break
            await transport.close()

    run(main())
    assert failures
    for error, seconds in failures:
        assert type(error.error) is NotConnectedError
        assert seconds < GRACE
    check_all(harness, sent)


def test_a_broker_that_is_killed_and_comes_back(harness: Harness) -> None:
    sent = events(300, keys=KEYS)

    async def main() -> None:
        transport = harness.transport()
        identity = await transport.connect()
        await transport.publish(sent[:200])
        harness.kill()
        began = time.monotonic()
        with failing(harness, NotConnectedError, confirmed=0):
            await transport.publish(sent[200:])
        for _ in range(2):
            with failing(harness, NotConnectedError):
                await transport.connect()
        assert time.monotonic() - began < 1  # nobody listens: that is no reason to wait
        harness.start()
        again = await transport.connect()
        if transport.capabilities.durable:
            assert again == identity
        if again != identity:  # then it says that all is gone
            await transport.publish(sent[:200])
        await transport.publish(sent[200:])
        await transport.close()

    run(main())
    check_all_once(harness, sent)


@pytest.mark.needs("durable")
def test_nothing_confirmed_is_lost_when_the_broker_is_killed(harness: Harness) -> None:
    sent = events(4000, keys=KEYS)
    confirmed: list[int] = []

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()

        def kill() -> None:
            time.sleep(0.05)
            harness.kill()

        killing = asyncio.get_running_loop().run_in_executor(None, kill)
        try:
            for first in range(0, len(sent), 100):
                confirmed.append(first)
                await transport.publish(sent[first : first + 100])
        except PublishError as error:
            confirmed.append(confirmed[-1] + error.confirmed)
        await killing
        await transport.close()

    run(main())
    harness.start()
    stored = [one.body for one in harness.read()]
    for keys in [KEYS] if harness.one_order else [[key] for key in KEYS]:
        must = [one.body for one in sent[: confirmed[-1]] if one.key in keys]
        assert [body for body in stored if json.loads(body)["key"] in keys][: len(must)] == must


@pytest.mark.parametrize("size", [0, 50_000])
def test_a_broker_that_is_frozen(harness: Harness, size: int) -> None:
    sent = events(400, keys=KEYS, size=size)  # 15 MB are more than the sockets take

    async def main() -> None:
        transport, other = harness.transport(impatient=True), harness.transport(impatient=True)
        await transport.connect()
        await transport.publish(sent[:100])
        harness.freeze()
        began = time.monotonic()
        with failing(harness, NotConnectedError, confirmed=0):
            await transport.publish(sent[100:])
        assert time.monotonic() - began < harness.deadline + GRACE
        for one in (transport, other):
            began = time.monotonic()
            with failing(harness, NotConnectedError):
                await one.connect()
            assert time.monotonic() - began < harness.deadline + GRACE
            began = time.monotonic()
            await one.close()
            assert time.monotonic() - began < 1 + GRACE
        harness.thaw()
        await publish_all(transport, sent[100:])
        await transport.close()

    run(main())
    check_all(harness, sent)


# The place where events are kept.


@pytest.mark.needs("declares_topology")
def test_a_missing_place_is_not_made_where_that_is_not_wanted(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport(declare=False)
        with failing(harness, TransportConfigurationError) as caught:
            await transport.connect()
        assert harness.place in str(caught[0])
        harness.make_place()
        await transport.connect()
        await transport.publish(events(3))
        await transport.close()

    run(main())
    check_all_once(harness, events(3))


@pytest.mark.needs("declares_topology")
def test_a_place_that_exists_is_used(harness: Harness) -> None:
    async def main() -> None:
        harness.make_place()
        for declare in (True, False):
            transport = harness.transport(declare=declare)
            await transport.connect()
            await transport.publish(events(3))
            await transport.close()

    run(main())
    check_all(harness, events(3))


@pytest.mark.needs("declares_topology")
def test_a_place_that_differs_is_named_and_not_changed(harness: Harness) -> None:
    async def main() -> None:
        assert harness.different()
        for different in harness.different():
            words = harness.make_place(**different)
            transport = harness.transport()
            for _ in range(2):
                with failing(harness, TransportConfigurationError) as caught:
                    await transport.connect()
                for word in [harness.place, *words]:
                    assert word in str(caught[0])
            harness.remove_place()
            await transport.connect()  # mended, without a new transport
            await transport.close()
            harness.remove_place()
        everything = {name: value for one in harness.different() for name, value in one.items()}
        words = harness.make_place(**everything)
        with failing(harness, TransportConfigurationError) as caught:
            await transport.connect()
        for word in words:
            assert word in str(caught[0])
        await transport.close()

    run(main())


@pytest.mark.needs("declares_topology")
@pytest.mark.needs("subscribable")
def test_limits_that_a_consumer_does_not_say_are_taken_as_they_are(harness: Harness) -> None:
    """The bridge's file has them, and the consumer a URL."""
    limits: dict[str, dict[str, Any]] = {
        "NATS": {"max_bytes": 2**20},
        "RabbitMQ": {"x-max-age": "1h"},
        "Kafka": {"retention.ms": "3600000"},
    }

    async def main() -> None:
        harness.make_place(**limits[harness.title])
        transport = harness.transport()
        options: TransportOptions = transport._options  # type: ignore[attr-defined]
        said = options.for_consumer()
        assert not said.limits_as_found  # they are said
        given = {name: getattr(options, name) for name in options.model_fields_set - {"limits", "partitions"}}
        transport = type(transport)(type(options).model_validate(given).for_consumer())
        await transport.connect()
        subscription = await transport.subscribe(f"router-{harness.place}")
        await subscription.close()
        await transport.close()
        transport = harness.transport()
        with failing(harness, TransportConfigurationError):
            await transport.connect()
        await transport.close()

    run(main())


@pytest.mark.needs("declares_topology")
@pytest.mark.needs("subscribable")
def test_a_consumer_that_is_there_before_the_bridge_makes_what_a_bridge_makes(harness: Harness) -> None:
    """Where neither says limits; a bridge with others says what differs, and changes nothing."""
    transport = harness.transport()
    options: TransportOptions = transport._options  # type: ignore[attr-defined]
    given = {name: getattr(options, name) for name in options.model_fields_set - {"limits", "partitions"}}

    def another(**more: object) -> Transport:
        return type(transport)(type(options).model_validate(given | more))

    async def main() -> None:
        consumer = type(transport)(type(options).model_validate(given).for_consumer())
        await consumer.connect()
        await (await consumer.subscribe(f"router-{harness.place}")).close()
        await consumer.close()
        bridge = another()
        await bridge.connect()
        await bridge.publish(events(1))
        inbox = bridge.inbox(f"router-{harness.place}")
        await inbox.connect()
        await inbox.close()
        await bridge.close()
        other = another(limits={"max_age": "1d"})
        with failing(harness, TransportConfigurationError) as caught:
            await other.connect()
        assert harness.place in str(caught[0]) and "limits" in str(caught[0])
        assert "delete" in caught[0].remedy
        harness.remove_place()
        await other.connect()
        await other.publish(events(1))
        await other.close()

    run(main())


@pytest.mark.needs("declares_topology")
def test_a_place_that_is_deleted_underneath_is_made_again(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport()
        first = await transport.connect()
        assert first
        await transport.publish(events(300))
        harness.remove_place()
        began = time.monotonic()
        with failing(harness, NotConnectedError, confirmed=0):
            await transport.publish(events(300, start=300))
        assert time.monotonic() - began < GRACE
        await transport.close()
        assert await transport.connect() not in ("", first)
        await transport.publish(events(300, start=300))
        await transport.close()

    run(main())
    check_all_once(harness, events(300, start=300))


@pytest.mark.needs("declares_topology")
@pytest.mark.parametrize("over_the_same_connection", [True, False])
def test_a_place_that_was_made_again_by_someone_else(harness: Harness, over_the_same_connection: bool) -> None:
    async def main() -> None:
        transport = harness.transport()
        first = await transport.connect()
        await transport.publish(events(300))
        harness.remove_place()
        harness.make_place()
        if over_the_same_connection:
            again = await transport.connect()
        else:
            with failing(harness, NotConnectedError, confirmed=0):
                await transport.publish(events(1, start=300))
            await transport.close()
            again = await transport.connect()
        assert again not in ("", first)
        await transport.publish(events(10))
        assert await transport.connect() == again
        await transport.publish(events(10, start=10))
        await transport.close()

    run(main())
    assert ids(harness)[-20:] == [one.id for one in events(20)]


# Looking at it.


async def take(transport: Transport, count: int, *, oldest: bool = False) -> list[Incoming]:
    async with contextlib.aclosing(transport.tail(oldest=oldest)) as subscription:
        return [await anext(subscription) for _ in range(count)]


@pytest.mark.needs("replayable")
def test_a_subscriber_sees_what_comes(harness: Harness) -> None:
    async def main() -> list[Incoming]:
        one, other = harness.transport(), harness.transport()
        await one.connect()
        await other.connect()
        await one.publish(events(5))
        taking = asyncio.create_task(take(other, 20))
        await asyncio.sleep(0.3)
        await one.publish(events(20, start=5))
        result = await taking
        await one.publish(events(5, start=25))
        await one.close()
        await other.close()
        return result

    check_incoming(harness, run(main()), events(20, start=5))


@pytest.mark.needs("replayable")
def test_a_subscriber_begins_with_the_oldest(harness: Harness) -> None:
    sent = events(1500, keys=KEYS)

    async def main() -> list[Incoming]:
        transport = harness.transport()
        await transport.connect()
        await transport.publish(sent[:1300])
        taking = asyncio.create_task(take(transport, len(sent), oldest=True))
        await asyncio.sleep(0.3)
        await transport.publish(sent[1300:])  # beside its subscriber
        result = await taking
        assert harness.traces() == 0
        await transport.close()
        return result

    found = run(main())
    check_incoming(harness, found, sent)
    if harness.one_order:
        assert [int(one.position) for one in found] == list(range(1, len(sent) + 1))
    assert len({one.position for one in found}) == len(sent)


def check_incoming(harness: Harness, found: list[Incoming], sent: list[Outgoing]) -> None:
    assert by_key(harness, [one.body for one in found]) == by_key(harness, [one.body for one in sent])
    outgoing = {one.id: one for one in sent}
    for incoming in found:
        assert incoming.address.endswith(harness.address(outgoing[json.loads(incoming.body)["id"]]))
        assert incoming.headers["content-type"] == CONTENT_TYPE
        assert all(name == name.lower() for name in incoming.headers)


@pytest.mark.needs("replayable")
@pytest.mark.parametrize("end", ["kill", "close", "cut"])
@pytest.mark.parametrize("oldest", [False, True])
def test_a_subscription_ends_with_its_connection(harness: Harness, end: str, oldest: bool) -> None:
    async def main() -> None:
        with harness.slow(0.0) as (transport, cut, _):
            await transport.connect()
            taking = asyncio.create_task(take(transport, 3, oldest=oldest))
            await asyncio.sleep(0.2)
            if end == "kill":
                harness.kill()
            elif end == "close":
                await transport.close()
            else:
                cut()
            began = time.monotonic()
            with failing(harness, NotConnectedError):
                await taking
            assert time.monotonic() - began < GRACE
            await transport.close()

    run(main())


def test_every_error_is_one_of_ours(harness: Harness) -> None:
    """Calls in any order, while the broker goes away and comes back in between."""
    chance = random.Random(11)

    async def main() -> None:
        transport, number = harness.transport(), 0
        for _ in range(40):
            action = chance.choice(["connect", "publish", "publish", "describe", "close", "kill", "start"])
            with contextlib.suppress(TransportError):
                if action == "connect":
                    await transport.connect()
                elif action == "publish":
                    number += 10
                    await transport.publish(events(10, start=number))
                elif action == "describe":
                    await transport.describe()
                elif action == "close":
                    await transport.close()
                elif action == "kill" and up:
                    harness.kill()
                    up.clear()
                elif action == "start" and not up:
                    harness.start()
                    up.append(True)
        await transport.close()

    up = [True]
    run(main())
