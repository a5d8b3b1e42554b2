"""What the subscriptions of NATS, in order or not, have in common: deliveries, and how they are settled.

JetStream settles by the message's number alone: what a subscriber sends late would settle what another is working
on by now, and nobody would be told. So nothing is sent any more once most of the ``ack_wait`` is over. It counts from
the request that a message answers: however long the process was frozen meanwhile, the message can't be older.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as Answers
from nats.js.api import ConsumerInfo

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery, Incoming, Subscription
from orthanc_events_bridge.transports.headers import DUE, attempts_before, due_of
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_copies import Copies
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_origin import Origin
from orthanc_events_bridge.transports.nats_pull import Durable, key_of, received, stored_at
from orthanc_events_bridge.transports.subscriptions import boot_time

#: The part of ``ack_wait`` after which nothing is settled any more.
_LATE: Final = 0.8
#: Seconds by which a copy comes later than it is due, so that it need not be put off twice where clocks differ.
_CLOCKS: Final = 0.25
#: Seconds that each of the two steps of closing may take.
_CLOSING: Final = 0.4


class NatsDelivery(Delivery):
    """Settled by an answer to the subject that came with it. No answer of the server says whether it came through:
    what got lost with the connection comes again.
    """

    def __init__(
        self, subscription: Settling, durable: Durable, message: Incoming, attempt: int, reply: str, since: float
    ) -> None:
        super().__init__(message, attempt)
        self._subscription = subscription
        self.durable = durable
        self.reply = reply
        self.since = since

    @property
    def key(self) -> str:
        """What tells its message from all others."""
        return f"{self.durable.origin.name}.{key_of(self.reply)}"

    @property
    def stored(self) -> float:
        """When its message was stored, in seconds of the epoch."""
        return stored_at(self.reply)

    async def ack(self) -> None:
        await self._subscription.settle(self, b"+ACK")

    async def nack(self, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        await self._subscription.give_back(self, delay, headers)

    async def reject(self, headers: Mapping[str, str]) -> None:
        await self._subscription.reject(self, headers)

    async def extend(self) -> None:
        await self._subscription.extend(self)


class Settling(Subscription):
    """A subscription's deliveries, and their end. What is to come is asked for by those that are made of it."""

    def __init__(self, connection: Connection, options: NatsOptions, name: str, in_flight: int) -> None:
        self._connection = connection
        self._patience = options.ack_timeout
        self._in_flight = in_flight
        self._copies = Copies(connection, options, name)
        self._name = name
        self._origins = {one: Origin(connection, options, one) for one in (options.stream, options.inbox_stream)}
        self._answers: list[Answers] = []
        self._putting_off: set[asyncio.Task[None]] = set()
        self._came: deque[NatsDelivery] = deque()
        self._held: dict[NatsDelivery, None] = {}
        self._room: asyncio.Future[None] | None = None
        self._leaving = False
        self._fault: NotConnectedError | None = None

    async def _open(self, infos: Sequence[ConsumerInfo]) -> list[Durable]:
        """Listen to what durable consumers will answer.

        :raises NotConnectedError: NATS doesn't answer.
        """
        durables: list[Durable] = []
        for origin in self._origins.values():
            await origin.look()
        for info in infos:
            durable = Durable(info, self._connection.new_inbox(), self._origins[info.stream_name])
            answered = functools.partial(self._on_message, durable)
            listening = self._connection.listen(durable.reply, answered)
            self._answers.append(await self._connection.ask(listening))
            durables.append(durable)
        self.ack_wait = min(durable.ack_wait for durable in durables)
        return durables

    @abstractmethod
    def _on_message(self, durable: Durable, message: Msg) -> None:
        """What a durable consumer answers."""

    @abstractmethod
    def _end(self) -> None:
        """Whoever waits for something to come is told that nothing does."""

    async def give_back(self, delivery: NatsDelivery, delay: float, headers: Mapping[str, str]) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.nack`: a copy, in the inbox."""
        if not self._ours(delivery):
            return
        try:
            await self._copies.again(delivery.message, delivery.key, delivery.attempt, delay, headers)
        except NotConnectedError:
            raise
        except TransportError:  # no room for copies: JetStream itself gives it again, and says nothing with it
            await self._check_origin(delivery.durable.origin, age=True)
            if not delivery.durable.origin.keeps(delivery.stored, delay):
                raise  # but would have dropped it by then
            await self.settle(delivery, b"-NAK" + delivery.durable.delay(delay))
        else:
            self._copied()
            await self.settle(delivery, b"+ACK")

    def _copied(self) -> None:
        """There is something new in the inbox."""

    def _delivery(self, durable: Durable, message: Msg, since: float) -> NatsDelivery | None:
        """What came, to be held; none where it is too early for it: JetStream keeps it until then.

        :param since: when it was asked for.
        """
        incoming, given = received(message)
        had_to_wait = DUE in incoming.headers
        if had_to_wait and (left := due_of(incoming.headers) - time.time()) > 0:
            early = NatsDelivery(self, durable, incoming, given, message.reply, since)
            self._held[early] = None
            task = asyncio.create_task(self._put_off(early, left))
            self._putting_off.add(task)
            task.add_done_callback(self._putting_off.discard)
            return None
        # A copy that had to wait was given once more, to be put off.
        died = max(0, given - (2 if had_to_wait else 1))
        attempt = attempts_before(incoming.headers, self._name) + died + 1
        return NatsDelivery(self, durable, incoming, attempt, message.reply, since)

    async def _put_off(self, delivery: NatsDelivery, left: float) -> None:
        """Have JetStream keep a copy that is not due for so many seconds. One that has waited for a part of the time
        for which its stream keeps it gets a new copy in its place."""
        origin = delivery.durable.origin
        with contextlib.suppress(NotConnectedError):  # receiving says it
            await self._check_origin(origin, age=True)
            longest = origin.longest_wait(delivery.stored)
            if delivery.attempt > 1:  # each is put off once, so that it is known how often it was given in earnest
                try:
                    await self._copies.anew(delivery.message, delivery.key)
                except NotConnectedError:
                    raise
                except TransportError:  # no room: it is tried again
                    await self.settle(delivery, b"-NAK" + delivery.durable.delay(longest))
                else:
                    self._copied()
                    await self.settle(delivery, b"+ACK")
            else:
                await self.settle(delivery, b"-NAK" + delivery.durable.delay(min(left + _CLOCKS, longest)))

    async def _check_origin(self, origin: Origin, *, age: bool = False) -> None:
        """Is it still the stream that what is held comes from?

        :raises NotConnectedError: no; nothing of what is held is ours.
        """
        try:
            await origin.check(age=age)
        except NotConnectedError as error:
            self._fail(error)
            raise

    def _arrived(self, delivery: NatsDelivery) -> None:
        if self._leaving:
            self._send(delivery.reply, b"-NAK")
        else:
            self._came.append(delivery)

    def _take(self, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        now = boot_time()
        while self._came and len(found) < limit:
            delivery = self._came.popleft()
            if self._late(delivery, now):  # it has been given to another by now, or soon is
                self._released(delivery)
            else:
                self._held[delivery] = None
                found.append(delivery)
        return found

    async def reject(self, delivery: NatsDelivery, headers: Mapping[str, str]) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.reject`."""
        if self._ours(delivery):
            await self._copies.dead(delivery.message, delivery.key, delivery.attempt, headers)
            await self.settle(delivery, b"+ACK")

    def _ours(self, delivery: NatsDelivery) -> bool:
        """Is it still to be settled?

        :raises NotConnectedError: it is not ours any more.
        """
        self._check()
        if delivery not in self._held:
            return False
        if self._late(delivery):
            del self._held[delivery]
            self._released(delivery)
        self._check_time(delivery)
        return True

    def _released(self, delivery: NatsDelivery) -> None:
        """It is not held any more."""
        self._has_room()

    # Settling.

    async def settle(self, delivery: NatsDelivery, answer: bytes) -> None:
        """Answer, once.

        :raises NotConnectedError: too late, or the connection was lost.
        """
        if delivery not in self._held:
            self._check()
            return
        del self._held[delivery]
        self._released(delivery)
        await self._answer(delivery, answer)

    def _has_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def extend(self, delivery: NatsDelivery) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.extend`."""
        if delivery in self._held:
            now = boot_time()
            await self._answer(delivery, b"+WPI")
            delivery.since = now
        else:
            self._check()

    async def _answer(self, delivery: NatsDelivery, answer: bytes) -> None:
        self._check()
        origin = delivery.durable.origin
        now = boot_time()
        if not origin.is_sure(now):  # for every event: to await it would take longer than to look
            await self._check_origin(origin)
            now = boot_time()
        self._check_time(delivery, now)
        self._send(delivery.reply, answer)

    def _check_time(self, delivery: NatsDelivery, now: float | None = None) -> None:
        if self._late(delivery, now):
            ack_wait = delivery.durable.ack_wait
            raise NotConnectedError(
                f"it was too late to settle an event at NATS: its ack_wait of {ack_wait:g} s is all but over",
                "it comes again; raise ack_wait, or extend in time",
            )

    def _late(self, delivery: NatsDelivery, now: float | None = None) -> bool:
        return (boot_time() if now is None else now) - delivery.since > _LATE * delivery.durable.ack_wait

    # The connection.

    def _send(self, subject: str, payload: bytes, reply: str = "") -> None:
        reply = f"{reply} " if reply else ""
        self._connection.post(f"PUB {subject} {reply}{len(payload)}\r\n".encode() + payload + b"\r\n")

    def _fail(self, error: NotConnectedError) -> None:
        if self._fault is None:
            self._fault = error
        self._end()
        self._has_room()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault
        try:
            self._connection.check()
        except NotConnectedError:
            raise
        except TransportError as error:  # a person has to mend it, and is told so when subscribing again
            raise NotConnectedError(error.message, error.remedy) from error

    async def _wait(self, future: asyncio.Future[None], seconds: float) -> bool:
        try:
            return await self._connection.wait(future, seconds)
        except TransportError:
            self._check()
            raise

    async def leave(self, back: Sequence[Delivery]) -> None:
        """See `orthanc_events_bridge.transports.base.Subscription.leave`; what is on its way goes back, too."""
        self._check()
        self._leaving = True
        for origin in self._origins.values():
            await self._check_origin(origin)
        for delivery in (*back, *self._came):
            if isinstance(delivery, NatsDelivery) and not self._late(delivery):
                self._held.pop(delivery, None)
                self._send(delivery.reply, b"-NAK")
        self._came.clear()

    async def close(self) -> None:
        answers, self._answers = self._answers, []
        if not answers:
            return
        for task in self._putting_off:
            task.cancel()
        self._fail(NotConnectedError("the subscription to NATS is closed", "subscribe again"))
        with contextlib.suppress(nats.errors.Error, OSError, TransportError):
            self._connection.check()
            # What is on its way comes first.
            draining = asyncio.gather(*(one.drain() for one in answers))  # type: ignore[no-untyped-call]
            await asyncio.wait_for(draining, _CLOSING)
            for delivery in (*self._held, *self._came):
                if not self._late(delivery):
                    self._send(delivery.reply, b"-NAK")
            await asyncio.wait_for(self._connection.flush(), _CLOSING)  # settled, when this is answered
        self._held.clear()
        self._came.clear()
