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

#: Seconds to wait for another process that writes.
_BUSY: Final = 10.0


class SqliteStore(sql.SqlStore):
    """See the module's text.

    :param path: of the file; made when it isn't there, readable by its owner only. ``:memory:``: none.
    :param now: seconds of the epoch.
    """

    def __init__(self, path: str, now: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    async def open(self) -> None:
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        try:
            if self._path != ":memory:":
                Path(self._path).touch(mode=0o600)
            # Autocommit: each statement is a transaction. Used by one thread at a time.
            found = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = FULL")  # what is done must be, behind a power cut too
            found.execute(sql.CREATE)
        except (sqlite3.Error, OSError) as error:
            raise self._problem(error) from error
        self._database = found

    async def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    async def _do(self, statement: str, key: str, owner: str, seconds: float, old: str = "") -> list[tuple[Any, ...]]:
        given = {"now": self._now(), "key": key, "owner": owner, "seconds": seconds, "old": old}
        return await asyncio.to_thread(self._execute, statement, given)

    def _execute(self, statement: str, given: dict[str, Any]) -> list[tuple[Any, ...]]:
        text = statement.format(now=":now", key=":key", owner=":owner", seconds=":seconds", old=":old")
        with self._lock:
            if self._database is None:
                raise StoreError(f"the store {self._path} is closed", "")
            try:
                return self._database.execute(text, given).fetchall()
            except sqlite3.Error as error:
                raise self._problem(error) from error

    def _problem(self, error: Exception) -> StoreError:
        return StoreError(
            f"the store {self._path} can't be used: {error}",
            "check that its folder is there and writable for the consumer's user, and has room",
        )
