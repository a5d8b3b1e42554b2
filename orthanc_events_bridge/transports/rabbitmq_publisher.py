"""Publishing to RabbitMQ: a batch is written in slices, and its confirms are counted, on one channel.

aiormq makes a future and takes a lock for each message; here a batch has one of each.
"""

from __future__ import annotations

import asyncio
import functools
import re
import struct
import uuid
from collections.abc import Iterator, Sequence
from typing import Final

import pamqp.frame
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.constants import FRAME_BODY, FRAME_HEADER

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.base import Outgoing, PublishError
from orthanc_events_bridge.transports.headers import EVENT_ID
from orthanc_events_bridge.transports.rabbitmq_batch import Batch
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

#: What is handed over before confirms get their turn: so many events or bytes.
_SLICE: Final = 50
_SLICE_BYTES: Final = 256 * 1024
#: Seconds between two looks at whether anything moves, and how long nothing may move before an alarm is told.
_LOOK: Final = 0.1
_ALARMED: Final = 0.3
#: Every server takes bodies of this size. How large one can be it says only by closing the channel.
_SMALL: Final = 16 * 1024
# The wire's shapes: a frame's type, channel and size; a header's class, weight, size of the body, and which of the
# properties are there (content type, headers, delivery mode, message id; AMQP 0.9.1, sections 2.3.5 and 4.2.6).
_FRAME: Final = struct.Struct(">BHI")
_HEADER: Final = struct.Struct(">HHQH")
_LENGTH: Final = struct.Struct(">I")
_PROPERTIES: Final = 1 << 15 | 1 << 13 | 1 << 12 | 1 << 7


