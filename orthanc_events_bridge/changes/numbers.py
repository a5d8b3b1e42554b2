"""Which numbers of a log are settled, where they come in no order: the low-water mark, and what is open above it.

A number is settled once its row is recorded, or it was given up. Open are the rows that were read and not recorded yet
(held), and the numbers that nobody has seen a row of (gaps): a transaction that hasn't committed yet, one that was
rolled back, or a row that is gone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from orthanc_events_bridge.changes.log import PAGE, ChangeLog, Row


class Gap(NamedTuple):
    """Numbers without a row, from ``first`` to ``last``, and since when that is known (seconds, monotonic)."""

    first: int
    last: int
    since: float


class Held(NamedTuple):
    """A row that is not recorded yet, and when it was read (seconds, monotonic)."""

    row: Row
    since: float


class Numbers:
    """Settled and open numbers of one log.

    :param mark: every number up to it is settled.
    :param ahead: what is open above it, as `ahead` gave it.
    :param now: seconds, monotonic.
    :ivar high: the highest number that is settled or open.
    :ivar held: by number.
    :ivar gaps: in their order, none touching another.
    """

    def __init__(self, mark: int, ahead: str, now: float) -> None:
        self.high = mark
        self.held: dict[int, Held] = {}
        self.gaps: list[Gap] = []
        if ahead:
            self.high, ranges = json.loads(ahead)
            self.gaps = [Gap(first, last, now) for first, last in ranges]

    def copy(self) -> Numbers:
        other = Numbers(self.high, "", 0.0)
        other.held, other.gaps = dict(self.held), list(self.gaps)
        return other

    @property
    def mark(self) -> int:
        """The number up to which everything is settled."""
        lowest = self.gaps[0].first if self.gaps else self.high + 1
        return min(lowest, min(self.held, default=lowest)) - 1

    @property
    def ahead(self) -> str:
        """What is open above the mark, to be kept with it; empty where nothing is settled above it."""
        ranges: list[list[int]] = []
        for first, last in sorted([*((seq, seq) for seq in self.held), *((gap.first, gap.last) for gap in self.gaps)]):
            if ranges and ranges[-1][1] == first - 1:
                ranges[-1][1] = last
            else:
                ranges.append([first, last])
        if ranges and ranges[-1][1] == self.high:  # above the last recorded row there is nothing to remember
            high = ranges.pop()[0] - 1
        else:
            high = self.high
        return json.dumps([high, ranges], separators=(",", ":")) if ranges else ""

    # -- what is read --------------------------------------------------------------------------------------------------

    def read_on(self, log: ChangeLog, now: float) -> bool:
        """Read the next page above everything; false when the log's end was reached.

        :raises LogUnavailableError: the log can't be read now.
        """
        page = log.page(self.high, PAGE)
        for row in page:
            if row.seq > self.high + 1:
                self.gaps.append(Gap(self.high + 1, row.seq - 1, now))
            self.held[row.seq] = Held(row, now)
            self.high = row.seq
        return len(page) == PAGE

    def given(self, counter: int, now: float) -> None:
        """So many numbers were given before the last page was read: those without a row are a gap at the end."""
        if counter > self.high:
            self.gaps.append(Gap(self.high + 1, counter, now))
            self.high = counter

    def read_gaps(self, log: ChangeLog, now: float) -> None:
        """Look whether rows have come that were missing.

        :raises LogUnavailableError: the log can't be read now.
        """
        for row in rows_within(log, self.gaps):
            self._fill(row, now)

    def _fill(self, row: Row, now: float) -> None:
        index = bisect_right(self.gaps, (row.seq, float("inf"))) - 1
        if index < 0 or row.seq > self.gaps[index].last:
            return
        first, last, since = self.gaps[index]
        rest = (Gap(first, row.seq - 1, since), Gap(row.seq + 1, last, since))
        self.gaps[index : index + 1] = [gap for gap in rest if gap.first <= gap.last]
        self.held[row.seq] = Held(row, now)

    # -- what is settled -----------------------------------------------------------------------------------------------

    def give_up(self, before: float) -> list[Gap]:
        """Settle the gaps that have been there since some moment (seconds, monotonic), or longer."""
        given_up = [gap for gap in self.gaps if gap.since <= before]
        if given_up:
            self.gaps = [gap for gap in self.gaps if gap.since > before]
        return given_up


def rows_within(log: ChangeLog, gaps: Sequence[Gap]) -> Iterator[Row]:
    """The rows that the log now has within gaps, and others between them, with as few pages as may be.

    :raises LogUnavailableError: the log can't be read now.
    """
    read = 0
    for gap in list(gaps):
        read = max(read, gap.first - 1)
        while read < gap.last:
            page = log.page(read, PAGE)
            yield from page
            if len(page) < PAGE:
                return
            read = page[-1].seq
