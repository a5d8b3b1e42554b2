"""A SQLite file, for the workers of one machine. On a network file system its locks don't hold."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.consumers.stores import sql
from orthanc_events_bridge.consumers.stores.base import StoreError
from orthanc_events_bridge.consumers.stores.database import Database, Step

#: Seconds to wait for another process that writes.
_BUSY: Final = 10.0


class SqliteDatabase(Database):
    """See the module's text.

    :param path: of the file; made when it isn't there, readable by its owner only. ``:memory:``: none.
    :param now: seconds of the epoch.
    """

    def __init__(self, path: str, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self.file = None if path == ":memory:" else Path(path)
        self._now = now
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    async def open(self, *create: str) -> None:
        await asyncio.to_thread(self._open, create)

    def _open(self, create: tuple[str, ...]) -> None:
        try:
            if self._path != ":memory:":
                Path(self._path).touch(mode=0o600)
            # Autocommit: a statement is a transaction. Used by one thread at a time.
            found = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = FULL")  # what is done must be, behind a power cut too
            for statement in create:
                found.execute(statement)
        except (sqlite3.Error, OSError) as error:
            raise self._problem(error) from error
        self._database = found

    async def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    async def run(self, *steps: Step) -> list[tuple[Any, ...]]:
        return await asyncio.to_thread(self._run, steps)

    def _run(self, steps: tuple[Step, ...]) -> list[tuple[Any, ...]]:
        with self._lock:
            if self._database is None:
                raise StoreError(f"the store {self._path} is closed", "")
            try:
                if len(steps) == 1:
                    return self._execute(self._database, *steps[0])
                with self._database:  # commits, or rolls back
                    self._database.execute("BEGIN IMMEDIATE")
                    return [self._execute(self._database, *step) for step in steps][-1]
            except sqlite3.Error as error:
                raise self._problem(error) from error

    def _execute(self, database: sqlite3.Connection, statement: str, given: Any) -> list[tuple[Any, ...]]:
        text = statement.format(now=":now", **{name: f":{name}" for name in given})
        return database.execute(text, {"now": self._now(), **given}).fetchall()

    def _problem(self, error: Exception) -> StoreError:
        return StoreError(
            f"the store {self._path} can't be used: {error}",
            "check that its folder is there and writable for the consumer's user, and has room",
        )


class SqliteStore(sql.SqlStore):
    """What is done once, in such a file. See `SqliteDatabase`."""

    def __init__(self, path: str, now: Callable[[], float] = time.time) -> None:
        super().__init__(SqliteDatabase(path, now))
