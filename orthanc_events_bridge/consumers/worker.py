"""One worker: takes what its consumer is given, and has it handled.

What it promises (`tests/unit/test_consumer.py`, `tests/faults/test_consumer.py`):

Settling
    Each delivery is settled exactly one way: `orthanc_events_bridge.consumers.handling`.
Order
    Events of one key never run at the same time in one worker, and run in the order in which they came.
Staleness
    What was held by a process that stood still for most of ``ack_wait`` belongs to another worker by now: it is neither
    begun nor settled, and asked for again over a new connection.
Stopping
    Nothing new is begun, and what has not begun goes back at once. What runs may end until the deadline; what has not
    ended by then goes back, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.event import Event, UnreadableError, read
from orthanc_events_bridge.consumers.failures import kind_of
from orthanc_events_bridge.consumers.handling import Handling
from orthanc_events_bridge.consumers.holding import Held, Holding
from orthanc_events_bridge.consumers.keys import Keys
from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.routes import Route
from orthanc_events_bridge.consumers.terms import Terms
from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.transports.subscriptions import boot_time

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.clients import Clients
    from orthanc_events_bridge.transports.base import Delivery, Subscription, Transport

log = logging.getLogger(__name__)

#: Seconds that one question to the broker for events may wait; stopping doesn't wait for it.
_WAIT: Final = 30.0
#: Seconds between two tries to connect: the first, the longest, and where a person has to mend something.
_FIRST: Final = 0.1
_LONGEST: Final = 5.0
_SLOW: Final = 15.0
#: Types of events whose handlers are remembered; those of others may be without end.
_TYPES: Final = 1000


class Worker:
    """See the module's text.

    :param clients: what handlers ask Orthanc with.
    :param system: the kind of broker, for traces.
    :param now: seconds of the epoch.
    :param clock: seconds, also those for which the machine slept.
    :param chance: 0 to 1, at random.
    :ivar ready: whether it is subscribed.
    """

    def __init__(
        self,
        transport: Transport,
        terms: Terms,
        routes: Sequence[Route],
        clients: Clients,
        meter: Meter | None = None,
        *,
        system: str = "memory",
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = boot_time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._transport = transport
        self._terms = terms
        self._routes = routes
        self.meter = meter or Meter()
        self._clock = clock
        self._chance = chance
        self._repeats = Repeats(time.monotonic)
        self._by_type: dict[str, list[Route]] = {}
        self._stop = asyncio.Event()
        self._holding = Holding(clock, terms.ack_wait)
        self._handling = Handling(
            terms, self._holding, self._stop, self._start, clients, self.meter, system, now, chance
        )
        self._keys = Keys(terms.concurrency, self._handling.handle, self._start)
        self._ignored: deque[Held] = deque()
        self._ignoring = False
        self._drained = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.ready = False

    @property
    def ticked(self) -> float:
        """When it last looked at the clock (`boot_time`)."""
        return self._holding.ticked

    @property
    def running(self) -> list[str]:
        """The names of the handlers that run."""
        return self._holding.running

    @property
    def stuck(self) -> bool:
        """Whether it receives nothing, since all that it may hold waits for a place of retries or dead letters."""
        return self._handling.stuck

    # Its life.

    def stop(self) -> None:
        """Begin to stop: `run` returns when that is done."""
        self._stop.set()

    async def run(self) -> None:
        """Work until `stop` is called. Whatever the broker does meanwhile, it goes on by itself."""
        ticking = asyncio.create_task(self._holding.tick())
        failures = 0
        try:
            while not self._stop.is_set():
                began = self._clock()
                try:
                    subscription = await self._until_stopped(self._subscribe())
                    if subscription is not None:
                        await self._work(subscription)
                except TransportError as error:
                    await self._transport.close()
                    failures = failures + 1 if self._clock() - began < _LONGEST else 1
                    await self._pause(error, failures)
        finally:
            if self._stop.is_set():
                await self._drain()  # of what was begun before the broker was lost
            ticking.cancel()
            await self._transport.close()
            self.close()

    async def work_off(self, subscription: Subscription) -> int:
        """Handle what is there now, and wait for nothing that comes later. For tests, in place of `run`.

        :return: how many deliveries that were.
        :raises NotConnectedError: the subscription has ended.
        """
        count = 0
        while deliveries := await subscription.receive(self._terms.prefetch, 0.0):
            for delivery in deliveries:
                self._accept(delivery)
            await asyncio.gather(*self._tasks)
            count += len(deliveries)
        return count

    def close(self) -> None:
        """Let go of the threads that handlers ran in; `run` does so itself."""
        if left := self._handling.close():
            log.warning("the consumer %s leaves handlers behind that run on: %s", self._terms.name, ", ".join(left))

    async def _subscribe(self) -> Subscription:
        terms = self._terms
        await self._transport.connect()
        return await self._transport.subscribe(
            terms.name,
            oldest=terms.oldest,
            in_flight=terms.prefetch,
            ack_wait=terms.ack_wait,
            ordered=terms.ordered,
            longest=terms.longest,
            inbox_only=terms.inbox_only,
        )

    async def _pause(self, error: TransportError, failures: int) -> None:
        if line := self._repeats.line("connect", f"the consumer {self._terms.name} gets no events: {error}"):
            log.warning("%s; it tries again by itself", line)
        wait = _SLOW
        if isinstance(error, NotConnectedError):
            wait = min(_FIRST * 2.0 ** min(failures - 1, 10), _LONGEST)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait * (0.75 + 0.5 * self._chance())):
                await self._stop.wait()

    async def _work(self, subscription: Subscription) -> None:
        """Until we are stopped.

        :raises NotConnectedError: it has to be subscribed again.
        """
        again = " again" if self._repeats.over("connect") else ""
        log.info("the consumer %s receives events%s", self._terms.name, again)
        self._holding.ack_wait = subscription.ack_wait or self._terms.ack_wait
        self._holding.broken.clear()
        self.ready = True
        beating = asyncio.create_task(self._holding.beat())
        try:
            await self._receive(subscription)
        finally:
            self.ready = False
            if self._stop.is_set():
                with contextlib.suppress(NotConnectedError):  # they come again
                    await subscription.leave(self._holding.take_unbegun())
                await self._drain()
            beating.cancel()
            self._holding.give_up()
            await subscription.close()
            await self._transport.close()

    async def _receive(self, subscription: Subscription) -> None:
        taking, *others = (
            asyncio.ensure_future(one)
            for one in (self._take(subscription), self._stop.wait(), self._holding.broken.wait())
        )
        try:
            await asyncio.wait((taking, *others), return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                if taking.done():
                    taking.result()
                raise self._holding.fault()
        finally:
            for task in (taking, *others):
                task.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take(self, subscription: Subscription) -> None:
        """Until we are stopped, or what we hold is void."""
        while True:
            deliveries = await subscription.receive(self._terms.prefetch, _WAIT)
            self._holding.look()
            if self._holding.broken.is_set():
                return
            for delivery in deliveries:
                self._accept(delivery)

    async def _until_stopped(self, work: Any) -> Any:
        """The result of something, or none where we are stopped before."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return None
        finally:
            stopping.cancel()
            task.cancel()

    async def _drain(self) -> None:
        """Let end what runs; nothing else begins."""
        if self._drained or not self._tasks:
            return
        self._drained = True
        name, deadline = self._terms.name, self._terms.drain
        log.info("the consumer %s stops: %d events are being handled", name, self.meter.in_flight)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                while self._tasks:  # one of them may start another
                    await asyncio.wait(self._tasks)
        if left := list(self._tasks):
            running = ", ".join(self.running)
            log.warning("the consumer %s gives back what did not end within %g s: %s", name, deadline, running)
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1.0)

    # Handling.

    def _accept(self, delivery: Delivery) -> None:
        try:
            event = read(delivery.message, delivery.attempt)
        except UnreadableError as error:
            self._start(self._handling.bury(self._holding.add(delivery, _NOTHING, ()), error.reason))
            return
        routes = self._routes_of(event)
        held = self._holding.add(delivery, event, routes)
        if routes:
            self._keys.add(held)
        elif not event.ours and not event.producer:
            reason = "it is an event of another kind, and no handler asks for its type"
            self._start(self._handling.bury(held, reason))
        else:
            self._ignored.append(held)
            if not self._ignoring:
                self._ignoring = True
                self._start(self._ignore())

    def _routes_of(self, event: Event) -> list[Route]:
        found = self._by_type.get(event.type)
        if found is None:
            found = [one for one in self._routes if one.matches(event)]
            if len(self._by_type) < _TYPES:
                self._by_type[event.type] = found
        return found

    async def _ignore(self) -> None:
        try:
            while self._ignored:
                await self._handling.ignore(self._ignored.popleft())
        finally:
            self._ignoring = False

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        # Nobody knows what it has left behind: what is held goes back, and comes again.
        log.critical(
            "handling failed by itself, which is a mistake of this package: %s", kind_of(error), exc_info=error
        )
        self._holding.fail()


#: Stands for what can't be read.
_NOTHING: Final = Event("", "", "", "")
