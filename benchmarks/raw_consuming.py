"""What a worker of the kit is held against: the fastest loops by hand with each broker's client that we found.

Each receives in one process, holds at most 512 messages, and acknowledges as cheaply as its broker lets it: NATS by raw
``MSG.NEXT`` requests, two under way, and an own inbox; RabbitMQ by aiormq, and an acknowledgement for 64 at a time;
Kafka by ``getmany`` and a commit for each batch. In three ways:

``plain``
    What a worker promises, and no more than can be had by hand in fifty lines: the event is read (JSON, and the
    attributes that CloudEvents require are there), an async handler is awaited for it, up to 16 at a time and those of
    one key one behind the other (16 lanes, by the key), and a message is acknowledged when its handler has returned.
    It does without retries, dead letters, attempts, filters, metrics, a deadline for what is held, and stopping in good
    order; where anything fails it dies. Not by the package ``cloudevents``: that one takes longer than all the rest.
``JSON``
    One behind the other, each read by ``json.loads``, none looked at; there is no handler to be awaited. Nobody can use
    this where handlers wait for something.
``nothing``
    The same without even reading: what the client itself can do.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiormq
import nats
from aiokafka import AIOKafkaConsumer, TopicPartition
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

#: Called with each event that is handled.
Handler = Callable[[dict[str, Any]], Awaitable[None]]

WAYS: Final = ("plain", "JSON", "nothing")
_BATCH: Final = 256
_HELD: Final = 2 * _BATCH
_ACKS: Final = 64
_LANES: Final = 16


class Loop(ABC):
    """One broker's.

    :param way: one of `WAYS`.
    :param name: of the consumer.
    :param seen: called with each event's number of the sequence, when it is handled.
    """

    def __init__(self, options: Any, way: str, name: str, seen: Callable[[int], None], done: asyncio.Event) -> None:
        self.options = options
        self.name = name
        self.done = done
        self._way = way
        self._seen = seen
        self._lanes: list[asyncio.Queue[tuple[dict[str, Any], Any]]] = [asyncio.Queue() for _ in range(_LANES)]

    async def run(self) -> None:
        """Until it is done."""
        lanes = [asyncio.create_task(self._lane(one)) for one in self._lanes]
        try:
            await self.receive()
        finally:
            for lane in lanes:
                lane.cancel()

    @abstractmethod
    async def receive(self) -> None:
        """Take messages, until it is done, and give each to `take`."""

    @abstractmethod
    async def settle(self, message: Any) -> None:
        """It is handled."""

    async def take(self, body: bytes, message: Any) -> None:
        """Have it handled, and settle it then."""
        if self._way == "plain":
            event = read(body)
            self._lanes[hash(event["partitionkey"]) % _LANES].put_nowait((event, message))
            return
        if self._way == "JSON":
            json.loads(body)
        self._seen(0)
        await self.settle(message)

    async def _lane(self, lane: asyncio.Queue[tuple[dict[str, Any], Any]]) -> None:
        while True:
            event, message = await lane.get()
            await self._handle(event)
            await self.settle(message)

    async def _handle(self, event: dict[str, Any]) -> None:
        self._seen(event["data"]["seq"])


def read(body: bytes) -> dict[str, Any]:
    """A structured CloudEvent.

    :raises ValueError: it is none.
    """
    event: dict[str, Any] = json.loads(body)
    if event["specversion"] != "1.0" or not (event["id"] and event["source"] and event["type"]):
        raise ValueError("it is no CloudEvent")
    return event


class NatsLoop(Loop):
    """An own inbox and raw ``MSG.NEXT`` requests, two under way; each message is acknowledged."""

    options: NatsOptions

    async def receive(self) -> None:
        client = self._client = await nats.connect(self.options.servers[0])
        config = ConsumerConfig(durable_name=self.name, ack_policy=AckPolicy.EXPLICIT, max_ack_pending=-1)
        await client.jetstream().add_consumer(self.options.stream, config)
        self._inbox = client.new_inbox()
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.options.stream}.{self.name}"
        self._request = json.dumps({"batch": _BATCH, "expires": 5_000_000_000}).encode()
        self._left = _HELD

        async def on_message(message: Msg) -> None:
            if message.reply:
                await self.take(message.data, message)

        await client.subscribe(self._inbox, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
        for _ in range(2):
            await client.publish(self._subject, self._request, self._inbox)
        await self.done.wait()
        await client.flush()
        await client.close()

    async def settle(self, message: Msg) -> None:
        await self._client.publish(message.reply, b"+ACK")
        self._left -= 1
        if self._left <= _BATCH:
            self._left += _BATCH
            await self._client.publish(self._subject, self._request, self._inbox)


class RabbitLoop(Loop):
    """aiormq with a prefetch of 512; every 64th acknowledgement, for all before it."""

    options: RabbitOptions

    async def receive(self) -> None:
        connection = await aiormq.connect(self.options.servers[0])
        self._channel = await connection.channel()
        self._settled: set[int] = set()  # those before which something is not
        self._low = self._told = 0
        await self._channel.basic_qos(prefetch_count=_HELD)

        async def on_message(message: Any) -> None:
            await self.take(message.body, message)

        await self._channel.basic_consume(_queue(self.name), on_message)
        await self.done.wait()
        await connection.close()

    async def settle(self, message: Any) -> None:
        self._settled.add(message.delivery_tag)
        while self._low + 1 in self._settled:
            self._low += 1
            self._settled.remove(self._low)
        if self._low - self._told >= _ACKS or self.done.is_set():
            self._told = self._low
            await self._channel.basic_ack(self._low, multiple=True, wait=False)


def _queue(name: str) -> str:
    return f"orthanc.raw.{name}"


class KafkaLoop(Loop):
    """``getmany(512)``; a commit for each batch, when all of it is handled."""

    options: KafkaOptions

    async def receive(self) -> None:
        consumer = AIOKafkaConsumer(
            self.options.topic,
            bootstrap_servers=self.options.servers[0],
            group_id=f"raw-{self.name}",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        await consumer.start()
        while not self.done.is_set():
            batch: dict[TopicPartition, Any] = await consumer.getmany(timeout_ms=200, max_records=_HELD)
            self._left = sum(map(len, batch.values()))
            self._settled = asyncio.Event()
            for records in batch.values():
                for record in records:
                    await self.take(record.value, record)
            if batch:
                await self._settled.wait()
                await consumer.commit()
        await consumer.stop()

    async def settle(self, message: Any) -> None:
        self._left -= 1
        if not self._left:
            self._settled.set()


LOOPS: Final[dict[str, type[Loop]]] = {"nats": NatsLoop, "rabbitmq": RabbitLoop, "kafka": KafkaLoop}


async def prepare(options: TransportOptions, name: str) -> None:
    """At RabbitMQ: a quorum queue as a consumer's, bound to everything. Elsewhere nothing has to be there before."""
    if isinstance(options, RabbitOptions):
        connection = await aiormq.connect(options.servers[0])
        channel = await connection.channel()
        await channel.queue_declare(_queue(name), durable=True, arguments={"x-queue-type": "quorum"})
        await channel.queue_bind(_queue(name), options.exchange, "#")
        await connection.close()
