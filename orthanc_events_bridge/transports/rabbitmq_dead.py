"""The dead letters of a consumer at RabbitMQ, in a quorum queue that nobody receives from: put there, and looked at.

Looking at them is receiving all of them without an acknowledgement: a lot at a time, each by a subscription of its
own, so that no more bodies are here than those of one lot. What is not removed goes back to its place, in its order,
when the channel is closed, whoever closes it. Meanwhile nobody else would see anything: only one can look at a time,
and another waits for its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, RefusedError, TransportConfigurationError, TransportError
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

#: So many are received at a time.
_LOT: Final = 100
#: Where that would be more lots than so many, each is larger: what several subscriptions of a channel held RabbitMQ
#: takes back in their order as long as they are 32 at the most (up to that an Erlang map has one).
_LOTS: Final = 30
#: For so many seconds at most the next one is waited for, and so many between two looks.
_PATIENCE: Final = 30.0
_PAUSE: Final = 0.01
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
    """Holds what it has read, without its content, until it is closed or reads again."""

    def __init__(self, connection: Connection, options: RabbitOptions, queues: Queues) -> None:
        self._connection = connection
        self._queues = queues
        # Only then it is known that a message can be given and given back as often as wanted.
        self._declare = options.declare
        self._stack = contextlib.AsyncExitStack()
        self._channel: Channel | None = None
        self._acks: Acks | None = None
        self._readings = 0
        self._consumers = 0
        self._come: deque[DeliveredMessage] = deque()  # and is not read yet
        self._held: set[int] = set()  # the delivery tags of what is not removed
        self._returned = False  # one was given back by itself, and has not come again
        self._deleted = False

    async def read(self) -> AsyncGenerator[DeadLetter]:
        await self._give_back()
        channel = await self._begin()
        if channel is None:
            return
        try:
            count = await self._count(channel)  # what comes from now on is for the next reading
            lot = max(_LOT, -(-count // _LOTS))
            while count and not self._deleted:
                if not self._come:
                    async with self._consuming(channel, min(lot, count)):
                        await self._wait_for(channel, min(lot, count))
                if self._come:
                    raw, count = self._come.popleft(), count - 1
                    yield DeadLetter(incoming(raw), (self._readings, raw.delivery_tag))
        except ClosedError as error:
            self._gone(error)

    async def remove(self, letters: Sequence[DeadLetter]) -> None:
        tags = [self._tag(letter) for letter in letters]
        tags = [tag for tag in tags if tag in self._held]
        channel, acks = self._channel, self._acks
        if not tags or channel is None or acks is None:
            return
        try:
            # What RabbitMQ keeps back of many acknowledgements it would forget when the channel is closed. It sends it
            # behind the answer to the first of these questions, and before that to the second.
            read = len(self._come)
            async with self._consuming(channel, 1):
                for tag in tags:
                    acks.settle(tag)
                    self._held.discard(tag)
                acks.flush()
            if self._declare and len(self._come) > read:  # else there would be as many lots as removals
                tag = self._come.pop().delivery_tag or 0
                self._held.discard(tag)
                acks.give_back(tag)
                self._returned = True
            await self._connection.ask(channel.queue_declare(self._queues.dead, passive=True))
        except ClosedError as error:
            self._gone(error)

    def _tag(self, letter: DeadLetter) -> int:
        mark = letter.mark
        assert isinstance(mark, tuple)
        reading, tag = mark
        if reading != self._readings:
            raise NotConnectedError(
                f"the dead letters in {self._queues.dead} at RabbitMQ were read anew", "remove what was read last"
            )
        return int(tag)

    async def close(self) -> None:
        ends = [asyncio.ensure_future(self._give_back())]
        await asyncio.wait(ends, timeout=_CLOSING)
        for one in ends:
            one.cancel()

    async def _give_back(self) -> None:
        """Let RabbitMQ have all that is held, and another his turn. Never raises."""
        channel, self._channel = self._channel, None
        try:
            if channel is not None and self._returned:
                # What it has back it gives first, in the order in which it came back: that one behind what is held.
                one_more = len(self._come) + 1
                with contextlib.suppress(TransportError, ClosedError):
                    async with self._consuming(channel, 1):
                        await self._wait_for(channel, one_more)
        finally:
            self._returned = False
            if self._acks is not None:
                self._acks.close()
            self._come.clear()
            self._held.clear()
            if channel is not None:
                await self._connection.end(channel)
        with contextlib.suppress(TransportError, ClosedError):
            await self._stack.aclose()

    async def _begin(self) -> Channel | None:
        """Take our turn.

        :return: on which they are received; none where there is no such queue.
        """
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
        self._readings += 1
        self._deleted = False
        return channel

    @contextlib.asynccontextmanager
    async def _consuming(self, channel: Channel, most: int) -> AsyncGenerator[None]:
        """Be given at most so many, and keep them."""
        # In an order in which RabbitMQ takes back what several of one channel held.
        self._consumers += 1
        tag = f"dead.{self._consumers:06d}"
        await self._connection.ask(channel.basic_qos(prefetch_count=most))
        await self._connection.ask(channel.consume(self._queues.dead, self._on_message, self._on_deleted, tag=tag))
        yield
        if not self._deleted:
            await self._connection.ask(channel.basic_cancel(tag))

    async def _count(self, channel: Channel) -> int:
        """How many there are; the first of them is received by that."""
        before = await self._ready(channel)
        # Without the queue's leader it has no messages, it says; and who receives needs that.
        async with self._consuming(channel, 1):
            for _ in range(2):  # what it gave before it was asked comes before the second answer
                left = await self._ready(channel)
            count = max(before, left + 1 if left else len(self._come))
            await self._wait_for(channel, min(count, 1))
        return count

    async def _ready(self, channel: Channel) -> int:
        """How many nobody holds."""
        declared = await self._connection.ask(channel.queue_declare(self._queues.dead, passive=True))
        return declared.message_count or 0

    async def _wait_for(self, channel: Channel, number: int) -> None:
        """Wait until so many have come. Thousands come late: that no more are left says nothing."""
        loop = asyncio.get_running_loop()
        seen, end = 0, loop.time() + _PATIENCE
        while len(self._come) < number and not self._deleted:
            if len(self._come) > seen:
                seen, end = len(self._come), loop.time() + _PATIENCE
            elif loop.time() > end:
                raise NotConnectedError(
                    f"RabbitMQ has not handed over all messages of the queue {self._queues.dead} that it had",
                    "try again; see the RabbitMQ server's log, and whether somebody else takes from this queue",
                )
            await self._ready(channel)
            await asyncio.sleep(_PAUSE)

    def _gone(self, error: ClosedError) -> None:
        """There is nothing any more, where the queue was deleted.

        :raises TransportError: it is something else.
        """
        if not error.missing:
            raise refused(self._connection, self._queues.dead, error) from error
        self._on_deleted()

    def _on_message(self, raw: DeliveredMessage) -> None:
        tag = raw.delivery_tag or 0
        if self._acks is not None:
            self._acks.given(tag)
        self._held.add(tag)
        self._come.append(raw)
        self._returned = False

    def _on_deleted(self) -> None:
        self._deleted = True
        self._come.clear()
        self._held.clear()
