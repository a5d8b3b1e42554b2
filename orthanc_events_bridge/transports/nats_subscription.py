"""Subscribers of a NATS stream: those of one name share a durable pull consumer of that name.

``fetch()`` of nats-py 2.16 is the brake, as measured, so that events are asked for, and come, through an inbox of
our own.

JetStream settles by the message's number alone: what a subscriber sends late would settle what another is working
on by now, and nobody would be told. So nothing is sent any more once most of the ``ack_wait`` is over. It counts from
the request that a message answers: however long the process was frozen meanwhile, the message can't be older.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as Inbox
from nats.js.api import ConsumerInfo

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import Delivery, Incoming, Subscription
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_consumer import open_consumer
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.subscriptions import boot_time

#: The part of ``ack_wait`` after which nothing is settled any more.
_LATE: Final = 0.8
#: A request waits at the server for so much of ``ack_wait``, and for so many seconds, at most.
_PULL: Final = 0.1
_PULL_SECONDS: Final = 5.0
#: Seconds before asking again when others' requests come first.
_PAUSE: Final = 0.02
#: Seconds that each of the two steps of closing may take.
_CLOSING: Final = 0.4
#: From so many seconds on, a delay is to survive a restart of the server in full.
_LONG_DELAY: Final = 1.0
#: What the server answers when a request has ended and the next one may follow.
_ENDED: Final = frozenset({"404", "408"})
_PASSING: Final = ("exceeded maxwaiting", "leadership change")


@dataclass(slots=True)
class _Pull:
    """A request for events.

    :ivar left: how many may still come.
    :ivar sent: when, on the clock `boot_time`.
    :ivar expires: after how many seconds the server answers at the latest.
    """

    left: int
    sent: float
    expires: float
    done: asyncio.Future[None]

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class NatsDelivery(Delivery):
    """Settled by an answer to the subject that came with it. No answer of the server says whether it came through:
    what got lost with the connection comes again.
    """

    def __init__(self, subscription: NatsSubscription, message: Incoming, attempt: int, reply: str, since: float):
        super().__init__(message, attempt)
        self._subscription = subscription
        self.reply = reply
        self.since = since

    async def ack(self) -> None:
        await self._subscription.settle(self, b"+ACK")

    async def nack(self, delay: float = 0.0) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.nack`.

        What waits is kept by the server in memory and looked at one by one: meant for minutes, not for days.
        """
        await self._subscription.settle(self, b"-NAK" + self._subscription.delay(delay))

    async def extend(self) -> None:
        await self._subscription.extend(self)


