"""Fetching what is new in the partitions that a subscriber has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_partition import Partition
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused
from orthanc_events_bridge.transports.kafka_reader import records
from orthanc_events_bridge.transports.kafka_topic import Topic

#: Seconds that a node waits for the first event; where a partition is left out because it has enough, so many.
_WAIT: Final = 0.25
_SHORT_WAIT: Final = 0.02
#: Bytes of one partition, and of one answer; the latter so that decoding it doesn't hold up everything else.
_PART: Final = 256 * 1024
_ANSWER: Final = 2 * 1024**2
#: Seconds before a partition's leader is looked for again.
_PAUSE: Final = 0.1

_OLDEST: Final = -2
#: Another node leads the partition, or soon will, or the topic is gone: its metadata tell.
_LED_ELSEWHERE: Final = frozenset(
    {
        errors.UnknownTopicOrPartitionError.errno,
        errors.LeaderNotAvailableError.errno,
        errors.NotLeaderForPartitionError.errno,
        errors.ReplicaNotAvailableError.errno,
        74,  # "fenced leader epoch"
        75,  # "unknown leader epoch"
        78,  # "offset not available"
    }
)


class Fetcher:
    """Asks every node for what is new in the partitions that it leads, each in a task of its own.

    :param cluster: for this alone: a node answers one request after the other, and these wait for events.
    :param beside: for everything else.
    :param main: the topic that events go to.
    :param arrived: called when a partition has got something.
    """

    def __init__(
        self,
        cluster: Cluster,
        beside: Cluster,
        options: KafkaOptions,
        main: Topic,
        arrived: Callable[[Partition], None],
    ) -> None:
        self._cluster = cluster
        self._beside = beside
        self._patience = options.connect_timeout
        self._arrived = arrived
        self._partitions: Collection[Partition] = ()
        self._ids = {main.name: main.metadata.id}
        self._changed = asyncio.Event()

    def use(self, partitions: Collection[Partition]) -> None:
        """Fetch for these from now on."""
        self._partitions = partitions
        self.wake()

    def wake(self) -> None:
        """A partition has room, or it is there, or not there, any more."""
        self._changed.set()

    async def run(self) -> None:
        """Fetch, for ever.

        :raises TransportError: it can't go on.
        """
        tasks: dict[int, asyncio.Task[None]] = {}
        changing: asyncio.Task[Any] | None = None
        try:
            while True:
                self._changed.clear()
                await self._find_leaders()
                for leader in {one.leader for one in self._partitions} - {-1}:
                    if leader not in tasks:
                        tasks[leader] = asyncio.create_task(self._follow(leader))
                changing = asyncio.create_task(self._changed.wait())
                leaderless = any(one.leader == -1 for one in self._partitions)
                await asyncio.wait(
                    {changing, *tasks.values()},
                    timeout=_PAUSE if leaderless else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                changing.cancel()
                for leader, task in list(tasks.items()):
                    if task.done():
                        del tasks[leader]
                        task.result()
        finally:
            for each in (*tasks.values(), *([changing] if changing else [])):
                each.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _find_leaders(self) -> None:
        for topic in sorted({one.place[0] for one in self._partitions if one.leader == -1}):
            found = await self._look(topic)
            self._cluster.nodes = self._beside.nodes
            for one in self._partitions:
                if one.place[0] == topic and one.leader == -1 and one.place[1] < len(found.leaders):
                    one.leader = found.leaders[one.place[1]]

    async def _look(self, topic: str) -> TopicMetadata:
        """What the cluster says of a topic, if it is the one of before: in another one, offsets mean other events.

        :raises NotConnectedError: it is not.
        """
        found = await self._beside.topic(topic)
        if found is None or self._ids.setdefault(topic, found.id) != found.id:
            raise NotConnectedError(
                f"the Kafka topic {topic} was deleted{'' if found is None else ' and made again'}",
                "it is made or found again when subscribing",
            )
        return found

    async def _follow(self, leader: int) -> None:
        """Ask one node again and again, as long as it leads a partition."""
        while mine := [one for one in self._partitions if one.leader == leader]:
            self._cluster.check()
            hungry = [one for one in mine if one.hungry]
            if not hungry:
                await self._room()
                continue
            node = await self._cluster.node(leader)  # Kafka closes a connection that was idle for ten minutes
            asked = {one.place: (one, one.wanted) for one in hungry}
            rows: dict[str, list[tuple[int, int, int]]] = {}
            for (topic, number), (_, offset) in asked.items():
                rows.setdefault(topic, []).append((number, offset, _PART))
            wait = _WAIT if len(hungry) == len(mine) else _SHORT_WAIT
            request = FetchRequest(round(wait * 1000), 1, _ANSWER, 0, list(rows.items()))
            try:
                answer = await self._cluster.wait(node.begin(request), self._patience + wait)
            except errors.KafkaError as error:
                raise self._cluster.lost(error) from error
            for topic, those in answer.topics:
                for number, code, *_, data in those:
                    one, offset = asked[topic, number]
                    # Else it has changed hands meanwhile, or is about to.
                    if not (one.gone or one.leaving) and one.wanted == offset:
                        await self._take(one, code, data or b"")
            if any(one.leader == -1 for one in hungry):
                await asyncio.sleep(_PAUSE)
                self.wake()

    async def _room(self) -> None:
        """Wait until a partition has room for more, or a moment."""
        with_room = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({with_room}, timeout=_WAIT)
        finally:
            with_room.cancel()

    async def _take(self, one: Partition, code: int, data: bytes) -> None:
        topic = one.place[0]
        if code == errors.OffsetOutOfRangeError.errno:
            await self._look(topic)
            one.restart(await self._oldest(one))
        elif code in _LED_ELSEWHERE:
            one.leader = -1
        elif code:
            raise self._cluster.fail(refused(code, topic))
        elif data:
            found, following = records(data, one.wanted)
            one.arrived(found)
            one.wanted = following
            if one.records:
                self._arrived(one)

    async def _oldest(self, one: Partition) -> int:
        """The offset of the oldest event that is kept."""
        topic, number = one.place
        answer = await self._beside.ask(OffsetRequest(-1, 0, [(topic, [(number, _OLDEST)])]), one.leader)
        for _, those in answer.topics:
            for _, code, _, offset in those:
                if not code:
                    return int(offset)
                raise self._cluster.fail(refused(code, topic))
        raise self._cluster.lost()
