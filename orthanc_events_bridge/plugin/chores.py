"""What capture does beside recording (repair, backfill): a step now and then, in a tenth of its time at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from orthanc_events_bridge.errors import LogUnavailableError

#: Between two steps: seconds at least, and how many times as long as the last one took.
_REST: Final = 0.020
_REST_FACTOR: Final = 9
#: And behind a question that Orthanc could not answer.
_REST_AFTER_REFUSAL: Final = 1.0


class Chore:
    """When the next step of one kind of work is due. Used by capture's thread alone."""

    def __init__(self) -> None:
        self._next = 0.0

    def step(self, work: Callable[[], None]) -> float:
        """Take a step, if it is time to.

        What Orthanc can't answer now can wait, while recording can't: such a step is taken again a while later.

        :return: seconds until the next one.
        """
        now = time.monotonic()
        if now >= self._next:
            try:
                work()
                rest = max(_REST, _REST_FACTOR * (time.monotonic() - now))
            except LogUnavailableError:
                rest = _REST_AFTER_REFUSAL
            self._next = time.monotonic() + rest
        return max(0.0, self._next - time.monotonic())
