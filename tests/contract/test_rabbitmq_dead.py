"""What only RabbitMQ has of dead letters: a queue that is held while it is read, and can be full or forbidden."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from orthanc_events_bridge.errors import NotConnectedError, RefusedError, TransportConfigurationError
from orthanc_events_bridge.transports import rabbitmq_asking
from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters, Delivery, Transport
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from tests.contract.harness import SECRET, event, events, failing, run
from tests.contract.rabbitmq_harness import RabbitHarness, there
from tests.contract.rabbitmq_tools import rabbit_transport
from tests.contract.test_rabbitmq_subscription import (
    PATIENCE,
    collect,
    connected,
    deleting,
    do,
    ids,
    nothing_left,
    publishing,
    queues,
    rabbit,
    server,
    subscribed,
)

__all__ = ["queues", "rabbit"]

WHY = {"orthanc-reason": "no"}


@contextlib.asynccontextmanager
async def looking(transport: Transport, queues: Queues) -> AsyncGenerator[DeadLetters]:
    dead = await transport.dead_letters(queues.name)
    try:
        yield dead
    finally:
        await dead.close()


async def read(transport: Transport, queues: Queues) -> list[DeadLetter]:
    async with looking(transport, queues) as dead:
        return [one async for one in dead.read()]


def numbers(letters: Sequence[DeadLetter]) -> list[int]:
    return [json.loads(letter.message.body)["number"] for letter in letters]


async def reject(transport: Transport, queues: Queues, count: int, start: int = 0) -> None:
    async with subscribed(transport, queues, oldest=False) as subscription:
        await transport.publish(events(count, start=start))
        for left in range(count, 0, -100):
            for delivery in await collect(subscription, min(left, 100), ack=False):
                await delivery.reject(WHY)


def options(rabbit: RabbitHarness, **more: Any) -> Transport:
    """A transport to the place, with further options."""
    given: dict[str, Any] = {
        "user": "contract",
        "password": SECRET,
        "exchange": rabbit.exchange,
        "history": rabbit.history,
        "inbox_prefix": rabbit.inboxes,
        "dead_prefix": rabbit.dead,
    }
    given |= more
    given["limits"] = {"max_bytes": 2**27, **more.get("limits", {})}
    return rabbit_transport(f"amqp://127.0.0.1:{rabbit.port}", **given)


def test_hundreds_are_removed_at_once_and_the_others_keep_their_order(rabbit: RabbitHarness, queues: Queues) -> None:
    """More than RabbitMQ has under way at a time: the rest it would forget, were it not waited for."""
    count = 700

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await reject(transport, queues, count)
            async with looking(transport, queues) as dead:
                letters = [one async for one in dead.read()]
                assert numbers(letters) == [*range(count)]
                await dead.remove(letters[::2])
            left = [*range(1, count, 2)]
            async with looking(transport, queues) as dead:
                letters = [one async for one in dead.read()]
                assert numbers(letters) == left
                await dead.remove(letters[::3])
                del left[::3]
                assert numbers([one async for one in dead.read()]) == left  # by the same one
                await reject(transport, queues, 2, start=9000)
                letters = [one async for one in dead.read()]
                assert numbers(letters) == [*left, 9000, 9001]
                await dead.remove(letters[5::4])
                del letters[5::4]
            for _ in range(3):
                again = await read(transport, queues)
                assert numbers(again) == numbers(letters)
            assert {one.message.headers["orthanc-attempts"] for one in again} == {"1"}
            assert not [name for one in again for name in one.message.headers if name.startswith("x-")]

    run(main(), seconds=3 * PATIENCE)


def test_they_keep_their_order_where_some_are_removed_while_they_are_read(
    rabbit: RabbitHarness, queues: Queues
) -> None:
    """More often than RabbitMQ keeps subscriptions of one channel in their order, that hold something."""
    count, part = 900, 5

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await reject(transport, queues, count)
            async with looking(transport, queues) as dead:
                chosen: list[DeadLetter] = []
                async for one in dead.read():
                    if numbers([one])[0] % 2:
                        chosen.append(one)
                    if len(chosen) == part:
                        await dead.remove(chosen)
                        chosen = []
            for _ in range(2):
                assert numbers(await read(transport, queues)) == [*range(0, count, 2)]

    run(main(), seconds=3 * PATIENCE)


def test_they_keep_their_order_where_reading_ends_in_the_middle_or_another_comes_meanwhile(
    rabbit: RabbitHarness, queues: Queues
) -> None:
    count = 300

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await reject(transport, queues, count)
            async with looking(transport, queues) as dead:
                async with contextlib.aclosing(dead.read()) as reading:
                    first = [await anext(reading) for _ in range(50)]
                await dead.remove(first[::2])
            left = [*range(1, 50, 2), *range(50, count)]
            async with looking(transport, queues) as dead:
                letters = [one async for one in dead.read()]
                assert numbers(letters) == left
                await reject(transport, queues, 1, start=9000)
                await dead.remove(letters[:3])
            for _ in range(2):
                assert numbers(await read(transport, queues)) == [*left[3:], 9000]

    run(main(), seconds=3 * PATIENCE)


def test_what_a_reader_held_that_died_is_there_again_in_order(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await reject(transport, queues, 20)
            with rabbit.slow(0.0) as (other, cut, _):
                await other.connect()
                dead = await other.dead_letters(queues.name)
                letters = [one async for one in dead.read()]
                await dead.remove(letters[:3])
                cut()
                with failing(rabbit, NotConnectedError):
                    await dead.remove(letters[3:6])
                await dead.close()
                await other.close()
            assert numbers(await read(transport, queues)) == [*range(3, 20)]

    run(main(), seconds=2 * PATIENCE)


def test_one_at_a_time_looks_at_them(rabbit: RabbitHarness, queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as one, connected(rabbit.transport()) as other:
            await reject(one, queues, 3)
            async with looking(one, queues) as dead:
                assert numbers([letter async for letter in dead.read()]) == [0, 1, 2]
                with monkeypatch.context() as patched:
                    patched.setattr(rabbitmq_asking, "_TURN", 0.3)
                    with failing(rabbit, NotConnectedError) as caught:
                        await read(other, queues)
                assert f"reading {queues.dead}" in str(caught[0])
                waiting = asyncio.create_task(read(other, queues))
                await asyncio.sleep(0.5)
                assert not waiting.done()
            assert numbers(await waiting) == [0, 1, 2]

    run(main(), seconds=2 * PATIENCE)


def test_when_there_are_too_many_the_next_is_held(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with (
            connected(options(rabbit, limits={"dead_letters": 3})) as transport,
            subscribed(transport, queues, oldest=False) as subscription,
        ):
            await transport.publish(events(20))
            held = await collect(subscription, 20, ack=False)
            stored = 0
            with failing(rabbit, RefusedError) as caught:
                for delivery in held:  # the limit is one that RabbitMQ looks at now and then
                    await delivery.reject(WHY)
                    stored += 1
            assert 3 <= stored < 20
            assert queues.dead in str(caught[0])
            async with looking(transport, queues) as dead:
                letters = [one async for one in dead.read()]
                assert numbers(letters) == [*range(stored)]
                await dead.remove(letters)
            await held[stored].reject(WHY)
            await held[stored + 1].nack()
            for delivery in held[stored + 2 :]:
                await delivery.ack()
            assert ids(await collect(subscription, 1)) == [event(stored + 1).id]
            assert numbers(await read(transport, queues)) == [stored]
            await nothing_left(transport, subscription)

    run(main(), seconds=2 * PATIENCE)


def test_what_to_do_about_a_limit_that_was_changed_is_said_and_works(rabbit: RabbitHarness, queues: Queues) -> None:
    """Nothing is lost meanwhile."""
    before, after = options(rabbit, limits={"dead_letters": 30}), options(rabbit, limits={"dead_letters": 50})

    async def main() -> None:
        async with connected(before) as transport:
            await reject(transport, queues, 2)
        async with connected(after) as transport, subscribed(transport, queues) as subscription:
            await transport.publish([event(2)])
            (delivery,) = await collect(subscription, 1, ack=False)
            with failing(rabbit, TransportConfigurationError) as caught:
                await delivery.reject(WHY)
            assert "set limits.dead_letters back" in caught[0].remedy and "30" in str(caught[0])
            assert "orthanc-events dlq" in caught[0].remedy and f"delete the queue {queues.dead}" in caught[0].remedy
            async with looking(transport, queues) as dead:  # as the command does
                letters = [one async for one in dead.read()]
                assert numbers(letters) == [0, 1]
                await dead.remove(letters)
            await do(rabbit, functools.partial(deleting, queues.dead))
            await delivery.reject(WHY)
            assert numbers(await read(transport, queues)) == [2]

    run(main(), seconds=2 * PATIENCE)


def test_deleted_ones_are_gone_and_the_place_is_made_again(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with (
            connected(rabbit.transport()) as transport,
            subscribed(transport, queues, oldest=False) as subscription,
        ):
            await transport.publish(events(3))
            held = await collect(subscription, 3, ack=False)
            assert not await asyncio.to_thread(there, rabbit.url, queues.dead)
            await held[0].reject(WHY)
            await do(rabbit, functools.partial(deleting, queues.dead))
            await held[1].reject(WHY)
            async with looking(transport, queues) as dead:
                letters = [one async for one in dead.read()]
                assert numbers(letters) == [1]
                await do(rabbit, functools.partial(deleting, queues.dead))
                await dead.remove(letters)  # nothing is left of them
            assert await read(transport, queues) == []
            await held[2].reject(WHY)
            assert numbers(await read(transport, queues)) == [2]
            await nothing_left(transport, subscription)

    run(main(), seconds=2 * PATIENCE)


def test_a_place_that_is_missing_or_another_is_named_and_nothing_is_lost(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            async with subscribed(transport, queues, oldest=False):
                await transport.publish([event(0)])
            async with (
                connected(rabbit.transport(declare=False)) as strict,
                subscribed(strict, queues) as subscription,
            ):
                (delivery,) = await collect(subscription, 1, ack=False)
                with failing(rabbit, TransportConfigurationError) as caught:
                    await delivery.reject(WHY)
                assert queues.dead in str(caught[0]) and "declare" in str(caught[0])
                await do(rabbit, lambda channel: channel.queue_declare(queues.dead, durable=True))
                await delivery.reject(WHY)
                await nothing_left(strict, subscription)
            async with subscribed(transport, queues) as subscription:
                await transport.publish([event(1)])
                (delivery,) = await collect(subscription, 1, ack=False)
                with failing(rabbit, TransportConfigurationError) as caught:
                    await delivery.reject(WHY)
                assert queues.dead in str(caught[0])
                assert numbers(await read(transport, queues)) == [0]
                await do(rabbit, functools.partial(deleting, queues.dead))
                await delivery.reject(WHY)
                assert numbers(await read(transport, queues)) == [1]

    run(main(), seconds=2 * PATIENCE)


@pytest.mark.parametrize("forbidden", ["amq.default", "dead"])
def test_a_user_who_may_not_store_them_is_told_and_the_event_is_held(
    rabbit: RabbitHarness, queues: Queues, forbidden: str
) -> None:
    user = f"worker-{queues.name}"
    without = "amq.default" if forbidden == "amq.default" else rabbit.dead
    limited = rf"^(?!{without}).*"
    server(rabbit).ctl("add_user", user, SECRET)
    server(rabbit).ctl("set_permissions", user, ".*", ".*", ".*")

    async def main() -> None:
        async with (
            connected(options(rabbit, user=user)) as transport,
            subscribed(transport, queues, oldest=False) as subscription,
        ):
            await transport.publish([event(0)])
            (delivery,) = await collect(subscription, 1, ack=False)
            await asyncio.to_thread(server(rabbit).ctl, "set_permissions", user, limited, limited, limited)
            with failing(rabbit, TransportConfigurationError) as caught:
                await delivery.reject(WHY)
            assert (forbidden if forbidden == "amq.default" else queues.dead) in str(caught[0])
            await asyncio.to_thread(server(rabbit).ctl, "set_permissions", user, ".*", ".*", ".*")
            await delivery.reject(WHY)
            await nothing_left(transport, subscription)
        async with connected(rabbit.transport()) as transport:
            assert numbers(await read(transport, queues)) == [0]

    run(main(), seconds=2 * PATIENCE)


def test_while_an_alarm_is_on_it_is_held(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with (
            connected(rabbit.transport(impatient=True)) as transport,
            subscribed(transport, queues, oldest=False) as subscription,
        ):
            await transport.publish(events(2))
            held = await collect(subscription, 2, ack=False)
            await held[0].reject(WHY)
            await asyncio.to_thread(server(rabbit).ctl, "set_vm_memory_high_watermark", "0.0000001")
            try:
                with failing(rabbit, RefusedError) as caught:
                    await held[1].reject(WHY)
                assert "alarm" in str(caught[0])
            finally:
                await asyncio.to_thread(server(rabbit).ctl, "set_vm_memory_high_watermark", "absolute", "2GB")
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    await held[1].reject(WHY)
                    break
                except RefusedError:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.1)
        async with connected(rabbit.transport()) as transport:
            assert numbers(await read(transport, queues)) == [0, 1]

    run(main(), seconds=3 * PATIENCE)


@pytest.mark.parametrize("again", [False, True], ids=["rejected", "given back"])
def test_one_that_is_confirmed_late_is_stored_once(rabbit: RabbitHarness, queues: Queues, again: bool) -> None:
    """However often it is tried meanwhile."""

    async def settle(delivery: Delivery) -> None:
        await (delivery.nack() if again else delivery.reject(WHY))

    async def main() -> None:
        async with (
            connected(rabbit.transport()) as publisher,
            connected(options(rabbit, ack_timeout=0.5)) as transport,
            subscribed(transport, queues, oldest=False) as subscription,
        ):
            await publisher.publish(events(2))
            first, second = await collect(subscription, 2, ack=False)
            await settle(first)
            await asyncio.to_thread(rabbit.freeze)
            try:
                for _ in range(3):
                    with failing(rabbit, RefusedError) as caught:
                        await settle(second)
                    assert "not confirmed" in str(caught[0])
            finally:
                await asyncio.to_thread(rabbit.thaw)
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    await settle(second)
                    break
                except RefusedError:
                    assert time.monotonic() < end
            if again:
                assert sorted(ids(await collect(subscription, 2))) == [one.id for one in events(2)]
            await nothing_left(transport, subscription)
            assert numbers(await read(transport, queues)) == ([] if again else [0, 1])

    run(main(), seconds=2 * PATIENCE)


def test_what_others_put_there_is_read_as_it_is(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            await reject(transport, queues, 1)
            await do(rabbit, functools.partial(publishing, queues.dead, b"\0", None))
            (_, letter) = await read(transport, queues)
            assert (letter.message.body, letter.message.headers) == (b"\0", {"content-type": ""})

    run(main(), seconds=PATIENCE)
