"""What `Consumer.test` gives: the consumer's own worker on a broker in memory, with a clock that tests move.

Handlers are run, retried and settled by the code that does it on a real broker. Nothing waits: an hour is as long as
the handlers that are due in it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from orthanc_events_bridge.consumers.event import Event, UnreadableError, read
from orthanc_events_bridge.consumers.once import Turns
from orthanc_events_bridge.consumers.publishing import Publisher
from orthanc_events_bridge.consumers.routes import Handler, Route, no_handler
from orthanc_events_bridge.consumers.stores.sqlite import SqliteStore
from orthanc_events_bridge.consumers.terms import Terms
from orthanc_events_bridge.consumers.worker import Worker
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.mapping import STRUCTURED, partition
from orthanc_events_bridge.orthanc_api import OrthancOptions
from orthanc_events_bridge.testing.events import AT, received
from orthanc_events_bridge.testing.orthanc_api import RecordedClients
from orthanc_events_bridge.testing.outcomes import Call, Outcome, Outcomes, Told, watch
from orthanc_events_bridge.transports.base import Delivery, Outgoing, Subscription
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport
from orthanc_events_bridge.transports.options import MemoryOptions

if TYPE_CHECKING:
    import respx

#: Seconds that handlers may take, by a real clock.
PATIENCE: Final = 10.0
#: Deliveries behind which `Kit.finish` takes it that there is no end.
_ENDLESS: Final = 10_000
#: Where Orthanc is, if the consumer says nothing of one.
_ORTHANC: Final = "http://orthanc.test"


class Parts(NamedTuple):
    """A consumer's, that are tested.

    :ivar options: which Orthanc its handlers ask.
    """

    terms: Terms
    routes: Sequence[Route]
    options: OrthancOptions | None
    turns: Turns
    publisher: Publisher


class _Published(MemoryTransport):
    """Notes what is published."""

    def __init__(self, broker: Broker, published: list[Event]) -> None:
        super().__init__(MemoryOptions(), broker)
        self._published = published

    async def publish(self, events: Sequence[Outgoing]) -> None:
        await super().publish(events)
        self._published += map(received, events)


class _Kit(Outcomes):
    """What both kinds of kit have.

    :ivar broker: the broker in memory, with what it holds (`orthanc_events_bridge.transports.memory.Broker`).
    :ivar published: what handlers published, each as the broker confirmed it: what was published again is there again.
        The consumer is given it too, as everybody is.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._now = 0.0
        self.broker = Broker(lambda: self._now)
        self.published: list[Event] = []
        self._terms = replace(parts.terms, oldest=True)
        self._routes = [replace(one, handler=self._watched(one)) for one in parts.routes]
        self._clients = RecordedClients(_ORTHANC if parts.options is None else parts.options.url)
        self._turns = parts.turns
        self._publisher = parts.publisher
        self._calls: dict[tuple[str, int], list[Call]] = {}
        self._lock = threading.Lock()
        self._sent = 0
        self._worker: Worker | None = None
        self._subscription: Subscription | None = None
        self._lent = ExitStack()

    @property
    def orthanc(self) -> respx.MockRouter:
        """The Orthanc that handlers ask: ``kit.orthanc.get("/system").respond(json={…})``, as respx has it.

        What is asked for and not recorded fails the test.

        :raises BridgeError: respx is not installed.
        """
        return self._clients.router()

    @property
    def now(self) -> datetime:
        """The time of the kit's clock."""
        return AT + timedelta(seconds=self._now)

    @property
    def waiting(self) -> float | None:
        """Seconds until the next retry is due; none where none waits."""
        name = self.broker.names.get(self._terms.name)
        return None if name is None or name.due is None else max(0.0, name.due - self._now)

    # Running.

    def _watched(self, route: Route) -> Handler:
        """The handler, with what it does written down."""

        def note(event: Event, result: Any = None, error: BaseException | None = None) -> None:
            with self._lock:  # sync handlers run in threads
                self._calls.setdefault((event.id, event.attempt), []).append(Call(route.name, event, result, error))

        return watch(route, note)

    def _tell(self, delivery: Delivery, kind: Literal["handled", "retried", "dead"], **more: Any) -> None:
        try:
            event: Event | None = read(delivery.message, delivery.attempt)
        except UnreadableError:
            event = None
        of = kind
        calls: Sequence[Call] = ()
        if event is not None:
            calls = self._calls.pop((event.id, event.attempt), ())
            if kind == "handled" and not any(one.matches(event) for one in self._routes):
                of = "ignored"  # type: ignore[assignment]
        self.outcomes.append(Outcome(of, event, self._now, delivery.attempt, calls=tuple(calls), **more))

    def _store(self, events: Iterable[Event | Outgoing | bytes]) -> None:
        for one in events:
            self._sent += 1
            sent = outgoing(one)
            # What is sent twice comes twice: brokers drop a second one within their window only.
            self.broker.store(sent._replace(dedupe=f"{sent.id}:{self._sent}"))

    async def _begin(self) -> None:
        store = partial(SqliteStore, ":memory:", lambda: self._now)
        self._lent.enter_context(self._turns.lent(store, lambda: self.now.timestamp()))
        self._lent.enter_context(self._publisher.lent(lambda: _Published(self.broker, self.published)))
        self._turns.loop = asyncio.get_running_loop()
        transport = MemoryTransport(MemoryOptions(), self.broker)
        self._worker = Worker(
            transport,
            self._terms,
            self._routes,
            self._clients,
            now=lambda: AT.timestamp() + self._now,
            clock=lambda: 0.0,  # a debugger may hold us up
            chance=lambda: 0.0,
        )
        await transport.connect()
        terms = self._terms
        found = await transport.subscribe(
            terms.name, oldest=True, in_flight=terms.prefetch, ack_wait=terms.ack_wait, ordered=terms.ordered
        )
        self._subscription = Told(found, self._tell)

    async def _settle(self) -> None:
        if self._worker is None or self._subscription is None:
            raise BridgeError("the kit is over", "keep what uses it inside `async with app.test() as kit:`")
        try:
            async with asyncio.timeout(PATIENCE):
                await self._worker.work_off(self._subscription)
        except TimeoutError:
            raise AssertionError(
                f"handlers have not ended within {PATIENCE:g} s. What happened:\n{self.story}"
            ) from None
        if unknown := self._clients.unknown:
            asked, unknown[:] = list(unknown), []
            raise AssertionError("\n".join(asked) + f"\nWhat happened:\n{self.story}")

    async def _advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("the clock does not go back")
        end = self._now + seconds
        await self._settle()
        while (wait := self.waiting) is not None and self._now + wait <= end:
            self._now += wait
            await self._settle()
        self._now = end
        await self._settle()

    async def _finish(self) -> None:
        await self._settle()
        begun = len(self.outcomes)
        while (wait := self.waiting) is not None:
            if len(self.outcomes) - begun > _ENDLESS:
                raise AssertionError(f"there is no end of retries behind {_ENDLESS}; the last: {self.outcomes[-1]!r}")
            await self._advance(wait)

    async def _end(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()
        if self._worker is not None:
            self._worker.close()
        self._worker = self._subscription = None
        await self._clients.close()
        await self._turns.close()
        await self._publisher.close()
        self._lent.close()


class AsyncKit(_Kit):
    """The kit in a test that is a coroutine function; see `Kit`."""

    async def send(self, *events: Event | Outgoing | bytes) -> None:
        """As `Kit.send`."""
        self._store(events)
        await self._settle()

    async def settle(self) -> None:
        """As `Kit.settle`."""
        await self._settle()

    async def advance(
        self, *, days: float = 0.0, hours: float = 0.0, minutes: float = 0.0, seconds: float = 0.0
    ) -> None:
        """As `Kit.advance`."""
        await self._advance(timedelta(days, seconds, minutes=minutes, hours=hours).total_seconds())

    async def finish(self) -> None:
        """As `Kit.finish`."""
        await self._finish()


class Kit(_Kit):
    """The kit in an ordinary test, made by `Consumer.test`.

    A handler that has not ended within `PATIENCE` real seconds fails the test, and so does a question to Orthanc for
    which nothing is recorded.
    """

    _over = False

    def send(self, *events: Event | Outgoing | bytes) -> None:
        """Send something, and have handled what is due.

        :param events: of `orthanc_events_bridge.testing.event`; or bytes, which are sent as they are. The same one sent
            twice comes twice, as duplicates do.
        :raises AssertionError: see the class.
        """
        self._store(events)
        self.settle()

    def settle(self) -> None:
        """Have handled what is due, until nothing is to be done now; `send` and `advance` do so themselves.

        :raises AssertionError: see the class.
        """
        self._run(self._settle)

    def advance(self, *, days: float = 0.0, hours: float = 0.0, minutes: float = 0.0, seconds: float = 0.0) -> None:
        """Let time pass, so many days, hours, minutes and seconds: what becomes due meanwhile is handled when it does.

        :raises AssertionError: see the class.
        """
        self._run(self._advance, timedelta(days, seconds, minutes=minutes, hours=hours).total_seconds())

    def finish(self) -> None:
        """Let time pass until no retry waits any more.

        :raises AssertionError: see the class; or there is no end of it.
        """
        self._run(self._finish)

    def start(self) -> None:
        """Begin; `Trial` does it."""
        self._runner = asyncio.Runner()
        self._run(self._begin)

    def end(self) -> None:
        """End; `Trial` does it."""
        self._run(self._end)
        self._runner.close()
        self._over = True

    def _run(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        if self._over:
            raise BridgeError("the kit is over", "keep what uses it inside `with app.test() as kit:`")
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._runner.run(work(*arguments))
        else:
            raise BridgeError(
                "a test that is a coroutine function can't use the kit so", "write `async with app.test()`"
            )


class Trial:
    """What `Consumer.test` returns: ``with`` gives a `Kit`, ``async with`` an `AsyncKit`."""

    def __init__(self, parts: Parts) -> None:
        if not parts.routes:
            raise no_handler(parts.terms.name)
        self._parts = parts
        self._kit: Kit | None = None
        self._async: AsyncKit | None = None

    def __enter__(self) -> Kit:
        self._kit = Kit(self._parts)
        self._kit.start()
        return self._kit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._kit is not None:
            self._kit.end()

    async def __aenter__(self) -> AsyncKit:
        self._async = AsyncKit(self._parts)
        await self._async._begin()
        return self._async

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._async is not None:
            await self._async._end()


def outgoing(one: Event | Outgoing | bytes) -> Outgoing:
    """As the bridge sends it."""
    if isinstance(one, Outgoing):
        return one
    if isinstance(one, bytes):
        return Outgoing("unread", "main", "server", "unknown", "server", partition("server"), STRUCTURED, one)
    attributes = dict(one.attributes)
    body = json.dumps({**attributes, "data": dict(one.data)}).encode()
    level, _, verb = one.name.partition(".") if one.ours else ("server", "", "unknown")
    return Outgoing(one.id, one.site or "main", level, verb, one.key, partition(one.key), STRUCTURED, body)
