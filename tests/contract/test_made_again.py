"""A place that is deleted and made again: what is sent to it anew reaches every consumer that was there before."""

from __future__ import annotations

import asyncio
import time

import pytest

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.base import Outgoing
from tests.contract.harness import Harness, events, run
from tests.contract.test_subscribe import (
    KEYS,
    PATIENCE,
    connected,
    drain,
    ids,
    name_of,
    over_new_connections,
    remaining,
    subscribed,
)

pytestmark = [pytest.mark.needs("subscribable"), pytest.mark.needs("identifies_place")]


async def tell_again(harness: Harness, sent: list[Outgoing], before: str) -> None:
    """As a relay does it: it finds that the place is another one, and sends everything again."""

    async def work(first: bool) -> None:
        async with connected(harness) as transport:
            identity = await transport.connect()
            assert identity != before
            await transport.publish(sent)

    await over_new_connections(work)


@pytest.mark.parametrize("subscribed_meanwhile", [False, True], ids=["away", "subscribed"])
def test_who_began_with_the_next_event_misses_nothing(harness: Harness, subscribed_meanwhile: bool) -> None:
    old, sent = events(20, start=100, keys=KEYS), events(60, keys=KEYS)
    wanted = {one.id for one in [*old, *sent]}

    async def main() -> None:
        name = name_of(harness)
        async with connected(harness) as transport:
            await transport.publish(old)
            async with subscribed(transport, name, oldest=False) as subscription:
                await transport.publish(sent[:20])
                assert {*ids(await drain(subscription, lambda found: len(found) == 20))} == {
                    one.id for one in sent[:20]
                }
                assert await remaining(transport, subscription) == []
        found: set[str] = set()

        async def consume(stop: asyncio.Event, begun: asyncio.Event) -> None:
            """As a consumer does it, whatever happens to what it is connected to."""
            end = time.monotonic() + PATIENCE
            while not (stop.is_set() and found >= wanted):
                assert time.monotonic() < end, f"{len(wanted - found)} of {len(wanted)} did not come"
                try:
                    async with (
                        connected(harness) as transport,
                        subscribed(transport, name, oldest=False) as subscription,
                    ):
                        begun.set()
                        while not (stop.is_set() and found >= wanted):
                            assert time.monotonic() < end, f"{len(wanted - found)} of {len(wanted)} did not come"
                            for delivery in await subscription.receive(10, 0.5):
                                await delivery.ack()
                                found.update(ids([delivery]))
                except NotConnectedError:
                    await asyncio.sleep(0.05)

        told, begun = asyncio.Event(), asyncio.Event()
        async with connected(harness) as relay:
            before = await relay.connect()
            consuming = asyncio.create_task(consume(told, begun)) if subscribed_meanwhile else None
            if consuming is not None:
                await begun.wait()
            await asyncio.to_thread(harness.remove_place)
            await tell_again(harness, [*old, *sent], before)
        told.set()
        await (consuming or consume(told, begun))
        # What came beside that is what came twice; and from now on the name goes on where it is.
        async with connected(harness) as transport, subscribed(transport, name, oldest=False) as subscription:
            assert {*await remaining(transport, subscription)} <= wanted
        async with connected(harness) as transport, subscribed(transport, name, oldest=False) as subscription:
            assert await remaining(transport, subscription) == []

    run(main(), seconds=4 * PATIENCE)
