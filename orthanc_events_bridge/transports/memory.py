"""A broker in memory: the transport contract's plainest reading, for tests.

Events are gone with the process.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.base import (
    Capabilities,
    DeadLetters,
    Incoming,
    Outgoing,
    Place,
    PublishError,
    Subscription,
    Transport,
)
from orthanc_events_bridge.transports.headers import ADDRESS, CONSUMER, EVENT_ID
from orthanc_events_bridge.transports.memory_dead import MemoryDeadLetters
from orthanc_events_bridge.transports.memory_subscription import MemorySubscription, Name
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.subscriptions import check_name

#: The largest body it takes, as NATS does by default.
MAX_PAYLOAD: Final = 1024 * 1024
#: Seconds between two looks at a broker that doesn't answer.
_LOOK: Final = 0.01


class Broker:
    """What outlives a connection. Tests set its attributes, from any thread, to make it fail.

    :param clock: seconds, by which delays and ``ack_wait`` are measured.
    :ivar messages: what is stored, in order.
    :ivar names: of consumers, and how far each has come.
    :ivar inboxes: of consumers, what is stored for each alone, in order.
    :ivar dead: of consumers, their dead letters, in order.
    :ivar begun: consumers that have subscribed, and how far each has come in its inbox.
    :ivar alone: those of them that have subscribed to their inbox only.
    :ivar up: whether it can be reached.
    :ivar frozen: whether it takes connections and answers nothing.
    :ivar deadline: for how many seconds a transport waits for an answer.
    :ivar latency: for how many seconds an answer is under way.
    :ivar generation: another number: the place was deleted and made again.
    :ivar removed: how often an inbox was deleted.
    :ivar connections: another number: all connections were cut.
    :ivar refuse: asked before each event is stored; what it returns is raised.
    :ivar refuse_dead: the same of dead letters.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.messages: list[Incoming] = []
        self.ids: set[str] = set()
        self.names: dict[str, Name] = {}
        self.inboxes: dict[str, list[Incoming]] = {}
        self.dead: dict[str, list[Incoming]] = {}
        self.begun: dict[str, Name] = {}
        self.alone: set[str] = set()
        self.up = True
        self.frozen = False
        self.deadline = 5.0
        self.latency = 0.0
        self.generation = 1
        self.removed: Counter[str] = Counter()
        self.connections = 1
        self.refuse: Callable[[Outgoing], TransportError | None] = lambda event: None
        self.refuse_dead: Callable[[], TransportError | None] = lambda: None

    def store(self, event: Outgoing, consumer: str = "") -> None:
        """Keep an event, unless one of its id was stored before.

        :param consumer: in whose inbox, in place of where everybody gets it.
        """
        key = event.dedupe or event.id
        if key in self.ids:
            return
        self.ids.add(key)
        address, messages = event.address, self.messages
        if consumer:
            event = event.in_inbox(consumer, address)
            address, messages = f"inbox.{consumer}", self.inboxes.setdefault(consumer, [])
        headers = {"content-type": event.content_type, EVENT_ID: event.id}
        headers |= {"dedupe-key": event.dedupe} if event.dedupe else {}
        headers |= {f"ce-{name}": value for name, value in event.attributes} | dict(event.headers)
        messages.append(Incoming(address, event.body, headers, str(len(messages) + 1)))

    def bury(self, consumer: str, message: Incoming, headers: Mapping[str, str]) -> None:
        """Keep a dead letter.

        :raises TransportError: `refuse_dead` says so.
        """
        error = self.refuse_dead()
        if error is not None:
            raise error
        named = {CONSUMER: consumer, ADDRESS: message.address}
        self.dead.setdefault(consumer, []).append(replace(message, headers={**message.headers, **named, **headers}))

    def recreate(self) -> None:
        """Delete the place for everybody, as an operator who deletes a stream and makes it again."""
        self.messages = []
        self.ids = set()
        self.names = {}
        self.generation += 1

    def remove_inbox(self, consumer: str) -> None:
        """Delete a consumer's inbox, and what is known of the consumer there."""
        self.ids -= {_key_of(one) for one in self.inboxes.pop(consumer, [])}
        self.begun.pop(consumer, None)
        self.removed[consumer] += 1

    def forget(self) -> None:
        """Lose everything, as a process that ends."""
        self.recreate()
        for consumer in {*self.inboxes, *self.begun}:
            self.remove_inbox(consumer)

    def cut(self) -> None:
        """Cut every connection."""
        self.connections += 1


def _key_of(message: Incoming) -> str:
    return message.headers.get("dedupe-key", message.headers[EVENT_ID])


