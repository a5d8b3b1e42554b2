"""What repair needs to look at everything a little at a time: where it is, and what it has seen and may not say yet.

Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

#: Seconds without any callback, behind which what was not heard of never will be.
CALM: Final = 2.0

Seen = TypeVar("Seen")


class Walk:
    """Once around all levels and ids, from somewhere back to there.

    :param place: where an earlier walk was, as `str` gave it: a level and the last id of it.
    """

    def __init__(self, place: str) -> None:
        self.level, _, self.after = place.partition(":")
        self._began = (self.level, self.after)
        self._wrapped = not self.after
        self._left: deque[str] | None = None

    def __str__(self) -> str:
        return f"{self.level}:{self.after}"

    def go_on(self, last: str, levels: Sequence[str]) -> bool:
        """Move behind an id, or from the end of a level to the next; true when it has been everywhere."""
        if self._left is None:  # the other levels, and at last what lies in front of where it began
            at = levels.index(self.level) if self.level in levels else 0
            self.level = levels[at]
            self._left = deque([*levels[at + 1 :], *levels[:at], *([] if self._wrapped else [self.level])])
        if last:
            self.after = last
            began = self.level == self._began[0] and not self._left and not self._wrapped
            return began and last >= self._began[1]
        if not self._left:
            return True
        self.level, self.after = self._left.popleft(), ""
        return False


class Doubts(Generic[Seen]):
    """What looks at Orthanc have shown, each until everything that was committed before the look is recorded.

    Callbacks come in the order of the commits. So nobody will contradict what was seen any more when a logged change
    is recorded that is younger than the look, or when no callback has come for a while.

    :param now: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._seen: dict[str, tuple[Seen, int, float]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, resource: str, seen: Seen, tip: int) -> None:
        """Keep what was seen of a resource, unless something is kept already.

        :param tip: the counter of Orthanc's log, asked *behind* the look.
        """
        self._seen.setdefault(resource, (seen, tip, self._now()))

    def drop(self, resource: str) -> None:
        self._seen.pop(resource, None)

    def settled(self, cursor: int, calm: float) -> list[tuple[str, Seen, int]]:
        """What is beyond doubt, in the order in which it was seen: resource, what was seen, and the counter then.

        :param cursor: the last Seq that is recorded.
        :param calm: seconds since the last callback came; none is waiting.
        """
        now = self._now()
        return [
            (resource, seen, tip)
            for resource, (seen, tip, since) in self._seen.items()
            if cursor > tip or (calm >= CALM and now - since >= CALM)
        ]
