"""The fastest plain loop that each broker's client has for receiving and acknowledging, as far as we found one."""

from __future__ import annotations

import asyncio
import json
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

#: Called with the body of each event.
Seen = Callable[[bytes], None]

_BATCH: Final = 256
_ACKS: Final = 64


async def from_nats(options: NatsOptions, name: str, seen: Seen, done: asyncio.Event) -> None:
    """An own inbox and raw ``MSG.NEXT`` requests, two under way; each message is acknowledged."""
    client = await nats.connect(options.servers[0])
    config = ConsumerConfig(durable_name=name, ack_policy=AckPolicy.EXPLICIT, max_ack_pending=-1)
    await client.jetstream().add_consumer(options.stream, config)
    inbox, subject = client.new_inbox(), f"$JS.API.CONSUMER.MSG.NEXT.{options.stream}.{name}"
    request = json.dumps({"batch": _BATCH, "expires": 5_000_000_000}).encode()
    left = 2 * _BATCH

    async def on_message(message: Msg) -> None:
        nonlocal left
        if not message.reply:
            return
        seen(message.data)
        await client.publish(message.reply, b"+ACK")
        left -= 1
        if left <= _BATCH:
            left += _BATCH
            await client.publish(subject, request, inbox)

    await client.subscribe(inbox, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    for _ in range(2):
        await client.publish(subject, request, inbox)
    await done.wait()
    await client.flush()
    await client.close()


async def from_rabbitmq(options: RabbitOptions, name: str, seen: Seen, done: asyncio.Event) -> None:
    """aiormq with a prefetch of 256; every 64th acknowledgement, for all before it."""
    connection = await aiormq.connect(options.servers[0])
    channel = await connection.channel()
    queue = f"orthanc.raw.{name}"
    await channel.basic_qos(prefetch_count=_BATCH)
    count = 0

    async def on_message(message: Any) -> None:
        nonlocal count
        seen(message.body)
        count += 1
        if count % _ACKS == 0 or done.is_set():
            await channel.basic_ack(message.delivery_tag, multiple=True, wait=False)

    await channel.basic_consume(queue, on_message)
    await done.wait()
    await connection.close()


async def prepare_rabbitmq(options: RabbitOptions, name: str) -> None:
    """A quorum queue as a consumer's, bound to everything."""
    connection = await aiormq.connect(options.servers[0])
    channel = await connection.channel()
    queue = f"orthanc.raw.{name}"
    await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    await channel.queue_bind(queue, options.exchange, "#")
    await connection.close()


async def from_kafka(options: KafkaOptions, name: str, seen: Seen, done: asyncio.Event) -> None:
    """``getmany(256)`` with a commit for each batch."""
    consumer = AIOKafkaConsumer(
        options.topic,
        bootstrap_servers=options.servers[0],
        group_id=f"raw-{name}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    while not done.is_set():
        batch: dict[TopicPartition, Any] = await consumer.getmany(timeout_ms=200, max_records=_BATCH)
        for records in batch.values():
            for record in records:
                seen(record.value)
        if batch:
            await consumer.commit()
    await consumer.stop()


LOOPS: Final[dict[str, Callable[[Any, str, Seen, asyncio.Event], Awaitable[None]]]] = {
    "nats": from_nats,
    "rabbitmq": from_rabbitmq,
    "kafka": from_kafka,
}


def loop_of(options: TransportOptions) -> Callable[[Any, str, Seen, asyncio.Event], Awaitable[None]]:
    """The loop for a broker."""
    return LOOPS[options.type]
