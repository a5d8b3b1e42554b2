"""Sending events to Kafka: batches under way, and what becomes of each.

The producer of aiokafka 0.14 hangs for as long as a broker is down, in sending and in closing alike, and keeps to
itself what it meets; so its work is done here, over aiokafka's single connections.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.transaction import InitProducerIdRequest

from orthanc_events_bridge.errors import EventRejectedError, NotConnectedError, RefusedError, TransportError
from orthanc_events_bridge.transports.base import Outgoing, PublishError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_node import Connection
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_producer import Batch, Producer, size
from orthanc_events_bridge.transports.kafka_protocol import refused
from orthanc_events_bridge.transports.kafka_reader import offsets
from orthanc_events_bridge.transports.kafka_topic import Topic, open_topic

#: Requests that a node has not answered yet.
_IN_FLIGHT: Final = 5
#: Bytes of a batch where the topic's own limit can't be read; Kafka's default is a little more.
_LARGEST: Final = 1_000_000
#: The part of ``ack_timeout`` after which Kafka says itself that replicas are missing.
_REPLICATION: Final = 0.8
#: Seconds between two looks at a server that has just started, and what it answers while it has no id to give.
_LOOK: Final = 0.02
_NOT_YET: Final = frozenset({errors.GroupLoadInProgressError.errno, errors.GroupCoordinatorNotAvailableError.errno})
_COMPRESSIONS: Final = {"none": 0, "gzip": 1}

# What Kafka refuses a batch with.
_STORED: Final = frozenset({errors.NoError.errno, errors.DuplicateSequenceNumber.errno})
#: What is in it can't be taken; the last is "invalid record".
_UNACCEPTABLE: Final = frozenset(
    {
        errors.MessageSizeTooLargeError.errno,
        errors.RecordListTooLargeError.errno,
        87,
    }
)
#: The producer and its numbers are not what Kafka expects; the last is "producer fenced".
_OUT_OF_STEP: Final = frozenset(
    {
        errors.OutOfOrderSequenceNumber.errno,
        errors.InvalidProducerEpoch.errno,
        errors.InvalidProducerIdMapping.errno,
        errors.UnknownProducerId.errno,
        90,
    }
)
#: Too few replicas: known before it was stored, or only behind that.
_TOO_FEW: Final = errors.NotEnoughReplicasError.errno
_LATE: Final = frozenset({errors.NotEnoughReplicasAfterAppendError.errno, errors.RequestTimedOutError.errno})


class _Outcome:
    """What became of the events of one call so far."""

    def __init__(self, size: int) -> None:
        self._confirmed = bytearray(size)
        self._failed = size
        self.error: TransportError | None = None

    def confirm(self, batch: Batch) -> None:
        for index in batch.indices:
            self._confirmed[index] = 1

    def fail(self, batch: Batch, error: TransportError) -> None:
        """The error of the first event that is not confirmed is the one that counts."""
        if batch.indices[0] < self._failed:
            self._failed, self.error = batch.indices[0], error

    def check(self) -> None:
        if self.error is not None:
            leading = self._confirmed.find(0)
            stored = [index for index in range(leading, len(self._confirmed)) if self._confirmed[index]]
            error = self.error
            if leading < self._failed and isinstance(error, EventRejectedError):
                # What is said is said of the first that is not confirmed, and that one was held back only.
                error = RefusedError(error.message, "what stands before it is sent first, by itself")
            raise PublishError(leading, error, stored)


class Publisher:
    """Sends to the topic, over one connection to the cluster after the other.

    :param without: as in `orthanc_events_bridge.transports.kafka.KafkaTransport`.
    """

    def __init__(self, options: KafkaOptions, without: frozenset[str]) -> None:
        self._options = options
        self._without = without
        self._largest = _LARGEST
        self._producer = Producer(options.topic, _COMPRESSIONS[options.compression], without)
        self._ends: dict[int, int] = {}  # behind the last event that we know of, in each partition
        self._place = ("", "")  # cluster and topic

    async def begin(self, cluster: Cluster, topic: Topic) -> Topic:
        """Get ready to send: over a new connection, or to a topic that has changed.

        :return: the topic as it is by then.
        :raises TransportError: that can't be.
        """
        topic = await self._ready(cluster, topic)
        place = (cluster.id, topic.metadata.id)
        if place != self._place:
            self._producer.abandon()  # a cluster that was made anew gives the same ids again, to others
            self._place = place
        if not self._producer.ready:
            await self._introduce(cluster)
        self._largest = topic.largest or self._largest
        return topic

    async def _ready(self, cluster: Cluster, topic: Topic) -> Topic:
        """Wait until every leader knows that it is one, as after the topic was made or a server has started."""
        end = asyncio.get_running_loop().time() + self._options.connect_timeout
        while True:
            try:
                # Without the end of a partition events can be sent: then it is Kafka that says why it can't take them.
                self._ends = await offsets(cluster, self._options, topic.metadata, oldest=False, known=True)
                return topic
            except NotConnectedError:
                if cluster.fault is not None or asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(_LOOK)
            topic = await open_topic(cluster, self._options)

    async def _introduce(self, cluster: Cluster) -> None:
        """Take a new producer's id; a server that has just started needs a moment until it has one to give."""
        end = asyncio.get_running_loop().time() + self._options.connect_timeout
        while True:
            answer = await cluster.ask(InitProducerIdRequest(None, 2**31 - 1))
            if not answer.error_code:
                break
            if answer.error_code not in _NOT_YET or asyncio.get_running_loop().time() > end:
                raise refused(answer.error_code, self._options.topic)
            await asyncio.sleep(_LOOK)
        self._producer.begin(answer.producer_id, answer.producer_epoch)

    async def publish(self, cluster: Cluster, topic: Topic, events: Sequence[Outgoing]) -> None:
        """As `orthanc_events_bridge.transports.base.Transport.publish`.

        :raises PublishError: not all are confirmed.
        """
        largest = topic.largest
        sendable = len(events)
        if largest is not None:
            sendable = next((i for i, event in enumerate(events) if self._is_too_large(event, largest)), len(events))
        if sendable:
            await self._publish(cluster, topic, events[:sendable])
        if sendable < len(events):
            raise PublishError(sendable, self._too_large(events[sendable], f"takes {largest} with its envelope"))

    def _is_too_large(self, event: Outgoing, largest: int) -> bool:
        return size(event) > largest - 100 and len(self._producer.encode([event])) > largest

    def _too_large(self, event: Outgoing, why: str) -> EventRejectedError:
        return EventRejectedError(
            f"the event has {event.size} bytes, and the Kafka topic {self._options.topic} {why}",
            "raise max.message.bytes of the topic",
        )

    async def _publish(self, cluster: Cluster, topic: Topic, events: Sequence[Outgoing]) -> None:
        count = len(topic.metadata.leaders)
        partitions = [int(event.partition) % count for event in events]
        if "partition" in self._without:
            partitions = [hash(event.id) % count for event in events]
        largest = min(self._largest, topic.largest or self._largest)
        batches = self._producer.plan(events, partitions, largest)
        if batches is None or not self._producer.ready:
            try:
                await self._introduce(cluster)
            except TransportError as error:
                raise PublishError(0, error) from error
            batches = self._producer.plan(events, partitions, largest)
            assert batches is not None
        by_leader: dict[int, list[Batch]] = {}
        for batch in batches:
            by_leader.setdefault(topic.metadata.leaders[batch.partition], []).append(batch)
        outcome = _Outcome(len(events))
        await asyncio.gather(
            *(self._deliver(cluster, leader, events, some, outcome) for leader, some in by_leader.items())
        )
        outcome.check()

    async def _deliver(
        self, cluster: Cluster, leader: int, events: Sequence[Outgoing], batches: list[Batch], outcome: _Outcome
    ) -> None:
        """Send the batches that one node leads, and take its answers."""
        under_way: deque[tuple[asyncio.Future[Any], list[Batch]]] = deque()
        current = batches[:1]
        try:
            node = await cluster.node(leader)
            for request, current in self._producer.requests(events, batches, self._options.ack_timeout * _REPLICATION):
                while len(under_way) == _IN_FLIGHT or _busy(under_way, current):
                    await self._take(cluster, events, under_way, outcome)
                if outcome.error is not None:  # also another node's
                    break
                for batch in current:
                    self._producer.sent(batch)
                if "confirm" in self._without:
                    await self._forget(node, request, current, outcome)
                    continue
                under_way.append((node.begin(request), current))
                await asyncio.sleep(0)
            while under_way:
                await self._take(cluster, events, under_way, outcome)
        except errors.KafkaError as error:
            outcome.fail(under_way[0][1][0] if under_way else current[0], cluster.lost(error))
        except TransportError as error:
            outcome.fail(under_way[0][1][0] if under_way else current[0], error)

    async def _forget(self, node: Connection, request: Any, batches: list[Batch], outcome: _Outcome) -> None:
        """A mutant: what was sent counts as stored."""
        await node.send(request, expect_response=False)
        for batch in batches:
            self._producer.stored(batch)
            outcome.confirm(batch)

    async def _take(
        self,
        cluster: Cluster,
        events: Sequence[Outgoing],
        under_way: deque[tuple[asyncio.Future[Any], list[Batch]]],
        outcome: _Outcome,
    ) -> None:
        """Wait for the oldest answer."""
        future, batches = under_way[0]
        answer = await cluster.wait(future, self._options.ack_timeout)
        codes = {row[0]: (row[1], row[2]) for _, rows in answer.topics for row in rows}
        for batch in batches:
            error = self._refusal(cluster, events, batch, *codes.get(batch.partition, (-1, -1)))
            if error is None:
                self._producer.stored(batch)
                outcome.confirm(batch)
            else:
                outcome.fail(batch, error)
        under_way.popleft()

    def _refusal(
        self, cluster: Cluster, events: Sequence[Outgoing], batch: Batch, code: int, offset: int
    ) -> TransportError | None:
        """Why a batch is not known to be stored; none when it is."""
        topic, name = self._options.topic, errors.for_code(code).__name__
        if code in _STORED:
            # What comes a second time is found where it was.
            if not batch.again and 0 <= offset < self._ends.get(batch.partition, 0):
                return cluster.fail(
                    NotConnectedError(
                        f"the Kafka topic {topic} was made again while we were connected",
                        "it is checked again by itself",
                    )
                )
            self._ends[batch.partition] = max(offset + len(batch.indices), self._ends.get(batch.partition, 0))
            return None
        if code in _LATE:
            # It may be stored, and then is not stored again if all that is under way is sent as it was: the relay does
            # that over a new connection, and begins with one event behind a refusal.
            return NotConnectedError(
                f"too few replicas of the Kafka topic {topic} have stored an event in time",
                "see that the other servers of the cluster are well",
            )
        if code == _TOO_FEW or code in _UNACCEPTABLE or code in _OUT_OF_STEP:
            self._producer.abandon()  # it is not stored: its numbers are free, and may not be used again
        if code == _TOO_FEW:
            return RefusedError(
                f"fewer replicas of the Kafka topic {topic} are in step than its min.insync.replicas asks for",
                "start the other servers of the cluster",
            )
        if code in _OUT_OF_STEP:
            return NotConnectedError(
                f"Kafka has lost the count of what we sent to the topic {topic}: {name} ({code})",
                "it is sent again by a new producer, by itself",
            )
        if code in _UNACCEPTABLE and len(batch.indices) == 1:
            return self._too_large(events[batch.indices[0]], f"refuses it: {name} ({code})")
        if code in _UNACCEPTABLE:
            length = sum(size(events[index]) for index in batch.indices)
            self._largest = max(1, length // 2)
            return RefusedError(
                f"the Kafka topic {topic} refuses a batch of {length} bytes", "it is sent again in smaller ones"
            )
        return cluster.fail(refused(code, topic))


def _busy(under_way: Iterable[tuple[object, list[Batch]]], batches: list[Batch]) -> bool:
    """Whether a partition of theirs has a batch under way."""
    taken = {batch.partition for _, some in under_way for batch in some}
    return any(batch.partition in taken for batch in batches)
