"""What only RabbitMQ has of order: 64 queues, each one subscriber's at a time, that are shared out among them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import random
import re
import time
from collections import Counter, defaultdict

import pytest
from aiormq.abc import AbstractChannel

from orthanc_events_bridge.consumers import Consumer
from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.worker import Worker as ConsumersWorker
from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports import rabbitmq_subscription
from orthanc_events_bridge.transports.base import Outgoing, Subscription, Transport
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from orthanc_events_bridge.transports.subscriptions import PARTITIONS
from tests.contract.harness import CONTENT_TYPE, SECRET, event, events, failing, run
from tests.contract.rabbitmq_harness import RabbitHarness, there
from tests.contract.rabbitmq_tools import rabbit_transport, until
from tests.contract.test_rabbitmq_subscription import (
    PATIENCE,
    collect,
    connected,
    deleting,
    do,
    ids,
    queues,
    rabbit,
    server,
)

__all__ = ["queues", "rabbit"]

KEYS = [f"study-{number}" for number in range(400)]


def shares(rabbit: RabbitHarness, queues: Queues) -> list[int]:
    """How many partitions each subscriber has, as RabbitMQ sees it."""
    lines = server(rabbit).ctl("list_channels", "pid", "connection").splitlines()
    connections = dict(line.split("\t") for line in lines)
    found: Counter[str] = Counter()
    for line in server(rabbit).ctl("list_consumers", "queue_name", "channel_pid", "active").splitlines():
        queue, channel, active = line.split("\t")
        if re.fullmatch(rf"{re.escape(queues.live)}\.\d\d", queue) and active == "true":
            found[connections[channel]] += 1
    return sorted(found.values())


async def in_order(transport: Transport, queues: Queues, *, oldest: bool = False) -> Subscription:
    return await transport.subscribe(queues.name, oldest=oldest, ordered=True)


class Worker:
    """A subscriber that settles all it gets, and knows when it last got something of each partition."""

    def __init__(self, rabbit: RabbitHarness, queues: Queues) -> None:
        self._rabbit = rabbit
        self._queues = queues
        self._stack = contextlib.ExitStack()
        self._task: asyncio.Task[None] | None = None
        self.seen: dict[str, float] = {}

    async def start(self) -> None:
        self._transport, self._cut, _ = self._stack.enter_context(self._rabbit.slow(0.0))
        await self._transport.connect()
        self._subscription = await in_order(self._transport, self._queues)
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        with contextlib.suppress(NotConnectedError):
            while True:
                for delivery in await self._subscription.receive(64, 1.0):
                    self.seen[delivery.message.address.rpartition(".")[2]] = time.monotonic()
                    await delivery.ack()

    async def end(self, *, die: bool = False) -> None:
        if die:
            self._cut()
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._subscription.close()
        await self._transport.close()
        self._stack.close()


def test_eight_have_4_to_16_of_the_partitions_each_whoever_comes_and_goes(
    rabbit: RabbitHarness, queues: Queues
) -> None:
    async def even(publisher: Transport, workers: list[Worker], least: int, most: int) -> float:
        """Wait until each has so many of what is published; in how many seconds that is."""
        began, number = time.monotonic(), 0
        while True:
            await publisher.publish(events(256, start=number, keys=KEYS))
            number += 256
            since = time.monotonic()
            await asyncio.sleep(0.5)
            counts = [sum(last >= since for last in worker.seen.values()) for worker in workers]
            if sum(counts) == PARTITIONS and least <= min(counts) and max(counts) <= most:
                return time.monotonic() - began
            assert time.monotonic() - began < 2 * PATIENCE, f"the shares are {counts}"

    async def main() -> None:
        workers = [Worker(rabbit, queues) for _ in range(8)]
        async with connected(rabbit.transport()) as publisher:
            await workers[0].start()
            print(f"1 alone: {await even(publisher, workers[:1], 64, 64):.1f} s")
            for worker in workers[1:]:
                await worker.start()
            print(f"7 came: {await even(publisher, workers, 4, 16):.1f} s")
            await workers.pop(3).end()
            await workers.pop(5).end(die=True)
            print(f"one went, and one died: {await even(publisher, workers, 5, 21):.1f} s")
            while len(workers) > 1:
                await workers.pop().end()
            print(f"1 is left: {await even(publisher, workers, 64, 64):.1f} s")
            await workers[0].end()

    run(main(), seconds=8 * PATIENCE)


def test_partitions_without_events_are_shared_too(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                transport = await stack.enter_async_context(connected(rabbit.transport()))
                stack.push_async_callback((await in_order(transport, queues)).close)
            end = time.monotonic() + PATIENCE
            while (found := await asyncio.to_thread(shares, rabbit, queues)) != 4 * [PARTITIONS // 4]:
                assert time.monotonic() < end, f"the shares are {found}"
                await asyncio.sleep(0.5)

    run(main(), seconds=2 * PATIENCE)


def test_the_past_comes_first_and_in_order_whoever_receives_it(rabbit: RabbitHarness, queues: Queues) -> None:
    """While events go on coming, and subscribers come and die."""
    before, chance = 600, random.Random(7)
    sent = events(before + 600, keys=KEYS[:150])
    ordered = dataclasses.replace(queues, ordered=True)
    first: dict[str, list[str]] = defaultdict(list)
    met: set[str] = set()
    by_id = {one.id: one for one in sent}

    def note(found: list[str]) -> None:
        for one in found:
            if one not in met:
                met.add(one)
                first[by_id[one].key].append(one)

    async def work(subscription: Subscription, seconds: float) -> None:
        end = time.monotonic() + seconds
        with contextlib.suppress(NotConnectedError):
            while time.monotonic() < end and len(met) < len(sent):
                for delivery in await subscription.receive(10, 0.1):
                    note(ids([delivery]))
                    await delivery.ack()

    async def dying() -> None:
        with rabbit.slow(0.0) as (transport, cut, _):
            await transport.connect()
            subscription = await in_order(transport, queues, oldest=True)
            await work(subscription, chance.uniform(0, 2))
            cut()
            await subscription.close()
            await transport.close()

    async def lasting(transport: Transport) -> None:
        subscription = await in_order(transport, queues, oldest=True)
        await work(subscription, 3 * PATIENCE)
        await subscription.close()

    async def settle(subscription: Subscription) -> None:
        """What the dead had in hand comes once more, and a past is over when that is settled too."""
        while True:
            for delivery in await subscription.receive(10, 0.1):
                await delivery.ack()

    async def publish(publisher: Transport) -> None:
        for start in range(before, len(sent), 5):
            await publisher.publish(sent[start : start + 5])

    async def main() -> None:
        async with connected(rabbit.transport()) as publisher, connected(rabbit.transport()) as transport:
            await publisher.publish(sent[:before])
            publishing = asyncio.create_task(publish(publisher))
            await dying()
            await asyncio.gather(lasting(transport), dying(), dying(), publishing)
            subscription = await in_order(transport, queues)
            settling = asyncio.create_task(settle(subscription))
            try:
                for queue in (ordered.beginning, ordered.pasts[0], ordered.pasts[63]):
                    await until_gone(rabbit, queue)
                    assert not settling.done(), settling.exception()
            finally:
                settling.cancel()
                await asyncio.gather(settling, return_exceptions=True)
                await subscription.close()

    run(main(), seconds=5 * PATIENCE)
    assert met == by_id.keys()
    for key, found in first.items():
        assert found == [one.id for one in sent if one.key == key]


@pytest.mark.parametrize("still", ["in the past", "behind it", "in the past, unordered"])
def test_who_was_there_before_passes_over_no_past_that_is_made_anew(
    rabbit: RabbitHarness, queues: Queues, still: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange is deleted, and another makes a new beginning: its past comes before what is published then."""
    # Else it is told in time, by chance, that the exchange was deleted.
    monkeypatch.setattr(rabbitmq_subscription, "_WATCH", 1000.0)
    past, later = events(300, keys=KEYS), events(300, start=300, keys=KEYS)
    wanted = {one.id for one in (*past, *later)}
    ordered, behind = "unordered" not in still, still == "behind it"

    async def subscribe(transport: Transport) -> Subscription:
        return await transport.subscribe(queues.name, oldest=True, ordered=ordered, in_flight=1 + 255 * ordered)

    async def main() -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            before, transport = [await stack.enter_async_context(connected(rabbit.transport())) for _ in range(2)]
            if not behind:
                await before.publish(past)
            first = await subscribe(before)  # has all that is given
            if behind:
                await until_gone(rabbit, queues.beginning)
            older = await subscribe(transport)
            if not behind:  # both take part in it
                await until(lambda: consumers(rabbit, queues.beginning) == 2, PATIENCE)
            await do(rabbit, lambda channel: channel.exchange_delete(rabbit.exchange))
            other = await stack.enter_async_context(connected(rabbit.transport()))  # makes it again
            if behind:
                await other.publish(past)
            newer = await subscribe(other)
            await first.close()
            if not behind:
                await other.publish(later)
            end = time.monotonic() + PATIENCE
            with failing(rabbit, NotConnectedError) as caught:
                while time.monotonic() < end:
                    assert not (await older.receive(100, 0.5) and ordered)
            assert rabbit.exchange in str(caught[0])
            await older.close()
            if behind:
                await other.publish(later)
            found: list[str] = []
            while {*found} < wanted:
                found += ids(await collect(newer, 1))
            await newer.close()
            return [*dict.fromkeys(found)]

    found = run(main(), seconds=3 * PATIENCE)
    for key in KEYS if ordered else ():
        assert [one for one in found if one.endswith(event(0, key).id[-12:])] == [
            one.id for one in (*past, *later) if one.key == key
        ]
    assert {*found} == wanted


