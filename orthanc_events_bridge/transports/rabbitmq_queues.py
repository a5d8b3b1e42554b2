"""The queues of a consumer's name: found and checked, or made.

``orthanc.consumer.{name}`` is bound to the exchange; for an ordered name it is a queue for each partition,
``orthanc.consumer.{name}.00`` to ``.63``. ``orthanc.inbox.{name}`` takes what is for this name alone: what
is tried again, and the past of a name that begins with the oldest event. What is to be tried later waits in
``orthanc.retry.{name}.{seconds}`` and goes to the inbox when the time is over. ``orthanc.dead.{name}`` holds what the
name can't handle; nobody is given it.

When the exchange is deleted, the binding goes with it, and what the one that is made again is sent would never come. A
binding can't be asked for. So there is an exchange ``orthanc.consumer.{name}`` that leads to it and carries nothing.
RabbitMQ deletes that by itself with the last thing that it leads to: as long as it is there, so is the binding.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.values import format_duration

_T = TypeVar("_T")

#: How long a message can wait at a time, in seconds; a longer delay is made of several waits.
STEPS: Final = (1, 5, 30, 120, 600, 3600)
#: RabbitMQ 4 drops a message that was given so often and never settled: 20 times, if nothing is said.
_ENOUGH: Final = 1_000_000_000
LIMIT: Final[dict[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": _ENOUGH}
#: For so many seconds an event can be held, where a queue can say so: from RabbitMQ 4 on. Older ones take it, and have
#: it still when they become new ones; none compares it with what a queue was made with.
_LONGEST: Final = 86400
_LONG: Final[dict[str, Any]] = LIMIT | {"x-consumer-timeout": _LONGEST * 1000}
ONE_AT_A_TIME: Final[dict[str, Any]] = _LONG | {"x-single-active-consumer": True}
#: Of the wire contract.
PARTITIONS: Final = 64
#: For so many seconds at most others are waited for who make the same queues, and so many between two looks.
_TURN: Final = 30.0
_PAUSE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Queues:
    """The names of a consumer's queues.

    :param inboxes: how inboxes' names begin.
    :param dead_letters: how those of dead letters do.
    :param ordered: whether its events come in order, whoever receives them.
    """

    name: str
    inboxes: str = "orthanc.inbox"
    dead_letters: str = "orthanc.dead"
    ordered: bool = False

    @classmethod
    def of(cls, name: str, options: RabbitOptions, *, ordered: bool = False) -> Queues:
        """Those of a consumer, as the options call them."""
        return cls(name, options.inbox_prefix, options.dead_prefix, ordered)

    @property
    def live(self) -> str:
        """What is published."""
        return f"orthanc.consumer.{self.name}"

    @property
    def inbox(self) -> str:
        """What is for this name alone."""
        return f"{self.inboxes}.{self.name}"

    @property
    def dead(self) -> str:
        """What it can't handle."""
        return f"{self.dead_letters}.{self.name}"

    @property
    def beginning(self) -> str:
        """There as long as the past is still to be copied (`orthanc_events_bridge.transports.rabbitmq_beginning`); an
        exchange of this name, for a moment."""
        return f"orthanc.beginning.{self.name}"

    @property
    def published(self) -> dict[str, str]:
        """The queues of what is published, each with the routing keys that it is bound by."""
        if not self.ordered:
            return {self.live: "#"}
        return {f"{self.live}.{number:02d}": f"*.*.*.{number:02d}" for number in range(PARTITIONS)}

    @property
    def pasts(self) -> list[str]:
        """Where what was published before the name began with the oldest event is copied to.

        For an ordered name one for each partition, that is there until it has been received.
        """
        if not self.ordered:
            return [self.inbox]
        return [f"{self.beginning}.{number:02d}" for number in range(PARTITIONS)]

    def past(self, routing_key: str) -> str:
        """The one for what came by this routing key; empty where the name doesn't get that."""
        if not self.ordered:
            return self.inbox
        partition = re.fullmatch(r"[^.]*\.[^.]*\.[^.]*\.(\d\d)", routing_key)
        return self.pasts[int(partition[1])] if partition and int(partition[1]) < PARTITIONS else ""

    @property
    def workers(self) -> str:
        """The exchange by which an ordered name's subscribers know of each other."""
        return f"orthanc.workers.{self.name}"

    def retry(self, seconds: int) -> str:
        """Where a message waits so long."""
        return f"orthanc.retry.{self.name}.{seconds}"

    @property
    def lasting(self) -> dict[str, dict[str, Any]]:
        """All that it needs from the first, each with its arguments; `published` are the last."""
        later: dict[str, Any] = LIMIT | {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self.inbox,
            "x-dead-letter-strategy": "at-least-once",  # needs reject-publish
            "x-overflow": "reject-publish",
        }
        waiting = {self.retry(seconds): later | {"x-message-ttl": seconds * 1000} for seconds in STEPS}
        published = dict.fromkeys(self.published, ONE_AT_A_TIME if self.ordered else _LONG)
        return {self.inbox: _LONG} | waiting | published

    @property
    def made(self) -> str:
        """The one that is made when all others are."""
        return list(self.published)[-1]


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
    asking = Asking(connection)
    try:
        if not options.declare:
            await asking.check(queues.lasting)
        elif not (await asking.exists(queues.made) and await asking.bound(queues)):
            async with alone(connection, f"{queues.live}.making"):
                known = await asking.exists(queues.made)
                if not (known and await asking.bound(queues)):
                    if not known:
                        await _check_kind(asking, queues)
                    await _make(asking, queues, begin if known or oldest else None)
        # Where there is one, it was made before the name's queues.
        beginning = await asking.exists(queues.beginning)
        if options.declare:
            for queue, arguments in queues.lasting.items():
                await asking.declare(queue, arguments)
            # It is not made here: one that is missing by now says that the exchange was deleted.
            await asking.ask(queues.live, lambda channel: channel.exchange_bind(options.exchange, queues.live))
            if not beginning:
                for queue, keys in queues.published.items():
                    await asking.bind(queue, options.exchange, keys)
            if not await asking.bound(queues):
                raise NotConnectedError(
                    f"the exchange {options.exchange} of RabbitMQ was deleted while we subscribed", "subscribe again"
                )
        return beginning
    finally:
        await asking.end()


