"""The servers of one RabbitMQ cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.rabbitmq_connection import Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.servers import InTurn


class Servers(InTurn[Connection]):
    """The servers of one cluster, tried in turn, beginning with the one that worked last."""

    def __init__(self, options: RabbitOptions) -> None:
        super().__init__(options.servers, lambda server: Connection.open(options, server))

    @contextlib.contextmanager
    def passing_on(self) -> Iterator[None]:
        """Where a server lets us in and does not do its work, the next one is tried."""
        try:
            yield
        except TransportError as error:
            if isinstance(error.error if isinstance(error, PublishError) else error, NotConnectedError):
                self.pass_on()
            raise
