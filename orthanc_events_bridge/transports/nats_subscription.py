"""Subscribers at NATS: those of one name share two durable consumers, of the stream for everybody and of the inboxes'.

They are asked in turn, by one request at a time, so that what is asked for never exceeds what may be held. A request
waits at the server for what is for everybody only; the inbox is looked at in between, and whenever it gave something.

``fetch()`` of nats-py 2.16 is the brake, as measured, so that events are asked for, and come, through an inbox of
our own.

JetStream settles by the message's number alone: what a subscriber sends late would settle what another is working
on by now, and nobody would be told. So nothing is sent any more once most of the ``ack_wait`` is over. It counts from
the request that a message answers: however long the process was frozen meanwhile, the message can't be older.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import deque
from typing import Final

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as Answers

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import Delivery, Incoming, Subscription
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_consumer import open_consumers
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_pull import Durable, Pull, problem, received
from orthanc_events_bridge.transports.subscriptions import boot_time

#: The part of ``ack_wait`` after which nothing is settled any more.
_LATE: Final = 0.8
#: A request waits at the server for so much of ``ack_wait``, and for so many seconds, at most; after so many the inbox
#: has its turn.
_PULL: Final = 0.1
_PULL_SECONDS: Final = 0.25
#: Seconds before asking again when others' requests come first.
_PAUSE: Final = 0.02
#: Seconds that each of the two steps of closing may take.
_CLOSING: Final = 0.4


class NatsDelivery(Delivery):
    """Settled by an answer to the subject that came with it. No answer of the server says whether it came through:
    what got lost with the connection comes again.
    """

    def __init__(
        self,
        subscription: NatsSubscription,
        durable: Durable,
        message: Incoming,
        attempt: int,
        reply: str,
        since: float,
    ) -> None:
        super().__init__(message, attempt)
        self._subscription = subscription
        self.durable = durable
        self.reply = reply
        self.since = since

    async def ack(self) -> None:
        await self._subscription.settle(self, b"+ACK")

    async def nack(self, delay: float = 0.0) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.nack`.

        What waits is kept by the server in memory and looked at one by one: meant for minutes, not for days.
        """
        await self._subscription.settle(self, b"-NAK" + self.durable.delay(delay))

    async def extend(self) -> None:
        await self._subscription.extend(self)


