"""Subscribers at NATS that are given the events of each partition in order, however many there are.

Each of the 64 partitions has a durable consumer of its own, which gives its next event when the one before is settled
(``max_ack_pending`` of 1, as measured: ``-NAK`` with a delay holds up everything behind it). A subscriber asks many of
them at a time, for one event each; whoever has asked first is given it. So the subscribers share the partitions anew
with every event, and nothing has to be handed over.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery
from orthanc_events_bridge.transports.headers import OPERATION
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_pull import Durable, Pull, problem
from orthanc_events_bridge.transports.nats_settling import NatsDelivery, Settling
from orthanc_events_bridge.transports.subscriptions import boot_time

#: A request waits at the server for so many seconds, and for so much of ``ack_wait``, at most.
_PULL: Final = 0.1
_LONGEST_PULL: Final = 2.0
#: The same where more partitions wait for their turn to be asked.
_TURN: Final = 0.2
#: Seconds before a partition is asked again that could not be.
_PAUSE: Final = 0.05


class NatsOrderedSubscription(Settling):
    """Made by `open`."""

    def __init__(self, connection: Connection, options: NatsOptions, name: str, in_flight: int) -> None:
        super().__init__(connection, options, name, in_flight)
        self._idle: deque[Durable] = deque()  # partitions that can be asked
        self._pulls: dict[Durable, Pull] = {}
        self._said: dict[Durable, tuple[str, Mapping[str, str]]] = {}  # with what one was given back, and its key
        self._inbox: Durable | None = None
        self._news: asyncio.Future[None] | None = None

    @classmethod
    async def open(
        cls,
        connection: Connection,
        options: NatsOptions,
        name: str,
        infos: Sequence[ConsumerInfo],
        *,
        in_flight: int,
    ) -> NatsOrderedSubscription:
        """Begin to listen to durable consumers.

        :param infos: of them, as `orthanc_events_bridge.transports.nats_consumer` found or made them.
        :raises NotConnectedError: NATS doesn't answer.
        """
        self = cls(connection, options, name, in_flight)
        self._idle.extend(await self._open(infos))
        self._inbox = self._idle[-1]
        return self

    # Receiving.

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            self._check()
            self._check_pulls()
            if found := self._take(limit):
                return found
            self._ask()
            left = end - loop.time()
            if left <= 0 and (not self._pulls or wait > 0):
                return []
            self._news = loop.create_future()
            # Partitions that could not be asked are asked again in a moment, though nobody says so.
            paused = not self._pulls and bool(self._idle)
            if not await self._wait(self._news, _PAUSE if paused else max(left, _TURN)) and left <= 0:
                return []

    def _ask(self) -> None:
        """Ask as many partitions as there is room for what they may bring, those first that have waited longest."""
        now = boot_time()
        for _ in range(len(self._idle)):
            if len(self._held) + len(self._came) + len(self._pulls) >= self._in_flight:
                return
            durable = self._idle.popleft()
            if durable.asked > now:
                self._idle.append(durable)
                continue
            others = len(self._pulls) + len(self._idle) + 1
            turns = self._in_flight < others + len(self._held) + len(self._came)
            expires = min(_TURN if turns else _LONGEST_PULL, durable.ack_wait * _PULL)
            self._pulls[durable] = Pull(durable, 1, now, expires, asyncio.get_running_loop().create_future())
            subject, request = durable.request(1, expires)
            self._send(subject, request, durable.reply)

    def _check_pulls(self) -> None:
        """Has the server answered every request that it should have?"""
        now = boot_time()
        if any(now - pull.sent > pull.expires + self._patience for pull in self._pulls.values()):
            self._fail(
                NotConnectedError(
                    f"NATS has not answered a request for events within {self._patience:g} s",
                    "check the server; they are asked for again over a new connection",
                )
            )
            self._check()

    def _on_message(self, durable: Durable, message: Msg) -> None:
        pull = self._pulls.get(durable)
        if message.reply:
            since = pull.sent if pull else boot_time()
            if pull is not None:
                durable.origin.answered(pull)
                del self._pulls[durable]
            delivery = self._delivery(durable, message, since)
            if durable is self._inbox or delivery is None:
                self._idle.append(durable)
            if delivery is not None:
                key, said = self._said.pop(durable, ("", NO_HEADERS))
                if key == delivery.key:
                    headers = {**delivery.message.headers, **said}
                    delivery.message = dataclasses.replace(delivery.message, headers=headers)
                self._arrived(delivery)
        elif words := problem(message):
            self._fail(
                NotConnectedError(
                    f"a NATS consumer gives no more events: {words}", "it is made or found again when subscribing"
                )
            )
        elif pull is not None:
            durable.origin.answered(pull)
            del self._pulls[durable]
            if boot_time() - pull.sent < pull.expires / 2:  # others' requests come first
                durable.asked = boot_time() + _PAUSE
            self._idle.append(durable)
        self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _end(self) -> None:
        self._tell()

    def _has_room(self) -> None:
        super()._has_room()
        self._tell()

    # Settling.

    def _released(self, delivery: NatsDelivery) -> None:
        if delivery.durable is not self._inbox:  # which is idle already
            self._idle.append(delivery.durable)
        super()._released(delivery)

    async def give_back(self, delivery: NatsDelivery, delay: float, headers: Mapping[str, str]) -> None:
        """JetStream keeps what is behind it waiting. What is in the inbox has no order to keep, and gets a copy. So
        does what its stream would have dropped by then: rather out of order than lost."""
        if not self._ours(delivery):
            return
        await self._check_origin(delivery.durable.origin, age=True)
        if delivery.durable is self._inbox or not delivery.durable.origin.keeps(delivery.stored, delay):
            await super().give_back(delivery, delay, headers)
            return
        said = {name: value for name, value in delivery.message.headers.items() if name.startswith("orthanc-")}
        self._said[delivery.durable] = (delivery.key, {**said, OPERATION: "retry", **headers})
        await self.settle(delivery, b"-NAK" + delivery.durable.delay(delay))
