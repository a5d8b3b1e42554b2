"""What becomes of what waits, or is held, when a stream of NATS drops it by age, has no room, or is made again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from orthanc_events_bridge.errors import NotConnectedError, RefusedError
from orthanc_events_bridge.transports.base import Delivery, PublishError, Subscription
from tests.contract.harness import event, events, run
from tests.contract.nats_tools import nats_server, nats_transport
from tests.contract.raw_nats import ask

#: Seconds for which the streams here keep an event.
AGE = 8
KEPT = {"max_bytes": 2**20, "max_age": f"{AGE}s", "duplicate_window": "1s"}


async def collect(subscription: Subscription, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await subscription.receive(count - len(found), 0.5)
    return found


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_a_retry_comes_also_when_the_stream_keeps_nothing_for_so_long(tmp_path: Path, ordered: bool) -> None:
    delay = AGE * 1.5

    async def main() -> None:
        transport = nats_transport(server, limits=KEPT)
        await transport.connect()
        subscription = await transport.subscribe("router", ordered=ordered)
        await transport.publish(events(1))
        (delivery,) = await collect(subscription, 1)
        await delivery.nack(delay, {"orthanc-first-failure": "then"})
        given_back = time.monotonic()
        (again,) = await collect(subscription, 1)
        assert time.monotonic() - given_back >= delay
        assert again.message.body == event(0).body
        assert again.message.headers["orthanc-first-failure"] == "then"
        assert again.message.headers["orthanc-operation"] == "retry"
        assert again.attempt == 2
        await again.ack()
        assert await subscription.receive(1, 1.0) == []
        await subscription.close()
        await transport.close()

    with nats_server(tmp_path) as server:
        run(main(), seconds=90)


def test_an_age_that_is_shortened_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orthanc_events_bridge.transports import nats_origin

    monkeypatch.setattr(nats_origin, "_STEADY", 1.0)
    monkeypatch.setattr(nats_origin, "_LONGEST_COPY", 2.0)
    delay = AGE * 1.5

    async def main() -> None:
        transport = nats_transport(server)
        await transport.connect()
        subscription = await transport.subscribe("router")
        await transport.publish(events(1))
        (delivery,) = await collect(subscription, 1)
        await delivery.nack(delay)
        given_back = time.monotonic()
        assert await subscription.receive(1, 1.0) == []  # it is put off
        config = ask(server.port, "STREAM.INFO.ORTHANC_EVENTS_INBOX")["config"]
        shorter = config | {"max_age": AGE * 1_000_000_000, "duplicate_window": 1_000_000_000}
        ask(server.port, "STREAM.UPDATE.ORTHANC_EVENTS_INBOX", **shorter)
        (again,) = await collect(subscription, 1)
        assert time.monotonic() - given_back >= delay
        await again.ack()
        await subscription.close()
        await transport.close()

    with nats_server(tmp_path) as server:
        run(main(), seconds=90)


def test_without_room_for_copies_what_would_be_dropped_is_held(tmp_path: Path) -> None:
    async def main() -> None:
        transport = nats_transport(server, limits=KEPT, inbox_max_bytes=65536)
        await transport.connect()
        subscription = await transport.subscribe("router")
        await transport.publish(events(2))
        first, second = await collect(subscription, 2)
        other = transport.inbox("other")
        await other.connect()
        for number in range(10_000):  # no larger than a copy
            try:
                await other.publish([event(number)])
            except PublishError:
                break
        await first.nack(0.5)  # JetStream itself keeps it for so long
        with pytest.raises(RefusedError, match="full"):
            await second.nack(AGE)
        ask(server.port, "STREAM.PURGE.ORTHANC_EVENTS_INBOX")
        await second.nack(AGE)  # held, it can be given back once more
        found = await collect(subscription, 2)
        assert [one.message.body for one in found] == [event(0).body, event(1).body]
        for one in found:
            await one.ack()
        for closing in (other, subscription, transport):
            await closing.close()

    with nats_server(tmp_path) as server:
        run(main(), seconds=90)


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_what_was_held_when_its_stream_was_made_again_settles_nothing_there(tmp_path: Path, ordered: bool) -> None:
    """A subscriber that holds all that it may asks for nothing, and so is not told by the server."""

    async def main() -> None:
        transport, other = nats_transport(server), nats_transport(server)
        await transport.connect()
        subscription = await transport.subscribe("router", ordered=ordered, in_flight=1)
        await transport.publish(events(1))
        (held,) = await collect(subscription, 1)
        await asyncio.sleep(1.5)  # a handler at work
        ask(server.port, "STREAM.DELETE.ORTHANC_EVENTS")
        await other.connect()
        theirs = await other.subscribe("router", ordered=ordered)
        await other.publish(events(1))
        (working,) = await collect(theirs, 1)
        assert working.message.position == held.message.position
        with pytest.raises(NotConnectedError, match="made again"):
            await held.ack()
        await working.nack()  # it is still theirs to give back
        (again,) = await collect(theirs, 1)
        await again.ack()
        for closing in (subscription, theirs, transport, other):
            await closing.close()

    with nats_server(tmp_path) as server:
        run(main(), seconds=90)
