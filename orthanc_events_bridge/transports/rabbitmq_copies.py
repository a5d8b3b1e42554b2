"""Copies of received messages, put into a queue by its name and confirmed by it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import pamqp.frame
from aiormq.abc import DeliveredMessage
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from orthanc_events_bridge.errors import NotConnectedError, RefusedError, TransportError
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_sending import Sending

#: How a result ends where there is no such queue.
DELETED: Final = "was deleted"
#: How it begins where nobody knows.
LOST: Final = "the connection was lost"
#: Seconds between two looks at whether an alarm is over.
_ALARM: Final = 0.5
#: A frame's own bytes.
_FRAME: Final = 8


class _Copy(NamedTuple):
    exchange: str
    queue: str
    headers: dict[str, Any]
    body: bytes
    content_type: str | None
    future: asyncio.Future[str]


class Copies:
    """A channel on which messages are sent to queues, opened with the first of them.

    :param patience: how long a queue can take to confirm, in seconds.
    :ivar fault: why the server has closed it.
    """

    def __init__(self, sending: Sending, patience: float) -> None:
        self._sending = sending
        self._patience = patience
        self._mark = ""
        self._tag = 0
        self._waiting: dict[int, _Copy] = {}
        self._early: list[_Copy] = []  # those that wait for the channel
        self._opening = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._returned: set[int] = set()
        self._connection: Connection | None = None
        self._channel: Channel | None = None
        self.fault: ClosedError | None = None

    @property
    def waiting(self) -> list[asyncio.Future[str]]:
        """Those that are not answered yet."""
        return [copy.future for copy in (*self._waiting.values(), *self._early)]

    @property
    def alarm(self) -> str:
        """Why nothing is taken at the moment; empty when it is."""
        return self._sending.alarm

    async def open(self) -> None:
        """Open the channel, if it isn't; for who wants to know at once why it can't be.

        :raises NotConnectedError: RabbitMQ doesn't answer.
        :raises RefusedError: it won't before an alarm is over.
        :raises TransportConfigurationError: it does not let us have it.
        """
        async with self._opening:
            if self._channel is not None:
                return
            connection = await self._sending.connection()
            channel = await connection.channel(confirms=True)
            channel.on_confirm = self._on_confirm
            channel.on_return = self._on_return
            channel.on_fault = self._on_fault
            self._mark, self._tag = uuid.uuid4().hex[:12], 0
            self._connection, self._channel = connection, channel
            connection.when_lost(functools.partial(self._on_lost, channel))

    def send(
        self, queue: str, headers: Mapping[str, Any], body: bytes, content_type: str | None, *, exchange: str = ""
    ) -> asyncio.Future[str]:
        """Begin to send a message.

        :param exchange: leads there; by default the one that leads to each queue by its name.
        :return: its result is empty as soon as the queue has it, on disk; otherwise why it hasn't.
        """
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        copy = _Copy(exchange, queue, dict(headers), body, content_type, future)
        if self.fault is not None:
            future.set_result(self.fault.text)
        elif self._channel is not None:
            self._write(self._channel, copy)
        else:
            self._early.append(copy)
            if self._task is None:
                self._task = asyncio.create_task(self._send_early())
        return future

    async def _send_early(self) -> None:
        try:
            while True:
                with contextlib.suppress(RefusedError):  # an alarm is on
                    await self.open()
                    break
                await asyncio.sleep(_ALARM)
        except TransportError as error:
            self.abandon(f"{LOST}: {error.message}")
        else:
            early, self._early = self._early, []
            for copy in early:
                if self._channel is not None:
                    self._write(self._channel, copy)
                else:  # by the one before
                    copy.future.set_result(LOST)
        finally:
            self._task = None

    def _write(self, channel: Channel, copy: _Copy) -> None:
        assert self._connection is not None
        self._tag += 1
        self._waiting[self._tag] = copy
        room = self._connection.frame_max - _FRAME
        properties = Basic.Properties(
            content_type=copy.content_type,
            delivery_mode=2,
            message_id=f"{self._mark}.{self._tag}",
            headers=copy.headers,
        )
        body = copy.body
        frames: list[Frame | ContentHeader | ContentBody] = [
            Basic.Publish(exchange=copy.exchange, routing_key=copy.queue, mandatory=True),
            ContentHeader(body_size=len(body), properties=properties),
            *(ContentBody(body[start : start + room]) for start in range(0, len(body), room)),
        ]
        try:
            self._connection.write(b"".join(pamqp.frame.marshal(frame, channel.number) for frame in frames))
        except (OSError, RuntimeError) as error:
            self._connection.fail(self._connection.lost(error))
            self._on_lost(channel)

    async def sent(self, future: asyncio.Future[str]) -> None:
        """Wait until a message is where it was sent.

        :raises RefusedError: the queue has not answered yet, perhaps because an alarm is on. It can be waited for
            again, and must not be sent again.
        :raises NotConnectedError: the queue doesn't take it, or the connection was lost.
        """
        await self.answered(future)
        if future.result():
            raise self.refusal(future)

    async def answered(self, future: asyncio.Future[str]) -> None:
        """Wait until it is known whether it is.

        :raises RefusedError: as `sent`.
        """
        await asyncio.wait({future}, timeout=self._patience)
        if future.done():
            return
        if self.alarm and self._connection is not None:
            raise self._connection.alarmed()
        raise RefusedError(
            f"RabbitMQ has not confirmed a copy of an event within {self._patience:g} s",
            "check the server and its cluster; its answer is waited for",
        )

    @staticmethod
    def refusal(future: asyncio.Future[str]) -> NotConnectedError:
        """What it means that a message is not where it was sent."""
        return NotConnectedError(
            f"RabbitMQ did not take a copy of an event: {future.result()}", "subscribe again; the event comes again"
        )

    def _on_confirm(self, tag: int, multiple: bool, acked: bool) -> None:
        for one in [one for one in self._waiting if one <= tag] if multiple else [tag]:
            copy = self._waiting.pop(one, None)
            if copy is not None and not copy.future.done():
                taken, why = acked and one not in self._returned, DELETED if acked else "refuses it"
                copy.future.set_result("" if taken else f"the queue {copy.queue} {why}")
            self._returned.discard(one)

    def _on_return(self, message: DeliveredMessage) -> None:
        mark, _, tag = str(message.header.properties.message_id).partition(".")
        if mark == self._mark:
            self._returned.add(int(tag))  # its confirm follows

    def _on_fault(self, fault: ClosedError) -> None:
        self.fault = fault
        self.abandon(fault.text)

    def _on_lost(self, channel: Channel) -> None:
        """The connection was: the next message opens another one."""
        if channel is self._channel:
            self._channel = None
            self.abandon(LOST)

    def abandon(self, why: str) -> None:
        """Wait for no answer any more."""
        copies = [*self._waiting.values(), *self._early]
        self._waiting.clear()
        self._early.clear()
        self._returned.clear()
        for copy in copies:
            if not copy.future.done():
                copy.future.set_result(why)

    async def end(self) -> None:
        """Give up what is not answered. The channel ends with its connection."""
        self.abandon("the subscription is closed")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
