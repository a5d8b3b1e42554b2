"""The ledger as a tool: what Orthanc has against what the outbox has, and that against what a broker holds.

Nothing is written anywhere but into a scratch database of our own, so that memory stays bounded whatever is compared.
What is still on its way is no difference: whatever looks like one is looked at again, until it stays.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Self

MISSING: Final = "missing"
EXTRA: Final = "extra"
OUT_OF_ORDER: Final = "out of order"
KINDS: Final = (MISSING, EXTRA, OUT_OF_ORDER)

#: What is done, how much of it, of how much (0: not known).
Show = Callable[[str, int, int], None]


class Difference(NamedTuple):
    """One thing that is not as it should be.

    :param what: one of `KINDS`.
    :param where: where it shows: ``outbox``, or a transport's name.
    :param subject: what it is about: ``studies/…``, as in events, or a row of Orthanc's log.
    :param why: the reason, as far as it is known.
    :param event: the event's id, where it is about one.
    :param sequence: its number in the outbox.
    """

    what: str
    where: str
    subject: str
    why: str
    event: str = ""
    sequence: int | None = None


class Findings:
    """What was found. Differences are kept in the scratch database, which is a temporary file of SQLite's.

    :ivar notes: what is no difference, and how often: reason → count.
    :ivar checked: how much was compared: what → count.
    """

    def __init__(self) -> None:
        self.scratch = sqlite3.connect("", isolation_level=None)
        self.scratch.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE differences (what, place, subject, why, event, sequence)"
        )
        self.notes: Counter[str] = Counter()
        self.checked: dict[str, int] = {}

    def add(self, difference: Difference) -> None:
        self.scratch.execute("INSERT INTO differences VALUES (?,?,?,?,?,?)", difference)

    def counts(self) -> dict[str, int]:
        """How many differences of each kind."""
        found: dict[str, int] = dict(self.scratch.execute("SELECT what, count(*) FROM differences GROUP BY what"))
        return {kind: found.get(kind, 0) for kind in KINDS}

    def reasons(self) -> list[tuple[str, str, str, int]]:
        """Kind, place and reason of differences, and how many there are."""
        return self.scratch.execute(
            "SELECT what, place, why, count(*) FROM differences GROUP BY what, place, why ORDER BY 4 DESC, 1, 2, 3"
        ).fetchall()

    def first(self, limit: int) -> Iterator[Difference]:
        """Some of the differences."""
        rows: Iterator[Any] = self.scratch.execute("SELECT * FROM differences LIMIT ?", (limit,))
        return map(Difference._make, rows)

    def close(self) -> None:
        self.scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
