"""What is asked about queues at RabbitMQ, one question behind the other; and what it means that one is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

_T = TypeVar("_T")

#: For so many seconds at most others are waited for who do the same, and so many between two looks.
_TURN: Final = 30.0
_PAUSE: Final = 0.05


@contextlib.asynccontextmanager
async def alone(connection: Connection, queue: str) -> AsyncGenerator[None]:
    """Do something that only one can do at a time: where two make a quorum queue, 3.10 ends the connection of one.

    :param queue: is there meanwhile; its last part says what is done to what is called like the rest.
    :raises NotConnectedError: another has been doing it for too long, or RabbitMQ doesn't answer.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + _TURN
    while True:
        channel = await connection.channel()
        try:
            await connection.ask(channel.queue_declare(queue, durable=True, auto_delete=True))
            await connection.ask(channel.consume(queue, lambda message: None, lambda: None, exclusive=True))
            break
        except ClosedError as error:
            if not error.missing and "exclusive use" not in error.text:
                raise refused(connection, queue, error) from error
        if loop.time() > end:
            what, _, doing = queue.rpartition(".")
            raise NotConnectedError(
                f"somebody else has been {doing} {what} at RabbitMQ for {_TURN:g} s",
                "try again when they have ended; `rabbitmqctl list_consumers` shows who it is",
            )
        await asyncio.sleep(_PAUSE)
    try:
        yield
    finally:
        await connection.end(channel)


class Asking:
    """A channel to ask about queues on; another one when the server has closed it for an answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel: Channel | None = None

    async def _answer(self, question: Callable[[Channel], Awaitable[_T]]) -> _T:
        if self._channel is None or self._channel.fault is not None:
            self._channel = await self._connection.channel()
        return await self._connection.ask(question(self._channel))

    async def exists(self, queue: str) -> bool:
        """Whether there is such a queue."""
        return await self._found(queue, lambda channel: channel.queue_declare(queue, passive=True))

    async def leads(self, exchange: str) -> bool:
        """Whether there is such an exchange."""
        return await self._found(exchange, lambda channel: channel.exchange_declare(exchange, passive=True))

    async def begun(self, queue: str, told: str) -> bool:
        """Whether there is a past that is still to be received, in this queue; not if there is such an exchange."""
        return await self.exists(queue) and not await self.leads(told)

    async def _found(self, name: str, question: Callable[[Channel], Awaitable[object]]) -> bool:
        try:
            await self._answer(question)
        except ClosedError as error:
            if error.missing:
                return False
            raise refused(self._connection, name, error) from error
        return True

    async def check(self, queues: Iterable[str], exchanges: Iterable[str] = ()) -> None:
        """Are they there?

        :raises TransportConfigurationError: no.
        """
        missing = {
            "queue": [queue for queue in queues if not await self.exists(queue)],
            "exchange": [exchange for exchange in exchanges if not await self.leads(exchange)],
        }
        named = [f"no {kind} {', '.join(names)}" for kind, names in missing.items() if names]
        if named:
            raise TransportConfigurationError(
                f"RabbitMQ has {' and '.join(named)}, and declare is false",
                "make it, or set declare to true",
            )

    async def declare(self, queue: str, arguments: dict[str, Any]) -> None:
        """Make a queue, or see that it is there with these settings."""
        await self.ask(queue, lambda channel: channel.queue_declare(queue, durable=True, arguments=arguments))

    async def bind(self, queue: str, exchange: str, keys: str) -> None:
        """Let a queue have what comes by these routing keys."""
        await self.ask(queue, lambda channel: channel.queue_bind(queue, exchange, keys))

    async def delete(self, queue: str) -> None:
        """Delete a queue, if it is there."""
        await self.ask(queue, lambda channel: channel.queue_delete(queue))

    async def ask(self, queue: str, question: Callable[[Channel], Awaitable[object]]) -> None:
        """Ask something about a queue.

        :raises TransportError: see `refused`.
        """
        try:
            await self._answer(question)
        except ClosedError as error:
            raise refused(self._connection, queue, error) from error

    async def differs(self, name: str, question: Callable[[Channel], Awaitable[object]]) -> str:
        """How something is that is to be made, and is there with other settings; empty where it isn't.

        :raises TransportError: see `refused`.
        """
        try:
            await self._answer(question)
        except ClosedError as error:
            if error.code != 406:
                raise refused(self._connection, name, error, "exchange") from error
            return error.text
        return ""

    async def end(self) -> None:
        """Close the channel. Never raises."""
        if self._channel is not None:
            await self._connection.end(self._channel)


def deleted(options: RabbitOptions, what: str) -> NotConnectedError:
    """The error that says that something was that a subscription needs."""
    return NotConnectedError(
        f"the {what} was deleted",
        "it is made again when subscribing"
        if options.declare
        else "make it again: it is waited for, since declare is false",
    )


def channel_closed(whose: str, fault: ClosedError) -> NotConnectedError:
    """The error that says that RabbitMQ has closed the channel that something was received on."""
    return NotConnectedError(
        f"RabbitMQ has closed the channel of {whose}: {fault.text} ({fault.code})",
        "what was not settled comes again; where an event takes long, raise consumer_timeout at the server",
    )


def refused(connection: Connection, name: str, error: ClosedError, kind: str = "queue") -> TransportError:
    """Which of our errors it is that RabbitMQ doesn't let us use a queue, or an exchange."""
    if error.code == 403:
        return TransportConfigurationError(
            f"RabbitMQ does not permit this user to use the {kind} {name}: {error.text}",
            r"let it configure, write and read ^orthanc\..*, write to amq.default, and use amq.gen-*",
        )
    if error.code == 406 and "'x-max-length'" in error.text:
        return TransportConfigurationError(
            f"RabbitMQ has the {kind} {name} with another limit: {error.text}",
            "set limits.dead_letters back, or empty it with `orthanc-events dlq` and delete the queue "
            f"{name}, so that it is made anew",
        )
    if error.code in (405, 406):
        return TransportConfigurationError(
            f"RabbitMQ has the {kind} {name} with other settings: {error.text}",
            "delete it when it is empty, so that it is made anew, or give the consumer another name",
        )
    if error.missing:  # while we asked
        return NotConnectedError(f"the {kind} {name} of RabbitMQ was deleted", "subscribe again")
    if error.code == 404:  # its node is down
        return connection.lost(error)
    return TransportConfigurationError(
        f"RabbitMQ refuses the {kind} {name}: {error.text} ({error.code})", "see the RabbitMQ server's log"
    )
