"""The dead letters of a consumer at RabbitMQ, in a quorum queue that nobody receives from: put there, and looked at.

Looking at them is receiving all of them without an acknowledgement, so all are held here, each with its body and 2 KB
more. What is not removed goes back to its place, in its order, when the channel is closed, whoever closes it. Meanwhile
nobody else would see anything: only one can look at a time, and another waits for its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import RefusedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters
from orthanc_events_bridge.transports.rabbitmq_acks import Acks
from orthanc_events_bridge.transports.rabbitmq_asking import Asking, alone, refused
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_copies import LOST, Copies
from orthanc_events_bridge.transports.rabbitmq_delivery import RabbitDelivery
from orthanc_events_bridge.transports.rabbitmq_message import dead_headers, incoming
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_queues import Queues, open_dead
from orthanc_events_bridge.transports.rabbitmq_sending import Sending

#: So many messages RabbitMQ hands over at a time.
MOST: Final = 65_535
#: Seconds that closing may take.
_CLOSING: Final = 0.9


class DeadPlace:
    """Where one subscriber puts its dead letters.

    It has a channel of its own: what RabbitMQ closes it for ends nothing else.
    """

    def __init__(self, connection: Connection, sending: Sending, options: RabbitOptions, queues: Queues) -> None:
        self._connection = connection
        self._sending = sending
        self._options = options
        self._queues = queues
        self._copies: Copies | None = None
        self._found = False  # the queue was, or it was made
        self._finding = asyncio.Lock()

    @property
    def waiting(self) -> list[asyncio.Future[str]]:
        """Those that are not answered yet."""
        return self._copies.waiting if self._copies is not None else []

    async def put(self, delivery: RabbitDelivery, headers: Mapping[str, str]) -> None:
        """Put a copy of an event there, and return when the queue has it, on disk.

        :param headers: say why.
        :raises NotConnectedError: RabbitMQ doesn't answer.
        :raises RefusedError: the queue is full, or has not answered yet: tried again, its answer is waited for.
        :raises TransportConfigurationError: it can't be used as it is, or RabbitMQ does not permit it.
        """
        raw, why = delivery.raw, ""
        for _ in range(2):  # it may have been deleted since it was found
            if delivery.dead is None:
                await self._find()
            copies = self._copies
            assert copies is not None
            if delivery.dead is None:
                named = dead_headers(raw, self._queues.name, headers)
                delivery.dead = copies.send(self._queues.dead, named, raw.body, raw.header.properties.content_type)
            await copies.answered(delivery.dead)
            future, delivery.dead = delivery.dead, None
            why = future.result()
            if not why:
                return
            if why.startswith(LOST):
                raise copies.refusal(future)
            if copies.fault is not None and copies.fault.code == 403:
                raise TransportConfigurationError(
                    f"RabbitMQ does not permit this user to store dead letters: {copies.fault.text}",
                    "let it write to amq.default",
                )
            self._found = False
        raise RefusedError(
            f"RabbitMQ takes no more dead letters: {why}",
            f"redrive or discard some with `orthanc-events dlq`, or see the policy of the queue {self._queues.dead}",
        )

    async def _find(self) -> None:
        async with self._finding:
            if not self._found:
                await open_dead(self._connection, self._options, self._queues)
                self._found = True
            if self._copies is None or self._copies.fault is not None:
                self._copies = Copies(self._sending, self._options.ack_timeout)
            await self._copies.open()

    async def close(self) -> None:
        """Nothing more is put there. Never raises."""
        if self._copies is not None:
            await self._copies.end()


class RabbitDeadLetters(DeadLetters):
    """Holds what it has read until it is closed, so that there is only one order and one mark for each."""

    def __init__(self, connection: Connection, queues: Queues) -> None:
        self._connection = connection
        self._queues = queues
        self._stack = contextlib.AsyncExitStack()
        self._channel: Channel | None = None
        self._acks: Acks | None = None
        self._consumer = ""
        self._consumers = 0
        self._held: dict[int, DeliveredMessage] = {}
        self._deleted = False

    async def read(self) -> AsyncGenerator[DeadLetter]:
        channel = await self._begin()
        if channel is None:
            return
        await self._receive(channel)
        for tag, raw in sorted(self._held.items()):
            yield DeadLetter(incoming(raw), tag)

    async def remove(self, letters: Sequence[DeadLetter]) -> None:
        tags = [letter.mark for letter in letters if letter.mark in self._held]
        channel, acks = self._channel, self._acks
        if not tags or channel is None or acks is None:
            return
        try:
            # What RabbitMQ keeps back of many acknowledgements it would forget when the channel is closed. It sends it
            # behind the answer to the first of these questions, and before that to the second.
            await self._consume(channel)
            for tag in tags:
                assert isinstance(tag, int)
                acks.settle(tag)
                del self._held[tag]
            acks.flush()
            await self._connection.ask(channel.basic_cancel(self._consumer))
            self._consumer = ""
            await self._connection.ask(channel.queue_declare(self._queues.dead, passive=True))
        except ClosedError as error:
            if not error.missing:
                raise self._closed(error) from error

    async def close(self) -> None:
        if self._acks is not None:
            self._acks.close()
        channel, self._channel = self._channel, None
        ends = [asyncio.ensure_future(self._end(channel))]
        await asyncio.wait(ends, timeout=_CLOSING)
        for one in ends:
            one.cancel()
        self._held.clear()

    async def _end(self, channel: Channel | None) -> None:
        if channel is not None:
            await self._connection.end(channel)
        with contextlib.suppress(TransportError, ClosedError):
            await self._stack.aclose()

    async def _begin(self) -> Channel | None:
        """Take our turn.

        :return: on which they are received; none where there is no such queue.
        """
        if self._channel is not None:
            return self._channel
        connection, queue = self._connection, self._queues.dead
        asking = Asking(connection)
        try:
            if not await asking.exists(queue):
                return None
        finally:
            await asking.end()
        await self._stack.enter_async_context(alone(connection, f"{queue}.reading"))
        channel = self._channel = await connection.channel()
        self._acks = Acks(connection, channel)
        try:
            await connection.ask(channel.basic_qos(prefetch_count=MOST))
        except ClosedError as error:
            raise self._closed(error) from error
        return channel

    async def _consume(self, channel: Channel) -> None:
        if not self._consumer:
            # In an order in which RabbitMQ takes back what several of one channel held.
            self._consumers += 1
            tag = f"dead.{self._consumers:06d}"
            self._consumer = await self._connection.ask(
                channel.consume(self._queues.dead, self._on_message, self._on_deleted, tag=tag)
            )

    async def _receive(self, channel: Channel) -> None:
        """Receive all that are there now."""
        connection, queue = self._connection, self._queues.dead
        self._deleted = False
        try:
            # First this, which needs the queue's leader: without one it would have no messages, it says.
            await self._consume(channel)
            while not self._deleted:
                seen, left = len(self._held), 0
                for _ in range(2):  # what it gave before it was asked comes before the second answer
                    declared = await connection.ask(channel.queue_declare(queue, passive=True))
                    left = declared.message_count or 0
                if len(self._held) == seen and (left == 0 or seen == MOST):
                    return
        except ClosedError as error:
            if not error.missing:
                raise self._closed(error) from error
            self._held.clear()

    def _closed(self, error: ClosedError) -> TransportError:
        return refused(self._connection, self._queues.dead, error)

    def _on_message(self, raw: DeliveredMessage) -> None:
        tag = raw.delivery_tag or 0
        if self._acks is not None:
            self._acks.given(tag)
        self._held[tag] = raw

    def _on_deleted(self) -> None:
        self._deleted, self._consumer = True, ""
        self._held.clear()
