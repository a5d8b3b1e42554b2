"""Which partitions a subscriber has, from when until when, and how far Kafka knows what it has settled in them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_fetcher import Fetcher
from orthanc_events_bridge.transports.kafka_group import NOTE_TOO_LONG, Group, Share
from orthanc_events_bridge.transports.kafka_ordered import Kind, begun_as
from orthanc_events_bridge.transports.kafka_partition import NOTE, Partition, mark_of
from orthanc_events_bridge.transports.kafka_retries import Retries
from orthanc_events_bridge.transports.kafka_sharing import Claim, Place
from orthanc_events_bridge.transports.kafka_topic import Topic
from orthanc_events_bridge.transports.subscriptions import boot_time

#: Seconds within which Kafka hears of a member; soon where partitions are about to move.
_BEAT: Final = 0.5
_QUICK_BEAT: Final = 0.1
#: Seconds that acknowledgements are collected for.
_COLLECT: Final = 0.05
#: Seconds between two looks at whether topics have changed.
_WATCH: Final = 5.0


class Membership:
    """A subscriber's part of its group.

    :param topic: the one that events go to.
    :param lost: told of a partition that goes to another member although something of it is in hand: it is too late
        for that.
    :param kind: ``ordered``: of a partition of that topic one event is in hand at a time; ``inbox``: none is.
    :ivar partitions: those that are ours.
    :ivar joined: set once we are a member.
    """

    def __init__(
        self,
        group: Group,
        cluster: Cluster,
        topic: Topic,
        retries: Retries,
        fetcher: Fetcher,
        ack_wait: float,
        lost: Callable[[Partition], None],
        kind: Kind,
    ) -> None:
        self.partitions: dict[Place, Partition] = {}
        self.joined = asyncio.Event()
        self._group = group
        self._cluster = cluster
        self._topic = topic
        self._retries = retries
        self._fetcher = fetcher
        self._ack_wait = ack_wait
        self._lost = lost
        self._kind = kind
        self._told: frozenset[str] = frozenset()
        self._leaves = self._leaves_told = False
        self._stirred = asyncio.Event()
        self._settled = asyncio.Event()
        self._changed: set[Partition] = set()
        self._storing = asyncio.Lock()
        self._note = NOTE

    # Sharing.

    async def run(self) -> None:
        """Be a member of the group, for ever.

        :raises TransportError: we can't.
        """
        while True:
            self._told = frozenset(self._retries.made)
            held = frozenset(self.partitions)
            busy = frozenset(place for place, one in self.partitions.items() if one.held)
            shared = set() if self._kind == "inbox" else {self._topic.name}
            topics = {*shared, self._retries.inbox, *self._told}
            self._leaves_told = self._leaves
            share = await self._group.join(Claim(held, busy, self._leaves), topics, self._count)
            await self._apply(share)
            self.joined.set()
            await self._keep(share)

    async def _count(self) -> dict[str, int]:
        """The topics to share, and how many partitions each has."""
        counts = await self._retries.counts()
        return counts if self._kind == "inbox" else {self._topic.name: await self._look(), **counts}

    async def _look(self) -> int:
        """How many partitions the events' topic has; it also keeps a connection in use that Kafka would close.

        :raises NotConnectedError: it is another topic now, or gone.
        """
        topic = await self._cluster.topic(self._topic.name)
        if topic is None or topic.id != self._topic.metadata.id:
            raise NotConnectedError(
                f"the Kafka topic {self._topic.name} was deleted{'' if topic is None else ' and made again'}",
                "connect and subscribe again",
            )
        return len(topic.leaders)

    async def _apply(self, share: Share) -> None:
        for place, one in self.partitions.items():
            one.leaving = place not in share.places
            if one.leaving:
                one.drop()
        new = share.places - self.partitions.keys()
        stored = await self._group.stored(new) if new else {}
        for place in new:
            events = place[0] == self._topic.name
            step = self._retries.steps.get(place[0])
            row, mark = stored.get(place), self._mark(place)
            self.partitions[place] = Partition.begin(place, step, row, mark, ordered=self._kind == "ordered" and events)
        self._fetcher.use(self.partitions.values())

    def _mark(self, place: Place) -> str:
        """With what the notes on a partition begin."""
        if place == (self._retries.inbox, 0):
            return begun_as(self._kind)
        return mark_of(self._topic.metadata.id) if place[0] == self._topic.name else ""

    async def _keep(self, share: Share) -> None:
        """Say that we are alive, until it is time to share anew."""
        loop = asyncio.get_running_loop()
        look = loop.time() + _WATCH
        while not await self._let_go() and self._told == self._retries.made and self._leaves == self._leaves_told:
            moving = share.more or any(one.leaving for one in self.partitions.values())
            self._stirred.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_QUICK_BEAT if moving else _BEAT):
                    await self._stirred.wait()
            if await self._group.beat():
                return
            if loop.time() > look:
                look = loop.time() + _WATCH
                if share.counts is None:
                    await self._look()
                elif await self._count() != share.counts:
                    return

    async def _let_go(self) -> bool:
        """Give up the partitions that go to others, as far as nothing of them is in hand, or only what is too late.

        :return: whether there are any.
        """
        now = boot_time()
        free = [
            one
            for one in self.partitions.values()
            if one.leaving and all(each and now - each.since > self._ack_wait for each in one.held.values())
        ]
        if not free:
            return False
        for one in free:
            self._lost(one)
        self._changed.update(free)
        while not await self.store():  # noqa: ASYNC110  # nobody tells when it would be accepted
            await asyncio.sleep(_COLLECT)
        for one in free:
            one.gone = True
            del self.partitions[one.place]
        self._fetcher.use(self.partitions.values())
        return True

    def leave(self, changed: Iterable[Partition]) -> None:
        """Let others have our partitions, each as soon as nothing of it is in hand.

        :param changed: those of which something was put back.
        """
        self._changed.update(changed)
        self._leaves = True
        self._settled.set()
        self._stirred.set()

    # Progress.

    def settled(self, one: Partition) -> None:
        """Something of a partition was settled."""
        self._changed.add(one)
        self._settled.set()
        # It may be free now, or have made a topic of delays necessary.
        if (one.leaving and not one.held) or self._told != self._retries.made:
            self._stirred.set()

    async def follow(self) -> None:
        """Store how far we are whenever that has changed, for ever.

        :raises TransportError: it can't be stored.
        """
        while True:
            await self._settled.wait()
            await asyncio.sleep(_COLLECT)
            self._settled.clear()
            if not await self.store():
                self._settled.set()

    async def store(self) -> bool:
        """Store how far we are.

        :return: False: not now, it is to be tried again.
        :raises TransportError: it can't be stored.
        """
        async with self._storing:
            changed, self._changed = self._changed, set()
            rows = {one: one.progress(self._note) for one in changed if not one.gone}
            new = {one.place: row for one, row in rows.items() if row != one.stored}
            try:
                codes = await self._group.store(new) if new else set()
            except BaseException:
                self._changed |= changed
                raise
            if codes:
                self._changed |= changed
                if codes & NOTE_TOO_LONG:
                    self._note //= 2
                return False
            for one, row in rows.items():
                one.stored = row
            return True
