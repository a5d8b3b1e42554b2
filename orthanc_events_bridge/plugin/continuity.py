"""Whether Orthanc's log still is the one that was read before: at each start, and once a second while followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from orthanc_events_bridge.changes.log import PAGE, TAIL, ChangeLog, Row, common_seq, same_log
from orthanc_events_bridge.errors import PassedOverError
from orthanc_events_bridge.outbox import OutboxWriter

EMPTIED: Final = "was emptied (DELETE /changes)"
#: The reasons of a break, as events tell them.
REASONS: Final = ("emptied", "counter-behind", "numbers-reused")
#: Resources that are asked for where rows of the log are missing.
_ASKED: Final = 5


class Break(NamedTuple):
    """The log does not go on where it ended.

    :ivar reason: one of `REASONS`.
    :ivar what: what has become of it, for people.
    :ivar tip: its counter at that time.
    :ivar going_on: the Seq behind which to read on; none where the two have nothing in common: then where the callbacks
        join it.
    """

    reason: str
    what: str
    tip: int
    going_on: int | None


class Continuity:
    """Used by capture's thread alone.

    :param log: Orthanc's change log.
    :param ask: Orthanc's answer about a resource, by level and id; none when it is gone.
    """

    def __init__(self, log: ChangeLog, ask: Callable[[str, str], dict[str, Any] | None]) -> None:
        self._log = log
        self._ask = ask
        self._first: Sequence[Row] = ()  # of the log, at the last look
        self._suspected: int | None = None  # the log's counter when it looked emptied for the first time

    def recognise(self, tail: list[Row], cursor: int) -> Break | None:
        """Look at a start whether this is the log that was read before.

        :param tail: the last rows that were read.
        :param cursor: the last Seq that is recorded.
        :raises LogUnavailableError: Orthanc can't answer now; call again.
        """
        tip = self._log.tip()
        rows = self._log.page(tail[0].seq - 1, TAIL) if tail else []
        if not same_log(tail, rows, tip, cursor):
            why = f"its counter is {tip}, {cursor} was recorded" if tip < cursor else "its numbers are given to others"
            what = f"is not the one that was read before ({why}): another or a restored database"
            reason = "counter-behind" if tip < cursor else "numbers-reused"
            return Break(reason, what, tip, min(common_seq(tail, rows), tip) or None)
        return Break("emptied", EMPTIED, tip, cursor) if self._was_emptied(tail) else None

    def is_followed(self, tail: list[Row]) -> bool:
        """Whether this still is the log that was read before, as far as one page can tell.

        :param tail: the last rows that were read.
        :raises LogUnavailableError: Orthanc can't answer now; call again.
        """
        return not tail or same_log(tail, self._log.page(tail[0].seq - 1, TAIL), 0, 0)

    def _was_emptied(self, tail: list[Row]) -> bool:
        """Whether rows of the log are gone although their resources are not."""
        if not tail:
            return False
        oldest = self._log.page(0, PAGE)
        if oldest and oldest[0].seq <= tail[-1].seq:
            return False
        new = {row.resource for row in oldest}  # deleted, and stored again
        last = list({row.resource: row for row in tail if row.resource not in new}.values())[-_ASKED:]
        return any(self._is_there(row) for row in last)

    def _is_there(self, row: Row) -> bool:
        """Whether Orthanc says so. One that it can't describe proves nothing."""
        try:
            return self._ask(row.level, row.resource) is not None
        except PassedOverError:
            return False

    def is_emptied(self, outbox: OutboxWriter, cursor: int) -> bool:
        """Look whether the log was emptied while it is followed: its first rows are gone, what they are about is not.

        What was deleted and stored again has a younger creation; the callback of that may still be on its way. So it
        is looked again once everything is recorded that the log had counted by the first look.

        :param cursor: the last Seq that is recorded.
        :raises LogUnavailableError: Orthanc can't answer now; call again.
        """
        if self._suspected is not None and cursor < self._suspected:
            return False
        first = self._log.page(0, _ASKED)
        gone = bool(self._first) and not set(self._first) & set(first)
        kept = gone and any(self._is_kept(outbox, row) for row in self._first)
        if kept and self._suspected is None:
            self._suspected = self._log.tip()
            return False
        self._first, self._suspected = first, None
        return kept

    def _is_kept(self, outbox: OutboxWriter, row: Row) -> bool:
        known = outbox.resources.find(row.resource)
        # What another Orthanc on the same database watches over (0), it may have stored anew.
        if known is None or known.born == 0 or (known.born or 0) > row.seq:
            return False
        return self._is_there(row)