def consumers(rabbit: RabbitHarness, queue: str) -> int:
    return server(rabbit).ctl("list_consumers", "queue_name").split().count(queue)


async def until_gone(rabbit: RabbitHarness, queue: str) -> None:
    end = time.monotonic() + PATIENCE
    while await asyncio.to_thread(there, rabbit.url, queue):
        assert time.monotonic() < end, f"{queue} is there"
        await asyncio.sleep(0.5)


def test_what_is_deleted_underneath_is_made_again(rabbit: RabbitHarness, queues: Queues) -> None:
    sent = event(0)
    queue = f"{queues.live}.{sent.partition}"

    async def received(transport: Transport, one: Outgoing, name: str) -> None:
        subscription = await in_order(transport, queues)
        await transport.publish([one])
        assert ids(await collect(subscription, 1)) == [one.id]
        if name == queue:
            await do(rabbit, functools.partial(deleting, queue))
        else:
            await do(rabbit, lambda channel: channel.exchange_delete(name))
        with failing(rabbit, NotConnectedError) as caught:
            async with asyncio.timeout(PATIENCE):
                await subscription.receive(1, 2 * PATIENCE)
        assert name in str(caught[0])
        await subscription.close()

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            for number, name in enumerate((queue, queues.workers, queue)):
                await received(transport, event(number), name)

    run(main(), seconds=3 * PATIENCE)


