"""The dead letters of one Kafka consumer: a topic of one partition, in which each letter has a key of its own.

The topic is compacted: Kafka keeps the newest record of each key for ever, and drops nothing by age or size. A letter
is removed by a record of its key without a value, as Kafka's compaction wants it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.protocol.produce import ProduceRequest

from orthanc_events_bridge.errors import (
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_delays import Copy, changed, message_of
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_places import LED_ELSEWHERE, batch_of, need_topic
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused
from orthanc_events_bridge.transports.kafka_reader import records

#: Bytes that a letter may be larger than the largest event by: it may be a copy already, which may be so by half of it.
_LARGER: Final = 128 * 1024
#: Kafka compacts whole segments only, and one of them has a gigabyte otherwise.
_SEGMENT: Final = 64 * 1024**2
#: Bytes of one answer, and removals in one request.
_ANSWER: Final = 1024**2
_REMOVALS: Final = 1000
#: Seconds between two tries to store something whose partition has no leader yet.
_LOOK: Final = 0.02
#: What the protocol calls a topic among the things that have settings, and a partition's beginning and end.
_TOPIC: Final = 2
_OLDEST: Final = -2
_NEWEST: Final = -1
_POLICY: Final = "cleanup.policy"
_COMPACT: Final = "compact"

_TOO_LARGE: Final = frozenset({errors.MessageSizeTooLargeError.errno, errors.RecordListTooLargeError.errno})
_TOO_FEW: Final = frozenset({errors.NotEnoughReplicasError.errno, errors.NotEnoughReplicasAfterAppendError.errno})


def dead_topic(options: KafkaOptions, name: str) -> str:
    """The topic of a consumer's dead letters."""
    return f"{options.dead_prefix}.{name}"


class DeadTopic:
    """Where a consumer's dead letters are put.

    :param largest: how many bytes an event can have; none where we may not know.
    """

    def __init__(self, cluster: Cluster, options: KafkaOptions, name: str, largest: int | None = None) -> None:
        self._cluster = cluster
        self._options = options
        self._largest = largest
        self._known: TopicMetadata | None = None
        self._storing = asyncio.Lock()
        self.topic = dead_topic(options, name)

    async def put(self, record: Any, headers: Mapping[str, str], key: bytes) -> None:
        """Store a record as a dead letter; all replicas in step have it then.

        :param headers: are added, in place of those of the same name.
        :param key: of the letter: one that was stored already is replaced by this one.
        :raises NotConnectedError: nobody knows whether it is stored.
        :raises TransportError: it is not stored, or not as safely as it has to be.
        """
        letter = Copy(self.topic, key, record.value or b"", changed(record.headers, headers))
        await self.store([letter])

    async def store(self, copies: Sequence[Copy]) -> None:
        """Store records in one batch.

        :raises TransportError: as `put`.
        """
        # One after the other: what waits for replicas holds up everything else on this connection, heartbeats too.
        async with self._storing:
            await self._store(copies)

    async def _store(self, copies: Sequence[Copy]) -> None:
        end = asyncio.get_running_loop().time() + self._options.ack_timeout
        while code := await self._try(copies):
            self._known = None
            if code not in LED_ELSEWHERE:
                raise self._refused(code)
            if asyncio.get_running_loop().time() > end:
                raise RefusedError(
                    f"no server of Kafka leads the topic of dead letters {self.topic}", "start the servers that hold it"
                )
            await asyncio.sleep(_LOOK)

    async def _try(self, copies: Sequence[Copy]) -> int:
        """Store records; what Kafka's code for it is."""
        if self._known is None:
            self._known = await self._need()
        # Kafka says itself that replicas are missing, before we give up.
        request = ProduceRequest(
            None, -1, round(self._options.ack_timeout * 800), [(self.topic, [(0, batch_of(copies))])]
        )
        try:
            node = await self._cluster.node(self._known.leaders[0])
            answer = await self._cluster.wait(node.begin(request), self._options.ack_timeout)
        except errors.KafkaError as error:
            raise self._cluster.lost(error) from error
        except TransportError:
            self._known = None  # another may lead it by now
            raise
        return next(int(row[1]) for _, rows in answer.topics for row in rows)

    async def _need(self) -> TopicMetadata:
        settings = {_POLICY: _COMPACT, "segment.bytes": str(_SEGMENT)}
        if self._largest is not None:
            settings["max.message.bytes"] = str(self._largest + _LARGER)
        found, made = await need_topic(self._cluster, self._options, self.topic, 1, settings)
        if not made:
            await check_policy(self._cluster, self._options, self.topic)
        return found

    def _refused(self, code: int) -> TransportError:
        name = f"{errors.for_code(code).__name__} ({code})"
        error = refused(code, self.topic)
        if isinstance(error, TransportConfigurationError):
            return error
        if code in _TOO_LARGE:
            return TransportConfigurationError(
                f"a dead letter is too large for the Kafka topic {self.topic}: {name}",
                "raise max.message.bytes of the topic",
            )
        remedy = "start the other servers of the cluster" if code in _TOO_FEW else "see that its servers are well"
        return RefusedError(f"the Kafka topic {self.topic} takes no dead letter now: {name}", remedy)