def check_longest(connection: Connection, options: RabbitOptions, longest: float) -> None:
    """May a consumer hold an event for so many seconds?

    :raises TransportConfigurationError: RabbitMQ would take it back before, and close the channel.
    """
    ours = options.declare and connection.major >= 4
    most = float(_LONGEST) if ours else options.consumer_timeout
    if longest > most:
        raise TransportConfigurationError(
            f"RabbitMQ {connection.version} takes back what a consumer holds for {format_duration(most)}, and this one "
            f"is to hold it for {format_duration(longest)}",
            "let its handlers take less"
            if ours
            else "raise consumer_timeout in rabbitmq.conf, and give the transport's option consumer_timeout the same",
        )


async def _check_kind(asking: Asking, queues: Queues) -> None:
    """A name is ordered or not for good.

    :raises TransportConfigurationError: it exists, and is the other.
    """
    other = replace(queues, ordered=not queues.ordered).made
    if await asking.exists(other):
        raise TransportConfigurationError(
            f"RabbitMQ has the consumer {queues.name}, and it is {'not ' if queues.ordered else ''}ordered",
            "give the consumer another name, or subscribe as before; to change it, let it receive all it has, and "
            f"delete {queues.live}{'' if queues.ordered else '.00 to .63'}",
        )


async def open_inbox(connection: Connection, options: RabbitOptions, queues: Queues) -> bool:
    """Find a name's inbox and check it, or make it, whether or not anybody has subscribed under this name.

    :return: whether it is new.
    :raises NotConnectedError: RabbitMQ doesn't answer.
    :raises TransportConfigurationError: it can't be used as it is.
    """
    return await _open(connection, options, queues, {queues.inbox: queues.lasting[queues.inbox]})