def test_an_exchange_of_workers_that_is_made_again_at_once_is_noticed(rabbit: RabbitHarness, queues: Queues) -> None:
    """With it the binding is gone, by which they hear of each other."""

    async def main() -> None:
        async with connected(rabbit.transport()) as transport:
            subscription = await in_order(transport, queues)
            await do(
                rabbit,
                lambda channel: channel.exchange_delete(queues.workers),
                lambda channel: channel.exchange_declare(queues.workers, exchange_type="fanout", durable=True),
            )
            with failing(rabbit, NotConnectedError) as caught:
                async with asyncio.timeout(PATIENCE):
                    await subscription.receive(1, 2 * PATIENCE)
            assert queues.workers in str(caught[0])
            await subscription.close()
            subscription = await in_order(transport, queues)
            await transport.publish([event(0)])
            assert ids(await collect(subscription, 1)) == [event(0).id]
            await subscription.close()

    run(main(), seconds=3 * PATIENCE)


def test_what_is_missing_is_named_where_nothing_is_to_be_made(rabbit: RabbitHarness, queues: Queues) -> None:
    async def main() -> None:
        rabbit.make_place()
        async with connected(rabbit.transport(declare=False)) as strict:
            with failing(rabbit, TransportConfigurationError) as caught:
                await in_order(strict, queues)
            assert f"{queues.live}.00" in str(caught[0]) and "declare" in str(caught[0])
            assert f"exchange {queues.workers}" in str(caught[0])
            async with connected(rabbit.transport()) as transport:
                await (await in_order(transport, queues)).close()
            subscription = await in_order(strict, queues)
            await strict.publish([event(0)])
            assert ids(await collect(subscription, 1)) == [event(0).id]
            await subscription.close()

    run(main(), seconds=2 * PATIENCE)


