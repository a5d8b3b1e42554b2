"""``bridge.db``: what the bridge must remember, and what it tells capture and the command line.

Written by the bridge, and, for `commands`, by the command line. `orthanc_events_bridge.status` reads it
elsewhere. A transport is known here from its first start until it is forgotten on purpose.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.errors import DamagedError, OutboxError
from orthanc_events_bridge.folder import identity, set_aside
from orthanc_events_bridge.outbox_schema import translated as translated_errors

VERSION: Final = 1
#: Pages that are given back to the disk at once.
_VACUUM: Final = 500
_SCHEMA: Final = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS settings (  -- those that shape events; rows of the outbox name the number
    number INTEGER PRIMARY KEY, document TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE IF NOT EXISTS transports (
    name TEXT PRIMARY KEY,
    recorder TEXT NOT NULL,              -- the outbox that the position belongs to
    position INTEGER NOT NULL DEFAULT 0, -- everything up to here is delivered or set aside
    seq INTEGER,                         -- the highest Seq of Orthanc's log up to there
    identity TEXT NOT NULL DEFAULT '',   -- of the place at the broker; another one: it was made again
    published INTEGER NOT NULL DEFAULT 0,
    gap_from INTEGER, gap_through INTEGER -- what the outbox had to give up before it was delivered
) STRICT;
CREATE TABLE IF NOT EXISTS set_aside (   -- events that a broker can never take; the rows stay in the outbox
    transport TEXT NOT NULL, position INTEGER NOT NULL, event TEXT NOT NULL, type TEXT NOT NULL,
    reason TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (transport, position)
) STRICT;
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, document TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS commands (
    number INTEGER PRIMARY KEY AUTOINCREMENT, command TEXT NOT NULL, transport TEXT NOT NULL, argument TEXT
) STRICT;
"""
#: Tables that came later. A version of the package that doesn't know them works without.
_LATER: Final = """
CREATE TABLE IF NOT EXISTS paused (name TEXT PRIMARY KEY, since INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS answers (  -- what became of commands, by their number
    number INTEGER PRIMARY KEY, done INTEGER NOT NULL, text TEXT NOT NULL
) STRICT;
"""
#: So many answers are kept for the command line to find.
_ANSWERS: Final = 1000


@dataclass(slots=True)
class Progress:
    """How far one transport is; the columns are explained in the schema above."""

    position: int
    seq: int | None
    identity: str
    published: int


@dataclass(frozen=True, slots=True)
class Command:
    """What the operator asked for on the command line."""

    number: int
    command: str
    transport: str
    argument: Any


