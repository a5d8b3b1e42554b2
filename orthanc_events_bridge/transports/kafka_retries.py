"""A Kafka consumer's inbox and topics of delays, and what is on its way into them.

A copy counts when all replicas in step have it. It is sent once: where nobody knows whether it was stored, what it is a
copy of comes again.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.admin import CreateTopicsRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_delays import STEPS, Copy, retry_topic
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused

#: The wire contract's number of partitions, whatever a topic has.
_PARTITIONS: Final = 64
#: Bytes of one request, about, and so of one batch; fewer where a topic takes no more.
_REQUEST: Final = 512 * 1024
#: Bytes that a copy, with its headers, may be larger than the largest event by.
_LARGER: Final = 64 * 1024
_SEGMENT: Final = 64 * 1024**2
#: Seconds between two looks at a topic that is coming into being.
_LOOK: Final = 0.02

#: What Kafka answers where nothing is stored, and another node, or the same one soon, does it.
_LED_ELSEWHERE: Final = frozenset(
    {
        errors.UnknownTopicOrPartitionError.errno,
        errors.LeaderNotAvailableError.errno,
        errors.NotLeaderForPartitionError.errno,
    }
)


def inbox_topic(options: KafkaOptions, name: str) -> str:
    """The topic that only this consumer reads."""
    return f"{options.inbox_prefix}.{name}"


class Retries:
    """A consumer's inbox and topics of delays, and what is on its way into them.

    :param main: the topic that the copies are of.
    :param largest: how many bytes an event of it can have; none where we may not know.
    """

    def __init__(
        self, cluster: Cluster, options: KafkaOptions, name: str, main: TopicMetadata, largest: int | None
    ) -> None:
        self._cluster = cluster
        self._options = options
        self._main = main
        self._largest = None if largest is None else largest + _LARGER
        self._request_size = min(_REQUEST, self._largest or _REQUEST)
        self.inbox = inbox_topic(options, name)
        #: By topic, the seconds that an event waits in it.
        self.steps: Mapping[str, int] = {retry_topic(name, step): step for step in STEPS}
        #: Those of them that we have made.
        self.made: set[str] = set()
        self._known: dict[str, TopicMetadata] = {}
        self._waiting: deque[tuple[Copy, asyncio.Future[None]]] = deque()
        self._under_way: list[tuple[Copy, asyncio.Future[None]]] = []
        self._arrived = asyncio.Event()

    # Topics.

    async def counts(self) -> dict[str, int]:
        """Find out which of the topics there are, and how many partitions each has.

        :raises TransportError: Kafka doesn't answer.
        """
        topics = (self.inbox, *self.steps)
        found = {topic: await self._cluster.topic(topic) for topic in topics}
        self._known = {topic: metadata for topic, metadata in found.items() if metadata is not None}
        return {topic: len(metadata.leaders) for topic, metadata in self._known.items()}

    async def need(self, topic: str) -> TopicMetadata:
        """Find a topic, or make it.

        :raises NotConnectedError: Kafka doesn't answer.
        :raises TransportConfigurationError: it is not there, and can't be made.
        """
        found = self._known.get(topic) or await self._cluster.topic(topic)
        if found is None:
            if not self._options.declare:
                raise TransportConfigurationError(
                    f"Kafka has no topic {topic}, and declare is false",
                    "make it, with as many partitions as the events' topic has, or set declare to true",
                )
            await self._make(topic)
            self.made.add(topic)
        end = asyncio.get_running_loop().time() + self._options.connect_timeout
        while found is None or -1 in found.leaders or not found.leaders:
            if asyncio.get_running_loop().time() > end:
                raise NotConnectedError(f"no server of Kafka leads the topic {topic}", "start the servers that hold it")
            await asyncio.sleep(_LOOK)
            found = await self._cluster.topic(topic)
        self._known[topic] = found
        return found

    async def _make(self, topic: str) -> None:
        limits = self._options.limits
        settings = {
            "cleanup.policy": "delete",
            "unclean.leader.election.enable": "false",
            "min.insync.replicas": str(limits.needed_replicas),
            "retention.ms": str(round(limits.max_age * 1000) or -1),
            "retention.bytes": str(limits.max_bytes or -1),
            "segment.bytes": str(_SEGMENT),
        }
        if self._largest is not None:
            settings["max.message.bytes"] = str(self._largest)
        new: tuple[Any, ...] = (topic, len(self._main.leaders), limits.replicas, [], list(settings.items()))
        timeout = round(self._options.connect_timeout * 1000)
        answer = await self._cluster.ask(CreateTopicsRequest([new], timeout, False))
        for _, code, text in answer.topic_errors:
            # Another subscriber can have been quicker.
            if code in (errors.NoError.errno, errors.TopicAlreadyExistsError.errno):
                continue
            error = refused(code, topic)
            if isinstance(error, TransportConfigurationError) or getattr(errors.for_code(code), "retriable", False):
                raise error
            raise TransportConfigurationError(
                f"Kafka can't make the topic {topic}: {text or errors.for_code(code).__name__} ({code})",
                "check `limits`; limits.replicas can't be more than there are servers",
            )

    # Copies.

    def send(self, copy: Copy) -> asyncio.Future[None]:
        """Begin to store a copy; the future is done when all replicas in step have it, or it holds a `TransportError`.

        To cancel the future doesn't keep the copy from being stored.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((copy, future))
        self._arrived.set()
        return future

    async def run(self) -> None:
        """Store what is to be stored, for ever.

        :raises TransportError: it can't go on; `fail` is then to be called.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                size = 0
                while self._waiting and (not self._under_way or size + self._waiting[0][0].size < self._request_size):
                    self._under_way.append(self._waiting.popleft())
                    size += self._under_way[-1][0].size
                await self._store([copy for copy, _ in self._under_way])
                for _, future in self._under_way:
                    if not future.done():
                        future.set_result(None)
                self._under_way.clear()

    def fail(self, error: TransportError) -> None:
        """Nothing is stored any more, and of what is under way nobody knows."""
        for _, future in (*self._under_way, *self._waiting):
            if not future.done():
                future.set_exception(error)
                future.exception()  # looked at, also if nobody waits for it
        self._under_way.clear()
        self._waiting.clear()

    async def _store(self, copies: Sequence[Copy]) -> None:
        end = asyncio.get_running_loop().time() + self._options.ack_timeout
        while copies := await self._try(copies, asyncio.get_running_loop().time() > end):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)

    async def _try(self, copies: Sequence[Copy], last: bool) -> list[Copy]:
        """Store copies; return those whose partition has another leader, or none yet that knows of it.

        :param last: that is an error, then.
        """
        by_leader: dict[int, dict[tuple[str, int], list[Copy]]] = {}
        for copy in copies:
            leaders = (await self.need(copy.topic)).leaders
            number = zlib.crc32(copy.key or b"") % _PARTITIONS % len(leaders)
            by_leader.setdefault(leaders[number], {}).setdefault((copy.topic, number), []).append(copy)
        again: list[Copy] = []
        try:
            answers = [
                (await self._cluster.node(leader)).begin(self._request(batches))
                for leader, batches in by_leader.items()
            ]
            for answer, batches in zip(answers, by_leader.values(), strict=True):
                found = await self._cluster.wait(answer, self._options.ack_timeout)
                for topic, number, code in ((topic, *row[:2]) for topic, rows in found.topics for row in rows):
                    if code in _LED_ELSEWHERE and not last:
                        self._known.pop(topic, None)
                        again += batches[topic, number]
                    elif code:
                        error = refused(code, topic)
                        raise NotConnectedError(error.message, error.remedy)
        except errors.KafkaError as error:
            raise self._cluster.lost(error) from error
        return again

    def _request(self, batches: Mapping[tuple[str, int], Sequence[Copy]]) -> Any:
        rows: dict[str, list[tuple[int, bytes]]] = {}
        for (topic, number), copies in batches.items():
            rows.setdefault(topic, []).append((number, _batch(copies)))
        # Kafka says itself that replicas are missing, before we give up.
        return ProduceRequest(None, -1, round(self._options.ack_timeout * 800), list(rows.items()))


def _batch(copies: Sequence[Copy]) -> bytes:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=2**30,
    )
    now = time.time_ns() // 1_000_000
    for offset, copy in enumerate(copies):
        builder.append(offset, now, copy.key, copy.value, list(copy.headers))
    return bytes(builder.build())
