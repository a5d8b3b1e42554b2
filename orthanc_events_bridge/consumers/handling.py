"""What becomes of an event: its handlers are run, and its delivery is settled exactly one way.

It is acknowledged when they have returned, given again when one of them failed, and put among the dead letters when
that makes no sense any more. Where the connection is lost in between nothing is sent: the broker gives it again by
itself.

A place of retries or of dead letters that takes nothing loses nothing, and holds nobody up: what has to go there is
held, and waits beside what is handled. It counts among what a worker may hold (``prefetch``): where all of that waits,
nothing more is received, which health, metrics and the log say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.failures import ascii_text, kind_of, place, spell
from orthanc_events_bridge.consumers.retry import Again, Dead, Reject, Retry, RetryPolicy
from orthanc_events_bridge.consumers.settings import LONGEST_ORDERED_RETRY
from orthanc_events_bridge.consumers.threads import DaemonThreads
from orthanc_events_bridge.consumers.tracing import Spans
from orthanc_events_bridge.errors import BridgeError, NotConnectedError, RefusedError, TransportError
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.moments import iso, seconds_of
from orthanc_events_bridge.transports.headers import EXCEPTION, FIRST_FAILURE, LAST_FAILURE, REASON

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.clients import Clients
    from orthanc_events_bridge.consumers.holding import Held, Holding
    from orthanc_events_bridge.consumers.meter import Meter
    from orthanc_events_bridge.consumers.routes import Route
    from orthanc_events_bridge.consumers.terms import Terms

log = logging.getLogger(__name__)

#: Settles a delivery.
_Settle = Callable[[], Coroutine[Any, Any, None]]

#: Seconds between two tries to store a retry or a dead letter.
_AGAIN: Final = 1.0
#: So many deliveries are not held against an event at least, whose worker stopped or lost its broker before it began.
_NOT_BEGUN: Final = 20


class Handling:
    """See the module's text.

    :param holding: what is settled leaves it.
    :param stop: set when nothing is to begin any more.
    :param start: has a coroutine run beside.
    :param clients: what handlers ask Orthanc with.
    :param now: seconds of the epoch.
    :param chance: 0 to 1, at random.
    """

    def __init__(
        self,
        terms: Terms,
        holding: Holding,
        stop: asyncio.Event,
        start: Callable[[Coroutine[Any, Any, None]], None],
        clients: Clients,
        meter: Meter,
        system: str,
        now: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._terms = terms
        self._holding = holding
        self._stop = stop
        self._start = start
        self._clients = clients
        self._meter = meter
        self._now = now
        self._chance = chance
        self._spans = Spans(terms.name, system)
        self._threads = DaemonThreads(terms.concurrency, f"{terms.name}-handler")
        self._repeats = Repeats(time.monotonic)
        self._waiting: dict[Held, tuple[_Settle, str]] = {}

    @property
    def stuck(self) -> bool:
        """Whether all that may be held waits for a place of retries or dead letters."""
        return len(self._waiting) >= self._terms.prefetch

    def close(self) -> list[str]:
        """Let go of the threads that handlers ran in.

        :return: the names of those that run on.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        return self._threads.busy

    async def handle(self, held: Held) -> None:
        """Have it handled, and settle it; not where it isn't ours any more, or nothing is to begin."""
        self._holding.look()
        if held.void or self._stop.is_set():
            return
        event = held.event
        if event.attempt > _NOT_BEGUN and self._kills(held):
            reason = f"it was given {event.attempt - 1} times and never settled, as one that kills its workers"
            await self.bury(held, reason, "")
            return
        held.begun = True
        began = time.perf_counter()
        self._meter.begin()
        problem: BaseException | None = None
        try:
            await (self._traced(held) if self._spans.on else _Apart(self._call(held)))
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            problem = error
        except BaseException as error:  # a handler's own SystemExit, and whatever extensions raise
            problem = error
        finally:
            self._meter.end(event.name, time.perf_counter() - began)
        if problem is not None:
            await self._failed(held, problem)
            return
        self._meter.count("handled", event.name)
        if event.ours and not event.operation:
            self._meter.handled(event.attributes.get("recordedtime", ""), self._now())
        await self._settle(held, held.delivery.ack)

    async def ignore(self, held: Held) -> None:
        """No handler is for it."""
        self._meter.count("ignored", held.event.name)
        await self._settle(held, held.delivery.ack)

    async def _traced(self, held: Held) -> None:
        with self._spans.processing(held.event) as span:
            try:
                await _Apart(self._call(held))
            except BaseException as error:
                span.failed(kind_of(error))
                raise

    async def _call(self, held: Held) -> None:
        event = held.event
        for route in held.routes:
            held.at = route
            if route.where is not None and not route.where(event):
                continue
            if route.is_async:
                if route.wants_orthanc:
                    await route.handler(event, self._clients.for_async())
                else:
                    await route.handler(event)
            else:
                arguments = (event, self._clients.for_sync()) if route.wants_orthanc else (event,)
                await asyncio.get_running_loop().run_in_executor(self._threads, route.handler, *arguments)

    # Failures.

    def _policy(self, route: Route | None) -> RetryPolicy:
        return (route and route.retry) or self._terms.retry

    def _kills(self, held: Held) -> bool:
        """Was it given more often than is allowed? It can have been given back without having been begun."""
        limits = [self._policy(one).max_attempts for one in held.routes]
        return all(limit is not None and held.event.attempt > limit + max(limit, _NOT_BEGUN) for limit in limits)

    async def _failed(self, held: Held, problem: BaseException) -> None:
        event, now, name = held.event, self._now(), held.at.name if held.at is not None else ""
        first = seconds_of(held.delivery.message.headers.get(FIRST_FAILURE, ""))
        first = now if first is None else min(first, now)  # clocks differ
        outcome: Again | Dead
        if isinstance(problem, Reject):
            outcome = Dead(problem.reason)
        else:
            asked = problem.after if isinstance(problem, Retry) else None
            outcome = self._policy(held.at).after(event.attempt, now - first, self._chance, asked)
        kind = "" if isinstance(problem, Retry | Reject) else kind_of(problem)
        headers = {FIRST_FAILURE: iso(first * 1000), LAST_FAILURE: iso(now * 1000)}
        if kind:
            headers[EXCEPTION] = kind
        why = f"{kind} in {place(problem, held.at)}" if kind else f"{type(problem).__name__} of {name}"
        # Our own errors hold no patient data, and say what to do; what others say nobody knows.
        said = f": {problem}" if isinstance(problem, BridgeError) else ""
        if kind and not said:
            log.debug("what was raised may hold patient data", exc_info=problem)
        if isinstance(outcome, Dead):
            await self.bury(held, outcome.reason + said, why, headers)
            return
        delay = outcome.delay
        if self._terms.ordered:
            delay = min(delay, LONGEST_ORDERED_RETRY)  # 1/64 of all events waits with it
        wished = isinstance(problem, Retry) and problem.after is not None  # it waits for something: nothing is wrong
        level = logging.INFO if wished else logging.WARNING
        log.log(level, "%s: %s%s; attempt %d, again in %.3g s", spell(held), why, said, event.attempt, delay)
        await self._store(held, lambda: held.delivery.nack(delay, headers), "retried")

    async def bury(self, held: Held, reason: str, why: str = "", headers: dict[str, str] | None = None) -> None:
        """Put it among the dead letters: what is lost there would be lost for good.

        Where their place takes nothing it is held, and waits beside.
        """
        log.error("%s goes among the dead letters: %s%s", spell(held), reason, f"; {why}" if why else "")
        said = {REASON: ascii_text(reason), LAST_FAILURE: iso(self._now() * 1000)} | (headers or {})
        said.setdefault(FIRST_FAILURE, said[LAST_FAILURE])
        await self._store(held, lambda: self._reject(held, said), "dead")

    async def _reject(self, held: Held, said: dict[str, str]) -> None:
        for route in held.routes:
            if route.on_dead is None:
                continue
            try:
                await route.on_dead(held.event, said[REASON])
            except NotConnectedError as error:  # another connection than the one that holds it
                raise RefusedError(error.message, error.remedy) from error
            except TransportError:
                raise
            except Exception as error:  # the dead letter is what counts
                log.error("%s: that it is dead can't be told: %s", spell(held), kind_of(error))
        await held.delivery.reject(said)

    async def _store(self, held: Held, store: _Settle, outcome: str) -> None:
        """Settle it by what the broker has to store; where that takes nothing, later, beside what is handled."""
        held.begun = True
        if not self._waiting and await self._try(held, store, outcome):
            return
        self._waiting[held] = store, outcome
        self._meter.waiting = len(self._waiting)
        if len(self._waiting) == 1:
            self._start(self._store_later())
        if self.stuck and (line := self._repeats.line("stuck", f"the consumer {self._terms.name} receives nothing")):
            log.error("%s: all it may hold, %d events, waits for a place that takes none", line, len(self._waiting))

    async def _try(self, held: Held, store: _Settle, outcome: str) -> bool:
        """Try it.

        :return: False: the place takes nothing now.
        """
        try:
            if await self._settle(held, store):
                self._meter.count(outcome, held.event.name)
        except TransportError as error:
            if line := self._repeats.line("dead", f"a retry or a dead letter can't be stored: {error}"):
                log.error("%s; it is held and tried again", line)
            return False
        return True

    async def _store_later(self) -> None:
        """Until nothing waits any more. One at a time is tried: it is the place that takes none."""
        try:
            while self._waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_AGAIN):
                        await self._stop.wait()
                for held in list(self._waiting):
                    store, outcome = self._waiting[held]
                    stored = await self._try(held, store, outcome)
                    del self._waiting[held]
                    if not stored:
                        if self._stop.is_set():  # they come again
                            self._waiting.clear()
                        else:
                            self._waiting[held] = store, outcome  # behind the others, which may be smaller
                        break
                    self._repeats.over("stuck")
                self._meter.waiting = len(self._waiting)
        finally:
            self._waiting.clear()
            self._meter.waiting = 0
        if self._repeats.over("dead") and not self._stop.is_set():
            log.info("the consumer %s has stored what waited", self._terms.name)

    async def _settle(self, held: Held, settle: _Settle) -> bool:
        """Settle it, unless it isn't ours any more.

        :return: whether it is settled.
        :raises TransportError: it is not, and is held on.
        """
        self._holding.look()
        if held.void:
            return False
        held.begun = True
        try:
            await settle()
        except NotConnectedError:
            self._holding.remove(held)
            return False  # it comes again; receiving says why
        self._holding.remove(held)
        return True


class _Apart:
    """Awaits a coroutine in a context of its own (`contextvars`), as it had as a task of its own, for less.

    What one event's handler sets there, the next one's must not find.
    """

    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        context, step, value = copy_context(), self._coroutine.send, None
        while True:
            try:
                waits_for = context.run(step, value)
            except StopIteration:
                return
            try:
                value, step = (yield waits_for), self._coroutine.send
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # it was cancelled
                value, step = error, self._coroutine.throw
