"""RabbitMQ, by AMQP 0.9.1.

There is no CloudEvents binding for AMQP 0.9.1: binary mode uses ``ce-`` headers, as Knative's and the SDK's do.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.base import (
    Capabilities,
    DeadLetters,
    Incoming,
    Outgoing,
    Place,
    PublishError,
    Transport,
)
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.rabbitmq_connection import ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_dead import RabbitDeadLetters
from orthanc_events_bridge.transports.rabbitmq_inbox import RabbitInbox
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_ordered import OrderedSubscription
from orthanc_events_bridge.transports.rabbitmq_publisher import Publisher
from orthanc_events_bridge.transports.rabbitmq_queues import Queues, check_longest
from orthanc_events_bridge.transports.rabbitmq_servers import Servers
from orthanc_events_bridge.transports.rabbitmq_subscription import RabbitSubscription
from orthanc_events_bridge.transports.rabbitmq_topology import Watch, count, offset, open_place
from orthanc_events_bridge.transports.subscriptions import check_name
from orthanc_events_bridge.values import format_duration, format_size

#: Messages that `RabbitTransport.tail` holds, not looked at yet.
_PREFETCH: Final = 500


class RabbitTransport(Transport):
    """Publishes to one topic exchange, to which the history and the queues of whoever is interested are bound."""

    capabilities = Capabilities(
        durable=True,
        deduplicates=False,
        replayable=True,
        ordered=True,
        declares_topology=True,
        refuses_when_full=False,
        identifies_place=True,
        subscribable=True,
        has_inboxes=True,
        counts_deliveries=True,
        pipelined=True,
    )
    #: A seam for `make test-mutants`: protections that are left out.
    without: frozenset[str] = frozenset()

    def __init__(self, options: TransportOptions) -> None:
        assert isinstance(options, RabbitOptions)
        super().__init__(options)
        self._options = options
        self._servers = Servers(options)
        self._connection: Connection | None = None
        self._publisher: Publisher | None = None
        self._watch: Watch | None = None
        self._identity = ""
        self._deleted = False  # the history was, since `_identity` was made up

    async def connect(self) -> str:
        try:
            return await self._connect()
        except NotConnectedError:
            if not self._deleted:
                raise
        return await self._connect()  # while we looked

    async def _connect(self) -> str:
        connection = self._connection
        if connection is None or connection.fault is not None:
            await self.close()
            connection = self._connection = await self._servers.open()
        elif connection.alarm:  # it doesn't read what we would ask
            return self._identity
        try:
            with self._servers.passing_on():
                made = await open_place(connection, self._options)
                if made or self._deleted:
                    # When a queue was made can't be asked for: this is a name for the one that we know of.
                    self._identity, self._deleted = uuid.uuid4().hex, False
                if self._watch is None:
                    self._watch = Watch(connection, functools.partial(self._on_deleted, connection))
                await self._watch.keep(self._options.history)
                if self._publisher is None:
                    publisher = Publisher(connection, self._options, self.without)
                    await publisher.open()
                    self._publisher = publisher
        except BaseException:
            await self.close()
            raise
        return self._identity

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        self._publisher = self._watch = None
        if connection is not None:
            await connection.give_up()

    def _connected(self) -> Connection:
        if self._connection is None or self._publisher is None:
            raise NotConnectedError("not connected to RabbitMQ", "connect first")
        self._connection.check()
        return self._connection

    def _on_deleted(self, connection: Connection) -> None:
        """Other queues may go on to take events, which would be missing in the history unnoticed."""
        if connection is self._connection:
            self._deleted = True
            connection.fail(
                NotConnectedError(
                    f"the history {self._options.history} of RabbitMQ was deleted",
                    "it is made or found again by itself",
                )
            )

    def inbox(self, consumer: str) -> Place:
        check_name(self.name, consumer)
        return RabbitInbox(self._options, consumer, self.without)

    async def publish(self, events: Sequence[Outgoing]) -> None:
        try:
            self._connected()
            assert self._watch is not None and self._publisher is not None
            await self._watch.keep(self._options.history)
        except TransportError as error:
            raise PublishError(0, error) from error
        with self._servers.passing_on():
            await self._publisher.publish(events)

    async def dead_letters(self, consumer: str) -> DeadLetters:
        """See `orthanc_events_bridge.transports.base.Transport.dead_letters`. Reading holds them until it is closed:
        only one can read at a time."""
        check_name(self.name, consumer)
        return RabbitDeadLetters(self._connected(), self._options, Queues.of(consumer, self._options))

    async def subscribe(
        self,
        name: str,
        *,
        oldest: bool = False,
        in_flight: int = 256,
        ack_wait: float = 30.0,
        ordered: bool = False,
        longest: float = 0.0,
        inbox_only: bool = False,
    ) -> RabbitSubscription:
        """See `orthanc_events_bridge.transports.base.Transport.subscribe`. RabbitMQ has no ``ack_wait``."""
        check_name(self.name, name)
        with self._servers.passing_on():
            connection = self._connected()
            check_longest(connection, self._options, longest)
            kind = OrderedSubscription if ordered and not inbox_only else RabbitSubscription
            queues = Queues.of(name, self._options, ordered=ordered and not inbox_only, inbox_only=inbox_only)
            return await kind.open(connection, self._options, queues, oldest=oldest, in_flight=in_flight)

    # Looking at it.

    async def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        connection = self._connected()
        channel = await connection.channel()
        waiting: deque[DeliveredMessage] = deque()
        came = asyncio.Event()
        over: list[str] = []

        def receive(message: DeliveredMessage) -> None:
            waiting.append(message)
            came.set()

        def cancelled() -> None:
            over.append("its queue was deleted")
            came.set()

        try:
            queue, arguments = self._options.history, {"x-stream-offset": "first"}
            await connection.ask(channel.basic_qos(prefetch_count=_PREFETCH))
            if not oldest:
                declared = await connection.ask(channel.queue_declare(exclusive=True, auto_delete=True))
                queue, arguments = declared.queue or "", {}
                await connection.ask(channel.queue_bind(queue, self._options.exchange, "#"))
            await connection.ask(channel.consume(queue, receive, cancelled, arguments=arguments))
            while True:
                while waiting:
                    message = waiting.popleft()
                    # All before it too, and not each time: half of what may be held is always on its way.
                    if (message.delivery_tag or 0) % (_PREFETCH // 2) == 0:
                        await connection.ask(channel.basic_ack(message.delivery_tag or 0, multiple=True, wait=False))
                    yield _incoming(message)
                came.clear()
                await connection.wait_for(came)
                if over or channel.fault is not None:
                    raise connection.lost(channel.fault or OSError(over[0]))
        except ClosedError as error:
            raise TransportConfigurationError(
                f"RabbitMQ does not let this user read what was sent to {self._options.exchange}: {error.text}",
                f"let it read {self._options.exchange} and {self._options.history}, and do everything with amq.gen-*",
            ) from error
        finally:
            await connection.end(channel)

    async def describe(self) -> list[str]:
        connection = self._connected()
        await open_place(connection, self._options)
        options, limits = self._options, self._options.limits
        events = await count(connection, options.history)
        age = format_duration(limits.max_age) if limits.max_age else "unlimited"
        size = format_size(limits.max_bytes) if limits.max_bytes else "unlimited"
        tls = "with TLS" if connection.encrypted else "without TLS"
        watched = self._watch is not None and self._watch.working
        return [
            f"RabbitMQ {connection.version}, {tls}, virtual host {connection.vhost}",
            f"exchange {options.exchange}, history {options.history}: {events} events",
            f"limits: age {age}, size {size}; a full history drops its oldest events"
            if options.declare
            else "limits: those with which the history was made; a full history drops its oldest events",
            "a deletion of the history is noticed at once"
            if watched
            else "a deletion of the history is noticed late: the user may not read it",
        ]


def _incoming(message: DeliveredMessage) -> Incoming:
    properties = message.header.properties
    values: dict[str, Any] = dict(properties.headers or {})
    position = str(offset(message) + 1) if "x-stream-offset" in values else ""
    headers = {name.lower(): str(value) for name, value in values.items() if name != "x-stream-offset"}
    return Incoming(
        message.routing_key or "", message.body, headers | {"content-type": properties.content_type or ""}, position
    )
