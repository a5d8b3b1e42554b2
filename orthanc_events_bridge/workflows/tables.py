"""Tables of a workflow's own, in a database that only it may read: opened when it is first asked."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import SecretStr

from orthanc_events_bridge.consumers import stores
from orthanc_events_bridge.consumers.stores import Database
from orthanc_events_bridge.errors import BridgeError

#: So many rows in one statement: some databases take no more than a thousand parameters.
CHUNK: Final = 100


class Tables:
    """See the module's text.

    :param store: the URL of a database, or a file that holds one. A database in a file that others may read is refused
        with `orthanc_events_bridge.errors.BridgeError` when it is opened.
    """

    #: Statements that make them, and do nothing when said again.
    CREATE: ClassVar[tuple[str, ...]]

    def __init__(self, store: SecretStr | Path) -> None:
        self._store = store
        self._database: Database | None = None
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        """Let go of it."""
        database, self._database = self._database, None
        if database is not None:
            await database.close()

    async def _run(self, *steps: tuple[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
        async with self._opening:
            if self._database is None:
                database = stores.database(self._store)
                _check_file(database.file)
                try:
                    await database.open(*self.CREATE)
                except BaseException:
                    await database.close()
                    raise
                self._database = database
        return await self._database.run(*steps)


def in_parts(values: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A few at a time: what stands for them in a statement, as in ``IN (…)``, and they themselves by their names."""
    for start in range(0, len(values), CHUNK):
        given = {f"v{number}": value for number, value in enumerate(values[start : start + CHUNK])}
        yield ", ".join(f"{{{name}}}" for name in given), given


def _check_file(path: Path | None) -> None:
    """Is it for us alone?

    :raises BridgeError: others may read it.
    """
    if path is not None and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise BridgeError(f"{path} can be read by others, and holds who the patients are", f"chmod 600 {path}")
