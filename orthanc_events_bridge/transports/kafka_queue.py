"""The partitions that have something to give out, each in its turn."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final

from orthanc_events_bridge.transports.kafka_delays import waiting_time
from orthanc_events_bridge.transports.kafka_partition import Partition

#: Events of one partition that are given out before it is another's turn.
_TURN: Final = 16


class Queue:
    """Partitions with records, in turn; those that wait for a time stand aside.

    :param hungry: called when one of them had enough, and has room for more now.
    """

    def __init__(self, hungry: Callable[[], None]) -> None:
        self._hungry = hungry
        self._ready: deque[Partition] = deque()
        self._later: list[tuple[float, int, Partition]] = []
        self._numbers = itertools.count()

    def add(self, one: Partition) -> bool:
        """It has got something.

        :return: whether that is new.
        """
        if one.queued:
            return False
        one.queued = True
        self._ready.append(one)
        return True

    @property
    def next(self) -> float:
        """When the first of those that wait has waited enough."""
        return self._later[0][0] if self._later else math.inf

    def take(self, now: float) -> Generator[tuple[Partition, Any, float]]:
        """Yield records, each partition's in its order, as long as one is wanted.

        :param now: the time of the epoch.
        :return: partition and record, and in how many seconds it is due, where that is not now: it is to wait in
            another topic.
        """
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        while self._ready:
            one = self._ready.popleft()
            if one.leaving or one.gone:
                one.queued = False
                continue
            had_enough, ready = not one.hungry, now
            try:
                for _ in range(min(_TURN, len(one.records))):
                    if one.blocked:
                        break
                    ready, due = max(now, one.due), now
                    if one.step is not None:
                        ready, due = waiting_time(one.records[0], one.step)
                    if ready > now:
                        break
                    record = one.records.popleft()
                    one.given = record.offset + 1
                    yield one, record, due - now
            finally:
                if one.blocked:
                    one.queued = False
                elif ready > now:
                    heapq.heappush(self._later, (ready, next(self._numbers), one))
                elif one.records:
                    self._ready.append(one)
                else:
                    one.queued = False
                if had_enough and one.hungry:
                    self._hungry()
