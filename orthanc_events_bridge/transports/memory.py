"""A broker in memory: the transport contract's plainest reading, for tests. Events are gone with the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.base import Capabilities, Incoming, Outgoing, PublishError, Transport
from orthanc_events_bridge.transports.options import TransportOptions

#: The largest body it takes, as NATS does by default.
MAX_PAYLOAD: Final = 1024 * 1024


class Broker:
    """What outlives a connection. Tests set its attributes to make it fail.

    :ivar messages: what is stored, in order.
    :ivar up: whether it can be reached.
    :ivar generation: another number: the place was deleted and made again.
    :ivar refuse: asked before each event is stored; what it returns is raised.
    """

    def __init__(self) -> None:
        self.messages: list[Incoming] = []
        self.ids: set[str] = set()
        self.up = True
        self.declared: bool | None = None
        self.generation = 1
        self.refuse: Callable[[Outgoing], TransportError | None] = lambda event: None
        self.changed = asyncio.Event()

    def store(self, event: Outgoing) -> None:
        """Keep an event, unless one of its id is there."""
        if event.id not in self.ids:
            self.ids.add(event.id)
            address = ".".join((event.site, event.level, event.verb, event.partition))
            headers = {"content-type": event.content_type, "orthanc-event-id": event.id}
            self.messages.append(Incoming(address, event.body, headers, str(len(self.messages) + 1)))
            self.changed.set()
            self.changed = asyncio.Event()

    def recreate(self) -> None:
        """Delete everything, as an operator who deletes a stream and makes it again."""
        self.messages.clear()
        self.ids.clear()
        self.generation += 1


class MemoryTransport(Transport):
    """Publishes to a `Broker`, by default one of its own."""

    capabilities = Capabilities(
        durable=False, deduplicates=True, replayable=True, ordered=True, declares_topology=False
    )

    def __init__(self, options: TransportOptions, broker: Broker | None = None) -> None:
        super().__init__(options)
        self.broker = broker or Broker()
        self._connected = False

    def _reach(self) -> None:
        if not self.broker.up:
            self._connected = False
            raise NotConnectedError("the broker is down", "start it again")

    async def connect(self) -> str:
        self._reach()
        if self.broker.declared is False:
            raise TransportConfigurationError("the topology is missing", "declare it")
        self._connected = True
        return str(self.broker.generation)

    async def publish(self, events: Sequence[Outgoing]) -> None:
        for confirmed, event in enumerate(events):
            await asyncio.sleep(0)
            try:
                self._publish(event)
            except TransportError as error:
                raise PublishError(confirmed, error) from error

    def _publish(self, event: Outgoing) -> None:
        if not self._connected:
            raise NotConnectedError("not connected", "connect first")
        self._reach()
        if len(event.body) > MAX_PAYLOAD:
            raise EventRejectedError(f"the event has {len(event.body)} bytes, the broker takes {MAX_PAYLOAD}")
        error = self.broker.refuse(event)
        if error is not None:
            raise error
        self.broker.store(event)

    async def close(self) -> None:
        self._connected = False

    async def subscribe(self, *, oldest: bool = False) -> AsyncIterator[Incoming]:
        position = 0 if oldest else len(self.broker.messages)
        while True:
            if not self._connected:
                raise NotConnectedError("not connected", "connect first")
            self._reach()
            changed = self.broker.changed
            if position < len(self.broker.messages):
                yield self.broker.messages[position]
                position += 1
            else:
                await changed.wait()

    async def describe(self) -> list[str]:
        return [f"in memory, {len(self.broker.messages)} messages"]
