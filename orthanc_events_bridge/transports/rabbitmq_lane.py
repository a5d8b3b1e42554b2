"""One partition of an ordered name, as one of its subscribers takes part in it.

Its queue gives to one subscriber at a time, the first that came (single active consumer), and one event at a time
(prefetch 1, on a channel of its own). What is to be tried again waits here, held. It is handed over by closing the
channel alone: where the consumer is cancelled, the next one begins although we still work.

What says that its past is over is never acknowledged: by the channel's end it goes to the next in the queue, until all
have seen it.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from typing import Final, Protocol

import pamqp.frame
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.transports.rabbitmq_asking import channel_closed, deleted, refused
from orthanc_events_bridge.transports.rabbitmq_beginning import is_end
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

#: Seconds that it keeps what another should have, before it lets go of it once more.
_KEEP: Final = 5.0


class Subscriber(Protocol):
    """Whose part it is."""

    def came(self, lane: Lane, raw: DeliveredMessage) -> None:
        """It was given an event."""

    def elsewhere(self, lane: Lane) -> bool:
        """Whether another should have it, and is there."""

    def past_received(self) -> None:
        """All of its past has been received, by whomever."""

    async def check_over(self) -> None:
        """See `orthanc_events_bridge.transports.rabbitmq_beginning.check_over`."""

    def fail(self, error: TransportError) -> None:
        """It can't go on."""


class Lane:
    """See the module's text.

    :param queues: the one that it takes part in, and before it perhaps that of its past.
    :ivar owner: who is to have it; empty as long as nobody has said so.
    """

    def __init__(
        self, connection: Connection, options: RabbitOptions, queues: list[str], subscriber: Subscriber
    ) -> None:
        self._connection = connection
        self._options = options
        self._queues = deque(queues)
        self._subscriber = subscriber
        self._channel: Channel | None = None
        self._held: int | None = None  # the delivery tag of what is not settled
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._leaving = False  # as soon as nothing is held
        self._over = False  # the past is
        self._deleted = False  # and its queue was
        self._since = 0.0
        self._retired = False
        self._closed = False
        self.owner = ""

    @property
    def past(self) -> bool:
        """Whether it still receives its past."""
        return len(self._queues) > 1

    async def open(self) -> None:
        """Queue up for it.

        :raises NotConnectedError: RabbitMQ doesn't answer.
        :raises TransportConfigurationError: it does not permit it.
        """
        connection = self._connection
        while True:
            queue = self._queues[0]
            channel = self._channel = await connection.channel()
            self._held, self._leaving, self._over, self._deleted = None, False, False, False
            self._since = asyncio.get_running_loop().time()
            receive, deleted = (functools.partial(one, channel) for one in (self._on_message, self._on_deleted))
            try:
                await connection.ask(channel.basic_qos(prefetch_count=1))
                await connection.ask(channel.consume(queue, receive, deleted))
            except ClosedError as error:
                if not (error.missing and self.past):
                    raise refused(connection, queue, error) from error
                await self._subscriber.check_over()
                self._next()
                continue
            channel.on_fault = functools.partial(self._on_fault, channel)
            if channel.fault is not None:  # since the answer
                self._on_fault(channel, channel.fault)
            return

    def leave(self) -> None:
        """Let another have it, as soon as nothing of it is held: queue up for it anew."""
        self._leaving = True
        self._move()

    def retire(self) -> None:
        """Hand it over for good, as soon as nothing of it is held, or what is would be given here once more."""
        self._retired = True

    def settle(self) -> None:
        """What it was given is done with."""
        tag, self._held = self._held, None
        channel = self._channel
        if tag is None or channel is None or channel.fault is not None or self._closed:
            return
        try:
            self._connection.write(pamqp.frame.marshal(Basic.Ack(delivery_tag=tag), channel.number))
        except (OSError, RuntimeError) as error:  # it has ended, and nobody has told us yet
            self._connection.fail(self._connection.lost(error))
        self._move()
        self._end_if_retired()

    def _end_if_retired(self) -> None:
        if self._retired and self._ending is None:
            self._ending = asyncio.create_task(self.close())

    def later(self, seconds: float, raw: DeliveredMessage) -> None:
        """Give what it was given once more; until then nothing else of it is given to anybody."""
        if self._retired:
            self._end_if_retired()
        elif not self._closed:
            came = self._connection.guarded(self._subscriber.came)
            self._timer = asyncio.get_running_loop().call_later(seconds, came, self, raw)

    # From one place to the next.

    @property
    def _moves(self) -> bool:
        return not self._closed and not self._retired and (self._over or (self._leaving and self._held is None))

    def _move(self) -> None:
        """Go where it is time to go."""
        if self._task is None and self._moves:
            self._task = asyncio.create_task(self._moving())
            self._task.add_done_callback(self._connection.watched)

    async def _moving(self) -> None:
        try:
            while self._moves:
                channel, self._channel = self._channel, None
                if self._over:
                    if self._deleted:
                        await self._subscriber.check_over()
                    self._next()
                if channel is not None:
                    await self._connection.end(channel)
                await self.open()
        except TransportError as error:
            self._subscriber.fail(error)
        finally:
            self._task = None

    def _next(self) -> None:
        self._queues.popleft()
        self._subscriber.past_received()

    def _on_message(self, channel: Channel, raw: DeliveredMessage) -> None:
        if channel is not self._channel or self._closed:
            return  # it comes again, or to another
        self._held = raw.delivery_tag or 0
        if self.past and is_end(raw):
            self._over = True
            self._move()
            return
        held_for = asyncio.get_running_loop().time() - self._since
        if held_for > _KEEP and self._subscriber.elsewhere(self):
            self._leaving = True
        self._subscriber.came(self, raw)

    def _on_deleted(self, channel: Channel) -> None:
        if channel is not self._channel or self._closed:
            return
        if self.past and self._held is None:
            self._over = self._deleted = True
            self._move()
        else:  # and where something of a past is held, nothing else of its partition may be given
            self._subscriber.fail(deleted(self._options, f"queue {self._queues[0]} of RabbitMQ"))

    def _on_fault(self, channel: Channel, fault: ClosedError) -> None:
        if channel is self._channel and not self._closed:
            self._subscriber.fail(channel_closed(self._queues[0], fault))

    async def close(self) -> None:
        """Hand it over. Never raises."""
        if self._ending is not None and self._ending is not asyncio.current_task():
            await self._ending
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        channel, self._channel = self._channel, None
        if channel is not None:
            await self._connection.end(channel)
