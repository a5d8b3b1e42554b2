"""The queues of a consumer's name: found and checked, or made.

``orthanc.consumer.{name}`` is bound to the exchange. ``orthanc.inbox.{name}`` takes what is for this name alone: what
is tried again, and the past of a name that begins with the oldest event. What is to be tried later waits in
``orthanc.retry.{name}.{seconds}`` and goes to the inbox when the time is over.

When the exchange is deleted, the binding goes with it, and what the one that is made again is sent would never come. A
binding can't be asked for. So there is an exchange ``orthanc.consumer.{name}`` that leads to it and carries nothing.
RabbitMQ deletes that by itself with the last thing that it leads to: as long as it is there, so is the binding.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

_T = TypeVar("_T")

#: How long a message can wait at a time, in seconds; a longer delay is made of several waits.
STEPS: Final = (1, 5, 30, 120, 600, 3600)
#: RabbitMQ 4 drops a message that was given so often and never settled: 20 times, if nothing is said.
_ENOUGH: Final = 1_000_000_000
#: For so many seconds at most others are waited for who make the same queues, and so many between two looks.
_TURN: Final = 30.0
_PAUSE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Queues:
    """The names of a consumer's queues.

    :param inboxes: how inboxes' names begin.
    """

    name: str
    inboxes: str = "orthanc.inbox"

    @property
    def live(self) -> str:
        """What is published."""
        return f"orthanc.consumer.{self.name}"

    @property
    def inbox(self) -> str:
        """What is for this name alone."""
        return f"{self.inboxes}.{self.name}"

    @property
    def beginning(self) -> str:
        """There as long as the past is still to be copied (`orthanc_events_bridge.transports.rabbitmq_beginning`); an
        exchange of this name, for a moment."""
        return f"orthanc.beginning.{self.name}"

    def retry(self, seconds: int) -> str:
        """Where a message waits so long."""
        return f"orthanc.retry.{self.name}.{seconds}"

    @property
    def lasting(self) -> dict[str, dict[str, Any]]:
        """All but `beginning`, each with its arguments; `live` is the last."""
        limit: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": _ENOUGH}
        later: dict[str, Any] = limit | {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self.inbox,
            "x-dead-letter-strategy": "at-least-once",  # needs reject-publish
            "x-overflow": "reject-publish",
        }
        waiting = {self.retry(seconds): later | {"x-message-ttl": seconds * 1000} for seconds in STEPS}
        return {self.inbox: limit} | waiting | {self.live: limit}


async def open_queues(
    connection: Connection,
    options: RabbitOptions,
    queues: Queues,
    begin: Callable[[], Awaitable[None]],
    *,
    oldest: bool,
) -> bool:
    """Find a name's queues and check them, or make them.

    :param begin: writes down that the name begins with the oldest event.
    :param oldest: the name's very first subscription does; and each that finds the exchange made again.
    :return: whether the past is still to be copied; otherwise the name's queue is bound to the exchange.
    :raises NotConnectedError: RabbitMQ doesn't answer.
    :raises TransportConfigurationError: they can't be used as they are.
    """
    asking = _Asking(connection)
    try:
        if not options.declare:
            await asking.check(queues.lasting)
        elif not (await asking.exists(queues.live) and await asking.bound(queues)):
            async with _alone(connection, f"{queues.live}.making"):
                known = await asking.exists(queues.live)
                if not (known and await asking.bound(queues)):
                    await _make(asking, queues, begin if known or oldest else None)
        # Where there is one, it was made before the name's queue.
        beginning = await asking.exists(queues.beginning)
        if options.declare:
            for queue, arguments in queues.lasting.items():
                await asking.declare(queue, arguments)
            # It is not made here: one that is missing by now says that the exchange was deleted.
            await asking.ask(queues.live, lambda channel: channel.exchange_bind(options.exchange, queues.live))
            if not beginning:
                await asking.ask(queues.live, lambda channel: bind(channel, options, queues.live))
            if not await asking.bound(queues):
                raise NotConnectedError(
                    f"the exchange {options.exchange} of RabbitMQ was deleted while we subscribed", "subscribe again"
                )
        return beginning
    finally:
        await asking.end()


async def open_inbox(connection: Connection, options: RabbitOptions, queues: Queues) -> bool:
    """Find a name's inbox and check it, or make it, whether or not anybody has subscribed under this name.

    :return: whether it is new.
    :raises NotConnectedError: RabbitMQ doesn't answer.
    :raises TransportConfigurationError: it can't be used as it is.
    """
    asking = _Asking(connection)
    inbox = {queues.inbox: queues.lasting[queues.inbox]}
    try:
        if not options.declare:
            await asking.check(inbox)
            return False
        missing = not await asking.exists(queues.inbox)
        if missing:
            async with _alone(connection, f"{queues.live}.making"):
                missing = not await asking.exists(queues.inbox)
                if missing:
                    await _make_all(asking, queues, inbox)
        await asking.declare(queues.inbox, inbox[queues.inbox])
        return missing
    finally:
        await asking.end()


async def _make(asking: _Asking, queues: Queues, begin: Callable[[], Awaitable[None]] | None) -> None:
    """Make the queues of a name that is new, or whose exchange is another one."""
    # Of a start that was not finished; it may not even say how far it had come.
    await asking.ask(queues.beginning, lambda channel: channel.queue_delete(queues.beginning))
    if begin is not None:
        arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True, "x-delivery-limit": _ENOUGH}
        await asking.declare(queues.beginning, arguments)
        await begin()
    # Behind that, and before the name's queue: whoever dies in between has not begun, and does not begin anew.
    await asking.ask(queues.live, lambda channel: _sign(channel, queues.live))
    await _make_all(asking, queues, queues.lasting)


def _sign(channel: Channel, name: str) -> Awaitable[object]:
    """Make the exchange that is deleted with the one that it leads to."""
    return channel.exchange_declare(name, exchange_type="fanout", durable=True, auto_delete=True)


async def _make_all(asking: _Asking, queues: Queues, wanted: dict[str, dict[str, Any]]) -> None:
    for queue, arguments in wanted.items():
        await asking.declare(queue, arguments)
    # 3.10 writes down that a quorum queue was elected a leader when the next one is, or seconds later; one that is
    # killed before never has a leader again, and then not even an event is confirmed to its publisher.
    last = f"{queues.live}.made"
    await asking.declare(last, {"x-queue-type": "quorum"})
    await asking.ask(last, lambda channel: channel.queue_delete(last))


@contextlib.asynccontextmanager
async def _alone(connection: Connection, queue: str) -> AsyncGenerator[None]:
    """Do something that only one can do at a time: where two make a quorum queue, 3.10 ends the connection of one.

    :param queue: is there meanwhile.
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
            raise NotConnectedError(
                f"somebody else has been making {queue.removesuffix('.making')} at RabbitMQ for {_TURN:g} s",
                "see `rabbitmqctl list_consumers`",
            )
        await asyncio.sleep(_PAUSE)
    try:
        yield
    finally:
        await connection.end(channel)


