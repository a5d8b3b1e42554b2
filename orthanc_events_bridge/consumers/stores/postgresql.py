"""Tables of a PostgreSQL (9.5 or newer). Leases are measured by the server's clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from orthanc_events_bridge.consumers.stores.base import StoreError
from orthanc_events_bridge.consumers.stores.database import Database, Step

_CONNECT: Final = 5
#: Seconds for an answer.
_ANSWER: Final = 10.0
#: Of the lock under which the table is made: two who make it at once would meet.
_LOCK: Final = 8797526


class PostgresDatabase(Database):
    """See the module's text.

    :param read: gives the URL as libpq takes it, and is asked at every connection; what it leaves out (password,
        certificates …) libpq finds in its environment (``PGPASSFILE`` …) and in ``~/.pgpass``.
    """

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        self._url = ""
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    async def open(self, *create: str) -> None:
        async with self._lock:
            connection = await self._connected()
            try:
                async with asyncio.timeout(_ANSWER), connection.transaction():
                    await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                    for statement in create:
                        await connection.execute(statement)
            except (psycopg.Error, TimeoutError) as error:
                await self._give_up()
                raise self._problem(error) from error

    async def close(self) -> None:
        await self._give_up()

    async def run(self, *steps: Step) -> list[tuple[Any, ...]]:
        async with self._lock:
            again = self._connection is not None and not self._connection.closed
            while True:
                connection = await self._connected()
                try:
                    async with asyncio.timeout(_ANSWER):
                        if len(steps) == 1:
                            return await _execute(connection, *steps[0])
                        async with connection.transaction():
                            return [await _execute(connection, *step) for step in steps][-1]
                except (psycopg.Error, TimeoutError) as error:
                    broken = connection.broken or isinstance(error, TimeoutError)
                    if broken:
                        await self._give_up()
                    if not (broken and again):
                        raise self._problem(error) from error
                    again = False  # the server was restarted since: each statement may be said twice

    async def _connected(self) -> psycopg.AsyncConnection[Any]:
        if self._connection is None or self._connection.closed:
            self._url = self._read()
            try:
                async with asyncio.timeout(_CONNECT + 1):
                    self._connection = await psycopg.AsyncConnection.connect(
                        self._url,
                        autocommit=True,
                        connect_timeout=_CONNECT,
                        application_name="orthanc-events-bridge",
                    )
            except (psycopg.Error, TimeoutError) as error:
                raise self._problem(error) from error
        return self._connection

    async def _give_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await connection.close()

    def _problem(self, error: Exception) -> StoreError:
        try:
            found = conninfo_to_dict(self._url)
        except psycopg.Error:  # what libpq says of it may hold the password
            return StoreError("the store's URL is none of PostgreSQL", "write postgresql://USER@HOST/DATABASE")
        place = f"{found.get('host', 'this machine')}, database {found.get('dbname', 'of the user')}"
        # The server's own sentence; of what is said before there is a server, nothing secret is in the first line.
        diagnostic = getattr(getattr(error, "diag", None), "message_primary", None)
        text = diagnostic or (str(error).splitlines() or ["it does not answer"])[0]
        return StoreError(
            f"the store in PostgreSQL ({place}) can't be used: {text}",
            "check that the server runs, the login, and that the user may create and write a table",
        )


async def _execute(
    connection: psycopg.AsyncConnection[Any], statement: str, given: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    # What may be any number has to be told apart from whole ones.
    names = {name: f"%({name})s" + "::double precision" * isinstance(value, float) for name, value in given.items()}
    text = statement.format(now="extract(epoch FROM clock_timestamp())::double precision", **names)
    cursor = await connection.execute(text, given)
    return await cursor.fetchall() if cursor.description is not None else []
