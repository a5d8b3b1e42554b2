"""The inbox of one consumer at RabbitMQ, as a place that events are sent to."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import Outgoing, Place, PublishError
from orthanc_events_bridge.transports.rabbitmq_connection import Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_publisher import Publisher
from orthanc_events_bridge.transports.rabbitmq_queues import Queues, open_inbox
from orthanc_events_bridge.transports.rabbitmq_servers import Servers


class RabbitInbox(Place):
    """A quorum queue, which the default exchange leads to.

    :param consumer: whose it is.
    :param without: protections that are left out, for mutants.
    """

    def __init__(self, options: RabbitOptions, consumer: str, without: frozenset[str] = frozenset()) -> None:
        self._options = options
        self._without = without
        self._consumer = consumer
        self._queues = Queues.of(consumer, options)
        self._servers = Servers(options)
        self._connection: Connection | None = None
        self._publisher: Publisher | None = None
        self._identity = ""

    async def connect(self) -> str:
        connection = self._connection
        if connection is None or connection.fault is not None:
            await self.close()
            connection = self._connection = await self._servers.open()
        elif connection.alarm:  # it doesn't read what we would ask
            return self._identity
        try:
            with self._servers.passing_on():
                if await open_inbox(connection, self._options, self._queues):
                    # When a queue was made can't be asked for: this is a name for the one that we have made.
                    self._identity = uuid.uuid4().hex
                if self._publisher is None:
                    publisher = Publisher(connection, self._options, self._without, self._queues.inbox)
                    await publisher.open()
                    self._publisher = publisher
        except BaseException:
            await self.close()
            raise
        return self._identity

    async def publish(self, events: Sequence[Outgoing]) -> None:
        try:
            if self._connection is None or self._publisher is None:
                raise NotConnectedError("not connected to RabbitMQ", "connect first")
            self._connection.check()
        except TransportError as error:
            raise PublishError(0, error) from error
        with self._servers.passing_on():
            await self._publisher.publish([event.in_inbox(self._consumer, event.address) for event in events])

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        self._publisher = None
        if connection is not None:
            await connection.give_up()
