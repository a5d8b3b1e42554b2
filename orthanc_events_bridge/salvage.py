"""What can still be read of a damaged outbox, or of one that was removed while it was open, makes the new one.

Taken over is what some transport has not had yet: the rows behind the one that every transport has, in order, up to
the first that can't be read. Behind it the order would not hold any more; what Orthanc logs of it is read from its
log again, with the same ids. Where Seq is not the order of the commits (PostgreSQL), what is missing may have lower
numbers than what is there, and the log is read from further below. The new outbox has a `recorder` of its own, so that
its numbers begin anew and none names two facts; ids stay. Of the resources, whatever can be read is taken over.
Standard library only.

SQLite keeps no checksums of what is in its pages: a damage that leaves their structure whole is not recognised.
"""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.changes.unordered import REREAD
from orthanc_events_bridge.outbox_schema import JUMP, SCHEMA, translated

#: What is written at once; between two such steps one is asked whether to stop.
_STEP: Final = 5000
_LEVELS: Final = ("patient", "study", "series", "instance")


@dataclass(frozen=True, slots=True)
class Salvage:
    """What was taken over.

    :ivar rows: how many that some transport has not had.
    :ivar whole: whether no such row is missing.
    :ivar resources: how many entries; `all_resources`: whether none is missing.
    :ivar cursor: the Seq behind which Orthanc's log is read.
    :ivar settled: the Seq behind which it is read where its numbers come in no order; none where no row is missing.
    """

    rows: int
    whole: bool
    resources: int
    all_resources: bool
    cursor: int
    settled: int | None = None


class StoppedError(Exception):
    """It was to stop: the damaged file is as it was."""


def salvage(
    source: sqlite3.Connection | None,
    target: Path,
    delivered: Callable[[str | None], int],
    acknowledged: int | None,
    now: float,
    stopping: Callable[[], bool] = lambda: False,
) -> Salvage:
    """Make a new outbox out of what can be read. The source is not written to.

    :param source: the damaged one; none where nothing can be opened.
    :param target: the new one; what is there is overwritten.
    :param delivered: the position that every transport has reached in the outbox of this recorder; none: not known.
    :param acknowledged: the Seq up to which every transport has everything; none where that is not known.
    :param now: seconds since the epoch.
    :raises OutboxFullError: there is no room for it.
    :raises StoppedError: as `stopping` says.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{target}{suffix}").unlink(missing_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with translated(target), closing(sqlite3.connect(target, isolation_level=None)) as db:
        db.executescript(SCHEMA)
        db.execute("PRAGMA journal_mode = OFF").fetchall()  # whatever happens, the file is thrown away
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        found = _Source(source)
        rows = found.rows(delivered(found.meta.get("recorder")))
        count = _copy(db, "INSERT INTO rows VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows, stopping)
        resources = found.resources()
        entries = _copy(db, "INSERT OR IGNORE INTO resources VALUES (?,?,?,?,?,?)", resources, stopping)
        cursor = found.cursor(acknowledged)
        settled = found.settled(cursor)
        _copy(db, "INSERT OR IGNORE INTO settings VALUES (?,?)", found.settings(), stopping)
        _copy(db, "INSERT OR IGNORE INTO tail VALUES (?,?,?,?,?)", found.tail(cursor), stopping)
        began = found.meta.get("began") if found.all_resources else None
        meta = {
            "recorder": str(uuid.uuid4()),
            "cursor": cursor,
            "settled": settled,
            "ahead": found.meta.get("ahead") or "" if found.whole else "",
            "other_logs": found.meta.get("other_logs") or 0,
            "position": count,
            # Where entries are missing, what was announced isn't known: nothing older than now counts as new.
            "began": began or int(now * 1000),
            "open": 0,
        }
        db.executemany("INSERT INTO meta VALUES (?,?)", meta.items())
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL").fetchall()
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Salvage(count, found.whole, entries, found.all_resources, cursor, settled)


def _copy(db: sqlite3.Connection, statement: str, rows: Iterator[tuple[Any, ...]], stopping: Callable[[], bool]) -> int:
    count = 0
    while step := list(islice(rows, _STEP)):
        if stopping():
            raise StoppedError
        db.executemany(statement, step)
        count += len(step)
    return count


class _Source:
    """The damaged outbox. Whatever can't be read ends what is read, and nothing is raised."""

    def __init__(self, db: sqlite3.Connection | None) -> None:
        self._db = db
        self.meta: dict[str, Any] = dict(self._read("SELECT key, value FROM meta"))
        self.whole = False
        self.all_resources = False
        self._failed = False
        self._seq = 0

    def _read(self, query: str, *arguments: object) -> Iterator[tuple[Any, ...]]:
        self._failed = True
        if self._db is None:
            return
        try:
            yield from self._db.execute(query, arguments)
        except (sqlite3.Error, OverflowError):
            return
        self._failed = False

    def rows(self, delivered: int) -> Iterator[tuple[Any, ...]]:
        """Those that are to be told still, under new positions."""
        last = delivered
        for number, row in enumerate(self._read("SELECT * FROM rows WHERE position > ? ORDER BY position", delivered)):
            # Positions have no holes but the jumps. Without any delivered, the first is where retention ended.
            if not _is_row(row) or ((row[0] - last - 1) % JUMP and (number or delivered)):
                return
            last = row[0]
            self._seq = max(self._seq, row[5] or 0)
            yield (number + 1, *row[1:])
        position, cursor = self.meta.get("position"), self.meta.get("cursor")
        reached = isinstance(position, int) and (last >= position or (position - last) % JUMP == 0)
        self.whole = reached and not self._failed and isinstance(cursor, int)

    def cursor(self, acknowledged: int | None) -> int:
        """The Seq up to which everything is delivered or taken over."""
        return int(self.meta["cursor"]) if self.whole else max(acknowledged or 0, self._seq)

    def settled(self, cursor: int) -> int | None:
        """The Seq up to which everything is delivered or taken over, also where the log has no order."""
        mark = self.meta.get("cursor")
        return None if self.whole else max(0, min(cursor - REREAD, mark if isinstance(mark, int) else cursor))

    def resources(self) -> Iterator[tuple[Any, ...]]:
        for row in self._read("SELECT id, level, parent, uids, born, growing FROM resources ORDER BY id"):
            if row[1] not in _LEVELS:
                return
            yield row
        self.all_resources = not self._failed

    def settings(self) -> Iterator[tuple[Any, ...]]:
        for number, document in self._read("SELECT number, document FROM settings"):
            if _parsed(document) is not None:
                yield number, document

    def tail(self, cursor: int) -> Iterator[tuple[Any, ...]]:
        yield from self._read("SELECT seq, date, change, level, resource FROM tail WHERE seq <= ?", cursor)


def _is_row(row: tuple[Any, ...]) -> bool:
    """Whether a row of the outbox is what it should be."""
    position, change, level, resource, at, seq, date, minted, recorded, settings, extra = row
    return (
        all(isinstance(number, int) for number in (position, at, recorded, settings))
        and all(isinstance(text, str) for text in (change, level))
        and all(text is None or isinstance(text, str) for text in (resource, date, minted))
        and (seq is None or isinstance(seq, int))
        and _parsed(extra) is not None
    )


def _parsed(document: object) -> dict[str, Any] | None:
    try:
        found = json.loads(document) if isinstance(document, str) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
