"""How many requests one Orthanc is at, at once: so many places, for all that asks it in this process.

A request has its place from when it is sent until its answer is read to the end, or closed. Who finds none free waits,
in the order of coming. It must not be possible to wait for oneself, so there are two exceptions, both over the limit:

- Who has a place already, and asks again before leaving it (a task that reads a stream, or writes one, and makes
  another request in between), doesn't wait.
- Where Orthanc has been at none of the requests for a moment, since all of them wait for who reads or writes them, the
  next one is let in. Who reads may itself wait for that one: in another task or thread, or by a lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

#: Seconds for which Orthanc is at nothing before one more is let in.
MOMENT: Final = 1.0


@dataclass(slots=True)
class Among:
    """Which of several workers on this machine this process is. Only commands set it.

    :ivar number: from 0.
    :ivar count: how many there are.
    """

    number: int = 0
    count: int = 1

    def share(self, most: int) -> int:
        """The part of a number that is this worker's; 1 at least."""
        whole, left = divmod(most, self.count)
        return max(1, whole + (self.number < left))


#: Of this process.
among = Among()

# One for all limits: who has a place at one Orthanc has it also when another one is asked.
_lock: Final = threading.Lock()
_places: Final[Counter[Hashable]] = Counter()
_left: Final[deque[Place]] = deque()
_limits: Final[WeakValueDictionary[tuple[object, ...], Limit]] = WeakValueDictionary()


@contextmanager
def _locked() -> Generator[None]:
    try:
        with _lock:
            yield
    finally:
        _clear()


def _clear() -> None:
    """Give on what was left. Where the lock is held, who holds it does that when done: Python's garbage collector can
    close an answer at any moment, also in a thread that holds the lock already.
    """
    while _left and _lock.acquire(blocking=False):
        try:
            while _left:
                place = _left.popleft()
                place.limit.free(place)
        finally:
            _lock.release()


def limit_of(url: str, most: int) -> Limit:
    """The limit of the Orthanc at an address, which all share that ask it there; where they differ, the least counts.

    :param most: for all the workers of a command together.
    """
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    place = (parts.scheme, parts.hostname, port, parts.path.rstrip("/"))
    most = among.share(most)
    with _locked():
        found = _limits.get(place)
        if found is None:
            found = _limits[place] = Limit(most, name=url)
        found.most = min(found.most, most)
        return found


def limits() -> list[Limit]:
    """Of all Orthancs that are asked now."""
    with _locked():
        return sorted(_limits.values(), key=lambda one: one.name)


class Limit:
    """So many places. For any thread, and any event loop.

    :param now: seconds, monotonic.
    :ivar most: how many.
    :ivar name: the Orthanc's address.
    """

    def __init__(self, most: int, now: Callable[[], float] = time.monotonic, name: str = "") -> None:
        self.most = most
        self.name = name
        self._now = now
        self._taken = 0
        self._busy = 0  # of these, those that Orthanc is at
        self._idle_since = now()
        self._waiting: deque[_Waiting] = deque()

    @property
    def taken(self) -> int:
        """How many requests have a place."""
        return self._taken

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return len(self._waiting)

    def enter(self) -> Place:
        """Get a place; wait for one where all are taken."""
        there = threading.Event()
        waiting = self._ask(threading.get_ident(), there.set)
        try:
            while waiting.place is None:
                if not there.wait(waiting.patience):
                    self.look()
        except BaseException:
            self._give_up(waiting)
            raise
        return waiting.place

    async def enter_async(self) -> Place:
        """The same in a coroutine."""
        there, loop = asyncio.Event(), asyncio.get_running_loop()
        waiting = self._ask(asyncio.current_task(), lambda: loop.call_soon_threadsafe(there.set))
        try:
            while waiting.place is None:
                try:
                    async with asyncio.timeout(waiting.patience):
                        await there.wait()
                except TimeoutError:
                    self.look()
        except BaseException:
            self._give_up(waiting)
            raise
        return waiting.place

    def look(self) -> None:
        """Let one more in, where Orthanc has been at nothing for a moment; who waits does so from time to time."""
        with _locked():
            if self._waiting and not self._busy and self._now() - self._idle_since >= MOMENT:
                self._give()

    def _ask(self, who: Hashable, wake: Callable[[], object]) -> _Waiting:
        with _locked():
            # The first in the line looks after one moment, the second after two, and so on: few look at a time.
            waiting = _Waiting(who, wake, MOMENT * (1 + len(self._waiting)))
            if who in _places or (self._taken < self.most and not self._waiting):
                waiting.place = self._take(who)
            else:
                self._waiting.append(waiting)
            return waiting

    def _take(self, who: Hashable) -> Place:
        self._taken += 1
        self._busy += 1
        _places[who] += 1
        return Place(self, who)

    def _give(self) -> None:
        """To the first who waits."""
        waiting = self._waiting.popleft()
        waiting.place = self._take(waiting.who)
        try:
            waiting.wake()
        except RuntimeError:  # its event loop is closed
            waiting.place.leave()

    def _give_up(self, waiting: _Waiting) -> None:
        with _locked():
            if waiting.place is not None:
                waiting.place.leave()
            else:
                self._waiting.remove(waiting)

    def free(self, place: Place) -> None:
        """Give a place on that was left; by who has the lock."""
        if place.freed:
            return
        place.freed = True
        self._turn(place, busy=False)
        self._taken -= 1
        _places[place.who] -= 1
        if not _places[place.who]:
            del _places[place.who]
        while self._waiting and self._taken < self.most:
            self._give()

    def _turn(self, place: Place, *, busy: bool) -> None:
        """Whether Orthanc is at it."""
        if place.busy == busy:
            return
        place.busy = busy
        self._busy += 1 if busy else -1
        if not self._busy:
            self._idle_since = self._now()

    def turn(self, place: Place, *, busy: bool) -> None:
        """See `Place.ours` and `Place.theirs`."""
        with _locked():
            if not place.freed:
                self._turn(place, busy=busy)


class Place:
    """That of one request; only its limit changes it.

    :ivar who: the task or the thread that has it.
    :ivar busy: whether Orthanc is at it, and not who reads or writes it.
    :ivar freed: whether it is given on.
    """

    __slots__ = ("busy", "freed", "limit", "who")

    def __init__(self, limit: Limit, who: Hashable) -> None:
        self.limit = limit
        self.who = who
        self.busy = True
        self.freed = False

    def leave(self) -> None:
        """Give it up. A second time it does nothing."""
        if not self.freed:
            _left.append(self)
            _clear()

    def read(self) -> None:
        """The answer has come: from now on it waits for who reads it."""
        self.limit.turn(self, busy=False)

    @contextmanager
    def ours(self) -> Generator[None]:
        """Meanwhile Orthanc waits for what is written to it."""
        self.limit.turn(self, busy=False)
        try:
            yield
        finally:
            self.limit.turn(self, busy=True)

    @contextmanager
    def theirs(self) -> Generator[None]:
        """Meanwhile who reads waits for Orthanc."""
        self.limit.turn(self, busy=True)
        try:
            yield
        finally:
            self.limit.turn(self, busy=False)


class _Waiting:
    """Who waits.

    :param wake: called when there is a place; it raises `RuntimeError` where nobody can be woken.
    :param patience: seconds between two looks whether anything moves.
    :ivar place: that was given.
    """

    __slots__ = ("patience", "place", "wake", "who")

    def __init__(self, who: Hashable, wake: Callable[[], object], patience: float) -> None:
        self.who = who
        self.wake = wake
        self.patience = patience
        self.place: Place | None = None
