"""What a consumer can't handle: the questions about dead letters that every broker with consumers has to answer."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.base import DeadLetter, Outgoing, Transport
from tests.contract.harness import CONTENT_TYPE, Harness, event, events, failing, run
from tests.contract.test_subscribe import collect, connected, id_of, name_of, remaining, subscribed

pytestmark = pytest.mark.needs("subscribable")

WHY = {
    "orthanc-reason": "failed 3 times of 3",
    "orthanc-exception": "ValueError",
    "orthanc-first-failure": "2026-11-27T08:00:00.000Z",
    "orthanc-last-failure": "2026-11-27T08:00:07.250Z",
}


async def read(transport: Transport, consumer: str) -> list[DeadLetter]:
    dead = await transport.dead_letters(consumer)
    try:
        return [one async for one in dead.read()]
    finally:
        await dead.close()


async def reject(transport: Transport, consumer: str, sent: list[Outgoing]) -> None:
    """Have a consumer reject everything."""
    async with subscribed(transport, consumer) as subscription:
        await transport.publish(sent)
        for delivery in await collect(subscription, len(sent), ack=False):
            await delivery.reject({**WHY, "orthanc-reason": f"because of {id_of(delivery)}"})


def test_it_is_kept_with_its_bytes_and_the_reason_and_never_given_again(harness: Harness) -> None:
    sent, name = event(0, size=3000), name_of(harness)

    async def main() -> list[DeadLetter]:
        async with connected(harness) as transport:
            async with subscribed(transport, name) as subscription:
                await transport.publish([sent])
                (delivery,) = await collect(subscription, 1, ack=False)
                await delivery.reject(WHY)
                await delivery.ack()  # it is settled
                assert await remaining(transport, subscription) == []
            return await read(transport, name)

    (letter,) = run(main())
    assert letter.message.body == sent.body
    headers = letter.message.headers
    assert headers["content-type"] == CONTENT_TYPE
    assert {name: headers[name] for name in WHY} == WHY
    assert headers["orthanc-consumer"] == name
    assert headers["orthanc-address"].endswith(harness.address(sent))
    assert headers["orthanc-attempts"] == "1"
    assert not any(one.startswith(("ce-", "ce_")) for one in headers)


def test_what_two_names_give_back_and_reject_both_are_given_again_and_both_keep(harness: Harness) -> None:
    names = [f"{name_of(harness)}-{letter}" for letter in "ab"]

    async def main() -> None:
        async with connected(harness) as transport, contextlib.AsyncExitStack() as stack:
            both = [await stack.enter_async_context(subscribed(transport, name)) for name in names]
            await transport.publish([event(0)])
            for subscription in both:
                (delivery,) = await collect(subscription, 1, ack=False)
                await delivery.nack()
            for subscription in both:
                (delivery,) = await collect(subscription, 1, ack=False)
                assert delivery.attempt == 2
                await delivery.nack(1.0)
            for subscription in both:
                (delivery,) = await collect(subscription, 1, ack=False)
                await delivery.reject(WHY)
            for name in names:
                (letter,) = await read(transport, name)
                assert letter.message.headers["orthanc-consumer"] == name
            await transport.publish([event(1)])
            for subscription in both:
                (delivery,) = await collect(subscription, 1, ack=False)
                await delivery.reject(WHY)
            for name in names:
                assert len(await read(transport, name)) == 2

    run(main())


def test_attributes_in_headers_are_kept(harness: Harness) -> None:
    attributes = (("specversion", "1.0"), ("id", "the-id"), ("type", "io.orthanc-events.study.created.v1"))
    sent, name = event(0)._replace(attributes=attributes, content_type="application/json"), name_of(harness)

    async def main() -> list[DeadLetter]:
        async with connected(harness) as transport:
            await reject(transport, name, [sent])
            return await read(transport, name)

    (letter,) = run(main())
    assert letter.message.body == sent.body
    for attribute, value in attributes:
        assert letter.message.headers[f"{harness.attribute_prefix}{attribute}"] == value
    assert letter.message.headers["content-type"] == "application/json"


def test_what_is_given_again_brings_what_was_said_and_is_counted(harness: Harness) -> None:
    name = name_of(harness)

    async def main() -> None:
        async with connected(harness) as transport:
            async with subscribed(transport, name) as subscription:
                await transport.publish([event(0)])
                (delivery,) = await collect(subscription, 1, ack=False)
                assert delivery.attempt == 1
                await delivery.nack(0.0, {"orthanc-first-failure": "2026-11-27T08:00:00.000Z", "orthanc-reason": "a"})
                (delivery,) = await collect(subscription, 1, ack=False)
                assert delivery.attempt == 2
                assert delivery.message.headers["orthanc-first-failure"] == "2026-11-27T08:00:00.000Z"
                assert delivery.message.headers["orthanc-reason"] == "a"
                assert delivery.message.headers["orthanc-operation"] == "retry"
                await delivery.nack(1.0, {"orthanc-reason": "b"})
                (delivery,) = await collect(subscription, 1, ack=False)
                assert delivery.attempt == 3
                assert delivery.message.headers["orthanc-first-failure"] == "2026-11-27T08:00:00.000Z"
                assert delivery.message.headers["orthanc-reason"] == "b"
                assert delivery.message.headers["content-type"] == CONTENT_TYPE
                assert delivery.message.address.endswith(harness.address(event(0)))
                await delivery.reject({"orthanc-reason": "c"})
            (letter,) = await read(transport, name)
            assert letter.message.headers["orthanc-attempts"] == "3"
            assert letter.message.headers["orthanc-reason"] == "c"
            assert letter.message.headers["orthanc-first-failure"] == "2026-11-27T08:00:00.000Z"
            assert letter.message.headers["orthanc-address"].endswith(harness.address(event(0)))

    run(main())


def test_each_consumer_has_its_own_and_they_are_read_in_their_order(harness: Harness) -> None:
    sent, one, other = events(20), name_of(harness), name_of(harness, "other")

    async def main() -> None:
        async with connected(harness) as transport:
            assert await read(transport, one) == []
            await reject(transport, one, sent)
            assert await read(transport, other) == []
            for _ in range(2):  # reading changes nothing
                letters = await read(transport, one)
                assert [letter.message.body for letter in letters] == [mine.body for mine in sent]
                for letter, mine in zip(letters, sent, strict=True):
                    assert letter.message.headers["orthanc-reason"] == f"because of {mine.id}"

    run(main())


def test_those_that_are_removed_are_gone_and_no_others(harness: Harness) -> None:
    sent, name = events(10), name_of(harness)

    async def main() -> None:
        async with connected(harness) as transport:
            await reject(transport, name, sent)
            dead = await transport.dead_letters(name)
            try:
                letters = [one async for one in dead.read()]
                await dead.remove(letters[2:5])
                await dead.remove(letters[4:6])  # one of them is not there any more
                await dead.remove([])
            finally:
                await dead.close()
            left = [json.loads(one.message.body)["number"] for one in await read(transport, name)]
            assert left == [0, 1, 6, 7, 8, 9]
            await reject(transport, name, events(2, start=20))
            left = [json.loads(one.message.body)["number"] for one in await read(transport, name)]
            assert left == [0, 1, 6, 7, 8, 9, 20, 21]

    run(main())


@pytest.mark.needs("durable")
def test_they_survive_a_kill_of_the_broker(harness: Harness) -> None:
    sent, name = events(5), name_of(harness)

    async def before() -> None:
        async with connected(harness) as transport:
            await reject(transport, name, sent)

    async def after() -> list[DeadLetter]:
        for _ in range(300):
            try:
                async with connected(harness) as transport:
                    return await read(transport, name)
            except NotConnectedError:
                await asyncio.sleep(0.1)
        raise AssertionError("the broker did not come back")

    run(before())
    harness.kill()
    harness.start()
    assert [letter.message.body for letter in run(after(), seconds=120)] == [one.body for one in sent]


def test_what_is_rejected_without_a_connection_comes_again(harness: Harness) -> None:
    name = name_of(harness)

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        subscription = await transport.subscribe(name, oldest=True)
        await transport.publish([event(0)])
        (delivery,) = await collect(subscription, 1, ack=False)
        await subscription.close()
        await transport.close()
        with failing(harness, NotConnectedError):
            await delivery.reject(WHY)
        async with connected(harness) as transport, subscribed(transport, name) as subscription:
            (delivery,) = await collect(subscription, 1)
            assert id_of(delivery) == event(0).id
            assert await read(transport, name) == []

    run(main())


def test_a_name_that_can_not_be_is_an_error_and_so_is_no_connection(harness: Harness) -> None:
    async def main() -> None:
        transport = harness.transport()
        with failing(harness, NotConnectedError):
            await transport.dead_letters("one")
        async with connected(harness) as transport:
            with failing(harness, TransportConfigurationError):
                await transport.dead_letters("a.b")

    run(main())