def bind(channel: Channel, options: RabbitOptions, queue: str) -> Awaitable[object]:
    """Let a queue have every event."""
    return channel.queue_bind(queue, options.exchange, "#")


class _Asking:
    """A channel to ask on; another one when the server has closed it for an answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel: Channel | None = None

    async def _answer(self, question: Callable[[Channel], Awaitable[_T]]) -> _T:
        if self._channel is None or self._channel.fault is not None:
            self._channel = await self._connection.channel()
        return await self._connection.ask(question(self._channel))

    async def exists(self, queue: str) -> bool:
        return await self._found(queue, lambda channel: channel.queue_declare(queue, passive=True))

    async def bound(self, queues: Queues) -> bool:
        """Whether the exchange is the one still that the name's queue was bound to."""
        return await self._found(queues.live, lambda channel: channel.exchange_declare(queues.live, passive=True))

    async def _found(self, name: str, question: Callable[[Channel], Awaitable[object]]) -> bool:
        try:
            await self._answer(question)
        except ClosedError as error:
            if error.missing:
                return False
            raise refused(self._connection, name, error) from error
        return True

    async def check(self, queues: dict[str, dict[str, Any]]) -> None:
        missing = [queue for queue in queues if not await self.exists(queue)]
        if missing:
            raise TransportConfigurationError(
                f"RabbitMQ has no queue {', '.join(missing)}, and declare is false",
                "make it, or set declare to true",
            )

    async def declare(self, queue: str, arguments: dict[str, Any]) -> None:
        await self.ask(queue, lambda channel: channel.queue_declare(queue, durable=True, arguments=arguments))

    async def ask(self, queue: str, question: Callable[[Channel], Awaitable[object]]) -> None:
        try:
            await self._answer(question)
        except ClosedError as error:
            raise refused(self._connection, queue, error) from error

    async def end(self) -> None:
        if self._channel is not None:
            await self._connection.end(self._channel)


def refused(connection: Connection, queue: str, error: ClosedError) -> TransportError:
    """Which of our errors it is that RabbitMQ doesn't let us use a queue."""
    if error.code == 403:
        return TransportConfigurationError(
            f"RabbitMQ does not permit this user to use the queue {queue}: {error.text}",
            r"let it configure, write and read ^orthanc\..*, write to amq.default, and use amq.gen-*",
        )
    if error.code in (405, 406):
        return TransportConfigurationError(
            f"RabbitMQ has the queue {queue} with other settings: {error.text}",
            "delete it when it is empty, so that it is made anew, or give the consumer another name",
        )
    if error.code == 404:  # deleted while we asked, or its node is down
        return connection.lost(error)
    return TransportConfigurationError(
        f"RabbitMQ refuses the queue {queue}: {error.text} ({error.code})", "see the RabbitMQ server's log"
    )
