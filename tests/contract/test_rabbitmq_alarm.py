"""While RabbitMQ has an alarm on, it reads from no connection that publishes; what is handled goes on all the same."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from orthanc_events_bridge.errors import RefusedError
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from tests.contract.harness import events, failing, run
from tests.contract.rabbitmq_harness import RabbitHarness
from tests.contract.test_rabbitmq_dead import looking, options
from tests.contract.test_rabbitmq_subscription import PATIENCE, collect, connected, ids, queues, rabbit, server

__all__ = ["queues", "rabbit"]

KEYS = [f"study-{number}" for number in range(400)]


@contextlib.asynccontextmanager
async def alarm(rabbit: RabbitHarness) -> AsyncGenerator[None]:
    await asyncio.to_thread(server(rabbit).ctl, "set_vm_memory_high_watermark", "0.0000001")
    try:
        yield
    finally:
        await asyncio.to_thread(server(rabbit).ctl, "set_vm_memory_high_watermark", "absolute", "2GB")


def unsettled(rabbit: RabbitHarness, queues: Queues) -> int:
    """How many events a name's queues hold, in the eyes of RabbitMQ."""
    lines = server(rabbit).ctl("list_queues", "name", "messages").splitlines()
    found = (line.split("\t") for line in lines if line.startswith(queues.live))
    return sum(int(count) for _, count in found)


async def until_unsettled(rabbit: RabbitHarness, queues: Queues, most: int) -> None:
    end = time.monotonic() + PATIENCE
    while (found := await asyncio.to_thread(unsettled, rabbit, queues)) > most:
        assert time.monotonic() < end, f"RabbitMQ has {found} unsettled"
        await asyncio.sleep(0.5)


async def patiently(settle: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Settle as a worker does, which tries again as long as it holds the event."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            await settle()
        except RefusedError:
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
        else:
            return


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_events_are_handled_while_an_alarm_is_on(rabbit: RabbitHarness, queues: Queues, ordered: bool) -> None:
    sent = events(300, keys=KEYS)

    async def main() -> None:
        async with connected(rabbit.transport()) as publisher, connected(options(rabbit, ack_timeout=1)) as transport:
            subscription = await transport.subscribe(queues.name, in_flight=64, ordered=ordered)
            await publisher.publish(sent)
            first, rejected, given_back = await collect(subscription, 3, ack=False)
            late = {*ids([first, rejected, given_back])}
            partitions = {one.partition for one in sent if one.id in late}
            if ordered:  # then these wait too
                late |= {one.id for one in sent if one.partition in partitions}
            found: list[str] = []

            async def until(condition: Callable[[], bool]) -> None:
                end = time.monotonic() + PATIENCE
                while not condition():
                    assert time.monotonic() < end, f"{len(found)} came"
                    for delivery in await subscription.receive(1, 0.5):
                        await delivery.ack()
                        found.extend(ids([delivery]))

            async with alarm(rabbit):
                await until(lambda: len(found) == 100)
                with contextlib.suppress(RefusedError):  # the first on a connection is taken still
                    await first.reject({})
                await asyncio.sleep(5)  # workers of an ordered name have told each other meanwhile that they are there
                for settle in [rejected.reject({})] if ordered else [rejected.reject({}), given_back.nack()]:
                    with failing(rabbit, RefusedError) as caught:
                        await settle
                    assert "alarm" in str(caught[0])
                await until(lambda: len({*found} - late) == len(sent) - len(late))
                await until_unsettled(rabbit, queues, len(late))
            await patiently(functools.partial(first.reject, {}))
            await patiently(functools.partial(rejected.reject, {}))
            await patiently(given_back.nack)
            await until(lambda: len({*found}) == len(sent) - 2)
            await until_unsettled(rabbit, queues, 0)
            async with looking(transport, queues) as dead:
                letters = [json.loads(one.message.body)["id"] async for one in dead.read()]
            await subscription.close()
        # Nothing is missing, and nothing is there twice.
        assert sorted(letters) == sorted(ids([first, rejected]))
        assert sorted([*found, *letters]) == [one.id for one in sent]

    run(main(), seconds=4 * PATIENCE)


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_closing_does_not_wait_for_an_alarm(rabbit: RabbitHarness, queues: Queues, ordered: bool) -> None:
    """What was to be tried again then comes again."""
    sent = events(10, keys=KEYS)

    async def main() -> None:
        async with connected(rabbit.transport()) as publisher:
            async with connected(options(rabbit, ack_timeout=1)) as transport:
                subscription = await transport.subscribe(queues.name, ordered=ordered)
                await publisher.publish(sent)
                held = await collect(subscription, 10, ack=False)
                async with alarm(rabbit):
                    for delivery in held[:3]:
                        with contextlib.suppress(RefusedError):
                            await delivery.reject({})
                    for delivery in held[3:6]:
                        await delivery.ack()
                    began = time.monotonic()
                    await subscription.close()
                    await transport.close()
                    seconds = time.monotonic() - began
                    # It is not asked how long it takes on a busy machine, but whether it waits.
                    assert seconds < 10, f"{seconds:.1f} s"
            async with connected(rabbit.transport()) as transport:
                subscription = await transport.subscribe(queues.name, ordered=ordered)
                again: set[str] = set()
                while not again >= {*ids(held[6:])}:
                    again |= {*ids(await collect(subscription, 1))}
                await subscription.close()
        assert not again & {*ids(held[3:6])}

    run(main(), seconds=3 * PATIENCE)