class State:
    """Opens ``bridge.db``, and makes it when it isn't there, readable by its owner only.

    :raises OutboxError: it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        #: What shows that the file is damaged, once a statement has met it.
        self.damage: DamagedError | None = None
        self._open()

    def _open(self) -> None:
        path = self._path
        with self._translated():
            try:
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise OutboxError(f"{path} can't be opened: {error.strerror}") from error
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5)
            try:
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    self._db.executescript(_SCHEMA + f"PRAGMA user_version = {VERSION}; COMMIT;")
                elif version != VERSION:
                    wrong = f"{path} has version {version}, this package uses {VERSION}"
                    raise OutboxError(wrong, "use the same version")
                self._db.executescript(_LATER)
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("PRAGMA journal_size_limit = 1048576")
            except BaseException:
                self._db.close()
                raise
        self._files = identity(path)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """As `translated_errors`; damage is remembered."""
        try:
            with translated_errors(self._path):
                yield
        except DamagedError as error:
            self.damage = error
            raise

    def shrink(self) -> None:
        """Give free pages back to the disk, a few at a time."""
        with self._translated():
            if self._db.execute("PRAGMA freelist_count").fetchone()[0] > _VACUUM // 10:
                if not self._db.execute("PRAGMA auto_vacuum").fetchone()[0]:  # of an earlier version
                    self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    self._db.execute("VACUUM")
                self._db.executescript(f"PRAGMA incremental_vacuum({_VACUUM})")  # see outbox.py
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def put_back(self) -> bool:
        """Make the file again if somebody has removed it, or put another in its place, while we have it open.

        :return: whether that was so.
        :raises OutboxError: it can't be made.
        """
        if identity(self._path) == self._files:
            return False
        new = Path(f"{self._path}.new")
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._translated():
            with closing(sqlite3.connect(new, isolation_level=None)) as copy:
                self._db.backup(copy)
            self._db.close()  # before another file has its name: see plugin/rescue.py
        set_aside(self._path)
        os.replace(new, self._path)  # noqa: PTH105 -- no SQLite has it open
        self._open()
        return True

    def number_settings(self, shape: Mapping[str, Any]) -> int:
        """The number of the settings that shape events; the same settings keep theirs.

        Numbers only grow, and begin with the time: in a ``bridge.db`` that was lost and made again, no number
        is given twice, and rows of the outbox that name an old one keep their meaning.
        """
        document = json.dumps(shape, sort_keys=True)
        with self._translated():
            self._db.execute(
                "INSERT OR IGNORE INTO settings SELECT max(coalesce((SELECT max(number) FROM settings), 0) + 1, ?), ?",
                (int(time.time()), document),
            )
            return int(self._db.execute("SELECT number FROM settings WHERE document = ?", (document,)).fetchone()[0])

    def settings(self) -> dict[int, dict[str, Any]]:
        """All settings that were ever numbered."""
        with self._translated():
            return {n: json.loads(document) for n, document in self._db.execute("SELECT * FROM settings")}

    def note(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a document for the others to read."""
        with self._translated():
            self._db.execute("REPLACE INTO notes VALUES (?, ?)", (key, json.dumps(document)))

    # -- transports ------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written in here is kept as a whole, or not at all."""
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            with self._translated():
                self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def known(self) -> dict[str, int]:
        """The position of each transport that was ever started and not forgotten."""
        with self._translated():
            return dict(self._db.execute("SELECT name, position FROM transports ORDER BY name").fetchall())

    def paused(self) -> dict[str, int]:
        """The transports that are paused, and since when, in milliseconds since the epoch."""
        with self._translated():
            return dict(self._db.execute("SELECT name, since FROM paused").fetchall())

    def pause(self, name: str) -> None:
        """Keep that a transport is paused; one that is already keeps its time."""
        with self._translated():
            self._db.execute("INSERT OR IGNORE INTO paused VALUES (?, ?)", (name, int(time.time() * 1000)))

    def resume(self, name: str) -> None:
        """Keep that it is paused no longer."""
        with self._translated():
            self._db.execute("DELETE FROM paused WHERE name = ?", (name,))

    def forget(self, name: str) -> None:
        """Drop everything that belongs to a transport: its place, its gap, what was set aside, a pause."""
        with self.together(), self._translated():
            self._db.execute("DELETE FROM transports WHERE name = ?", (name,))
            self._db.execute("DELETE FROM set_aside WHERE transport = ?", (name,))
            self._db.execute("DELETE FROM paused WHERE name = ?", (name,))

    def succeed(self, recorder: str, former: str, position: int) -> None:
        """An outbox goes on under another recorder: what transports have had of it counts on.

        :param former: its recorder before.
        :param position: how far it went under that.
        """
        with self._translated():
            self._db.execute(
                "UPDATE transports SET recorder = ?, position = min(position, ?) WHERE recorder = ?",
                (recorder, position, former),
            )

    def progress(self, name: str, recorder: str, position: int = 0) -> Progress:
        """How far a transport is with this outbox.

        :param position: where it begins if it is new; with another outbox, every one begins with the oldest row.
        """
        with self._translated():
            self._db.execute(
                "INSERT INTO transports (name, recorder, position) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
                " recorder = excluded.recorder, position = 0, gap_from = NULL, gap_through = NULL"
                " WHERE recorder <> excluded.recorder",
                (name, recorder, position),
            )
            row = self._db.execute(
                "SELECT position, seq, identity, published FROM transports WHERE name = ?", (name,)
            ).fetchone()
        return Progress(*row)

    def save(self, name: str, progress: Progress) -> None:
        """Keep how far a transport is."""
        with self._translated():
            self._db.execute(
                "UPDATE transports SET position = ?, seq = ?, identity = ?, published = ? WHERE name = ?",
                (progress.position, progress.seq, progress.identity, progress.published, name),
            )

    def gap(self, name: str, first: int, last: int) -> None:
        """Mark what a transport has lost because the outbox had to give it up."""
        with self._translated():
            self._db.execute(
                "UPDATE transports SET gap_from = coalesce(gap_from, ?), gap_through = ? WHERE name = ?",
                (first, last, name),
            )

    def set_aside(self, transport: str, position: int, event: str, type_name: str, reason: str) -> None:
        """Keep an event that the broker can never take where the operator sees it."""
        with self._translated():
            self._db.execute(
                "REPLACE INTO set_aside VALUES (?,?,?,?,?,?)",
                (transport, position, event, type_name, reason, int(time.time() * 1000)),
            )

    def aside(self, transport: str, position: int) -> str | None:
        """The id of the event that is set aside there; none where none is."""
        with self._translated():
            row = self._db.execute(
                "SELECT event FROM set_aside WHERE transport = ? AND position = ?", (transport, position)
            ).fetchone()
        return str(row[0]) if row else None

    def taken_back(self, transport: str, position: int) -> None:
        """An event is set aside no longer."""
        with self._translated():
            self._db.execute("DELETE FROM set_aside WHERE transport = ? AND position = ?", (transport, position))

    # -- commands --------------------------------------------------------------------------------------------

    def ask(self, command: str, transport: str, argument: object = None) -> int:
        """Leave a command for the bridge, which looks once a second.

        :return: its number, by which `answer` is found.
        """
        with self._translated():
            cursor = self._db.execute(
                "INSERT INTO commands (command, transport, argument) VALUES (?,?,?)",
                (command, transport, json.dumps(argument)),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def commands(self) -> list[Command]:
        """What was asked and isn't done yet, oldest first."""
        with self._translated():
            rows = self._db.execute("SELECT * FROM commands ORDER BY number").fetchall()
        return [Command(number, command, name, json.loads(argument)) for number, command, name, argument in rows]

    def done(self, command: Command, text: str, *, failed: bool = False) -> None:
        """A command is no longer asked.

        :param text: what became of it, for the one who asked.
        :param failed: whether it could not be done.
        """
        with self.together(), self._translated():
            self._db.execute("DELETE FROM commands WHERE number = ?", (command.number,))
            self._db.execute("REPLACE INTO answers VALUES (?,?,?)", (command.number, not failed, text))
            self._db.execute("DELETE FROM answers WHERE number <= ?", (command.number - _ANSWERS,))

    def answer(self, number: int) -> tuple[bool, str] | None:
        """What became of a command: whether it is done, and what there is to say; none while it waits."""
        with self._translated():
            row = self._db.execute("SELECT done, text FROM answers WHERE number = ?", (number,)).fetchone()
        return (bool(row[0]), str(row[1])) if row else None

    def close(self) -> None:
        self._db.close()