class MemoryTransport(Transport):
    """Publishes to a `Broker`, by default one of its own."""

    capabilities = Capabilities(
        durable=False,
        deduplicates=True,
        replayable=True,
        ordered=True,
        declares_topology=False,
        refuses_when_full=True,
        identifies_place=True,
        subscribable=True,
        has_inboxes=True,
        counts_deliveries=True,
        pipelined=True,
    )

    def __init__(self, options: TransportOptions, broker: Broker | None = None, consumer: str = "") -> None:
        super().__init__(options)
        self.broker = broker or Broker()
        self._options = options
        self._consumer = consumer
        self._connection: int | None = None
        self._opened = 0  # connections so far

    async def _answer(self) -> None:
        """Wait until the broker answers.

        :raises NotConnectedError: it doesn't.
        """
        left = self.broker.deadline
        await asyncio.sleep(self.broker.latency)
        while self.broker.up and self.broker.frozen:
            if left <= 0:
                raise NotConnectedError(f"the broker has not answered within {self.broker.deadline:g} s", "thaw it")
            left -= _LOOK
            await asyncio.sleep(_LOOK)

    def _check(self) -> None:
        if self._connection is None:
            raise NotConnectedError("not connected to the broker", "connect first")
        if not self.broker.up or self._connection != self.broker.connections:
            raise NotConnectedError("the connection to the broker was lost", "connect again")

    async def connect(self) -> str:
        await self._answer()
        if not self.broker.up:
            raise NotConnectedError("the broker is down", "start it again")
        if self._connection != self.broker.connections:
            self._connection = self.broker.connections
            self._opened += 1
        if self._consumer:
            return f"{self._consumer} {self.broker.removed[self._consumer]}"
        return str(self.broker.generation)

    def inbox(self, consumer: str) -> Place:
        check_name(self.name, consumer)
        return MemoryTransport(self._options, self.broker, consumer)

    async def publish(self, events: Sequence[Outgoing]) -> None:
        confirmed = 0
        try:
            self._check()
            await self._answer()
            for event in events:
                await asyncio.sleep(0)
                await self._publish(event)
                confirmed += 1
        except TransportError as error:
            raise PublishError(confirmed, error) from error

    async def _publish(self, event: Outgoing) -> None:
        if self.broker.frozen:
            await self._answer()
        self._check()
        if len(event.body) > MAX_PAYLOAD:
            raise EventRejectedError(
                f"the event has {len(event.body)} bytes, the broker takes {MAX_PAYLOAD}", "send less"
            )
        error = self.broker.refuse(event)
        if error is not None:
            raise error
        self.broker.store(event, self._consumer)

    async def close(self) -> None:
        self._connection = None

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
    ) -> Subscription:
        check_name(self.name, name)
        self._check()
        await self._answer()
        self._check()
        broker, opened = self.broker, self._opened
        live = None if inbox_only else self._live(name, oldest, ordered)
        inbox = broker.begun.setdefault(name, Name(broker.inboxes.setdefault(name, []), 0, clock=broker.clock))
        if live is None:
            broker.names.pop(name, None)
            broker.alone.add(name)

        def connected() -> bool:
            there = broker.up and self._connection == broker.connections and self._opened == opened
            return there and broker.names.get(name) is live and broker.begun.get(name) is inbox

        def bury(message: Incoming, headers: Mapping[str, str]) -> None:
            broker.bury(name, message, headers)

        names = (inbox,) if live is None else (live, inbox)
        return MemorySubscription(names, connected, self._answer, in_flight, ack_wait, bury)

    def _live(self, name: str, oldest: bool, ordered: bool) -> Name:
        """What the broker knows of a name where everybody gets events."""
        broker = self.broker
        # Who has begun before misses nothing of a place that was made again.
        known = name in broker.begun and name not in broker.alone
        first = 0 if oldest or known else len(broker.messages)
        live = broker.names.setdefault(name, Name(broker.messages, first, ordered, broker.clock))
        if live.ordered != ordered:
            raise TransportConfigurationError(
                f"the broker has the consumer {name}, and it is {'ordered' if live.ordered else 'not ordered'}",
                "give the consumer another name, or subscribe as before",
            )
        broker.alone.discard(name)
        return live

    async def dead_letters(self, consumer: str) -> DeadLetters:
        check_name(self.name, consumer)
        self._check()
        await self._answer()

        async def check() -> None:
            self._check()
            await self._answer()

        return MemoryDeadLetters(self.broker.dead.setdefault(consumer, []), check)

    async def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        self._check()
        messages = self.broker.messages
        position = 0 if oldest else len(messages)
        while True:
            self._check()
            if messages is not self.broker.messages:
                messages, position = self.broker.messages, 0
            if position < len(messages):
                position += 1
                yield messages[position - 1]
            else:
                await asyncio.sleep(_LOOK)

    async def describe(self) -> list[str]:
        self._check()
        return [f"a broker in memory: {len(self.broker.messages)} events"]
