"""The plain client of Kafka: aiokafka."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from aiokafka import AIOKafkaProducer

from benchmarks.raw import Confirmed, Raw, Way
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.kafka_options import KafkaOptions

#: Events between two looks at what is confirmed.
_LOOK = 500
#: Bytes of a batch at most: aiokafka's default, and as many as our transport has.
_BATCHES = {"default": 16 * 1024, "large": 256 * 1024}

#: Key, partition, value, headers.
_Message = tuple[bytes, int, bytes, list[tuple[str, bytes]]]


class RawKafka(Raw[_Message]):
    """To the topic, idempotent and confirmed by all replicas, to the partition that the contract names."""

    ways: ClassVar = {"default": Way("aiokafka"), "large": Way("aiokafka with batches of 256 KiB")}
    how = (
        "aiokafka's producer by the futures of its `send`, with acks=all and enable_idempotence, once with its own"
        " defaults, by which a batch has 16 KiB at most, and once with batches as large as our transport's, 256 KiB"
    )
    options: KafkaOptions

    def prepare(self, event: Outgoing) -> _Message:
        headers = [
            ("content-type", event.content_type.encode()),
            ("orthanc-event-id", event.id.encode()),
            ("orthanc-site", event.site.encode()),
        ]
        return event.key.encode(), int(event.partition) % self.options.partitions, event.body, headers

    def _producer(self, way: str) -> AIOKafkaProducer:
        compression = None if self.options.compression == "none" else self.options.compression
        return AIOKafkaProducer(
            bootstrap_servers=self.options.servers[0],
            acks="all",
            enable_idempotence=True,
            max_batch_size=_BATCHES[way],
            compression_type=compression,
        )

    async def send(self, way: str, messages: Sequence[_Message], confirmed: Confirmed) -> None:
        under_way: list[asyncio.Future[object]] = []
        async with self._producer(way) as producer:
            for sent, (key, partition, value, headers) in enumerate(messages, 1):
                under_way.append(
                    await producer.send(self.options.topic, value, key=key, partition=partition, headers=headers)
                )
                if sent % _LOOK == 0:
                    under_way = [future for future in under_way if not (future.done() and future.result())]
                    confirmed(sent - len(under_way))
            await asyncio.gather(*under_way)
            confirmed(len(messages))

    async def send_one(self, message: _Message) -> None:
        key, partition, value, headers = message
        async with self._producer("default") as producer:
            await producer.send_and_wait(self.options.topic, value, key=key, partition=partition, headers=headers)
