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
import functools
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.rabbitmq_asking import Asking, alone
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.subscriptions import PARTITIONS
from orthanc_events_bridge.values import format_duration

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

#: Seconds in which those who receive from a queue are told that it was deleted. Where it is made again before that,
#: RabbitMQ 3.10 tells them nothing, and what the new one gives them gets lost on its way: it would stand still.
_TOLD: Final = 1.0


@dataclass(frozen=True, slots=True)
class Queues:
    """The names of a consumer's queues.

    :param inboxes: how inboxes' names begin.
    :param dead_letters: how those of dead letters do.
    :param ordered: whether its events come in order, whoever receives them.
    :param inbox_only: whether it has nothing of what is published.
    """

    name: str
    inboxes: str = "orthanc.inbox"
    dead_letters: str = "orthanc.dead"
    ordered: bool = False
    inbox_only: bool = False

    @classmethod
    def of(cls, name: str, options: RabbitOptions, *, ordered: bool = False, inbox_only: bool = False) -> Queues:
        """Those of a consumer, as the options call them."""
        return cls(name, options.inbox_prefix, options.dead_prefix, ordered, inbox_only)

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
    def told(self) -> str:
        """An exchange that carries nothing: as long as it is there, the past has been received.

        That `beginning` is gone does not say so: RabbitMQ 4 tells of its deletion a moment before it is, and it is made
        anew where the exchange of what is published was deleted.
        """
        return f"orthanc.told.{self.name}"

    @property
    def place(self) -> str:
        """An exchange that carries nothing: its setting says from which exchange the name gets what is published."""
        return f"orthanc.place.{self.name}"

    @property
    def published(self) -> dict[str, str]:
        """The queues of what is published, each with the routing keys that it is bound by."""
        if self.inbox_only:
            return {}
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
            await asking.check(queues.lasting, [queues.workers] if queues.ordered else [])
        elif queues.inbox_only:
            await _open_inbox_only(connection, asking, queues)
        elif not (await asking.exists(queues.made) and await asking.leads(queues.live)):
            async with alone(connection, f"{queues.live}.making"):
                known = await asking.exists(queues.made)
                if not (known and await asking.leads(queues.live)):
                    if not known:
                        await _check_kind(asking, queues)
                        for exchange in (queues.place, queues.live):  # of a name whose queue was deleted on purpose
                            await asking.ask(exchange, functools.partial(_drop, exchange))
                    await _check_place(asking, options, queues)
                    await _make(asking, queues, begin if known or oldest else None)
        if queues.inbox_only:
            return False
        # Where there is one, it was made before the name's queues.
        beginning = await asking.exists(queues.beginning)
        if beginning and await asking.leads(queues.told):  # whoever received all of it died before it deleted that
            beginning = False
            if options.declare:
                async with alone(connection, f"{queues.live}.making"):
                    if await asking.leads(queues.told):  # still: no other has begun
                        await asking.delete(queues.beginning)
        if options.declare:
            await _check_place(asking, options, queues)
            for queue, arguments in queues.lasting.items():
                await asking.declare(queue, arguments)
            # It is not made here: one that is missing by now says that the exchange was deleted.
            await asking.ask(queues.live, lambda channel: channel.exchange_bind(options.exchange, queues.live))
            if not beginning:
                for queue, keys in queues.published.items():
                    await asking.bind(queue, options.exchange, keys)
            if not await asking.leads(queues.live):
                raise NotConnectedError(
                    f"the exchange {options.exchange} of RabbitMQ was deleted while we subscribed", "subscribe again"
                )
        return beginning
    finally:
        await asking.end()


async def _open_inbox_only(connection: Connection, asking: Asking, queues: Queues) -> None:
    """Make the queues of a name that has nothing of what is published, and delete what it had of that."""
    before = [replace(queues, inbox_only=False, ordered=ordered) for ordered in (False, True)]

    async def left() -> list[Queues]:
        return [one for one in before if await asking.exists(one.made)]

    if await left() or not all([await asking.exists(queue) for queue in queues.lasting]):
        async with alone(connection, f"{queues.live}.making"):
            for one in await left():
                pasts = one.pasts if one.ordered else []
                for queue in (queues.beginning, *pasts, *one.published):  # the one that tells of the others last
                    await asking.delete(queue)
            await _make_all(asking, queues, queues.lasting)
    for queue, arguments in queues.lasting.items():
        await asking.declare(queue, arguments)


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


async def _check_place(asking: Asking, options: RabbitOptions, queues: Queues) -> None:
    """A name gets the events of one exchange. Bindings can't be asked about; the settings of an exchange are compared.

    :raises TransportConfigurationError: it gets those of another one.
    """
    differs = await asking.differs(
        queues.place,
        lambda channel: channel.exchange_declare(
            queues.place, exchange_type="fanout", durable=True, arguments={"alternate-exchange": options.exchange}
        ),
    )
    if differs:
        raise TransportConfigurationError(
            f"the consumer {queues.name} has the events of another exchange of RabbitMQ than {options.exchange}:"
            f" {differs}",
            "give one of the two consumers another name; if it has moved for good, let it receive all it has and "
            f"delete the queue {queues.live}{'.00 to .63' if queues.ordered else ''}",
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
    return await _open(connection, options, queues, {queues.dead: dead_arguments(options)})


def dead_arguments(options: RabbitOptions) -> dict[str, Any]:
    """Those of the queue of dead letters."""
    return LIMIT | {"x-overflow": "reject-publish", "x-max-length": options.limits.dead_letters}


async def _open(
    connection: Connection,
    options: RabbitOptions,
    queues: Queues,
    wanted: dict[str, dict[str, Any]],
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
    pasts = queues.pasts if queues.ordered else []
    # Of a start that was not finished; it may not even say how far it had come.
    if any([await asking.exists(queue) for queue in (queues.beginning, *pasts[-1:])]):
        for queue in (queues.beginning, *pasts):
            await asking.delete(queue)
        await asyncio.sleep(_TOLD)
    if begin is not None:
        await asking.ask(queues.told, lambda channel: channel.exchange_delete(queues.told))
        for queue in (queues.beginning, *pasts):
            await asking.declare(queue, ONE_AT_A_TIME)
        await begin()
    # Behind that, and before the name's queue: whoever dies in between has not begun, and does not begin anew.
    await asking.ask(queues.live, lambda channel: _sign(channel, queues.live))
    await _make_all(asking, queues, queues.lasting)


def _drop(exchange: str, channel: Channel) -> Awaitable[object]:
    return channel.exchange_delete(exchange)


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
