"""The servers of one RabbitMQ cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.rabbitmq_connection import Connection
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions


class Servers:
    """The servers of one cluster, tried in turn, beginning with the one that worked last."""

    def __init__(self, options: RabbitOptions) -> None:
        self._options = options
        self._next = 0

    def pass_on(self) -> None:
        """Begin with the next one: what lets us in may still do no work, as in the lesser part of a cluster."""
        self._next += 1

    @contextlib.contextmanager
    def passing_on(self) -> Iterator[None]:
        """Where a server lets us in and does not do its work, the next one is tried."""
        try:
            yield
        except TransportError as error:
            if isinstance(error.error if isinstance(error, PublishError) else error, NotConnectedError):
                self.pass_on()
            raise

    async def open(self) -> Connection:
        """Connect to the first that takes us.

        :raises TransportError: none does; what a person has to mend is said first.
        """
        problem: TransportError | None = None
        for _ in self._options.servers:
            try:
                return await Connection.open(
                    self._options, self._options.servers[self._next % len(self._options.servers)]
                )
            except TransportError as error:
                self.pass_on()
                if not isinstance(problem, TransportConfigurationError):
                    problem = error
        assert problem is not None
        raise problem
