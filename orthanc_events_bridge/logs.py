"""Logging that a fault which repeats for an hour can't flood. Standard library only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

#: Seconds between two lines about the same fault.
INTERVAL: Final = 300.0


class Repeats:
    """Decides whether a fault that may repeat is worth another line.

    :param now: seconds, monotonic.
    :param interval: seconds between two lines about the same fault.
    """

    def __init__(self, now: Callable[[], float], interval: float = INTERVAL) -> None:
        self._now = now
        self._interval = interval
        self._last: dict[str, tuple[float, int]] = {}

    def line(self, key: str, message: str) -> str | None:
        """The line to write, with how often the fault was passed over in silence; none when it is too early.

        :param key: what makes two faults the same.
        """
        last, silent = self._last.get(key, (float("-inf"), 0))
        if self._now() - last < self._interval:
            self._last[key] = (last, silent + 1)
            return None
        self._last[key] = (self._now(), 0)
        return f"{message} (and {silent} times more since the last line about it)" if silent else message

    def over(self, key: str) -> bool:
        """Forget a fault that has ended; true when there had been one."""
        return self._last.pop(key, None) is not None


def quiet_clients() -> None:
    """Keep brokers' clients from writing tracebacks about what is told in our own words."""
    for noisy in ("nats", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