async def open_dead(connection: Connection, options: RabbitOptions, queues: Queues) -> bool:
    """The same for a name's dead letters: a full queue refuses them, and an operator's policy can't make it drop any.

    :raises TransportError: as `open_inbox`.
    """
    arguments = LIMIT | {"x-overflow": "reject-publish", "x-max-length": options.limits.dead_letters}
    return await _open(connection, options, queues, {queues.dead: arguments})


async def _open(
    connection: Connection, options: RabbitOptions, queues: Queues, wanted: dict[str, dict[str, Any]]
) -> bool:
    asking = Asking(connection)
    ((queue, arguments),) = wanted.items()
    try:
        if not options.declare:
            await asking.check(wanted)
            return False
        missing = not await asking.exists(queue)
        if missing:
            async with alone(connection, f"{queues.live}.making"):
                missing = not await asking.exists(queue)
                if missing:
                    await _make_all(asking, queues, wanted)
        await asking.declare(queue, arguments)
        return missing
    finally:
        await asking.end()


async def _make(asking: Asking, queues: Queues, begin: Callable[[], Awaitable[None]] | None) -> None:
    """Make the queues of a name that is new, or whose exchange is another one."""
    # Of a start that was not finished; it may not even say how far it had come.
    await asking.delete(queues.beginning)
    pasts = queues.pasts if queues.ordered else []
    for queue in pasts:
        await asking.delete(queue)
    if begin is not None:
        for queue in (queues.beginning, *pasts):
            await asking.declare(queue, ONE_AT_A_TIME)
        await begin()
    # Behind that, and before the name's queue: whoever dies in between has not begun, and does not begin anew.
    await asking.ask(queues.live, lambda channel: _sign(channel, queues.live))
    await _make_all(asking, queues, queues.lasting)


def _sign(channel: Channel, name: str) -> Awaitable[object]:
    """Make the exchange that is deleted with the one that it leads to."""
    return channel.exchange_declare(name, exchange_type="fanout", durable=True, auto_delete=True)


async def _make_all(asking: Asking, queues: Queues, wanted: dict[str, dict[str, Any]]) -> None:
    for queue, arguments in wanted.items():
        await asking.declare(queue, arguments)
    # 3.10 writes down that a quorum queue was elected a leader when the next one is, or seconds later; one that is
    # killed before never has a leader again, and then not even an event is confirmed to its publisher.
    last = f"{queues.live}.made"
    await asking.declare(last, {"x-queue-type": "quorum"})
    await asking.delete(last)


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

    async def check(self, queues: Iterable[str]) -> None:
        """Are they there?

        :raises TransportConfigurationError: no.
        """
        missing = [queue for queue in queues if not await self.exists(queue)]
        if missing:
            raise TransportConfigurationError(
                f"RabbitMQ has no queue {', '.join(missing)}, and declare is false",
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

    async def end(self) -> None:
        """Close the channel. Never raises."""
        if self._channel is not None:
            await self._connection.end(self._channel)


def refused(connection: Connection, name: str, error: ClosedError, kind: str = "queue") -> TransportError:
    """Which of our errors it is that RabbitMQ doesn't let us use a queue, or an exchange."""
    if error.code == 403:
        return TransportConfigurationError(
            f"RabbitMQ does not permit this user to use the {kind} {name}: {error.text}",
            r"let it configure, write and read ^orthanc\..*, write to amq.default, and use amq.gen-*",
        )
    if error.code in (405, 406):
        return TransportConfigurationError(
            f"RabbitMQ has the {kind} {name} with other settings: {error.text}",
            "delete it when it is empty, so that it is made anew, or give the consumer another name",
        )
    if error.code == 404:  # deleted while we asked, or its node is down
        return connection.lost(error)
    return TransportConfigurationError(
        f"RabbitMQ refuses the {kind} {name}: {error.text} ({error.code})", "see the RabbitMQ server's log"
    )
