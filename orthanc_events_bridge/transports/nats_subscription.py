"""Subscribers at NATS: those of one name share two durable consumers, of the stream for everybody and of the inboxes'.

They are asked in turn, by one request at a time, so that what is asked for never exceeds what may be held. A request
waits at the server for what is for everybody only; the inbox is looked at in between, and whenever it gave something.

``fetch()`` of nats-py 2.16 is the brake, as measured, so that events are asked for, and come, through an inbox of
our own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Final

from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.base import Delivery
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_pull import Durable, Pull, problem
from orthanc_events_bridge.transports.nats_settling import Settling
from orthanc_events_bridge.transports.subscriptions import boot_time

#: A request waits at the server for so much of ``ack_wait``, and for so many seconds, at most; after so many the inbox
#: has its turn.
_PULL: Final = 0.1
_PULL_SECONDS: Final = 0.25
#: Seconds before asking again when others' requests come first.
_PAUSE: Final = 0.02


class NatsSubscription(Settling):
    """Made by `open`."""

    def __init__(self, connection: Connection, options: NatsOptions, name: str, in_flight: int) -> None:
        super().__init__(connection, options, name, in_flight)
        self._durables: list[Durable] = []  # for everybody, and the inbox; or the inbox alone
        self._asked: Durable | None = None  # the one that was asked last
        self._pull: Pull | None = None
        self._news = False  # in the inbox, from ourselves

    @classmethod
    async def open(
        cls,
        connection: Connection,
        options: NatsOptions,
        name: str,
        infos: Sequence[ConsumerInfo],
        *,
        in_flight: int,
    ) -> NatsSubscription:
        """Begin to listen to durable consumers.

        :param infos: of them, as `orthanc_events_bridge.transports.nats_consumer` found or made them.
        :raises NotConnectedError: NATS doesn't answer.
        """
        self = cls(connection, options, name, in_flight)
        self._durables = await self._open(infos)
        return self

    # Receiving.

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        asked: set[Durable] = set()
        while True:
            self._check()
            if found := self._take(limit):
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

    def _copied(self) -> None:
        self._news = True

    def _next(self) -> Durable:
        """The one to be asked now: neither waits for the other for longer than a moment."""
        live, inbox = self._durables[0], self._durables[-1]
        if self._news:
            self._news = False
            return inbox
        waited = boot_time() - inbox.asked >= _PULL_SECONDS
        if self._asked is live and (inbox.filled or not live.filled or waited):
            return inbox
        return live

    async def _ask(self, durable: Durable, batch: int, wait: float) -> None:
        """Ask for so many at most, and wait until something comes, or the server says that there is nothing."""
        expires = min(wait, durable.ack_wait * _PULL)
        if len(self._durables) > 1:  # neither is waited for at the cost of the other
            inbox = self._durables[-1]
            expires = 0.0 if durable is inbox or inbox.filled else min(expires, _PULL_SECONDS)
        future = asyncio.get_running_loop().create_future()
        pull = self._pull = Pull(durable, batch, boot_time(), expires, future)
        self._asked, durable.asked, durable.filled = durable, pull.sent, False
        subject, request = durable.request(batch, expires)
        self._send(subject, request, durable.reply)
        await self._finish(pull, math.inf)
        if not durable.filled and expires > (waited := boot_time() - pull.sent):  # others' requests come first
            await asyncio.sleep(min(expires - waited, _PAUSE))

    async def _finish(self, pull: Pull, seconds: float) -> bool:
        """Wait until a request has brought something or has ended, at most so long.

        :return: whether it has.
        :raises NotConnectedError: the server doesn't answer.
        """
        seen = pull.left + 1
        while pull.left < seen:  # as long as they keep coming
            seen = pull.left
            patience = pull.expires + self._patience
            if pull.news.done():  # of what is taken already
                pull.news = asyncio.get_running_loop().create_future()
            if await self._wait(pull.news, min(seconds, patience)):
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

    def _on_message(self, durable: Durable, message: Msg) -> None:
        pull = self._pull
        if message.reply:
            since = pull.sent if pull else boot_time()
            delivery = self._delivery(durable, message, since)
            if delivery is not None:
                self._arrived(delivery)
            durable.filled = True
            if pull is not None:
                durable.origin.answered(pull)
                pull.left -= 1
                if not pull.left:
                    self._pull = None
                pull.tell()
        elif words := problem(message):
            self._fail(
                NotConnectedError(
                    f"a NATS consumer gives no more events: {words}", "it is made or found again when subscribing"
                )
            )
        elif pull is not None and pull.durable is durable:
            durable.origin.answered(pull)
            self._end()

    def _end(self) -> None:
        if self._pull is not None:
            self._pull.tell()
            self._pull = None
