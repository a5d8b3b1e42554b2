"""Copies of received messages, put into a queue by its name and confirmed by it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any, Final

import pamqp.frame
from aiormq.abc import DeliveredMessage
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection

#: How a result ends where there is no such queue.
DELETED: Final = "was deleted"
#: A frame's own bytes.
_FRAME: Final = 8


class Copies:
    """A channel on which messages are sent to queues.

    :param patience: how long a queue can take to confirm, in seconds.
    """

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._mark = uuid.uuid4().hex[:12]
        self._tag = 0
        self._waiting: dict[int, tuple[str, asyncio.Future[str]]] = {}
        self._returned: set[int] = set()
        self.channel: Channel | None = None

    async def open(self) -> None:
        """Open the channel.

        :raises TransportError: RabbitMQ doesn't answer.
        """
        self.channel = await self._connection.channel(confirms=True)
        self.channel.on_confirm = self._on_confirm
        self.channel.on_return = self._on_return
        self.channel.on_fault = self._on_fault

    @property
    def waiting(self) -> list[asyncio.Future[str]]:
        """Those that are not answered yet."""
        return [future for _, future in self._waiting.values()]

    def send(
        self, queue: str, headers: Mapping[str, Any], body: bytes, content_type: str | None, *, exchange: str = ""
    ) -> asyncio.Future[str]:
        """Begin to send a message.

        :param exchange: leads there; by default the one that leads to each queue by its name.
        :return: its result is empty as soon as the queue has it, on disk; otherwise why it hasn't.
        """
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        channel = self.channel
        if channel is None or channel.fault is not None:
            future.set_result(channel.fault.text if channel and channel.fault else "the channel is not open")
            return future
        self._tag += 1
        self._waiting[self._tag] = queue, future
        room = self._connection.frame_max - _FRAME
        properties = Basic.Properties(
            content_type=content_type,
            delivery_mode=2,
            message_id=f"{self._mark}.{self._tag}",
            headers=dict(headers),
        )
        frames: list[Frame | ContentHeader | ContentBody] = [
            Basic.Publish(exchange=exchange, routing_key=queue, mandatory=True),
            ContentHeader(body_size=len(body), properties=properties),
            *(ContentBody(body[start : start + room]) for start in range(0, len(body), room)),
        ]
        try:
            self._connection.write(b"".join(pamqp.frame.marshal(frame, channel.number) for frame in frames))
        except (OSError, RuntimeError) as error:
            self._connection.fail(self._connection.lost(error))
            self.abandon("the connection was lost")
        return future

    async def sent(self, future: asyncio.Future[str]) -> None:
        """Wait until a message is where it was sent.

        :raises NotConnectedError: the queue doesn't take it.
        :raises TransportError: the connection was lost.
        """
        if not await self._connection.wait(future, self._patience):
            alarm = f": an alarm is on: {self._connection.alarm}" if self._connection.alarm else ""
            raise NotConnectedError(
                f"RabbitMQ has not confirmed a copy of an event within {self._patience:g} s{alarm}",
                "check the server; the event comes again",
            )
        if future.result():
            raise self.refusal(future)

    @staticmethod
    def refusal(future: asyncio.Future[str]) -> NotConnectedError:
        """What it means that a message is not where it was sent."""
        return NotConnectedError(
            f"RabbitMQ did not take a copy of an event: {future.result()}", "subscribe again; the event comes again"
        )

    def _on_confirm(self, tag: int, multiple: bool, acked: bool) -> None:
        for one in [one for one in self._waiting if one <= tag] if multiple else [tag]:
            queue, future = self._waiting.pop(one, ("", None))
            if future is not None and not future.done():
                taken = acked and one not in self._returned
                future.set_result("" if taken else f"the queue {queue} {DELETED if acked else 'refuses it'}")
            self._returned.discard(one)

    def _on_return(self, message: DeliveredMessage) -> None:
        mark, _, tag = str(message.header.properties.message_id).partition(".")
        if mark == self._mark:
            self._returned.add(int(tag))  # its confirm follows

    def _on_fault(self, fault: ClosedError) -> None:
        self.abandon(fault.text)

    def abandon(self, why: str) -> None:
        """Wait for no answer any more."""
        waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            if not future.done():
                future.set_result(why)
