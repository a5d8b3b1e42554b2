"""A name reads one stream, exchange or topic: its inbox, its retries and its dead letters are named after it alone."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import pytest
from aiormq.abc import AbstractChannel

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.base import Transport
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.nats import NatsTransport
from orthanc_events_bridge.transports.rabbitmq import RabbitTransport
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from tests.contract.harness import Harness, events, failing, run
from tests.contract.rabbitmq_harness import RabbitHarness, administrate
from tests.contract.test_subscribe import KEYS, connected, drain, ids, name_of, subscribed

#: What another place is called.
_OTHER: Final[dict[str, Callable[[Harness], dict[str, Any]]]] = {
    "nats": lambda harness: {"stream": f"{harness.place}_B", "subject_prefix": f"other.{harness.place}"},
    "rabbitmq": lambda harness: {"exchange": f"{harness.place}_B", "history": f"{harness.place}_B"},
    "kafka": lambda harness: {"topic": f"{harness.place}_B"},
}


@pytest.fixture(params=sorted(_OTHER))
def both(brokers: Callable[[str], Harness], request: pytest.FixtureRequest) -> Iterator[tuple[Harness, Transport]]:
    """A broker, and a transport to another place of it, with the same inboxes."""
    harness = brokers(request.param)
    harness.new_place()
    transport = harness.transport()
    assert isinstance(transport, KafkaTransport | NatsTransport | RabbitTransport)
    options = transport._options
    yield harness, create(options.model_copy(update=_OTHER[request.param](harness)))
    harness.tidy()


@pytest.mark.parametrize("meanwhile", [True, False], ids=["beside", "afterwards"])
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_of_two_of_one_name_on_two_places_the_second_is_refused(
    both: tuple[Harness, Transport], meanwhile: bool, ordered: bool
) -> None:
    harness, other = both
    sent, name = events(30, keys=KEYS), name_of(harness)

    async def refused() -> None:
        await other.connect()
        with failing(harness, TransportConfigurationError) as caught:
            await other.subscribe(name, oldest=True, ordered=ordered)
        assert harness.place in str(caught[0]) and f"{harness.place}_B" in str(caught[0])
        await other.close()

    async def main() -> None:
        async with connected(harness) as transport:
            await transport.publish(sent)
            subscription = await transport.subscribe(name, oldest=True, ordered=ordered)
            if meanwhile:
                await refused()
            found = await drain(subscription, lambda found: len(found) == len(sent))
            assert {*ids(found)} == {one.id for one in sent}
            await subscription.close()
        if not meanwhile:
            await refused()
        # Another name reads it; and the first goes on where it is, and is not refused for what the other has tried.
        await other.connect()
        await other.publish(sent[:10])
        async with subscribed(other, f"{name}-b") as subscription:
            assert len(await drain(subscription, lambda found: len(found) == 10)) == 10
        await other.close()
        async with connected(harness) as transport:
            await transport.publish(more := events(10, start=100, keys=KEYS))
            subscription = await transport.subscribe(name, oldest=True, ordered=ordered)
            found = await drain(subscription, lambda found: len(found) >= 10)
            assert {*ids(found)} >= {one.id for one in more}
            await subscription.close()

    run(main(), seconds=180)


def _delete(queue: str, channel: AbstractChannel) -> Awaitable[object]:
    return channel.queue_delete(queue)


@pytest.mark.parametrize("both", ["rabbitmq"], indirect=True)
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_a_name_has_moved_to_another_exchange_when_its_queues_are_deleted(
    both: tuple[Harness, Transport], ordered: bool
) -> None:
    """As the refusal says. What is published at the first exchange from then on does not come."""
    harness, other = both
    assert isinstance(harness, RabbitHarness)
    name = name_of(harness)
    queues = Queues(name, ordered=ordered)

    async def main() -> None:
        await other.connect()
        async with connected(harness) as transport:
            await (await transport.subscribe(name, ordered=ordered)).close()
            with failing(harness, TransportConfigurationError) as caught:
                await other.subscribe(name, ordered=ordered)
            assert f"delete the queue {queues.live}" in caught[0].remedy
            deleting = [functools.partial(_delete, queue) for queue in queues.published]
            await asyncio.to_thread(administrate, harness.url, *deleting)
            subscription = await other.subscribe(name, ordered=ordered)
            await transport.publish(events(5, keys=KEYS))
            await other.publish(sent := events(5, start=5, keys=KEYS))
            found = await drain(subscription, lambda found: len(found) == len(sent))
            assert {*ids(found)} == {one.id for one in sent}
            await subscription.close()
            with failing(harness, TransportConfigurationError):
                await transport.subscribe(name, ordered=ordered)
        await other.close()

    run(main(), seconds=180)
