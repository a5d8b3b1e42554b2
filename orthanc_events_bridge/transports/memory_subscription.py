"""Subscribers of a broker in memory."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery, Incoming, Subscription
from orthanc_events_bridge.transports.headers import ADDRESS, ATTEMPTS, OPERATION

#: Seconds between two looks at what there is.
_LOOK: Final = 0.01


class Name:
    """What the broker knows of a name in one place, whoever subscribes.

    :param messages: the broker's own list: what is for everybody, or an inbox.
    :param position: so many of them are given already, or never will be.
    :param ordered: whether a partition's next event waits until the one before is settled.
    :param clock: seconds.
    """

    def __init__(
        self,
        messages: list[Incoming],
        position: int,
        ordered: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._messages = messages
        self._position = position
        self.ordered = ordered
        self._waiting: dict[str, deque[Incoming]] = {}  # by partition, of those with one that isn't settled
        self._again: list[tuple[float, int, Incoming, int]] = []  # due, place among equals, what, next attempt
        self._places = itertools.count()
        self.held: dict[MemoryDelivery, None] = {}

    @property
    def due(self) -> float | None:
        """When the next of those that wait is to be given again; none where none waits."""
        return self._again[0][0] if self._again else None

    def give_again(self, delivery: MemoryDelivery, due: float, headers: Mapping[str, str] = NO_HEADERS) -> None:
        """To be taken once more, not before that time."""
        self.held.pop(delivery, None)
        message = replace(delivery.message, headers={**delivery.message.headers, **headers})
        heapq.heappush(self._again, (due, next(self._places), message, delivery.attempt + 1))

    def put_back(self, delivery: MemoryDelivery) -> None:
        """To be taken once more as if it had not been, before all others."""
        if self.held.pop(delivery, delivery) is None:
            heapq.heappush(self._again, (0.0, next(self._places), delivery.message, delivery.attempt))

    def settled(self, delivery: MemoryDelivery) -> None:
        """It is never given again."""
        del self.held[delivery]
        if self.ordered:
            waiting = self._waiting.pop(_partition(delivery.message))
            if waiting:
                following = waiting.popleft()
                self._waiting[_partition(following)] = waiting
                heapq.heappush(self._again, (0.0, next(self._places), following, 1))

    def _next(self) -> Incoming | None:
        """The next new one whose partition waits for no other."""
        while self._position < len(self._messages):
            message = self._messages[self._position]
            self._position += 1
            if not self.ordered:
                return message
            waiting = self._waiting.get(_partition(message))
            if waiting is None:
                self._waiting[_partition(message)] = deque()
                return message
            waiting.append(message)
        return None

    def take(self, subscription: MemorySubscription, limit: int) -> list[Delivery]:
        """What is there now: what is due again before what is new."""
        now = self.clock()
        for delivery in [one for one in self.held if not one.subscription.alive() or one.deadline < now]:
            self.give_again(delivery, now)
        found: list[Delivery] = []
        while len(found) < limit:
            if self._again and self._again[0][0] <= now:
                _, _, message, attempt = heapq.heappop(self._again)
            elif (new := self._next()) is not None:
                message, attempt = new, 1
            else:
                break
            delivery = MemoryDelivery(subscription, self, message, attempt)
            self.held[delivery] = None
            found.append(delivery)
        return found


def _partition(message: Incoming) -> str:
    return message.address.rpartition(".")[2]


class MemoryDelivery(Delivery):
    """Settled at once."""

    def __init__(self, subscription: MemorySubscription, name: Name, message: Incoming, attempt: int) -> None:
        address = message.headers.get(ADDRESS, message.address)  # in an inbox: where everybody gets it
        super().__init__(replace(message, address=address), attempt)
        self.subscription = subscription
        self._name = name
        self._clock = name.clock
        self.deadline = self._clock() + subscription.ack_wait
        self._settled = False

    async def ack(self) -> None:
        if not self._settled:
            self._settled = True
            await self._check()
            self._name.settled(self)

    async def nack(self, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        if not self._settled:
            self._settled = True
            due = self._clock() + delay
            await self._check()
            self._name.give_again(self, due, {OPERATION: "retry", **headers})

    async def reject(self, headers: Mapping[str, str]) -> None:
        if not self._settled:
            await self._check()
            self.subscription.bury(self.message, {ATTEMPTS: str(self.attempt), **headers})
            self._settled = True
            self._name.settled(self)

    async def extend(self) -> None:
        if not self._settled:
            await self._check()
            self.deadline = self._clock() + self.subscription.ack_wait

    async def _check(self) -> None:
        await self.subscription.check()
        if self not in self._name.held or self.deadline < self._clock():
            raise NotConnectedError(
                f"the broker gives an event to another: its ack_wait of {self.subscription.ack_wait:g} s is over",
                "raise ack_wait, or extend in time",
            )


class MemorySubscription(Subscription):
    """One subscriber.

    :param names: its name where everybody gets events, and in its inbox, or in that alone: they take turns.
    :param connected: whether the connection is still the one that it was made over.
    :param answer: waits until the broker answers.
    :param bury: puts a message among the dead letters, with further headers.
    """

    def __init__(
        self,
        names: Sequence[Name],
        connected: Callable[[], bool],
        answer: Callable[[], Awaitable[None]],
        in_flight: int,
        ack_wait: float,
        bury: Callable[[Incoming, Mapping[str, str]], None],
    ) -> None:
        self._turns = deque(names)
        self.bury = bury
        self.ack_wait = ack_wait
        self._connected = connected
        self._answer = answer
        self._in_flight = in_flight
        self._closed = False

    def alive(self) -> bool:
        """Whether it can still settle what it holds."""
        return not self._closed and self._connected()

    async def check(self) -> None:
        """Does the broker answer us?

        :raises NotConnectedError: no.
        """
        await self._answer()
        if not self.alive():
            raise NotConnectedError("the subscription to the broker has ended", "connect, and subscribe again")

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        end = time.monotonic() + wait
        while True:
            await self.check()
            held = sum(one.subscription is self for name in self._turns for one in name.held)
            found: list[Delivery] = []
            for _ in range(len(self._turns)):
                self._turns.rotate()
                if found := self._turns[0].take(self, min(limit, self._in_flight - held)):
                    break
            if found or time.monotonic() >= end:
                return found
            await asyncio.sleep(min(_LOOK, max(0.0, end - time.monotonic())))

    async def leave(self, back: Sequence[Delivery]) -> None:
        await self.check()
        for delivery in back:
            for name in self._turns:
                name.put_back(delivery)  # type: ignore[arg-type]

    async def close(self) -> None:
        self._closed = True
