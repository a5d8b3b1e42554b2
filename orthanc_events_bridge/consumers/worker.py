"""One worker: takes what its consumer is given, has it handled, and settles each delivery exactly one way.

What it promises (`tests/contract/test_consumer.py`):

Settling
    A delivery is acknowledged when its handlers have returned, given again when one of them failed, and put among the
    dead letters when that makes no sense any more. Where the connection is lost in between nothing is sent: the broker
    gives it again by itself.
Order
    Events of one key never run at the same time in one worker, and run in the order in which they came.
Staleness
    What was held by a process that stood still for most of ``ack_wait`` belongs to another worker by now: it is neither
    begun nor settled, and asked for again over a new connection.
Stopping
    Nothing new is begun. What runs may end until the deadline; what has not begun, or not ended by then, goes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.event import Event, UnreadableError, read
from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.retry import Again, Dead, Reject, Retry, RetryPolicy
from orthanc_events_bridge.consumers.routes import Route
from orthanc_events_bridge.consumers.settings import LONGEST_ORDERED_RETRY
from orthanc_events_bridge.consumers.threads import DaemonThreads
from orthanc_events_bridge.consumers.tracing import Spans
from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.transports.headers import EXCEPTION, FIRST_FAILURE, LAST_FAILURE, REASON
from orthanc_events_bridge.transports.subscriptions import boot_time

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.clients import Clients
    from orthanc_events_bridge.transports.base import Delivery, Subscription, Transport

log = logging.getLogger(__name__)

#: Seconds that one question to the broker for events may wait; stopping doesn't wait for it.
_WAIT: Final = 30.0
#: The part of ``ack_wait`` behind which a delivery is extended, and behind which we count as frozen.
_EXTEND: Final = 1 / 3
_FROZEN: Final = 0.4
#: Seconds between two looks at the clock.
_TICK: Final = 0.05
#: Seconds between two tries to connect: the first, the longest, and where a person has to mend something.
_FIRST: Final = 0.1
_LONGEST: Final = 5.0
_SLOW: Final = 15.0
#: Seconds between two tries to put something among the dead letters.
_DEAD: Final = 1.0
#: So many deliveries are not held against an event at least, whose worker stopped or lost its broker before it began.
_NOT_BEGUN: Final = 20
_LONGEST_TEXT: Final = 500


@dataclass(frozen=True, slots=True)
class Terms:
    """How a worker works.

    :ivar name: of its consumer.
    :ivar oldest: where the consumer's very first start begins: with the oldest event that the broker keeps.
    :ivar ordered: whether events of one key stay in order across all workers.
    :ivar concurrency: how many events are handled at a time.
    :ivar prefetch: how many deliveries may be held, those that are being handled among them.
    :ivar retry: for handlers without a policy of their own.
    :ivar ack_wait: seconds without a word from us behind which the broker may give a delivery to another.
    :ivar longest: seconds that a handler may take, with its waits; 0: what the broker allows by itself.
    :ivar drain: seconds that handlers have to end when the worker stops.
    """

    name: str
    oldest: bool = False
    ordered: bool = False
    concurrency: int = 16
    prefetch: int = 64
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    ack_wait: float = 30.0
    longest: float = 0.0
    drain: float = 25.0


class _Held:
    """A delivery that is not settled yet.

    :ivar begun: its handlers have begun, or it is being settled.
    :ivar void: it is not ours any more.
    """

    __slots__ = ("begun", "delivery", "event", "routes", "since", "void")

    def __init__(self, delivery: Delivery, event: Event, routes: list[Route], since: float) -> None:
        self.delivery = delivery
        self.event = event
        self.routes = routes
        self.since = since
        self.begun = False
        self.void = False


class Worker:
    """See the module's text.

    :param clients: what handlers ask Orthanc with.
    :param system: the kind of broker, for traces.
    :param now: seconds of the epoch.
    :param clock: seconds, also those for which the machine slept.
    :param chance: 0 to 1, at random.
    :ivar ready: whether it is subscribed.
    :ivar ticked: when it last looked at the clock (`boot_time`).
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
        self._clients = clients
        self.meter = meter or Meter()
        self._now = now
        self._clock = clock
        self._chance = chance
        self._spans = Spans(terms.name, system)
        self._repeats = Repeats(time.monotonic)
        self._by_type: dict[str, list[Route]] = {}
        self._held: dict[_Held, None] = {}
        self._chains: dict[str, deque[_Held]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(terms.concurrency)
        self._threads = DaemonThreads(terms.concurrency, f"{terms.name}-handler")
        self._stop = asyncio.Event()
        self._broken = asyncio.Event()
        self._ack_wait = terms.ack_wait
        self.ready = False
        self.ticked = clock()

    # Its life.

    def stop(self) -> None:
        """Begin to stop: `run` returns when that is done."""
        self._stop.set()

    async def run(self) -> None:
        """Work until `stop` is called. Whatever the broker does meanwhile, it goes on by itself."""
        ticking = asyncio.create_task(self._tick())
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
        self._threads.shutdown(wait=False, cancel_futures=True)

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
        self._ack_wait = subscription.ack_wait or self._terms.ack_wait
        self.ready = True
        self._broken.clear()
        beating = asyncio.create_task(self._beat())
        try:
            await self._receive(subscription)
        finally:
            self.ready = False
            if self._stop.is_set():
                await self._drain()
            beating.cancel()
            self._give_up()
            await subscription.close()
            await self._transport.close()

    async def _receive(self, subscription: Subscription) -> None:
        stopping = asyncio.ensure_future(self._stop.wait())
        breaking = asyncio.ensure_future(self._broken.wait())
        receiving: asyncio.Task[list[Delivery]] | None = None
        try:
            while True:
                receiving = asyncio.create_task(subscription.receive(self._terms.prefetch, _WAIT))
                await asyncio.wait((receiving, stopping, breaking), return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    return
                if breaking.done():
                    raise NotConnectedError(
                        f"this process stood still for longer than {_FROZEN * self._ack_wait:g} s, or could not go on",
                        "what it held comes again; where an async handler blocks its event loop, make it a sync one",
                    )
                for delivery in receiving.result():
                    self._accept(delivery)
        finally:
            for task in (receiving, stopping, breaking):
                if task is not None:
                    task.cancel()
            if receiving is not None:
                await asyncio.gather(receiving, return_exceptions=True)

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
        """Let end what runs; what has not begun does not begin."""
        if self._tasks:
            log.info("the consumer %s stops: %d events are being handled", self._terms.name, len(self._tasks))
            _, left = await asyncio.wait(self._tasks, timeout=self._terms.drain)
            if left:
                log.warning(
                    "the consumer %s gives %d events back, whose handlers did not end within %g s",
                    self._terms.name,
                    len(left),
                    self._terms.drain,
                )
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=1.0)

    def _give_up(self) -> None:
        """What is held belongs to others now. What runs goes on to its end, and is not settled."""
        for held in self._held:
            held.void = True
        self._held.clear()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self._look()

    def _look(self) -> None:
        """Did we stand still?"""
        now = self._clock()
        gap, self.ticked = now - self.ticked, now
        if gap > _FROZEN * self._ack_wait:
            self._give_up()
            self._broken.set()

    async def _beat(self) -> None:
        """Keep alive what is held."""
        every = self._ack_wait * _EXTEND
        while True:
            await asyncio.sleep(every / 4)
            now = self._clock()
            stopping = self._stop.is_set()  # what has not begun does not begin any more, and may go to others
            for held in [one for one in self._held if now - one.since >= every and (one.begun or not stopping)]:
                with contextlib.suppress(TransportError):  # receiving says it
                    if held in self._held:
                        held.since = now
                        await held.delivery.extend()

    # Handling.

    def _accept(self, delivery: Delivery) -> None:
        try:
            event = read(delivery.message, delivery.attempt)
        except UnreadableError as error:
            held = _Held(delivery, _NOTHING, [], self._clock())
            self._held[held] = None
            self._start(self._bury(held, error.reason, ""))
            return
        held = _Held(delivery, event, self._routes_of(event), self._clock())
        self._held[held] = None
        chain = self._chains.get(event.key)
        if chain is None:
            chain = self._chains[event.key] = deque()
            self._start(self._follow(event.key, chain))
        chain.append(held)

    def _routes_of(self, event: Event) -> list[Route]:
        found = self._by_type.get(event.type)
        if found is None:
            found = [one for one in self._routes if one.matches(event)]
            if len(self._by_type) < 1000:  # types of others may be without end
                self._by_type[event.type] = found
        return found

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        # Nobody knows what it has left behind: what is held goes back, and comes again.
        log.critical("handling failed by itself, which is a mistake of this package: %s", _kind(error), exc_info=error)
        self._give_up()
        self._broken.set()

    async def _follow(self, key: str, chain: deque[_Held]) -> None:
        """Handle the events of one key, one behind the other."""
        try:
            while chain:
                held = chain.popleft()
                if not held.routes:
                    await self._ignore(held)
                    continue
                async with self._slots:
                    self._look()
                    if not held.void and not self._stop.is_set():
                        await self._handle(held)
        finally:
            del self._chains[key]

    async def _ignore(self, held: _Held) -> None:
        event = held.event
        if not event.ours:
            await self._bury(held, "it is an event of another kind, and no handler asks for its type", "")
        else:
            self.meter.count("ignored", event.name)
            await self._settle(held, held.delivery.ack)

    async def _handle(self, held: _Held) -> None:
        event = held.event
        limits = [self._policy(one).max_attempts for one in held.routes]
        # More than were allowed: it can have been given back without having been begun.
        if all(limit is not None and event.attempt > limit + max(limit, _NOT_BEGUN) for limit in limits):
            reason = f"it was given {event.attempt - 1} times and never settled, as one that kills its workers"
            await self._bury(held, reason, "")
            return
        held.begun = True
        began = time.perf_counter()
        self.meter.begin()
        current = held.routes[0]
        outcome: Again | Dead | None = None
        problem: BaseException | None = None
        try:
            with self._spans.processing(event) as span:
                try:
                    for current in held.routes:
                        if current.where is None or current.where(event):
                            await self._call(current, event)
                except BaseException as error:
                    span.failed(_kind(error))
                    raise
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            problem = error
        except Reject as error:
            outcome = Dead(error.reason)
            problem = error
        except BaseException as error:  # a handler's own SystemExit, and whatever extensions raise
            problem = error
        finally:
            self.meter.end(event.name, time.perf_counter() - began)
        if problem is None:
            self.meter.count("handled", event.name)
            if event.ours and not event.operation:
                self.meter.handled(event.attributes.get("recordedtime", ""), self._now())
            await self._settle(held, held.delivery.ack)
            return
        await self._failed(held, current, problem, outcome)

    async def _call(self, route: Route, event: Event) -> None:
        arguments: tuple[Any, ...] = (event,)
        if route.is_async:
            if route.wants_orthanc:
                arguments = (event, self._clients.for_async())
            await route.handler(*arguments)
        else:
            if route.wants_orthanc:
                arguments = (event, self._clients.for_sync())
            await asyncio.get_running_loop().run_in_executor(self._threads, route.handler, *arguments)

    def _policy(self, route: Route) -> RetryPolicy:
        return route.retry or self._terms.retry

    async def _failed(self, held: _Held, route: Route, problem: BaseException, outcome: Again | Dead | None) -> None:
        event, now = held.event, self._now()
        first = _read_time(held.delivery.message.headers.get(FIRST_FAILURE, ""), now)
        if outcome is None:
            asked = problem.after if isinstance(problem, Retry) else None
            outcome = self._policy(route).after(event.attempt, now - first, self._chance, asked)
        kind = "" if isinstance(problem, Retry | Reject) else _kind(problem)
        headers = {FIRST_FAILURE: _time(first), LAST_FAILURE: _time(now)} | ({EXCEPTION: kind} if kind else {})
        why = f"{kind} in {_place(problem, route)}" if kind else f"{type(problem).__name__} of {route.name}"
        if kind:
            log.debug("what was raised may hold patient data", exc_info=problem)
        if isinstance(outcome, Dead):
            await self._bury(held, outcome.reason, why, headers)
            return
        self.meter.count("retried", event.name)
        delay = outcome.delay
        if self._terms.ordered:
            delay = min(delay, LONGEST_ORDERED_RETRY)  # 1/64 of all events waits with it
        log.warning("%s: %s; attempt %d, again in %.3g s", _spell(held), why, event.attempt, delay)
        await self._settle(held, lambda: held.delivery.nack(delay, headers))

    async def _bury(self, held: _Held, reason: str, why: str, headers: dict[str, str] | None = None) -> None:
        """Put it among the dead letters, however long that takes: what is lost there would be lost for good."""
        log.error("%s goes among the dead letters: %s%s", _spell(held), reason, f"; {why}" if why else "")
        said = {REASON: _ascii(reason), LAST_FAILURE: _time(self._now())} | (headers or {})
        said.setdefault(FIRST_FAILURE, said[LAST_FAILURE])
        if await self._settle(held, lambda: held.delivery.reject(said)):
            self.meter.count("dead", held.event.name)

    async def _settle(self, held: _Held, settle: Callable[[], Any]) -> bool:
        """Settle it, unless it isn't ours any more.

        :return: whether it is settled.
        """
        held.begun = True
        while True:
            self._look()
            if held.void:
                return False
            try:
                await settle()
            except NotConnectedError:
                self._held.pop(held, None)
                return False  # it comes again; receiving says why
            except TransportError as error:
                if line := self._repeats.line("dead", f"a retry or a dead letter can't be stored: {error}"):
                    log.error("%s; it is held and tried again", line)
                await asyncio.sleep(_DEAD)
            else:
                self._held.pop(held, None)
                return True


#: Stands for what can't be read.
_NOTHING: Final = Event("", "", "", "")


def _spell(held: _Held) -> str:
    """For the log; of events of others nobody knows what their attributes hold."""
    return repr(held.event) if held.event.ours else f"a message at position {held.delivery.message.position}"


def _kind(problem: BaseException) -> str:
    """The type of an exception; what it says can hold patient data."""
    kind = type(problem)
    return _ascii(kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")


def _place(problem: BaseException, route: Route) -> str:
    """Where a handler failed: the deepest line of the file that the handler is in."""
    file = getattr(getattr(inspect.unwrap(route.handler), "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(problem.__traceback__)
    for frame in reversed(frames):
        if frame.filename == file:
            return f"{route.name} (line {frame.lineno})"
    return route.name


def _ascii(text: str) -> str:
    """As a header of any broker can hold it."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain.encode("ascii", "backslashreplace").decode()[:_LONGEST_TEXT]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read_time(text: str, default: float) -> float:
    try:
        return min(datetime.fromisoformat(text).timestamp(), default)
    except ValueError:
        return default