class Publisher:
    """A channel of a connection, on which events are published in order.

    :param without: protections that are left out, for mutants.
    :param queue: takes all of them, by the default exchange, in place of ours with its routing keys.
    """

    def __init__(
        self, connection: Connection, options: RabbitOptions, without: frozenset[str], queue: str = ""
    ) -> None:
        self._connection = connection
        self._options = options
        self._queue = queue
        self._exchange = "" if queue else options.exchange
        self._without = without
        self._channel: Channel
        self._delivery = b"\x01" if "persistent" in without else b"\x02"
        self._mark = ""
        self._tag = 0  # of the last event that was sent
        self._batch: Batch | None = None
        self._accepted = _SMALL  # a body of this size was taken already
        self._largest: int | None = None  # the server's limit, once it has told
        self._method = functools.lru_cache(maxsize=10_000)(self._encode_method)

    async def open(self) -> None:
        """Open the channel.

        :raises TransportError: RabbitMQ doesn't answer.
        """
        channel = self._channel = await self._connection.channel(confirms=True)
        self._mark, self._tag = uuid.uuid4().hex[:12], 0
        self._method.cache_clear()
        channel.on_confirm = self._on_confirm
        channel.on_return = self._on_return
        channel.on_fault = self._on_fault

    async def publish(self, events: Sequence[Outgoing]) -> None:
        """See `orthanc_events_bridge.transports.base.Transport.publish`."""
        start = 0
        while start < len(events):
            end = self._portion(events, start)
            if end == start:
                raise PublishError(start, self._too_large(len(events[start].body)))
            try:
                await self._publish(events[start:end])
            except PublishError as error:
                stored = (start + index for index in error.stored)
                raise PublishError(start + error.confirmed, error.error, stored) from error.__cause__
            self._accepted = max(self._accepted, *(len(event.body) for event in events[start:end]))
            start = end

    def _portion(self, events: Sequence[Outgoing], start: int) -> int:
        """How far to send at a time: a body larger than any before goes alone, since it can cost us the channel."""
        for index in range(start, len(events)):
            size = len(events[index].body)
            if self._largest is not None and size > self._largest:
                return index
            if size > self._accepted:
                return max(index, start + 1)
        return len(events)

    async def _publish(self, events: Sequence[Outgoing]) -> None:
        batch = self._batch = Batch(self._tag + 1, len(events))
        sending: asyncio.Task[None] | None = None
        try:
            if self._channel.fault is not None:
                raise self._channel.fault
            if self._connection.alarm:
                raise self._connection.alarmed()
            sending = asyncio.create_task(self._send(batch, events))
            if "confirm" in self._without:
                await sending
                return
            await self._settle(batch)
            if batch.refused:
                raise self._refused()
            if batch.returned:
                raise self._unroutable()
        except ClosedError as closed:
            raise batch.failed(await self._closed(closed, events[batch.leading])) from closed
        except TransportError as error:
            raise batch.failed(error) from error.__cause__
        finally:
            self._batch = None
            if sending is not None:
                sending.cancel()

    async def _send(self, batch: Batch, events: Sequence[Outgoing]) -> None:
        try:
            for some in _slices(events):
                await asyncio.sleep(0)
                if self._batch is not batch or batch.end < len(events) or self._channel.fault is not None:
                    return
                frames = b"".join(self._encode(event, self._tag + 1 + index) for index, event in enumerate(some))
                self._tag += len(some)
                batch.sent += len(some)
                self._connection.write(frames)
                await self._connection.drain()
        except (OSError, RuntimeError) as error:
            self._connection.fail(self._connection.lost(error))

    def _encode(self, event: Outgoing, tag: int) -> bytes:
        """As the protocol spells it: pamqp takes five times as long, and with it half of a drain's time."""
        number, room, body = self._channel.number, self._connection.frame_max - _FRAME.size - 1, event.body
        named = {EVENT_ID: event.id}
        if event.headers or event.attributes:
            named |= dict(event.headers) | {f"ce-{name}": value for name, value in event.attributes}
        table = b"".join(_short(name) + b"S" + _long(value.encode()) for name, value in named.items())
        # The event's own id would not tell two sends of it apart.
        properties = (_short(event.content_type), _long(table), self._delivery, _short(f"{self._mark}.{tag}"))
        header = _HEADER.pack(Basic.frame_id, 0, len(body), _PROPERTIES) + b"".join(properties)
        parts = (body[start : start + room] for start in range(0, len(body), room))
        return b"".join(
            (
                self._method(self._queue or event.address),
                _frame(FRAME_HEADER, number, header),
                *(_frame(FRAME_BODY, number, part) for part in parts),
            )
        )

    def _encode_method(self, routing_key: str) -> bytes:
        mandatory = "mandatory" not in self._without
        publish = Basic.Publish(exchange=self._exchange, routing_key=routing_key, mandatory=mandatory)
        return pamqp.frame.marshal(publish, self._channel.number)

    # The answers.

    def _on_confirm(self, tag: int, multiple: bool, acked: bool) -> None:
        if self._batch is not None:
            self._batch.answer(tag, multiple, acked)

    def _on_return(self, message: DeliveredMessage) -> None:
        mark, _, tag = str(message.header.properties.message_id).partition(".")
        if self._batch is not None and mark == self._mark:
            self._batch.give_back(int(tag))

    def _on_fault(self, fault: ClosedError) -> None:
        if self._batch is not None:
            self._batch.finish()

    async def _settle(self, batch: Batch) -> None:
        """Wait for the answers, as long as anything moves.

        :raises ClosedError: the server has closed the channel.
        :raises TransportError: nothing moves.
        """
        loop = asyncio.get_running_loop()
        seen, since = (-1, -1), loop.time()
        while not await self._connection.wait(batch.done, _LOOK):
            moved = batch.progress, self._connection.waiting
            if moved != seen:
                seen, since = moved, loop.time()
            quiet, patience = loop.time() - since, self._options.ack_timeout
            if self._connection.alarm and quiet > min(_ALARMED, patience):
                raise self._connection.alarmed()
            if quiet > patience:
                raise NotConnectedError(
                    f"RabbitMQ has not confirmed an event within {patience:g} s",
                    "check the server and the queues that are bound to the exchange; the events are sent again",
                )
        if self._channel.fault is not None and batch.leading < batch.end:
            raise self._channel.fault

    # What goes wrong.

    async def _closed(self, closed: ClosedError, event: Outgoing) -> TransportError:
        """What it means that the server has closed the channel; an event that is too large costs no more than that.

        :param event: the first one that is not confirmed.
        """
        limit = re.search(r"larger than (?:configured )?max(?:imum)? size (\d+)", closed.text)
        if limit is None:
            error = self._no_exchange(closed)
            self._connection.fail(error)
            return error
        self._largest = int(limit[1])
        try:
            await self.open()
        except TransportError as error:
            self._connection.fail(error)
        if len(event.body) > self._largest:
            return self._too_large(len(event.body))
        return RefusedError("RabbitMQ has closed the channel for an event that is too large", "it is set aside next")

    def _no_exchange(self, closed: ClosedError) -> TransportError:
        exchange = self._exchange or "amq.default"
        if closed.code == 403:
            return TransportConfigurationError(
                f"RabbitMQ does not permit this user to publish: {closed.text}", f"let it write to {exchange}"
            )
        if closed.code == 404:
            return NotConnectedError(
                f"the exchange {exchange} of RabbitMQ was deleted: {closed.text}", "it is made or found again by itself"
            )
        return NotConnectedError(
            f"RabbitMQ has closed the channel: {closed.text} ({closed.code})", "it is opened again by itself"
        )

    def _too_large(self, size: int) -> EventRejectedError:
        return EventRejectedError(
            f"the event has {size} bytes, and RabbitMQ takes {self._largest}", "raise max_message_size at the server"
        )

    def _refused(self) -> RefusedError:
        if self._queue:
            return RefusedError(
                f"the queue {self._queue} of RabbitMQ is refusing events",
                "see `rabbitmqctl list_queues name messages arguments`, and `rabbitmqctl list_policies`",
            )
        return RefusedError(
            f"a queue that is bound to the exchange {self._options.exchange} of RabbitMQ is refusing events",
            "find the full one with `rabbitmqctl list_queues name messages arguments`, then empty it, raise its limit "
            "or unbind it",
        )

    def _unroutable(self) -> TransportError:
        text = f"no queue of RabbitMQ takes what is sent to the exchange {self._options.exchange}"
        error: TransportError
        if self._queue:
            error = NotConnectedError(
                f"the queue {self._queue} of RabbitMQ was deleted", "it is made or found again by itself"
            )
        elif self._options.declare:
            error = NotConnectedError(
                f"{text}: the history was deleted or unbound", "it is made and bound again by itself"
            )
        else:
            error = TransportConfigurationError(
                text, f"bind {self._options.history} to it with the routing key #, or set declare to true"
            )
        self._connection.fail(error)
        return error


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return b"%b%b\xce" % (_FRAME.pack(kind, channel, len(payload)), payload)


def _short(text: str) -> bytes:
    data = text.encode()
    return b"%c%b" % (len(data), data)


def _long(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _slices(events: Sequence[Outgoing]) -> Iterator[Sequence[Outgoing]]:
    start = size = 0
    for index, event in enumerate(events):
        if index - start >= _SLICE or size > _SLICE_BYTES:
            yield events[start:index]
            start, size = index, 0
        size += event.size
    if start < len(events):
        yield events[start:]