class NatsSubscription(Subscription):
    """Made by `open`."""

    def __init__(self, connection: Connection, options: NatsOptions, in_flight: int) -> None:
        self._connection = connection
        self._patience = options.ack_timeout
        self._in_flight = in_flight
        self._durables: list[Durable] = []  # for everybody, and the inbox
        self._answers: list[Answers] = []
        self._asked: Durable | None = None  # the one that was asked last
        self._pull: Pull | None = None
        self._came: deque[NatsDelivery] = deque()
        self._held: dict[NatsDelivery, None] = {}
        self._room: asyncio.Future[None] | None = None
        self._fault: NotConnectedError | None = None

    @classmethod
    async def open(
        cls, connection: Connection, options: NatsOptions, name: str, *, oldest: bool, in_flight: int, ack_wait: float
    ) -> NatsSubscription:
        """Find the durable consumers and check them, or make them.

        :raises NotConnectedError: NATS doesn't answer.
        :raises TransportConfigurationError: they can't be used, or not be made.
        """
        self = cls(connection, options, in_flight)
        for info in await open_consumers(connection, options, name, oldest=oldest, ack_wait=ack_wait):
            durable = Durable(info, connection.new_inbox())
            answered = functools.partial(self._on_message, durable)
            subscribing = connection.subscribe(durable.reply, cb=answered, pending_msgs_limit=-1)
            self._answers.append(await connection.ask(subscribing))
            self._durables.append(durable)
        return self

    # Receiving.

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        asked: set[Durable] = set()
        while True:
            self._check()
            if self._pull is None and (found := self._take(limit)):
                return found
            left = max(0.0, end - loop.time())
            room = min(limit, self._in_flight - len(self._held) - len(self._came))
            if self._pull is not None:  # of a call that was cancelled, or that is under way
                if not await self._finish(self._pull, left):
                    return self._take(limit)
            elif len(asked) == len(self._durables) and not left:
                return []
            elif room > 0:
                durable = self._next()
                asked.add(durable)
                await self._ask(durable, room, left)
            else:
                self._room = loop.create_future()
                if not await self._wait(self._room, left):
                    return []

    def _next(self) -> Durable:
        """The one to be asked now: neither waits for the other for longer than a moment."""
        live, inbox = self._durables
        waited = boot_time() - inbox.asked >= _PULL_SECONDS
        if self._asked is live and (inbox.filled or not live.filled or waited):
            return inbox
        return live

    def _take(self, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        while self._came and len(found) < limit:
            delivery = self._came.popleft()
            if not self._late(delivery):  # else it has been given to another by now, or soon is
                self._held[delivery] = None
                found.append(delivery)
        return found

    async def _ask(self, durable: Durable, batch: int, wait: float) -> None:
        """Ask for so many at most, and wait until the server says that there are no more."""
        live, inbox = self._durables
        expires = 0.0 if durable is inbox or inbox.filled else min(wait, live.ack_wait * _PULL, _PULL_SECONDS)
        future = asyncio.get_running_loop().create_future()
        pull = self._pull = Pull(durable, batch, boot_time(), expires, future)
        self._asked, durable.asked, durable.filled = durable, pull.sent, False
        subject, request = durable.request(batch, expires)
        self._send(subject, request, durable.reply)
        await self._finish(pull, math.inf)
        if not durable.filled and expires > (waited := boot_time() - pull.sent):  # others' requests come first
            await asyncio.sleep(min(expires - waited, _PAUSE))

    async def _finish(self, pull: Pull, seconds: float) -> bool:
        """Wait until a request has ended, at most so long.

        :return: whether it has.
        :raises NotConnectedError: the server doesn't answer.
        """
        seen = pull.left + 1
        while pull.left < seen:  # as long as they keep coming
            seen = pull.left
            patience = pull.expires + self._patience
            if await self._wait(pull.done, min(seconds, patience)):
                return True
            if seconds < patience and boot_time() - pull.sent < patience:
                return False
        self._fail(
            NotConnectedError(
                f"NATS has not answered a request for events within {self._patience:g} s",
                "check the server; they are asked for again over a new connection",
            )
        )
        return True

    async def _on_message(self, durable: Durable, message: Msg) -> None:
        pull = self._pull
        if message.reply:
            incoming, attempt = received(message)
            since = pull.sent if pull else boot_time()
            self._came.append(NatsDelivery(self, durable, incoming, attempt, message.reply, since))
            durable.filled = True
            if pull is not None:
                pull.left -= 1
                if not pull.left:
                    self._end()
        elif words := problem(message):
            self._fail(
                NotConnectedError(
                    f"a NATS consumer gives no more events: {words}", "it is made or found again when subscribing"
                )
            )
        elif pull is not None and pull.durable is durable:
            self._end()

    def _end(self) -> None:
        if self._pull is not None:
            self._pull.end()
            self._pull = None

    # Settling.

    async def settle(self, delivery: NatsDelivery, answer: bytes) -> None:
        """Answer, once.

        :raises NotConnectedError: too late, or the connection was lost.
        """
        if delivery not in self._held:
            self._check()
            return
        del self._held[delivery]
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        await self._answer(delivery, answer)

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
        if self._late(delivery):
            ack_wait = delivery.durable.ack_wait
            raise NotConnectedError(
                f"it was too late to settle an event at NATS: its ack_wait of {ack_wait:g} s is all but over",
                "it comes again; raise ack_wait, or extend in time",
            )
        self._send(delivery.reply, answer)

    def _late(self, delivery: NatsDelivery) -> bool:
        return boot_time() - delivery.since > _LATE * delivery.durable.ack_wait

    # The connection.

    def _send(self, subject: str, payload: bytes, reply: str = "") -> None:
        words = f"PUB {subject} {reply} {len(payload)}" if reply else f"PUB {subject} {len(payload)}"
        self._connection.post(b"%b\r\n%b\r\n" % (words.encode(), payload))

    def _fail(self, error: NotConnectedError) -> None:
        if self._fault is None:
            self._fault = error
        self._end()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

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

    async def close(self) -> None:
        answers, self._answers = self._answers, []
        if not answers:
            return
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
