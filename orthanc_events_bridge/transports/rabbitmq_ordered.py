"""Subscribers of an ordered name at RabbitMQ: they share its 64 partitions, and each is one's at a time.

Each takes part in all of them, so that one that dies is followed at once by the next in the queue. Which of them that
is, and who has how many, RabbitMQ leaves to us: a subscriber that sees by the roster that another is to have a
partition queues up for it anew, behind the other. So the one that is to have it is first in the end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import Delivery
from orthanc_events_bridge.transports.rabbitmq_asking import Asking
from orthanc_events_bridge.transports.rabbitmq_beginning import check_over
from orthanc_events_bridge.transports.rabbitmq_connection import Connection
from orthanc_events_bridge.transports.rabbitmq_delivery import RabbitDelivery
from orthanc_events_bridge.transports.rabbitmq_lane import Lane
from orthanc_events_bridge.transports.rabbitmq_message import as_given_again
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from orthanc_events_bridge.transports.rabbitmq_roster import Roster, owners
from orthanc_events_bridge.transports.rabbitmq_subscription import RabbitSubscription

#: Seconds without a change of the roster behind which all have seen the same, and the longest that is waited for it.
_QUIET: Final = 3.0
_RESTLESS: Final = 10.0
#: Seconds after which all have left a past that is over.
_PASSED: Final = 10.0


class OrderedDelivery(RabbitDelivery):
    """Of a partition."""

    def __init__(self, subscription: OrderedSubscription, raw: DeliveredMessage, lane: Lane) -> None:
        super().__init__(subscription, raw)
        self.lane = lane


class OrderedSubscription(RabbitSubscription):
    """Made by `open`. The inbox is received beside the partitions, as by a subscriber without order."""

    def __init__(self, connection: Connection, options: RabbitOptions, queues: Queues, in_flight: int) -> None:
        super().__init__(connection, options, queues, in_flight)
        self._lanes: list[Lane] = []
        self._changed = asyncio.Event()
        self._roster = Roster(connection, self._sending, options, queues, self._changed.set, self._past_heard)
        self._checking: asyncio.Task[None] | None = None
        self._balancing: asyncio.Task[None] | None = None
        self._clearing: asyncio.Task[None] | None = None

    async def _receive_published(self) -> None:
        await self._roster.open()
        pasts = self._queues.pasts if self._beginning is not None else []
        for number, queue in enumerate(self._queues.published):
            self._lanes.append(Lane(self._connection, self._options, [*pasts[number : number + 1], queue], self))
        opening = [asyncio.ensure_future(lane.open()) for lane in self._lanes]
        try:
            await asyncio.gather(*opening)
        finally:
            for one in opening:
                one.cancel()
            await asyncio.gather(*opening, return_exceptions=True)
        self._roster.past = self._beginning is not None
        # Not sooner: who hears of us may at once queue up behind us.
        self._roster.come()
        self._balancing = self._beside(self._balance())
        if self._beginning is not None:
            self._task = self._beside(self._begin(self._beginning))
            self.past_received()
        await self._clear_what_is_left()

    async def _past_received(self) -> None:
        self._beginning = None
        self._roster.past = False
        self._clearing = self._beside(self._clear())

    def _past_heard(self) -> None:
        """Another receives a past."""
        if self._beginning is None and (self._checking is None or self._checking.done()):
            self._checking = self._beside(self.check_over())

    async def check_over(self) -> None:
        await check_over(self._connection, self._options, self._queues)

    async def _clear(self) -> None:
        """Delete the queues of the past when nobody receives from them any more."""
        # RabbitMQ 3.10 ends the connection of one that begins to receive from a queue in the moment of its deletion.
        await asyncio.sleep(_PASSED)
        asking = Asking(self._connection)
        try:
            if await asking.begun(
                self._queues.beginning, self._queues.told
            ):  # another past has begun: they are that one's
                return
            for queue in self._queues.pasts:
                await asking.delete(queue)
        except TransportError as error:
            self.fail(error)
        finally:
            await asking.end()

    async def _clear_what_is_left(self) -> None:
        """Of one that died before."""
        if self._beginning is None and self._options.declare:
            asking = Asking(self._connection)
            try:
                if await asking.exists(self._queues.pasts[-1]):
                    self._clearing = self._beside(self._clear())
            finally:
                await asking.end()

    # Sharing.

    async def _balance(self) -> None:
        loop, changed = asyncio.get_running_loop(), self._changed
        while True:
            await changed.wait()
            end = loop.time() + _RESTLESS
            while changed.is_set() and loop.time() < end:
                changed.clear()
                await asyncio.sleep(_QUIET)
            if self._roster.fault is not None:
                self.fail(self._roster.fault)
                return
            for lane, owner in zip(self._lanes, owners(self._roster.workers), strict=True):
                before, lane.owner = lane.owner, owner
                if owner not in (before, self._roster.me):
                    lane.leave()

    def elsewhere(self, lane: Lane) -> bool:
        return lane.owner != self._roster.me and lane.owner in self._roster.workers

    # What its lanes tell.

    def came(self, lane: Lane, raw: DeliveredMessage) -> None:
        self._came.append(OrderedDelivery(self, raw, lane))
        self._news.set()

    def past_received(self) -> None:
        if self._beginning is not None and not any(lane.past for lane in self._lanes):
            self._beginning.end_received()

    def fail(self, error: TransportError) -> None:
        self._fail(NotConnectedError(error.message, error.remedy))

    # Settling.

    def _settle_delivery(self, delivery: RabbitDelivery) -> None:
        if isinstance(delivery, OrderedDelivery):
            delivery.lane.settle()
        else:
            super()._settle_delivery(delivery)

    async def give_back(self, delivery: RabbitDelivery, delay: float, more: Mapping[str, str]) -> None:
        if not isinstance(delivery, OrderedDelivery):
            await super().give_back(delivery, delay, more)
            return
        self.check()
        if delivery in self._held:
            del self._held[delivery]
            self._news.set()  # there is room
            delivery.lane.later(delay, as_given_again(delivery.raw, self._queues.name, more))

    async def leave(self, back: Sequence[Delivery]) -> None:
        """See `orthanc_events_bridge.transports.base.Subscription.leave`. A partition of which nothing is at work is
        handed over now, the others when that has ended."""
        if self._balancing is not None:
            self._balancing.cancel()
        ours = {one: None for one in (*back, *self._came) if isinstance(one, OrderedDelivery)}
        for delivery in ours:
            self._held.pop(delivery, None)
        self._came = deque(one for one in self._came if one not in ours)
        busy = {one.lane for one in self._held if isinstance(one, OrderedDelivery)}
        for lane in busy:
            lane.retire()
        await asyncio.gather(*(lane.close() for lane in self._lanes if lane not in busy))
        await super().leave([one for one in back if one not in ours])

    # Its end.

    def _leave(self) -> Iterable[Coroutine[Any, Any, None]]:
        return [self._roster.close(), *(lane.close() for lane in self._lanes)]

    @property
    def _background(self) -> tuple[asyncio.Task[None] | None, ...]:
        return (*super()._background, self._balancing, self._clearing, self._checking)