async def check_policy(cluster: Cluster, options: KafkaOptions, topic: str) -> None:
    """Does a topic of dead letters keep them? What we may not read can't be checked.

    :raises TransportConfigurationError: it doesn't.
    """
    answer = await cluster.ask(DescribeConfigsRequest([(_TOPIC, topic, [_POLICY])]))
    for _, _, _, _, entries in answer.resources:
        for _, value, *_ in entries:
            if value != _COMPACT and (options.declare or _COMPACT not in value.split(",")):
                raise TransportConfigurationError(
                    f"the Kafka topic {topic} exists with other settings: {_POLICY} is {value}, wanted {_COMPACT}: it"
                    " would drop dead letters by itself",
                    "change the topic; with declare set to false, `compact,delete` may keep them for a time only",
                )


class KafkaDeadLetters(DeadLetters):
    """Those of one consumer, over a transport's own connection."""

    def __init__(self, cluster: Cluster, options: KafkaOptions, name: str) -> None:
        self._cluster = cluster
        self._options = options
        self._name = name
        self._topic = dead_topic(options, name)
        self._closed = False

    async def find(self) -> TopicMetadata | None:
        """The topic, if there is one.

        :raises TransportError: it can't be looked at, or doesn't keep them.
        """
        self._check()
        found = await self._cluster.topic(self._topic)
        if found is not None:
            await check_policy(self._cluster, self._options, self._topic)
        return found

    async def read(self) -> AsyncGenerator[DeadLetter]:
        found = await self.find()
        if found is None:
            return
        begin, end = await self._ends(found)
        # What stands further on can say that a letter is removed: so first it is found out which are there.
        there: dict[bytes, int] = {}
        async for record in self._records(found, begin, end):
            if record.value is None:
                there.pop(record.key, None)
            else:
                there[record.key] = record.offset
        left = set(there.values())
        if not left:
            return
        async for record in self._records(found, min(left), max(left) + 1):
            if record.offset in left:
                yield DeadLetter(message_of(record, self._topic, 0), record.key)

    async def remove(self, letters: Sequence[DeadLetter]) -> None:
        if await self.find() is None:
            return
        place = DeadTopic(self._cluster, self._options, self._name)
        marks = [letter.mark for letter in letters]
        for first in range(0, len(marks), _REMOVALS):
            await place.store([*_removals(self._topic, marks[first : first + _REMOVALS])])

    async def close(self) -> None:
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise NotConnectedError("the dead letters at Kafka were closed", "ask for them again")
        self._cluster.check()

    async def _ends(self, found: TopicMetadata) -> tuple[int, int]:
        """The oldest offset, and that behind the newest."""
        ends: list[int] = []
        for which in (_OLDEST, _NEWEST):
            answer = await self._cluster.ask(OffsetRequest(-1, 0, [(self._topic, [(0, which)])]), found.leaders[0])
            ((_, ((_, code, _, offset),)),) = answer.topics
            if code:
                raise refused(code, self._topic)
            ends.append(offset)
        return ends[0], ends[1]

    async def _records(self, found: TopicMetadata, begin: int, end: int) -> AsyncGenerator[Any]:
        """The records of offsets from one on to before another one, as far as they are there."""
        offset = begin
        while offset < end:
            self._check()
            rows = [(self._topic, [(0, offset, _ANSWER)])]
            answer = await self._cluster.ask(FetchRequest(0, 1, _ANSWER, 0, rows), found.leaders[0])
            ((_, ((_, code, *_, data),)),) = answer.topics
            if code == errors.OffsetOutOfRangeError.errno:
                raise NotConnectedError(
                    f"the Kafka topic {self._topic} was cut off while it was read", "read it from the beginning"
                )
            if code:
                raise refused(code, self._topic)
            some, behind = records(data or b"", offset)
            for record in some:
                if record.offset < end:
                    yield record
            if behind == offset:  # compaction leaves nothing behind the last that it keeps
                return
            offset = behind


def _removals(topic: str, marks: Iterable[object]) -> Iterable[Copy]:
    for mark in marks:
        assert isinstance(mark, bytes)
        yield Copy(topic, mark, None, ())
