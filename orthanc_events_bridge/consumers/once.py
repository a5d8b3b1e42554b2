"""Effects that are done once, although events come at least once.

Each effect of each event is an entry in a store: *begun*, with an owner and a lease that is renewed while the effect
runs; then *done*. An entry alone, written before the effect, would lose the effect when the worker dies behind it; one
written behind it would not keep two workers apart.

What that promises, and what not (docs/once.md):

- While a lease holds, nobody else begins the effect. Behind it somebody does: its owner is dead, or as good as.
- An effect that is noted as done is not begun again, for as long as that is remembered.
- An effect that failed, or whose worker died in it, is begun again from its start: nobody knows how far it came. A
  worker that dies, or loses the store, between the end of the effect and the note does it again too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import inspect
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, TypeVar

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Retry
from orthanc_events_bridge.consumers.stores import STORES, Store
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.moments import seconds_of

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Seconds that a lease holds without being renewed.
LEASE: Final = 60.0
#: Seconds for which it is remembered that an effect is done.
KEEP: Final = 30 * 86400.0
#: The part of a lease behind which it is renewed.
_RENEW: Final = 1 / 3
#: Seconds between two tries to note that an effect is done.
_AGAIN: Final = 1.0
#: Seconds that the wait for another worker grows to.
_LONGEST: Final = 300.0


class Turns:
    """The effects of one consumer.

    :param consumer: its name, a part of every key.
    :param make: makes the store, when it is first used.
    :param sleep: waits so many seconds.
    :param now: seconds since the epoch.
    """

    def __init__(
        self,
        consumer: str,
        make: Callable[[], Store] | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._consumer = consumer
        self._make = make
        self._store: Store | None = None
        self._opening = asyncio.Lock()
        self.sleep = sleep
        self.now = now
        self.loop: asyncio.AbstractEventLoop | None = None

    def check(self, effect: object, lease: float, keep: float) -> None:
        """Can there be such an effect?

        :raises BridgeError: no.
        """
        self.check_store()
        if not isinstance(effect, str) or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", effect) is None:
            raise BridgeError(f"{effect!r} can't be the name of an effect", "use letters, digits, _ and -, at most 64")
        if not 1 <= lease <= 86400:
            raise BridgeError(f"the effect {effect}: lease={lease!r} makes no sense", "give 1 to 86400 seconds")
        if not lease <= keep:
            raise BridgeError(f"the effect {effect}: keep={keep!r} makes no sense", "give at least as much as lease")

    def check_store(self) -> None:
        """Is there a store?

        :raises BridgeError: no.
        """
        if self._make is None:
            raise BridgeError(
                f"consumer {self._consumer}: where to note what is done once is not said",
                f"give it a store: {STORES}",
            )

    def note(self, name: str) -> str:
        """What a note is known by."""
        return f"{self._consumer}.note.{hashlib.sha256(name.encode()).hexdigest()}"

    def key(self, event: Event, effect: str, of: str | None = None) -> str:
        """What an effect is known by: no patient data, and nothing that a store could not hold."""
        identity = event.id
        if of is not None:
            identity = hashlib.sha256(of.encode()).hexdigest()
        elif re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", identity) is None:  # another producer's
            identity = hashlib.sha256(f"{event.source}\n{identity}".encode()).hexdigest()
        return f"{self._consumer}.{effect}.{identity}"

    async def store(self) -> Store:
        """The store, opened.

        :raises BridgeError: it can't be used.
        """
        self.check_store()
        async with self._opening:
            if self._store is None:
                assert self._make is not None
                store = self._make()
                try:
                    await store.open()
                except BaseException:
                    await store.close()
                    raise
                self._store = store
            return self._store

    def wait(self, work: Coroutine[Any, Any, _T], what: str, instead: str) -> _T:
        """The result of something that runs in the worker's event loop, for a handler that runs in a thread.

        :param what: is asked for, in a handler's words.
        :param instead: what a coroutine function writes in place of it.
        :raises BridgeError: the consumer doesn't run, or this is its event loop.
        """
        loop = self.loop
        try:
            if loop is None or not loop.is_running():
                raise BridgeError(f"{what}: the consumer doesn't run", "call the handler by it, or by app.test()")
            if _running_loop() is loop:
                raise BridgeError(f"{what} would hold up everything", f"write `{instead}` in `async def`")
        except BridgeError:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def close(self) -> None:
        """End what is open; it is opened again when it is needed."""
        store, self._store, self.loop = self._store, None, None
        self._opening = asyncio.Lock()  # the next use may be in another event loop
        if store is not None:
            await store.close()

    @contextlib.contextmanager
    def lent(self, make: Callable[[], Store], now: Callable[[], float]) -> Iterator[None]:
        """Use another clock for a while, and another store where there is one at all. For tests."""
        own = self._make, self.now
        if self._make is not None:
            self._make = make
        self.now = now
        try:
            yield
        finally:
            self._make, self.now = own


class Once:
    """One effect of one event; made by `Consumer.once`. Used as a context manager, ``async with`` in async handlers,
    ``with`` in others, which gives whether the effect is to be done."""

    def __init__(
        self, turns: Turns, event: Event, effect: str, lease: float, keep: float, of: str | None = None
    ) -> None:
        turns.check(effect, lease, keep)
        self._turns = turns
        self._event = event
        self._effect = effect
        self._key = turns.key(event, effect, of)
        self._lease = lease
        self._keep = keep
        self._owner = uuid.uuid4().hex
        self._store: Store | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> bool:
        store = await self._turns.store()
        begun = await store.begin(self._key, self._owner, self._lease)
        if begun.state == "done":
            log.info("%r: %s is done already", self._event, self._effect)
            return False
        if begun.state == "theirs":
            # Each wait is an attempt: it is as long again as the event has been tried, so that an effect of an hour
            # outlasts no `RetryPolicy`. Not by the number of attempts: where the store was away for a while there are
            # dozens, and whoever has begun it may be dead.
            since = seconds_of(self._event.first_failure)
            tried = 0.0 if since is None else self._turns.now() - since
            raise Retry(after=max(begun.left, min(tried, _LONGEST)))
        self._store = store
        self._renewing = asyncio.create_task(self._renew(store))
        return True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        store, self._store = self._store, None
        if store is None:
            return
        assert self._renewing is not None
        if error is not None:
            await _ended(self._renewing)
            try:
                await store.forget(self._key, self._owner)
            except BridgeError as problem:  # then the lease runs out by itself
                log.warning("%r: that %s failed can't be noted: %s", self._event, self._effect, problem)
            return
        try:
            noted = await self._note(store, self._renewing)
        finally:
            await _ended(self._renewing)
        if not noted:
            log.error(
                "%r: %s took longer than its lease could be renewed, and another worker has begun it: it may be done"
                " twice",
                self._event,
                self._effect,
            )

    async def _note(self, store: Store, renewing: asyncio.Task[None]) -> bool:
        """Note that it is done; tried again for as long as the lease may hold."""
        while True:
            try:
                return await store.finish(self._key, self._owner, self._keep)
            except BridgeError as problem:
                if renewing.done():
                    raise
                log.warning("%r: that %s is done can't be noted yet: %s", self._event, self._effect, problem)
                await self._turns.sleep(_AGAIN)

    async def _renew(self, store: Store) -> None:
        """Until the lease is lost: another has it, or the store can't be reached for as long as it holds."""
        left = self._lease
        every = self._lease * _RENEW
        while left > 0:
            await self._turns.sleep(every)
            try:
                if not await store.renew(self._key, self._owner, self._lease):
                    return
                left = self._lease
            except BridgeError:
                left -= every

    # In handlers that run in threads.

    def __enter__(self) -> bool:
        return self._wait(self.__aenter__())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(self.__aexit__(kind, error, trace))

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._turns.wait(work, f"{self._effect}: `with`", "async with")


def only_once(handler: Callable[..., Any], make: Callable[[Event], Once]) -> Callable[..., Any]:
    """The handler, called once for each event as far as `Once` can promise it."""
    called = handler if inspect.isroutine(handler) else getattr(handler, "__call__", handler)  # noqa: B004
    if inspect.iscoroutinefunction(called):

        @functools.wraps(handler)
        async def awaited(event: Event, *rest: Any) -> Any:
            async with make(event) as first:
                return await handler(event, *rest) if first else None

        return awaited

    @functools.wraps(handler)
    def plain(event: Event, *rest: Any) -> Any:
        with make(event) as first:
            return handler(event, *rest) if first else None

    return plain


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
