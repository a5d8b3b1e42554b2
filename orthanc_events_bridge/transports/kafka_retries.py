"""A Kafka consumer's inbox and topics of delays, and what is on its way into them.

A copy counts when all replicas in step have it. It is sent once: where nobody knows whether it was stored, what it is a
copy of comes again.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.produce import ProduceRequest

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_delays import STEPS, Copy, retry_topic
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_places import LED_ELSEWHERE, batch_of, need_topic
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused
from orthanc_events_bridge.transports.subscriptions import PARTITIONS

#: Bytes of one request, about, and so of one batch; fewer where a topic takes no more.
_REQUEST: Final = 512 * 1024
#: Bytes that a copy, with its headers, may be larger than the largest event by.
_LARGER: Final = 64 * 1024
_SEGMENT: Final = 64 * 1024**2
#: Seconds between two tries to store something whose partition has no leader yet.
_LOOK: Final = 0.02


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
        found = self._known.get(topic)
        if found is None:
            partitions = len(self._main.leaders)
            found, made = await need_topic(self._cluster, self._options, topic, partitions, self._settings())
            if made:
                self.made.add(topic)
            self._known[topic] = found
        return found

    def _settings(self) -> dict[str, str]:
        limits = self._options.limits
        settings = {
            "cleanup.policy": "delete",
            "retention.ms": str(round(limits.max_age * 1000) or -1),
            "retention.bytes": str(limits.max_bytes or -1),
            "segment.bytes": str(_SEGMENT),
        }
        if self._largest is not None:
            settings["max.message.bytes"] = str(self._largest)
        return settings

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
            number = zlib.crc32(copy.key or b"") % PARTITIONS % len(leaders)
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
                    if code in LED_ELSEWHERE and not last:
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
            rows.setdefault(topic, []).append((number, batch_of(copies)))
        # Kafka says itself that replicas are missing, before we give up.
        return ProduceRequest(None, -1, round(self._options.ack_timeout * 800), list(rows.items()))
