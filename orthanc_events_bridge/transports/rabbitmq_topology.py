"""The exchange that events go to and the stream queue that keeps them: found and checked, or made; and watched."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

_T = TypeVar("_T")

#: The watch's name among the history's consumers.
WATCH: Final = "orthanc-events-bridge.watch"
#: RabbitMQ closes a channel on which a message waits too long for its acknowledgement: after a minute at the least.
_ACKNOWLEDGE: Final = 10.0
#: Seconds between two looks at whether a queue can be used yet.
_READY: Final = 0.1
_AGES: Final = (("D", 86400), ("h", 3600), ("m", 60), ("s", 1))
#: Seconds in which the first message of a stream comes, and one after another.
_FIRST: Final = 1.0
_FURTHER: Final = 0.3


def stream_arguments(options: RabbitOptions) -> dict[str, Any]:
    """With what arguments the history is declared."""
    limits = options.limits
    arguments: dict[str, Any] = {"x-queue-type": "stream", "x-stream-max-segment-size-bytes": limits.segment}
    if limits.max_bytes:
        arguments["x-max-length-bytes"] = limits.max_bytes
    if limits.max_age:
        seconds = math.ceil(limits.max_age)
        unit, size = next((unit, size) for unit, size in _AGES if seconds % size == 0)
        arguments["x-max-age"] = f"{seconds // size}{unit}"
    return arguments


async def open_place(connection: Connection, options: RabbitOptions) -> bool:
    """Find the exchange and the history and check them, or make them.

    :return: whether the history is new.
    :raises NotConnectedError: RabbitMQ doesn't answer.
    :raises TransportConfigurationError: they can't be used as they are.
    """
    questions = _Questions(connection, options)
    try:
        missing = not await questions.exists(options.history, "queue")
        if not options.declare:
            if missing or not await questions.exists(options.exchange, "exchange"):
                name = f"queue {options.history}" if missing else f"exchange {options.exchange}"
                raise TransportConfigurationError(
                    f"RabbitMQ has no {name}, and declare is false", "make it, or set declare to true"
                )
            return False
        differing = [
            await questions.declare(
                f"exchange {options.exchange}",
                lambda channel: channel.exchange_declare(options.exchange, exchange_type="topic", durable=True),
            ),
        ]
        if missing or not options.limits_as_found:
            declared = await questions.declare(
                f"queue {options.history}",
                lambda channel: channel.queue_declare(
                    options.history, durable=True, arguments=stream_arguments(options)
                ),
            )
            differing.append(declared)
        if any(differing):
            raise TransportConfigurationError(
                f"RabbitMQ has {' and '.join(filter(None, differing))}",
                "change `limits`, or delete it so that it is made anew, or set declare to false to use it as it is",
            )
        await questions.declare(
            f"binding of queue {options.history} to exchange {options.exchange}",
            lambda channel: channel.queue_bind(options.history, options.exchange, "#"),
        )
        return missing
    finally:
        await questions.end()


class _Questions:
    """A channel to ask on; another one when the server has closed it for an answer."""

    def __init__(self, connection: Connection, options: RabbitOptions) -> None:
        self._connection = connection
        self._options = options
        self._channel: Channel | None = None

    async def _answer(self, question: Callable[[Channel], Awaitable[_T]]) -> _T:
        if self._channel is None or self._channel.fault is not None:
            self._channel = await self._connection.channel()
        return await self._connection.ask(question(self._channel))

    async def exists(self, name: str, kind: str) -> bool:
        """Whether there is a ``queue`` or an ``exchange`` of this name."""

        def look(channel: Channel) -> Awaitable[object]:
            if kind == "queue":
                return channel.queue_declare(name, passive=True)
            return channel.exchange_declare(name, passive=True)

        end = asyncio.get_running_loop().time() + self._options.connect_timeout
        while True:
            try:
                await self._answer(look)
            except ClosedError as error:
                if error.code != 404:
                    raise self._refused(f"the {kind} {name}", error) from error
                if error.missing:
                    return False
                # A server that has just started has not found its streams yet.
                if asyncio.get_running_loop().time() > end:
                    raise self._not_ready(name, error) from error
                await asyncio.sleep(_READY)
            else:
                return True

    async def declare(self, what: str, question: Callable[[Channel], Awaitable[object]]) -> str:
        """Make something where it is missing.

        :return: how it differs where it is there already, with other settings; empty if it doesn't.
        """
        try:
            await self._answer(question)
        except ClosedError as error:
            if error.code == 406:
                return f"the {what} with other settings: {_difference(error.text)}"
            raise self._refused(f"the {what}", error) from error
        return ""

    async def end(self) -> None:
        if self._channel is not None:
            await self._connection.end(self._channel)

    @staticmethod
    def _not_ready(what: str, error: ClosedError) -> NotConnectedError:
        # RabbitMQ 3.10 loses a stream for good when it is killed within seconds of making its very first one.
        return NotConnectedError(
            f"RabbitMQ can't use {what} at the moment: {error.text}",
            "start its node and wait; if it stays so though the server is well, choose another name for `history`",
        )

    def _refused(self, what: str, error: ClosedError) -> TransportError:
        if error.code == 403:
            return TransportConfigurationError(
                f"RabbitMQ does not permit this user to use {what}: {error.text}",
                f"let it configure, write and read {self._options.exchange} and {self._options.history}, "
                "or make them yourself and set declare to false",
            )
        if error.code == 405:
            return TransportConfigurationError(
                f"RabbitMQ has {what} as an exclusive queue of another connection: {error.text}",
                "end that connection, or choose another name for `history`",
            )
        if error.code == 404:  # deleted, or gone with its node, while we asked
            return self._not_ready(what, error)
        return TransportConfigurationError(
            f"RabbitMQ refuses {what}: {error.text} ({error.code})", "see the RabbitMQ server's log"
        )


def _difference(text: str) -> str:
    found = re.search(r"inequivalent arg '([^']+)' .*: received (.*) but current is (.*)", text)
    if found is None:
        return text
    wanted, current = (
        re.sub(r"^(?:the value )?'(.*?)'(?: of type '\w+')?$", r"\1", part) for part in (found[2], found[3])
    )
    return f"{found[1]} is {current}, wanted {wanted}"


class Watch:
    """A consumer of the history by which RabbitMQ tells that it was deleted.

    It takes a message now and then only.

    :ivar working: whether RabbitMQ permits it.
    """

    def __init__(self, connection: Connection, deleted: Callable[[], None]) -> None:
        self._connection = connection
        self._deleted = deleted
        self._channel: Channel | None = None
        self._held: tuple[int, float] | None = None
        self.working = False

    async def keep(self, history: str) -> None:
        """Begin to watch, or go on; to be called now and then.

        :raises TransportError: RabbitMQ doesn't answer.
        """
        if self._channel is None or (self._channel.fault is not None and self.working):
            await self._begin(history)
        elif self._held is not None and asyncio.get_running_loop().time() - self._held[1] > _ACKNOWLEDGE:
            tag, self._held = self._held[0], None
            await self._connection.ask(self._channel.basic_ack(tag, wait=False))

    async def _begin(self, history: str) -> None:
        self._channel, self._held = await self._connection.channel(), None
        arguments = {"x-stream-offset": "next"}
        try:
            await self._connection.ask(self._channel.basic_qos(prefetch_count=1))
            await self._connection.ask(
                self._channel.consume(history, self._receive, self._deleted, tag=WATCH, arguments=arguments)
            )
        except ClosedError:
            self.working = False  # not permitted, or no stream: then we see less, which is no fault
        else:
            self.working = True

    def _receive(self, message: DeliveredMessage) -> None:
        self._held = message.delivery_tag or 0, asyncio.get_running_loop().time()


async def count(connection: Connection, history: str) -> int:
    """How many events the history holds.

    :raises TransportError: RabbitMQ doesn't answer, or does not permit it.
    """
    # Its own count is behind by seconds.
    first = await _offsets(connection, history, "first")
    last = await _offsets(connection, history, "last") if first else []
    return last[-1] - first[0] + 1 if last else 0


async def _offsets(connection: Connection, history: str, begin: str) -> list[int]:
    """The numbers of the first message, or of those at the end."""
    channel = await connection.channel()
    found: list[int] = []
    came = asyncio.Event()

    def receive(message: DeliveredMessage) -> None:
        found.append(offset(message))
        came.set()

    try:
        await connection.ask(channel.basic_qos(prefetch_count=1 if begin == "first" else 10_000))
        await connection.ask(channel.consume(history, receive, came.set, arguments={"x-stream-offset": begin}))
        while not (found and begin == "first"):
            came.clear()
            if not await connection.wait_for(came, _FURTHER if found else _FIRST):
                break
        return found
    except ClosedError as error:
        raise TransportConfigurationError(
            f"RabbitMQ does not let us read the history {history}: {error.text}", "let the user read it"
        ) from error
    finally:
        await connection.end(channel)


def offset(message: DeliveredMessage) -> int:
    """The number of a message in its stream, from 0 on.

    :raises TransportConfigurationError: it comes from another kind of queue.
    """
    number = (message.header.properties.headers or {}).get("x-stream-offset")
    if number is None:
        raise TransportConfigurationError(
            "the history of RabbitMQ is no stream", "delete it, and make it with x-queue-type stream"
        )
    return int(str(number))
