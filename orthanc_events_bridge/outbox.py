"""The outbox: what Orthanc's changes were, durable and in order, in one SQLite file.

`OutboxWriter` belongs to capture, the only writer; `orthanc_events_bridge.outbox_reader.OutboxReader` to everyone else.
Rows and log cursor move in the same transaction, so that a crash can't separate them. Standard library only.

Durability: write-ahead log with ``synchronous=NORMAL`` (a killed process loses nothing), and
`OutboxWriter.sync_path` to be fsynced at most once a second (that second is what a power cut can take).
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge import resources
from orthanc_events_bridge.changes.log import TAIL, Row
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import identity
from orthanc_events_bridge.outbox_schema import JUMP, SCHEMA, VERSION, translated, used_bytes

#: Pages that are given back to the disk at once: 8 MiB, some milliseconds.
_VACUUM: Final = 2000


class OutboxWriter:
    """Writes the outbox. To be used by one thread of one process.

    :param path: of ``outbox.db``; made when it isn't there, readable by its owner only.
    :param now: seconds since the epoch.
    :ivar recorder: the outbox's own UUID, made with it.
    :ivar cursor: the last Seq of Orthanc's log that is recorded; none before the first.
    :ivar ahead: what is recorded above the cursor, in the words of `orthanc_events_bridge.changes.unordered`.
    :ivar position: of the last row.
    :raises OutboxError: the file can't be opened, or a newer version of this package made it.
    """

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._path = path
        self._now = now
        with translated(path):
            try:
                # Where it is there, it isn't opened: a reader may be in this process, and closing any descriptor drops
                # the locks of its connection, too (sqlite.org/howtocorrupt.html, section 2.2).
                if not path.exists():
                    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
                elif not os.access(path, os.R_OK | os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            except OSError as error:
                raise OutboxError(f"{path} can't be opened: {error.strerror}") from error
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise OutboxError(
                f"{self._path} was made by a newer version of orthanc-events-bridge",
                "install that version again",
            )
        self._db.execute("PRAGMA synchronous = FULL")
        if version == 0:
            self._db.executescript(SCHEMA)
        elif version == 1:
            self._db.executescript(f"BEGIN IMMEDIATE; {resources.FROM_1} PRAGMA user_version = {VERSION}; COMMIT;")
        self._db.execute("PRAGMA journal_size_limit = 33554432")
        meta = self._meta()
        self.resources = resources.Resources(self._db, meta.get("resources"))
        self.recorder: str = meta.get("recorder") or str(uuid.uuid4())
        self.cursor: int | None = meta.get("cursor")
        self.ahead: str = meta.get("ahead") or ""
        #: After a salvage that lost rows: the Seq to go on from where the log has no order; none once it was gone on.
        self.settled: int | None = meta.get("settled")
        #: When recording began, milliseconds since the epoch.
        self.began: int = meta.get("began", 0)
        self.position: int = meta.get("position", 0)
        #: The Seq up to which every transport has had the log, so far as that is known. A power cut can take rows from
        #: here that are published: where they are read again, the deletions in front of them were published as well.
        self.published = 0
        #: How often the log was not the one of before: part of the ids of what is inferred behind that.
        self._other_logs: int = meta.get("other_logs", 0)
        with self._transaction():
            if "backup" in meta:
                self._renew()
                self._db.execute("DELETE FROM meta WHERE key = 'backup'")
            elif meta.get("open"):  # nobody closed it
                self._db.execute("INSERT INTO jumps VALUES (?, ?)", (self.position, self.position + JUMP))
                self.position += JUMP
            if "began" not in meta:
                oldest = self._db.execute("SELECT min(recorded) FROM rows").fetchone()[0]
                self.began = oldest or int(self._now() * 1000)
            self._set(recorder=self.recorder, open=1, position=self.position, began=self.began)
        self._db.execute("PRAGMA synchronous = NORMAL")
        #: The file that holds what isn't in the database proper yet. Fsyncing it makes everything durable;
        #: SQLite takes no POSIX lock on it, so that another descriptor of it may be closed freely.
        self.sync_path = Path(f"{self._path}-wal")
        self._files = identity(self._path)

    def _meta(self) -> dict[str, Any]:
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def _set(self, **values: Any) -> None:
        self._db.executemany("REPLACE INTO meta VALUES (?, ?)", values.items())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        count = self.resources.count
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self.resources.forget_cache(count)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def append(
        self,
        facts: Sequence[Fact],
        cursor: int,
        settings: int,
        look_up: Callable[[str, str], dict[str, str] | None],
        *,
        ahead: str = "",
        emptied: bool = False,
        another_log: bool = False,
        note: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Record facts and the log cursor, in one transaction: all or nothing.

        :param ahead: what is recorded above the cursor.
        :param settings: the number of the settings that shape their events.
        :param look_up: (level, id) → the parents by Orthanc's word, asked where neither the callbacks nor the
            outbox know them; none when the resource is gone.
        :param emptied: the log was emptied: of the remembered rows nothing can be there any more.
        :param another_log: from here on it is another one, and the remembered rows say nothing of it. What was
            inferred before can happen once more, and then is another fact.
        :param note: what is to be kept with them (see `note`): key and document.
        :raises OutboxFullError: the disk is full or read-only.
        :raises OutboxError: the file can't be written.
        """
        with translated(self._path), self._transaction():
            position = self.position
            recorded = int(self._now() * 1000)
            allowed = self._allowed_tags(settings)
            logs = self._other_logs + another_log
            rows = []
            for index, given in enumerate(facts):
                known = given.seq is not None and given.seq <= self.published
                for fact in (*(() if known else self.resources.lost_deletions(facts, index)), given):
                    position += 1
                    extra = self.resources.remember(fact, allowed, look_up)
                    inferred = fact.extra.get("inferred")
                    minted = None if fact.date is not None or inferred else str(uuid.uuid4())
                    date = f"{fact.date or ''}/{logs}" if inferred and logs else fact.date
                    rows.append(
                        (
                            position,
                            fact.change,
                            fact.level,
                            fact.resource,
                            fact.at,
                            fact.seq,
                            date,
                            minted,
                            recorded,
                            settings,
                            json.dumps(extra, separators=(",", ":")),
                        )
                    )
            self._db.executemany("INSERT INTO rows VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows)
            if emptied or another_log:
                self._db.execute("DELETE FROM tail")
            self._write_tail(facts)
            if note is not None:
                self._set(**{f"note.{note[0]}": json.dumps(note[1])})
            self._set(position=position, resources=self.resources.count, other_logs=logs)
            self._set_cursor(cursor, ahead)
        self.cursor, self.ahead, self.settled = cursor, ahead, None
        self.position, self._other_logs = position, logs

    def _set_cursor(self, cursor: int, ahead: str) -> None:
        self._set(cursor=cursor, ahead=ahead)
        if self.settled is not None:
            self._set(settled=None)

    def move_cursor(self, cursor: int, ahead: str = "") -> None:
        """Pass over a part of the log without recording it.

        :param ahead: what is passed over, or recorded, above the cursor.
        :raises OutboxError: the file can't be written.
        """
        with translated(self._path), self._transaction():
            self._set_cursor(cursor, ahead)
        self.cursor, self.ahead, self.settled = cursor, ahead, None

    def _allowed_tags(self, settings: int) -> frozenset[str]:
        row = self._db.execute("SELECT document FROM settings WHERE number = ?", (settings,)).fetchone()
        return frozenset(json.loads(row[0]).get("tags", ())) if row else frozenset()

    # -- an older file, another file -------------------------------------------------------------------------

    def renew(self) -> None:
        """The file is an older one than the world has seen: go on under another `recorder`.

        Its positions were given to other rows since, and no number may ever name two facts. What transports have had
        of it counts on (`former`).
        """
        with translated(self._path), self._transaction():
            self._renew()

    def _renew(self) -> None:
        former, self.recorder = self.recorder, str(uuid.uuid4())
        self._set(recorder=self.recorder, former=former, former_position=self.position)

    def unchanged(self) -> bool:
        """Whether the files under our name are still those that we have open."""
        return identity(self._path) == self._files

    @property
    def file(self) -> list[int] | None:
        """Device and inode of the file, by which another process means this one."""
        return list(self._files[0]) if self._files[0] else None

    @property
    def connection(self) -> sqlite3.Connection:
        """For what reads a file that has lost its name: nobody else can open it."""
        return self._db

    # -- the log's last rows, to recognise a restored database -----------------------------------------------

    def index_instances(self, wanted: bool) -> None:
        """See `Resources.index_instances`.

        :raises OutboxFullError: the disk is full or read-only.
        """
        with translated(self._path):
            self.resources.index_instances(wanted)

    def last_recorded(self) -> int:
        """When the newest row was recorded, milliseconds since the epoch; 0 where there is none."""
        with translated(self._path):
            row = self._db.execute("SELECT recorded FROM rows ORDER BY position DESC LIMIT 1").fetchone()
        return int(row[0]) if row else 0

    def tail(self) -> list[Row]:
        """The last rows of the log that were read, oldest first."""
        with translated(self._path):
            return [Row(*row) for row in self._db.execute("SELECT * FROM tail ORDER BY seq")]

    def _write_tail(self, facts: Sequence[Fact]) -> None:
        read = [(f.seq, f.date, f.change, f.level, f.resource) for f in facts if f.date is not None and f.seq]
        if read:
            self._db.executemany("REPLACE INTO tail VALUES (?,?,?,?,?)", read[-TAIL:])
            self._db.execute(f"DELETE FROM tail WHERE seq <= (SELECT max(seq) FROM tail) - {TAIL}")

    # -- settings, notes -------------------------------------------------------------------------------------

    def keep_settings(self, number: int, document: str) -> None:
        """Copy the settings that rows will name, when they are first used."""
        with translated(self._path):
            self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (number, document))

    def newest_settings(self) -> tuple[int, str] | None:
        """The last that were used; none before any."""
        with translated(self._path):
            row: tuple[int, str] | None = self._db.execute(
                "SELECT number, document FROM settings ORDER BY number DESC LIMIT 1"
            ).fetchone()
        return row

    def note(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep what only Orthanc's process knows where the command line can read it.

        :raises OutboxError: the file can't be written.
        """
        with translated(self._path):
            self._set(**{f"note.{key}": json.dumps(document)})

    def noted(self, key: str) -> dict[str, Any]:
        """What `note` kept; empty where it has kept nothing."""
        with translated(self._path):
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (f"note.{key}",)).fetchone()
        return dict(json.loads(row[0])) if row else {}

    def compact(self) -> None:
        """Give the write-ahead log's space back to a full disk, as far as that goes."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # -- bounds ----------------------------------------------------------------------------------------------

    def bytes_used(self) -> int:
        """About the size of the rows: without free pages, and without the tree of resources, which no limit binds."""
        with translated(self._path):
            return max(0, used_bytes(self._db) - self.resources.bytes_used)

    def retain(self, delivered: int, recorded_before: int, limit: int = 5000) -> int:
        """Delete the oldest rows that every transport has delivered and that are old enough.

        :param delivered: the position up to which all transports have delivered.
        :param recorded_before: milliseconds since the epoch.
        :param limit: rows at most, so that a call stays short.
        :return: how many rows went.
        """
        with translated(self._path), self._transaction():
            # The age is asked of the oldest rows only: asked of all, every look would read the whole table.
            deleted = self._db.execute(
                "DELETE FROM rows WHERE position <= (SELECT max(position) FROM (SELECT position, recorded"
                " FROM rows WHERE position <= ? ORDER BY position LIMIT ?) WHERE recorded < ?)",
                (delivered, limit, recorded_before),
            ).rowcount
        if deleted:
            self._shrink()
        return deleted

    def detach(self, delivered: int, limit: int = 5000) -> int:
        """Delete the oldest rows although a transport still needs them, and remember up to where.

        :return: how many rows went.
        """
        with translated(self._path), self._transaction():
            last = self._db.execute(
                "SELECT max(position) FROM (SELECT position FROM rows ORDER BY position LIMIT ?)", (limit,)
            ).fetchone()[0]
            if last is None:
                return 0
            deleted = self._db.execute("DELETE FROM rows WHERE position <= ?", (last,)).rowcount
            if last > delivered:
                self._set(detached=last)
        self._shrink()
        return deleted

    def _shrink(self) -> None:
        with translated(self._path):
            # A script: SQLite gives back a page per step, and `execute` takes one step of what has no columns.
            self._db.executescript(f"PRAGMA incremental_vacuum({_VACUUM})")
            if not self._db.execute("PRAGMA freelist_count").fetchone()[0]:
                # Only now the file itself gets shorter. Readers are not waited for.
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """A clean stop: everything is on the disk, and the next start's positions go on where these end."""
        with translated(self._path):
            self._db.execute("PRAGMA synchronous = FULL")
            self._set(open=0)
            self._db.close()

    def abandon(self) -> None:
        """Close without the mark of a clean stop."""
        self._db.close()
