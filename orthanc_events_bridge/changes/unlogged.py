"""Callbacks alone, for an Orthanc whose log another bridge reads (``capture.log: false``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from orthanc_events_bridge.changes.log import ChangeLog
from orthanc_events_bridge.changes.merge import Anchor, from_callback
from orthanc_events_bridge.changes.model import Callback, Fact

#: Callbacks in a batch, at most.
_BATCH: Final = 1000


class Unlogged:
    """Records what only callbacks show, and drops what is logged. The interface is that of `Merge`.

    The cursor stays where it is: if the log is to be read here again, it is read from there on, and nothing is missing.

    :param cursor: none on a first start: then it becomes what the log's counter is.
    :param ahead: what is recorded above the cursor already.
    """

    vanished: Final = 0

    def __init__(self, log: ChangeLog, queue: deque[Callback], cursor: int | None, *, ahead: str = "") -> None:
        self._log = log
        self._queue = queue
        self._first = cursor is None
        self.cursor = cursor or 0
        self.ahead = ahead

    def anchor(self) -> Anchor | None:
        """Nothing has to be joined.

        :raises LogUnavailableError: the log can't be read; call again.
        """
        return Anchor(self._log.tip() if self._first else self.cursor, "unlogged")

    def skip(self, through: int) -> None:
        self.cursor = through

    def backlog(self, through: int) -> Iterator[list[Fact]]:
        return iter(())

    def tail(self) -> list[Fact]:
        return []

    def due(self) -> list[Fact]:
        return []

    def take(self) -> list[Callback]:
        """Drain a batch."""
        return [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]

    def put_back(self, batch: Sequence[Callback]) -> None:
        """Undo `take`."""
        self._queue.extendleft(reversed(batch))

    def facts(self, batch: Sequence[Callback]) -> list[Fact]:
        """What of a batch of callbacks is not logged."""
        return [from_callback(callback, None) for callback in batch if not callback.logged]
