"""Reading a Kafka topic to look at it, without a group and without a trace."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.record.memory_records import MemoryRecords

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.base import Incoming
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused

#: What the protocol calls the beginning and the end of a partition.
_OLDEST: Final = -2
_NEWEST: Final = -1
#: What "offset not available" is called in our version of the request (Kafka's ReplicaManager, since 2.2).
_END_UNKNOWN: Final = errors.LeaderNotAvailableError.errno
#: Milliseconds that a node waits for the first event; bytes of one partition, and of one answer.
_WAIT: Final = 500
_PART: Final = 256 * 1024
_ANSWER: Final = 8 * 1024**2


def _by_leader(topic: TopicMetadata) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for partition, leader in enumerate(topic.leaders):
        found.setdefault(leader, []).append(partition)
    return found


async def offsets(
    cluster: Cluster, options: KafkaOptions, topic: TopicMetadata, *, oldest: bool, known: bool = False
) -> dict[int, int]:
    """The offset of the oldest kept event of each partition, or of the next one.

    :param known: leave those out whose leader can't say. One that is new must first see its replicas up to date, which
        takes a moment, or for ever where fewer are in step than ``min.insync.replicas`` (KIP-207, KIP-966).
    :raises TransportError: they can't be had.
    """
    found: dict[int, int] = {}
    for leader, partitions in _by_leader(topic).items():
        rows = [(partition, _OLDEST if oldest else _NEWEST) for partition in partitions]
        answer = await cluster.ask(OffsetRequest(-1, 0, [(options.topic, rows)]), leader)
        for _, those in answer.topics:
            for partition, code, _, offset in those:
                if code == _END_UNKNOWN:
                    if known:
                        continue
                    raise NotConnectedError(
                        f"the leader of partition {partition} of the Kafka topic {options.topic} can't tell its end:"
                        " its replicas are not up to date",
                        "start the other servers of the cluster",
                    )
                if code:
                    raise refused(code, options.topic)
                found[partition] = offset
    return found


async def read(
    cluster: Cluster, options: KafkaOptions, topic: TopicMetadata, *, oldest: bool
) -> AsyncGenerator[Incoming]:
    """Yield events, each partition's in its order; what comes together is put in the order of its times.

    :param cluster: for this alone; to give it up ends the reading.
    :raises TransportError: it can't go on.
    """
    following = await offsets(cluster, options, topic, oldest=oldest)
    answers: asyncio.Queue[dict[int, list[Any]]] = asyncio.Queue(1)
    tasks = [
        asyncio.create_task(_follow(cluster, options, leader, {one: following[one] for one in partitions}, answers))
        for leader, partitions in _by_leader(topic).items()
    ]
    try:
        while True:
            getting = asyncio.ensure_future(answers.get())
            done, _ = await asyncio.wait({getting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if getting not in done:
                getting.cancel()
                for task in done:
                    task.result()
            found = getting.result()
            streams = [[(row.timestamp, partition, row) for row in rows] for partition, rows in found.items()]
            for _, partition, row in heapq.merge(*streams, key=lambda one: one[0]):
                headers = {name.lower(): (value or b"").decode("utf-8", "replace") for name, value in row.headers}
                yield Incoming(options.topic, row.value or b"", headers, f"{partition}:{row.offset}")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    cluster: Cluster,
    options: KafkaOptions,
    leader: int,
    following: dict[int, int],
    answers: asyncio.Queue[dict[int, list[Any]]],
) -> None:
    """Ask one node for what is new in the partitions that it leads, again and again."""
    node = await cluster.node(leader)
    while True:
        rows = [(partition, offset, _PART) for partition, offset in following.items()]
        cluster.check()
        try:
            question = node.begin(FetchRequest(_WAIT, 1, _ANSWER, 0, [(options.topic, rows)]))
            answer = await cluster.wait(question, options.connect_timeout + _WAIT / 1000)
        except errors.KafkaError as error:
            raise cluster.lost(error) from error
        found: dict[int, list[Any]] = {}
        for _, those in answer.topics:
            for partition, code, *_, data in those:
                if code == errors.OffsetOutOfRangeError.errno:
                    raise NotConnectedError(
                        f"the Kafka topic {options.topic} has dropped events before they were read", "begin again"
                    )
                if code:
                    raise refused(code, options.topic)
                new, following[partition] = records(data or b"", following[partition])
                if new:
                    found[partition] = new
        if found:
            await answers.put(found)


def records(data: bytes, first: int) -> tuple[list[Any], int]:
    """The records of an answer from an offset on, and the offset behind them.

    An answer can begin in the middle of a batch, and its last batch can be cut off. What a transaction leaves behind
    takes an offset too, and is no record.

    :raises TransportConfigurationError: it is compressed in a way that aiokafka reads only with another package.
    """
    found: list[Any] = []
    memory = MemoryRecords(data)
    behind = first
    while memory.has_next():
        batch = memory.next_batch()
        if not batch.is_control_batch:
            try:
                found += [record for record in batch if record.offset >= first]
            except errors.UnsupportedCodecError as error:
                raise TransportConfigurationError(
                    f"the record at offset {batch.base_offset} of a Kafka topic is compressed as we can't read it",
                    "let whoever writes there use gzip, or no compression",
                ) from error
        behind = max(behind, batch.next_offset)
    return found, behind
