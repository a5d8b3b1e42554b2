"""The outbox as everyone but capture sees it: read from another process or thread. Standard library only."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orthanc_events_bridge import resources
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import identity
from orthanc_events_bridge.outbox_schema import VERSION, OutboxRow, translated, used_bytes


class OutboxReader:
    """Reads the outbox from another process or thread, while capture writes. No cursor is held open.

    :raises OutboxError: there is no outbox, or it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.stat()
        except FileNotFoundError:
            remedy = "start Orthanc with the bridge once, or name its folder"
            raise OutboxError(f"there is no outbox at {path}", remedy) from None
        except OSError as error:
            raise OutboxError(f"{path} can't be opened: {error.strerror}", "be the user that owns it") from error
        with translated(path):
            self._file = identity(path)[0]
            # Never made: between two looks the file may have been set aside.
            # Not by pathlib's as_uri, which imports much: in a thread of Orthanc's with 100 KiB of stack (Debian's
            # civetweb) Python 3.14 refuses that.
            uri = f"file://{quote(str(path.absolute()))}?mode=rw"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA query_only = 1")
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if not 1 <= version <= VERSION:  # what is read has been the same since the first
                    wrong = f"{path} has version {version}, this package reads 1 to {VERSION}"
                    raise OutboxError(wrong, "use the same version")
            except BaseException:
                self._db.close()
                raise

    @property
    def recorder(self) -> str:
        with translated(self._path):
            row = self._db.execute("SELECT value FROM meta WHERE key = 'recorder'").fetchone()
        return str(row[0]) if row else ""

    def exchanged(self) -> bool:
        """Whether another file has our name now; not while there is none."""
        now = identity(self._path)[0]
        return now is not None and now != self._file

    def meta(self) -> dict[str, Any]:
        """Cursor, position, recorder, what was detached, and the notes."""
        with translated(self._path):
            return dict(self._db.execute("SELECT key, value FROM meta"))

    def detached(self) -> int:
        """The last position that was given up before every transport had it; 0 where there is none."""
        with translated(self._path):
            row = self._db.execute("SELECT value FROM meta WHERE key = 'detached'").fetchone()
        return int(row[0]) if row else 0

    def version(self) -> int:
        """A number that changes with every commit of the writer's; cheap."""
        with translated(self._path):
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def rows(self, after: int, limit: int) -> list[OutboxRow]:
        """The rows behind a position, in order."""
        with translated(self._path):
            found = self._db.execute(
                "SELECT * FROM rows WHERE position > ? ORDER BY position LIMIT ?", (after, limit)
            ).fetchall()
        return [OutboxRow._make((*row[:-1], json.loads(row[-1]))) for row in found]

    def find(self, after: int, through: int, limit: int, *, recorded: int = 0, about: str = "") -> list[OutboxRow]:
        """Some of the rows behind a position, in order.

        :param through: the last position that is looked at.
        :param recorded: not before this time, milliseconds since the epoch.
        :param about: an id that must be in them, as their resource's or another.
        """
        with translated(self._path):
            found = self._db.execute(
                "SELECT * FROM rows WHERE position > ? AND position <= ? AND recorded >= ?"
                " AND (?4 = '' OR resource = ?4 OR instr(extra, ?4)) ORDER BY position LIMIT ?",
                (after, through, recorded, about, limit),
            ).fetchall()
        return [OutboxRow._make((*row[:-1], json.loads(row[-1]))) for row in found]

    def numbers(self, after: int, limit: int) -> list[tuple[int, int | None]]:
        """The positions of rows behind a position, in order, each with its number in Orthanc's log."""
        with translated(self._path):
            return self._db.execute(
                "SELECT position, seq FROM rows WHERE position > ? ORDER BY position LIMIT ?", (after, limit)
            ).fetchall()

    def resources(self) -> resources.Resources:
        """What is announced and not deleted since, to be read.

        :raises OutboxError: an older version has made the outbox, and this one has not opened it for writing yet.
        """
        with translated(self._path):
            if self._db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                raise OutboxError(
                    f"{self._path} was made by an older version",
                    "start Orthanc with this one, which brings it up to date",
                )
            return resources.Resources(self._db)

    def settings(self) -> dict[int, dict[str, Any]]:
        """All that rows may name."""
        with translated(self._path):
            return {n: json.loads(document) for n, document in self._db.execute("SELECT * FROM settings")}

    def extent(self) -> tuple[int, int, int]:
        """(position of the oldest row, when it was recorded in ms, position of the last one), or zeros."""
        with translated(self._path):
            oldest = self._db.execute("SELECT position, recorded FROM rows ORDER BY position LIMIT 1").fetchone()
            last = self._db.execute("SELECT max(position) FROM rows").fetchone()[0]
        return (*oldest, last) if oldest else (0, 0, 0)

    def count(self, after: int) -> int:
        """How many rows are behind a position. Nothing is scanned: positions have no holes but the jumps."""
        oldest, _, last = self.extent()
        return self.span(max(after, oldest - 1), last) if oldest else 0

    def span(self, after: int, last: int) -> int:
        """How many rows there are, or were, behind a position and up to another."""
        if after >= last:
            return 0
        with translated(self._path):
            jumps: Iterable[tuple[int, int]] = self._db.execute("SELECT origin, target FROM jumps").fetchall()
        return last - after - sum(min(to, last) - max(frm, after) for frm, to in jumps if to > after and frm < last)

    def bytes_used(self) -> int:
        with translated(self._path):
            return used_bytes(self._db)

    def close(self) -> None:
        self._db.close()
