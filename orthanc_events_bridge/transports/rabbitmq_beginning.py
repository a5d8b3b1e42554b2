"""The past of a name that begins with the oldest event: what the history holds, put into the name's inbox once.

The name's queue is bound first; then the history is copied up to that moment; and only when that has been received does
anybody take from the name's queue. So every event comes, in order, and only once as long as nobody is killed meanwhile.

How far it has come is said by one message in the queue ``orthanc.beginning.{name}``. Whoever holds it does the work,
one step at a time, and puts the next such message there before it acknowledges the last: another goes on where it died.
The last copy is followed by a message that says so, and whoever receives that makes the exchange
``orthanc.told.{name}`` and deletes the queue, by which others learn of it.

The past of an ordered name goes into a queue for each partition, ``orthanc.beginning.{name}.00`` to ``.63``, and is
received before what its partition gets now.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, RefusedError
from orthanc_events_bridge.transports.headers import ADDRESS, EVENT_ID, OPERATION
from orthanc_events_bridge.transports.rabbitmq_asking import Asking, channel_closed
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_copies import DELETED, Copies
from orthanc_events_bridge.transports.rabbitmq_message import headers_of
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from orthanc_events_bridge.transports.rabbitmq_topology import offset

#: The ``orthanc-operation`` of the message behind the last copy.
_END: Final = "end-of-past"
#: So many messages are copied in one step; and so many are fetched, more than are ever stored together.
_STEP: Final = 200
_FETCH: Final = 10_000
#: Seconds after which a history that shows nothing is empty.
_EMPTY: Final = 1.0
#: For so many seconds the message that says how far it has come is held at a time: behind ``consumer_timeout``, of a
#: minute at the least, RabbitMQ would take it back and close the channel.
_KEEP: Final = 30.0
#: Seconds after which what was routed by the bindings of a moment ago has come to where it was sent.
_MARGIN: Final = 0.1


class Beginning:
    """One subscriber's part in it.

    :param copies: opened by whom it belongs to.
    """

    def __init__(self, connection: Connection, options: RabbitOptions, queues: Queues, copies: Copies) -> None:
        self._connection = connection
        self._options = options
        self._queues = queues
        self._copies = copies
        self._news = asyncio.Event()
        self._mark: DeliveredMessage | None = None
        self._deleted = False
        self._received = False
        self._stopped = False
        self._reader: Channel | None = None
        self._read: deque[DeliveredMessage] = deque()

    # From outside.

    async def announce(self) -> None:
        """Write down that there is a past to be copied.

        :raises NotConnectedError: RabbitMQ doesn't answer.
        :raises TransportConfigurationError: RabbitMQ does not permit it.
        """
        try:
            await self._copies.open()
            future, _ = self._mark_with({})
            await self._copies.sent(future)
        except RefusedError as error:
            raise NotConnectedError(error.message, error.remedy) from error

    def end_received(self) -> None:
        """The message behind the last copy was."""
        self._received = True
        self._news.set()

    def stop(self) -> None:
        """Let the step that is being done be the last."""
        self._stopped = True
        self._news.set()

    async def run(self) -> bool:
        """Take part until the past has been received.

        :return: whether it has; not if it was stopped.
        :raises ClosedError: RabbitMQ does not permit something.
        :raises TransportError: RabbitMQ doesn't answer; or see `check_over`.
        """
        connection, queue = self._connection, self._queues.beginning
        channel = await connection.channel()
        try:
            await connection.ask(channel.basic_qos(prefetch_count=1))
            await connection.ask(channel.consume(queue, self._on_mark, self._on_deleted))
            channel.on_fault = lambda fault: self._news.set()
            known, ended = "", False
            while True:
                await self._until(lambda: self._mark or self._ends(channel))
                mark, self._mark = self._mark, None
                if channel.fault is not None:
                    raise channel_closed(queue, channel.fault)
                if self._deleted:
                    break
                if self._received:
                    await connection.ask(
                        channel.exchange_declare(self._queues.told, exchange_type="fanout", durable=True)
                    )
                    await connection.ask(channel.queue_delete(queue))
                    return True
                if self._stopped:
                    return False
                if mark is None:
                    continue
                state = json.loads(mark.body)
                # Another than we have put there is one that its writer had not come to acknowledge.
                if known in ("", state["id"]):
                    if "until" in state and state["next"] > state["until"]:
                        if not ended:
                            await self._say_end()
                        ended = True
                        # It is kept, so that nobody else does the same; but it is given to us anew in time.
                        if not await self._until(lambda: self._ends(channel), _KEEP):
                            await connection.ask(channel.basic_nack(mark.delivery_tag or 0, requeue=True))
                        continue
                    following = await self._step(state)
                    if following is None:
                        return False
                    known = await self._put(following)
                await connection.ask(channel.basic_ack(mark.delivery_tag or 0))
        except ClosedError as error:
            if not (error.missing and channel.fault is not None):
                raise
        finally:
            for one in (channel, self._reader):
                if one is not None:
                    await connection.end(one)
        await check_over(connection, self._options, self._queues)
        return True

    def _ends(self, channel: Channel) -> bool:
        return self._received or self._deleted or self._stopped or channel.fault is not None

    async def _until(self, condition: Callable[[], object], seconds: float = math.inf) -> bool:
        """Wait for news, at most so long.

        :return: whether it is so.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition() and loop.time() < end:
            self._news.clear()
            await self._connection.wait_for(self._news, end - loop.time() if seconds < math.inf else None)
        return bool(condition())

    def _on_mark(self, message: DeliveredMessage) -> None:
        self._mark = message
        self._news.set()

    def _on_deleted(self) -> None:
        self._deleted = True
        self._news.set()

    async def _put(self, state: Mapping[str, Any]) -> str:
        future, identifier = self._mark_with(state)
        await self._sent(future)
        return identifier

    def _mark_with(self, state: Mapping[str, Any]) -> tuple[asyncio.Future[str], str]:
        identifier = uuid.uuid4().hex
        body = json.dumps({**state, "id": identifier}).encode()
        return self._copies.send(self._queues.beginning, {}, body, "application/json"), identifier

    async def _say_end(self) -> None:
        sent = [self._copies.send(queue, {OPERATION: _END}, b"", None) for queue in self._queues.pasts]
        for future in sent:
            await self._sent_to_past(future)

    async def _sent(self, future: asyncio.Future[str]) -> None:
        """Wait until a copy is where it was sent, while an alarm is on for as long as that takes."""
        while True:
            try:
                await self._copies.sent(future)
            except RefusedError as error:
                if not self._copies.alarm:
                    raise NotConnectedError(error.message, error.remedy) from error
            else:
                return

    async def _sent_to_past(self, future: asyncio.Future[str]) -> None:
        """The same for a past; that of an ordered name is deleted when all of it has come."""
        try:
            await self._sent(future)
        except NotConnectedError:
            if not (self._queues.ordered and future.done() and future.result().endswith(DELETED)):
                raise

    # The steps.

    async def _step(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Do what comes next.

        :return: how far it has come then; none where it was stopped before it had done anything.
        """
        return await (self._copy(state) if "until" in state else self._plan())

    async def _plan(self) -> dict[str, Any] | None:
        """Bind the name's queue, and find out what it doesn't get."""
        connection, options = self._connection, self._options
        channel = await connection.channel()
        try:
            seen: list[int] = []

            def see(message: DeliveredMessage) -> None:
                seen.append(offset(message))
                self._news.set()

            await self._consume(channel, see, "first", 1)
            await self._until(lambda: seen or self._stopped, _EMPTY)
            if self._stopped:
                return None
            # All queues begin with the same event: what comes to the twin comes to them, and need not be copied.
            published, fork = self._queues.published, self._queues.beginning
            skip: list[str] = []
            twin = (await connection.ask(channel.queue_declare(exclusive=True, auto_delete=True))).queue or ""
            await connection.ask(channel.basic_qos(prefetch_count=0))
            await connection.ask(channel.consume(twin, lambda message: skip.append(_id(message)), _nothing))
            await connection.ask(channel.exchange_declare(fork, exchange_type="topic"))
            for queue, keys in (published | {twin: "#"}).items():
                await connection.ask(channel.queue_bind(queue, fork, keys))
            await connection.ask(channel.exchange_bind(fork, options.exchange, "#"))
            for queue, keys in published.items():
                await connection.ask(channel.queue_bind(queue, options.exchange, keys))
            await asyncio.sleep(_MARGIN)
            last = await self._last() if seen else -1
            await asyncio.sleep(_MARGIN)
            await connection.ask(channel.exchange_delete(fork))
            await connection.ask(channel.queue_declare(twin, passive=True))  # answered when all of it is here
            return {"next": seen[0] if seen else 0, "until": last, "skip": skip}
        finally:
            await connection.end(channel)

    async def _last(self) -> int:
        """The number of the history's last message; -1 if there is none."""
        connection = self._connection
        channel = await connection.channel()
        try:
            seen: list[int] = []

            def see(message: DeliveredMessage) -> None:
                seen.append(offset(message))
                self._news.set()

            await self._consume(channel, see, "last", _FETCH)
            await self._until(lambda: seen, _EMPTY)
            # It hands over all that is stored together before it answers the next question.
            await connection.ask(channel.queue_declare(self._options.history, passive=True))
            return max(seen, default=-1)
        finally:
            await connection.end(channel)

    async def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        connection = self._connection
        if self._reader is None:
            state["until"] = min(state["until"], await self._last())  # it may be another history by now
            self._reader = await connection.channel()
            await self._consume(self._reader, self._on_read, state["next"], 2 * _STEP)
            return state
        await self._until(lambda: self._read, self._options.ack_timeout)
        some = [self._read.popleft() for _ in range(min(_STEP, len(self._read)))]
        if not some:
            raise NotConnectedError(
                f"the history {self._options.history} of RabbitMQ gives no more events", "check the server"
            )
        skip = set(state["skip"])
        sent = [
            self._copies.send(queue, _headers(message), message.body, message.header.properties.content_type)
            for message in some
            if offset(message) <= state["until"] and _id(message) not in skip
            if (queue := self._queues.past(message.routing_key or ""))
        ]
        for future in sent:
            await self._sent_to_past(future)
        await connection.ask(self._reader.basic_ack(some[-1].delivery_tag or 0, multiple=True))
        return state | {"next": offset(some[-1]) + 1}

    def _on_read(self, message: DeliveredMessage) -> None:
        self._read.append(message)
        self._news.set()

    async def _consume(self, channel: Channel, receive: Any, begin: str | int, count: int) -> None:
        connection, history = self._connection, self._options.history

        def gone() -> None:
            connection.fail(
                NotConnectedError(
                    f"the history {history} of RabbitMQ was deleted", "it is made or found again by itself"
                )
            )

        await connection.ask(channel.basic_qos(prefetch_count=count))
        await connection.ask(channel.consume(history, receive, gone, arguments={"x-stream-offset": begin}))


async def check_over(connection: Connection, options: RabbitOptions, queues: Queues) -> None:
    """Has all of the past been received, now that a queue of it is gone?

    :raises NotConnectedError: no: the exchange was deleted, and another subscriber makes a new beginning, or will.
    """
    asking = Asking(connection)
    try:
        # In this order: `rabbitmq_queues` makes the second before the first.
        deleted = options.declare and not await asking.leads(queues.live)
        if deleted or await asking.begun(queues.beginning, queues.told):
            raise NotConnectedError(
                f"the exchange {options.exchange} of RabbitMQ was deleted, and the history is told to {queues.name} "
                "from its beginning",
                "take part in that by subscribing again",
            )
    finally:
        await asking.end()


def is_end(message: DeliveredMessage) -> bool:
    """Is it the message behind the last copy?"""
    return (message.header.properties.headers or {}).get(OPERATION) == _END


def _headers(message: DeliveredMessage) -> dict[str, Any]:
    return headers_of(message) | {ADDRESS: message.routing_key or ""}


def _id(message: DeliveredMessage) -> str:
    return str((message.header.properties.headers or {}).get(EVENT_ID))


def _nothing() -> None:
    """A queue of our own was deleted, and that is of no interest."""
