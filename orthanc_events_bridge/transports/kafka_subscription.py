"""Subscribers of a Kafka topic: those of one name are a consumer group, and share the topic's partitions.

A delivery is its subscriber's for as long as Kafka hears of that, in the background, and for at least ``ack_wait``
where Kafka doesn't. When partitions are shared out anew, one with deliveries in hand stays until they are settled or
their ``ack_wait`` is over. Acknowledgements are stored a moment later and together, with what is settled further on in
a partition than what is not: `orthanc_events_bridge.transports.kafka_partition`. Kafka doesn't count how often it gave
an event to a group; what is counted is what was given back. How an order is kept:
`orthanc_events_bridge.transports.kafka_ordered`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import Delivery, Subscription
from orthanc_events_bridge.transports.kafka_beginning import begin
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_dead import DeadTopic
from orthanc_events_bridge.transports.kafka_delays import copy_of, retry_topic, step_for
from orthanc_events_bridge.transports.kafka_delivery import KafkaDelivery
from orthanc_events_bridge.transports.kafka_fetcher import Fetcher
from orthanc_events_bridge.transports.kafka_group import Group
from orthanc_events_bridge.transports.kafka_membership import Membership
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_ordered import Kind
from orthanc_events_bridge.transports.kafka_partition import Partition
from orthanc_events_bridge.transports.kafka_queue import Queue
from orthanc_events_bridge.transports.kafka_retries import Retries
from orthanc_events_bridge.transports.kafka_topic import Topic
from orthanc_events_bridge.transports.subscriptions import boot_time

#: Kafka's smallest session by default, and what a member's has beyond ``ack_wait``: its last word is that old.
_SHORTEST_SESSION: Final = 6.0
_MARGIN: Final = 1.0
#: Seconds that each of the steps of closing may take.
_CLOSING: Final = 0.35


class KafkaSubscription(Subscription):
    """Made by `open`.

    :ivar closed: whether `close` was called.
    """

    def __init__(
        self,
        options: KafkaOptions,
        topic: Topic,
        connect: Callable[[], Awaitable[Cluster]],
        clusters: list[Cluster],
        name: str,
        in_flight: int,
        ack_wait: float,
        behind: set[str],
        kind: Kind,
    ) -> None:
        self._options = options
        self._topic = topic
        self._connect = connect
        self._clusters = clusters
        self._name = name
        self._in_flight = in_flight
        self._ack_wait = ack_wait
        self._behind = behind
        joining, beside, fetching = clusters
        self._beside = beside
        session = max(_SHORTEST_SESSION, ack_wait + _MARGIN)
        self._group = Group(joining, beside, options, name, session, kind)
        self._retries = Retries(beside, options, name, topic.metadata, topic.largest)
        self._dead = DeadTopic(beside, options, name, topic.largest)
        self._fetcher = Fetcher(fetching, beside, options, topic, self._arrived)
        self._membership = Membership(
            self._group, beside, topic, self._retries, self._fetcher, ack_wait, self._lose, kind
        )
        self._queue = Queue(self._fetcher.wake)
        self._held: set[KafkaDelivery] = set()
        self._news: set[asyncio.Future[None]] = set()
        self._fault: TransportError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.closed = False

    @classmethod
    async def open(
        cls,
        options: KafkaOptions,
        topic: Topic,
        connect: Callable[[], Awaitable[Cluster]],
        name: str,
        *,
        oldest: bool,
        in_flight: int,
        ack_wait: float,
        behind: set[str],
        kind: Kind,
    ) -> KafkaSubscription:
        """Fix where the name begins, make its inbox, and become a member.

        That others, who may be dead, take part in the sharing is not waited for longer than for an answer.

        :param connect: a new connection; this has three.
        :param behind: members of ours that could not say that they go, and for whose end others would wait.
        :raises NotConnectedError: Kafka doesn't answer.
        :raises TransportConfigurationError: it does not permit it.
        """
        clusters: list[Cluster] = []
        self: KafkaSubscription | None = None
        try:
            while len(clusters) < 3:
                clusters.append(await connect())
            self = cls(options, topic, connect, clusters, name, in_flight, ack_wait, behind, kind)
            await self._group.find()
            for member in sorted(behind):
                await self._group.leave(member=member)
                behind.discard(member)
            await self._retries.need(self._retries.inbox)
            await begin(self._group, self._beside, options, topic, self._retries.inbox, oldest=oldest, kind=kind)
            membership = self._membership
            for work in (membership.run(), membership.follow(), self._fetcher.run(), self._retries.run()):
                self._tasks.append(asyncio.create_task(self._guard(work)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(options.connect_timeout):
                    await membership.joined.wait()
            self._check(mended=False)
        except BaseException:
            if self is not None:
                await self.close()
            else:
                await asyncio.gather(*(cluster.give_up() for cluster in clusters))
            raise
        return self

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except TransportError as error:
            self._fail(error)
        except Exception as error:
            self._fail(NotConnectedError(f"reading from Kafka failed: {type(error).__name__}", "subscribe again"))
            raise

    # Receiving.

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            self._check()
            room = min(limit, self._in_flight - len(self._held))
            if room > 0 and (found := self._take(room)):
                return found
            left = end - loop.time()
            if left <= 0:
                return []
            if room > 0:
                left = max(0.0, min(left, self._queue.next - time.time()))
            news = loop.create_future()
            self._news.add(news)
            try:
                await asyncio.wait({news}, timeout=left)
            finally:
                self._news.discard(news)

    def _tell(self) -> None:
        """Wake up whoever receives."""
        for news in self._news:
            if not news.done():
                news.set_result(None)

    def _arrived(self, one: Partition) -> None:
        if self._queue.add(one):
            self._tell()

    def _take(self, room: int) -> list[Delivery]:
        found: list[Delivery] = []
        with contextlib.closing(self._queue.take(time.time())) as records:
            for one, record, delay in records:
                if delay > 0:
                    self._send_on(one, record, delay)
                else:
                    found.append(self._give(one, record))
                    if len(found) == room:
                        break
        return found

    def _send_on(self, one: Partition, record: Any, delay: float) -> None:
        """It has waited for as long as it does in this topic, and is not due yet."""
        one.held[record.offset] = None
        sending = self._retries.send(copy_of(record, retry_topic(self._name, step_for(delay)), {}))
        sending.add_done_callback(lambda sent: self._sent(one, record.offset, sent))

    def _give(self, one: Partition, record: Any) -> KafkaDelivery:
        delivery = KafkaDelivery(self, one, record, self._name)
        one.held[record.offset] = delivery
        self._held.add(delivery)
        return delivery

    # Settling.

    def check(self, delivery: KafkaDelivery) -> None:
        """Is it ours still?

        :raises NotConnectedError: no.
        """
        self._check()
        if delivery.lost:
            raise NotConnectedError(
                f"it was too late for an event from Kafka: its ack_wait of {self._ack_wait:g} s was over, and its "
                "partition went to another subscriber",
                "it comes again; raise ack_wait, or extend in time",
            )

    def take_back(self, delivery: KafkaDelivery) -> bool:
        """It is about to be settled.

        :return: False: it was settled before.
        :raises NotConnectedError: it is not ours any more.
        """
        self.check(delivery)
        if delivery not in self._held:
            return False
        self._held.discard(delivery)
        self._tell()
        return True

    def settle(self, one: Partition, offset: int) -> None:
        """The name is never given it again."""
        one.settled(offset)
        self._membership.settled(one)
        if one.records:  # they have waited for it, where there is an order
            self._arrived(one)

    def _lose(self, one: Partition) -> None:
        for delivery in one.held.values():
            if delivery is not None:
                delivery.lost = True
                self._held.discard(delivery)
        self._tell()

    async def bury(self, delivery: KafkaDelivery, headers: Mapping[str, str]) -> None:
        """Put it among the dead letters, and settle it.

        :raises NotConnectedError: it comes again, and may be among the dead letters too.
        :raises TransportError: it is not there, and is held on.
        """
        self.check(delivery)
        if delivery in self._held:
            try:
                await self._dead.put(delivery.record, delivery.dead_headers(headers), delivery.letter)
            except NotConnectedError as error:  # so that it does come again
                self._fail(error)
                raise
            if self.take_back(delivery):
                self.settle(delivery.partition, delivery.record.offset)

    async def retry(self, delivery: KafkaDelivery, delay: float, headers: Mapping[str, str]) -> None:
        """Store a copy for later, and settle it; where there is an order, let its partition wait for it.

        :raises NotConnectedError: it comes again, and maybe the copy too.
        """
        if not self.take_back(delivery):
            return
        one, record = delivery.partition, delivery.record
        if one.ordered:
            one.give_back(record, delivery.again(delay, headers))
            self._membership.settled(one)
            self._arrived(one)
            return
        sending = self._retries.send(delivery.copy_for_later(self._retries.inbox, delay, headers))
        sending.add_done_callback(lambda sent: self._sent(one, record.offset, sent))
        await asyncio.wait({sending})  # to be cancelled here changes nothing
        if sending.exception() is not None:
            self._check()

    def _sent(self, one: Partition, offset: int, sending: asyncio.Future[None]) -> None:
        if not sending.cancelled() and sending.exception() is None:
            self.settle(one, offset)

    # Its end.

    async def leave(self, back: Sequence[Delivery]) -> None:
        """See `orthanc_events_bridge.transports.base.Subscription.leave`. Others get a partition when nothing of it is
        in hand any more, and those that have none in hand at once."""
        self._check()
        offsets: dict[Partition, list[int]] = {}
        for delivery in back:
            if isinstance(delivery, KafkaDelivery) and delivery in self._held:
                self._held.discard(delivery)
                offsets.setdefault(delivery.partition, []).append(delivery.record.offset)
        for one, those in offsets.items():
            one.put_back(those)
        self._membership.leave(offsets)

    def _fail(self, error: TransportError) -> None:
        if self._fault is None:
            self._fault = error
        self._retries.fail(self._fault)
        self._membership.joined.set()
        self._tell()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _check(self, *, mended: bool = True) -> None:
        """Can it be used still?

        :param mended: what a person has to mend is said when subscribing again, and only then.
        """
        if self._fault is None and boot_time() > self._group.lease:
            self._fail(
                NotConnectedError(
                    f"we were away for too long: Kafka gives our share of {self._name} to others",
                    "what was in hand comes again; subscribe again",
                )
            )
        if self._fault is not None:
            if mended and not isinstance(self._fault, NotConnectedError):
                raise NotConnectedError(self._fault.message, self._fault.remedy) from self._fault
            raise self._fault

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        well = self._fault is None
        self._fail(NotConnectedError("the subscription to Kafka is closed", "subscribe again"))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TransportError, TimeoutError):
            if well:
                async with asyncio.timeout(_CLOSING):
                    await self._membership.store()
        await self._leave()
        self._held.clear()
        await asyncio.gather(*(cluster.give_up() for cluster in self._clusters))

    async def _leave(self) -> None:
        """Say that we go, so that others needn't wait until our session is over."""
        if not self._group.member:
            return
        self._behind.add(self._group.member)
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(_CLOSING):
                if self._beside.fault is not None:  # it can have been the line alone
                    self._clusters.append(await self._connect())
                await self._group.leave(self._clusters[-1] if self._beside.fault else self._beside)
                self._behind.discard(self._group.member)
