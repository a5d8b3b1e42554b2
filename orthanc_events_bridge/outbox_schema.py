"""What is in the file of an outbox, for all who open it: its tables, a row of them, and what SQLite's errors mean.

Standard library only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from orthanc_events_bridge import resources
from orthanc_events_bridge.errors import DamagedError, OutboxError, OutboxFullError

VERSION: Final = 2
#: After a start that no clean stop came before, positions go on this much further: a power cut may have taken
#: rows whose positions the world has seen, and no number may ever name two facts.
JUMP: Final = 1_000_000

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    position INTEGER PRIMARY KEY,  -- the event's `sequence`
    change TEXT NOT NULL,          -- as /changes spells it
    level TEXT NOT NULL,
    resource TEXT,
    at INTEGER NOT NULL,           -- of the change, milliseconds since the epoch
    seq INTEGER,                   -- in Orthanc's log
    date TEXT,                     -- as the log spells it; NULL: the row was never read
    minted TEXT,                   -- the event's id where it can't be derived from the log's row
    recorded INTEGER NOT NULL,     -- milliseconds since the epoch
    settings INTEGER NOT NULL,     -- which of `settings` shapes it; 0: the first that come
    extra TEXT NOT NULL            -- JSON: parents, tags, metadata, job, inferred
) STRICT;
CREATE TABLE IF NOT EXISTS tail (  -- the last rows of Orthanc's log
    seq INTEGER PRIMARY KEY, date TEXT, change TEXT, level TEXT, resource TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS settings (number INTEGER PRIMARY KEY, document TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS jumps (origin INTEGER PRIMARY KEY, target INTEGER NOT NULL) STRICT;
"""
#: Makes all tables of a new file.
SCHEMA: Final = f"""
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
{_TABLES}
{resources.SCHEMA}
PRAGMA user_version = {VERSION};
COMMIT;
"""

_DAMAGE_CODES: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_FULL_CODES: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR})


class OutboxRow(NamedTuple):
    """A fact with its place in the outbox; the columns are explained in the schema above."""

    position: int
    change: str
    level: str
    resource: str | None
    at: int
    seq: int | None
    date: str | None
    minted: str | None
    recorded: int
    settings: int
    extra: dict[str, Any]


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours.

    :raises OutboxFullError: the disk is full, read-only or failing.
    :raises DamagedError: what is in the file is no database, or not a whole one.
    :raises OutboxError: anything else.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _FULL_CODES:
            raise OutboxFullError(
                f"{path} can't be written: {error}", "free space on its disk, or make it writable again"
            ) from error
        if code in _DAMAGE_CODES:
            remedy = "it is set aside and made anew while Orthanc and the bridge are running; check its disk"
            raise DamagedError(f"{path} can't be used: {error}", remedy) from error
        remedy = "check the file's owner and permissions, and that its disk is sound"
        raise OutboxError(f"{path} can't be used: {error}", remedy) from error


def used_bytes(db: sqlite3.Connection) -> int:
    """The size of what an SQLite database keeps, free pages not counted."""
    pages, free, size = (
        db.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