@pytest.mark.parametrize("missing", ["workers", "partition", "inbox"])
def test_a_worker_waits_for_what_is_missing_where_nothing_is_to_be_made(
    rabbit: RabbitHarness,
    queues: Queues,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says so once, when it begins as well as while it works."""
    monkeypatch.setattr("orthanc_events_bridge.consumers.worker._SLOW", 0.5)
    rabbit.make_place()
    own = dataclasses.replace(queues, ordered=True)
    name = {"workers": own.workers, "partition": f"{own.live}.07", "inbox": own.inbox}[missing]
    seen: list[str] = []
    consumer = Consumer(queues.name, broker={"type": "memory"}, ordered=True)
    consumer.on("*")(lambda event: seen.append(event.id))

    async def remove(channel: AbstractChannel) -> None:
        await (channel.exchange_delete(name) if missing == "workers" else channel.queue_delete(name))

    async def make(channel: AbstractChannel) -> None:
        if missing == "workers":
            await channel.exchange_declare(name, exchange_type="fanout", durable=True)
            return
        await channel.queue_declare(name, durable=True, arguments=own.lasting[name])
        if missing == "partition":
            await channel.queue_bind(name, rabbit.exchange, own.published[name])

    def said() -> list[str]:
        return [one.getMessage() for one in caplog.records if "gets no events" in one.getMessage()]

    async def main() -> None:
        async with connected(rabbit.transport()) as publisher:
            await (await in_order(publisher, queues)).close()
            await do(rabbit, remove)
            worker = ConsumersWorker(
                rabbit.transport(declare=False), consumer._terms, consumer._routes, Clients(None), consumer.meter
            )
            working = asyncio.create_task(worker.run())
            for again in (False, True):
                await until(said, PATIENCE)
                await asyncio.sleep(2)  # several attempts
                (line,) = said()
                assert name in line and ("make it again" if again else "make it") in line and "lost" not in line
                assert "declare" in line
                await do(rabbit, make)
                await until(lambda: worker.ready, PATIENCE)
                sent = outgoing(queues, int(again))
                await publisher.publish([sent])
                await until(lambda sent=sent: sent.id in seen, PATIENCE)
                caplog.clear()
                if not again:
                    await do(rabbit, remove)
            worker.stop()
            await working

    run(main(), seconds=5 * PATIENCE)


def outgoing(queues: Queues, number: int) -> Outgoing:
    """An event that a consumer can read, of a partition of its own."""
    document = {
        "specversion": "1.0",
        "id": f"{queues.name}-{number}",
        "source": "urn:orthanc",
        "type": "io.orthanc-events.study.stable.v1",
        "partitionkey": "key",
    }
    body = json.dumps(document).encode()
    return Outgoing(str(document["id"]), "main", "study", "stable", "key", "07", CONTENT_TYPE, body)


def test_the_documented_permissions_are_enough(rabbit: RabbitHarness, queues: Queues) -> None:
    user, own = f"archive-{queues.name}", r"^(orthanc\..*|amq\.gen.*)$"
    server(rabbit).ctl("add_user", user, SECRET)
    server(rabbit).ctl("set_permissions", user, own, r"^(orthanc\..*|amq\.gen.*|amq\.default)$", own)
    names = {"exchange": rabbit.exchange, "history": rabbit.history, "inbox_prefix": rabbit.inboxes}
    login = {"user": user, "password": SECRET, "dead_prefix": rabbit.dead, "limits": {"max_bytes": 2**27}}

    async def main() -> None:
        async with connected(rabbit_transport(f"amqp://127.0.0.1:{rabbit.port}", **names, **login)) as transport:
            await transport.publish([event(0)])
            subscription = await in_order(transport, queues, oldest=True)
            (delivery,) = await collect(subscription, 1, ack=False)
            await delivery.nack(0.1)
            (delivery,) = await collect(subscription, 1, ack=False)
            await delivery.reject({})
            await subscription.close()
            dead = await transport.dead_letters(queues.name)
            letters = [one async for one in dead.read()]
            await dead.remove(letters)
            await dead.close()
            assert [one.message.body for one in letters] == [event(0).body]

    run(main(), seconds=2 * PATIENCE)