class NatsSubscription(Subscription):
    """Made by `open`."""

    def __init__(self, connection: Connection, options: NatsOptions, info: ConsumerInfo, in_flight: int) -> None:
        self._connection = connection
        self._patience = options.ack_timeout
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{options.stream}.{info.name}"
        self._ack_wait = info.config.ack_wait or 30.0
        self._in_flight = in_flight
        self._reply = connection.new_inbox()
        self._inbox: Inbox | None = None
        self._pull: _Pull | None = None
        self._came: deque[NatsDelivery] = deque()
        self._held: dict[NatsDelivery, None] = {}
        self._room: asyncio.Future[None] | None = None
        self._fault: NotConnectedError | None = None

    @classmethod
    async def open(
        cls, connection: Connection, options: NatsOptions, name: str, *, oldest: bool, in_flight: int, ack_wait: float
    ) -> NatsSubscription:
        """Find the durable consumer and check it, or make it.

        :raises NotConnectedError: NATS doesn't answer.
        :raises TransportConfigurationError: it can't be used, or not be made.
        """
        info = await open_consumer(connection, options, name, oldest=oldest, ack_wait=ack_wait)
        self = cls(connection, options, info, in_flight)
        subscribing = connection.subscribe(self._reply, cb=self._on_message, pending_msgs_limit=-1)
        self._inbox = await connection.ask(subscribing)
        return self

    # Receiving.

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        asked = False
        while True:
            self._check()
            if self._pull is None and (found := self._take(limit)):
                return found
            left = max(0.0, end - loop.time())
            room = min(limit, self._in_flight - len(self._held) - len(self._came))
            if self._pull is not None:  # of a call that was cancelled, or that is under way
                if not await self._finish(self._pull, left):
                    return self._take(limit)
            elif asked and not left:
                return []
            elif room > 0:
                if asked:
                    await asyncio.sleep(min(left, _PAUSE))
                asked = True
                await self._ask(room, left)
            else:
                self._room = loop.create_future()
                if not await self._wait(self._room, left):
                    return []

    def _take(self, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        while self._came and len(found) < limit:
            delivery = self._came.popleft()
            if not self._late(delivery):  # else it has been given to another by now, or soon is
                self._held[delivery] = None
                found.append(delivery)
        return found

    async def _ask(self, batch: int, wait: float) -> None:
        """Ask for so many at most, and wait until the server says that there are no more."""
        expires = min(wait, self._ack_wait * _PULL, _PULL_SECONDS)
        request: dict[str, Any] = {"batch": batch, "no_wait": True}  # with `expires`: wait for the first only
        if expires:
            request["expires"] = max(1, int(expires * 1e9))
        future = asyncio.get_running_loop().create_future()
        pull = self._pull = _Pull(batch, boot_time(), expires, future)
        self._send(self._subject, json.dumps(request).encode(), self._reply)
        await self._finish(pull, math.inf)

    async def _finish(self, pull: _Pull, seconds: float) -> bool:
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

    async def _on_message(self, message: Msg) -> None:
        pull = self._pull
        if message.reply:
            headers = {name.lower(): value for name, value in (message.headers or {}).items()}
            # $JS.ACK.{stream}.{consumer}.{attempt}.{number}… or $JS.ACK.{domain}.{account}.{stream}….
            tokens = message.reply.split(".")
            attempt, position = tokens[4:6] if len(tokens) == 9 else tokens[6:8]
            incoming = Incoming(message.subject, message.data, headers, position)
            since = pull.sent if pull else boot_time()
            self._came.append(NatsDelivery(self, incoming, int(attempt), message.reply, since))
            if pull is not None:
                pull.left -= 1
                if not pull.left:
                    self._end()
        else:
            headers = message.headers or {}
            status, text = headers.get("Status", ""), headers.get("Description", "")
            if status in _ENDED or text.lower().startswith(_PASSING):
                self._end()
            else:  # "503": nobody listens; "409": deleted, or changed
                self._fail(
                    NotConnectedError(
                        f"the NATS consumer gives no more events: {status} {text}".rstrip(),
                        "it is made or found again when subscribing",
                    )
                )

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
            raise NotConnectedError(
                f"it was too late to settle an event at NATS: its ack_wait of {self._ack_wait:g} s is all but over",
                "it comes again; raise ack_wait, or extend in time",
            )
        self._send(delivery.reply, answer)

    def _late(self, delivery: NatsDelivery) -> bool:
        return boot_time() - delivery.since > _LATE * self._ack_wait

    def delay(self, seconds: float) -> bytes:
        """How ``-NAK`` says it."""
        if seconds <= 0:
            return b""
        if seconds >= _LONG_DELAY:
            # When it is restarted, the server knows only the whole second in which a message with this delay would
            # have been delivered: at the beginning of that second nothing is cut off.
            now = time.time()
            seconds = math.ceil(now + seconds - self._ack_wait) + self._ack_wait - now
        return b' {"delay": %d}' % math.ceil(seconds * 1e9)

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
        inbox, self._inbox = self._inbox, None
        if inbox is None:
            return
        self._fail(NotConnectedError("the subscription to NATS is closed", "subscribe again"))
        with contextlib.suppress(nats.errors.Error, OSError, TransportError):
            self._connection.check()
            draining = inbox.drain()  # type: ignore[no-untyped-call]  # what is on its way comes first
            await asyncio.wait_for(draining, _CLOSING)
            for delivery in (*self._held, *self._came):
                if not self._late(delivery):
                    self._send(delivery.reply, b"-NAK")
            await asyncio.wait_for(self._connection.flush(), _CLOSING)  # settled, when this is answered
        self._held.clear()
        self._came.clear()
