"""Which events are handled when: so many at a time, and those of one key one behind the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.holding import Held

#: Events that are handled one behind the other, where no handler waits for anything, before others have their turn.
_TURN: Final = 64


class Keys:
    """Events of one key are handled in the order in which they came; of all, those first that came first.

    A task for each event would cost more than all else that is done for one: as many tasks as may run at a time take
    what is ready, and end when nothing is.

    :param concurrency: how many are handled at a time.
    :param handle: has one handled.
    :param start: has a coroutine run beside.
    """

    def __init__(
        self,
        concurrency: int,
        handle: Callable[[Held], Awaitable[None]],
        start: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._concurrency = concurrency
        self._handle = handle
        self._start = start
        self._ready: deque[Held] = deque()  # at most one of a key
        self._behind: dict[str, deque[Held] | None] = {}  # of each key of which one is ready, or is handled
        self._running = 0

    def add(self, held: Held) -> None:
        """One more."""
        key = held.key
        if key in self._behind:
            line = self._behind[key]
            if line is None:
                line = self._behind[key] = deque()
            line.append(held)
            return
        self._behind[key] = None
        self._ready.append(held)
        if self._running < self._concurrency:
            self._running += 1
            self._start(self._run())

    async def _run(self) -> None:
        turn = 0
        try:
            while self._ready:
                held = self._ready.popleft()
                try:
                    await self._handle(held)
                finally:
                    self._done(held.key)
                turn += 1
                if turn % _TURN == 0:
                    await asyncio.sleep(0)
        finally:
            self._running -= 1

    def _done(self, key: str) -> None:
        line = self._behind[key]
        if line:
            self._ready.append(line.popleft())
        else:
            del self._behind[key]
