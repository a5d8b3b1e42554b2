"""Several workers of one consumer on one machine: processes that are started, and started again when they die."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

log = logging.getLogger(__name__)

#: Seconds between two starts of one worker: the first, and the longest.
_FIRST: Final = 1.0
_LONGEST: Final = 30.0
#: Seconds that a worker has to live so that its next start is a first one again.
_WELL: Final = 60.0
#: Seconds between two looks.
_LOOK: Final = 0.1
#: It can't begin, and never will until a person changes something.
CONFIGURATION: Final = 2


class Process(Protocol):
    """One of them, as `subprocess.Popen` is."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code; none while it lives."""

    def send_signal(self, sig: int, /) -> None:
        """As it says."""


class Workers:
    """Keeps so many of them alive.

    :param start: starts the one with a number, from 0.
    :param count: how many.
    :param wait: waits for so many seconds, or less when somebody calls `stop`.
    :param now: seconds, monotonic.
    """

    def __init__(
        self,
        start: Callable[[int], Process],
        count: int,
        wait: Callable[[float], object] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._wait = wait
        self._now = now
        self._alive: dict[int, Process] = {}
        self._began: dict[int, float] = {}
        self._due = dict.fromkeys(range(count), now())
        self._deaths = dict.fromkeys(range(count), 0)
        self._stopping = False
        self._code = 0

    def stop(self) -> None:
        """Ask all to end; a second time: at once."""
        number = signal.SIGKILL if self._stopping else signal.SIGTERM
        self._stopping = True
        for process in self._alive.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def asked(self) -> bool:
        """Whether `stop` was called; a signal's handler may do so between any two steps."""
        return self._stopping

    def run(self) -> int:
        """Until `stop` is called and all have ended.

        :return: 0; 1 where one didn't end well when it was asked to, 2 where they can't begin.
        """
        while not (self._stopping and not self._alive):
            self._bury()
            if not self._stopping:
                self._begin()
            self._wait(_LOOK)
        return self._code

    def _begin(self) -> None:
        for number, due in list(self._due.items()):
            if self.asked():  # asked meanwhile, by a signal
                return
            if due <= self._now():
                del self._due[number]
                self._alive[number] = self._start(number)
                self._began[number] = self._now()
                if self.asked():  # asked while it was started, and not known to who asked
                    with suppress(ProcessLookupError):
                        self._alive[number].send_signal(signal.SIGTERM)

    def _bury(self) -> None:
        for number, process in list(self._alive.items()):
            code = process.poll()
            if code is None:
                continue
            del self._alive[number]
            if self._stopping:
                self._code = self._code or (1 if code else 0)
            elif code == CONFIGURATION:
                self._code = CONFIGURATION  # it has said why
                self.stop()
            else:
                self._again(number, process.pid, code)

    def _again(self, number: int, pid: int, code: int) -> None:
        lived = self._now() - self._began[number]
        self._deaths[number] = 1 if lived > _WELL else self._deaths[number] + 1
        delay = min(_FIRST * 2.0 ** min(self._deaths[number] - 1, 10), _LONGEST)
        self._due[number] = self._now() + delay
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        log.error("worker %d (process %d) %s; it is started again in %g s", number, pid, how, delay)
