"""Pages of Orthanc's change log (``GET /changes``), and how to tell that it is another log than before.

Orthanc's side, as measured on 1.10.1 to 1.13.0: ``since`` is exclusive, an unparsable one silently means 0;
``Date`` is UTC in whole seconds; the rows of a deleted resource are gone; Seq only ever grows, except in a
restored database.
"""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

from orthanc_events_bridge.errors import LogUnavailableError

#: Far behind any Seq. In digits, because Orthanc reads "9e18" as 0.
_BEYOND: Final = 9_000_000_000_000_000_000

#: Rows asked for at once. 1,000 would hold Python's interpreter lock for 10 ms where ``AllowThreads`` is off.
PAGE: Final = 200

#: How many of the last rows are remembered, to recognise a restored database.
TAIL: Final = 100


class Row(NamedTuple):
    """One row of the log, every field as Orthanc spells it (the level in lower case)."""

    seq: int
    date: str
    change: str
    level: str
    resource: str

    @property
    def at(self) -> int:
        """Its date in milliseconds since the epoch."""
        return date_to_ms(self.date)


@lru_cache(maxsize=64)
def date_to_ms(date: str) -> int:
    """``20261123T200627`` (UTC) → milliseconds since the epoch; 0 where it isn't a date."""
    try:
        return calendar.timegm(time.strptime(date, "%Y%m%dT%H%M%S")) * 1000
    except ValueError:
        return 0


class ChangeLog(Protocol):
    """What the merge needs of a change log."""

    def page(self, since: int, limit: int) -> Sequence[Row]:
        """The rows behind ``since``, at most ``limit``, in the order of their Seq.

        :raises LogUnavailableError: Orthanc can't answer now.
        """

    def tip(self) -> int:
        """The counter: the highest Seq ever given, also when its row is gone.

        :raises LogUnavailableError: Orthanc can't answer now.
        """


class OrthancLog:
    """The change log of a running Orthanc.

    :param get: fetches a path of Orthanc's REST API, or raises whatever it likes when it can't.
    :ivar counter: as the last empty page told it; none before there was any.
    :ivar unordered: whether Seq is given before the commit; then the counter may fall behind rows that are there.
    """

    def __init__(self, get: Callable[[str], bytes | str]) -> None:
        self._get = get
        self.counter: int | None = None
        self.unordered = False

    def page(self, since: int, limit: int) -> Sequence[Row]:
        rows, last = self._ask(f"/changes?since={since}&limit={limit}")
        if not rows:
            self.counter = last
        return rows

    def tip(self) -> int:
        counter = self._ask(f"/changes?since={_BEYOND}&limit=1")[1]
        return max(counter, self._ask("/changes?last")[1]) if self.unordered else counter

    def _ask(self, path: str) -> tuple[list[Row], int]:
        """The rows, and `Last`: the last row's number, or the counter where there is no row."""
        try:
            answer: Any = json.loads(self._get(path))
            if not isinstance(answer, dict) or not isinstance(answer.get("Changes"), list) or "Last" not in answer:
                raise ValueError("the answer is no list of changes")
            rows = [
                Row(int(row["Seq"]), row["Date"], row["ChangeType"], row["ResourceType"].lower(), row["ID"])
                for row in answer["Changes"]
            ]
            return rows, int(answer["Last"])
        except Exception as error:  # whatever the SDK or the HTTP client raises: the log can't be read now
            raise LogUnavailableError(f"Orthanc's change log can't be read: {error}") from error


def same_log(tail: Iterable[Row], rows: Sequence[Row], tip: int, cursor: int) -> bool:
    """Whether this is the log that was read before.

    :param tail: the last rows that were read, as remembered.
    :param rows: what the log now has at those numbers.
    :param tip: the log's counter.
    :param cursor: the last Seq that was recorded.
    :return: false when a remembered row is there with other content, or the counter is behind the cursor:
        another or a restored database. A row that is only missing says nothing: deletions erase rows.
    """
    if tip < cursor:
        return False
    remembered = {row.seq: row for row in tail}
    return all(remembered.get(row.seq, row) == row for row in rows)


def common_seq(tail: Iterable[Row], rows: Sequence[Row]) -> int:
    """The last number up to which the remembered rows and the log agree; 0 where nothing does."""
    now = {row.seq: row for row in rows}
    common = 0
    for row in sorted(tail):
        found = now.get(row.seq)
        if found is not None and found != row:
            break
        if found == row:
            common = row.seq
    return common
