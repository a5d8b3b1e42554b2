"""The connection over which a subscriber sends, beside the one that it receives from.

While an alarm is on, RabbitMQ reads nothing from a connection that something was published on: acknowledgements and
the end of a channel wait as well. Whoever receives and sends over one connection stands still with it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.rabbitmq_connection import Connection

#: Seconds that saying goodbye may take.
_GOODBYE: Final = 0.2


class Sending:
    """Opened when it is first needed, and again when it was lost.

    :param receiving: the connection that it stands beside.
    """

    def __init__(self, receiving: Connection) -> None:
        self._receiving = receiving
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    @property
    def alarm(self) -> str:
        """Why the server takes nothing at the moment; empty when it takes it."""
        return self._connection.alarm if self._connection is not None else ""

    async def connection(self) -> Connection:
        """The connection.

        :raises NotConnectedError: the server can't be reached any more, or the subscription is closed.
        :raises TransportConfigurationError: it does not let us in once more.
        """
        async with self._opening:
            if self._closed:
                raise NotConnectedError("the subscription to RabbitMQ is closed", "subscribe again")
            if self._connection is None or self._connection.fault is not None:
                lost, self._connection = self._connection, None
                if lost is not None:
                    await lost.give_up(_GOODBYE)
                self._connection = await self._receiving.another()
            return self._connection

    async def close(self) -> None:
        """End it. Never raises, and takes no longer than half a second."""
        self._closed = True
        if self._connection is not None:
            await self._connection.give_up(_GOODBYE)
