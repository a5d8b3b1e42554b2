"""What stores in a database have in common: one table, and every step of an entry one statement.

How they are written: `orthanc_events_bridge.consumers.stores.database`.
"""

from __future__ import annotations

from typing import Any, Final

from orthanc_events_bridge.consumers.stores.base import Begun, Store
from orthanc_events_bridge.consumers.stores.database import Database

#: ``until``: when the lease, or the memory of what is done, ends.
CREATE: Final = (
    "CREATE TABLE IF NOT EXISTS orthanc_events_once ("
    "key text PRIMARY KEY, owner text NOT NULL, until double precision NOT NULL, done boolean NOT NULL)"
)
BEGIN: Final = (
    "INSERT INTO orthanc_events_once AS held (key, owner, until, done)"
    " VALUES ({key}, {owner}, {now} + {seconds}, false)"
    " ON CONFLICT (key) DO UPDATE SET owner = excluded.owner, until = excluded.until, done = false"
    " WHERE held.until <= {now} OR (held.owner = excluded.owner AND NOT held.done) RETURNING 1"
)
LOOK: Final = "SELECT done, until - {now} FROM orthanc_events_once WHERE key = {key}"
RENEW: Final = (
    "UPDATE orthanc_events_once SET until = {now} + {seconds}"
    " WHERE key = {key} AND owner = {owner} AND NOT done RETURNING 1"
)
FINISH: Final = (
    "UPDATE orthanc_events_once SET until = {now} + {seconds}, done = true"
    " WHERE key = {key} AND owner = {owner} RETURNING 1"
)
FORGET: Final = "DELETE FROM orthanc_events_once WHERE key = {key} AND owner = {owner} AND NOT done RETURNING 1"
RECALL: Final = "SELECT owner FROM orthanc_events_once WHERE key = {key} AND until > {now}"
NOTE: Final = (
    "INSERT INTO orthanc_events_once AS held (key, owner, until, done)"
    " VALUES ({key}, {owner}, {now} + {seconds}, true)"
    " ON CONFLICT (key) DO UPDATE SET owner = excluded.owner, until = excluded.until"
    " WHERE held.until <= {now} RETURNING 1"
)
SWAP: Final = (
    "UPDATE orthanc_events_once SET owner = {owner}, until = {now} + {seconds}"
    " WHERE key = {key} AND owner = {old} AND until > {now} RETURNING 1"
)
#: An hour behind its end: an owner that renews late still finds its own.
SWEEP: Final = "DELETE FROM orthanc_events_once WHERE until + 3600 <= {now} RETURNING 1"
#: So many beginnings and notes between two sweeps.
SWEEP_EVERY: Final = 1000


class SqlStore(Store):
    """The steps of an entry.

    :param database: where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._written = 0

    async def open(self) -> None:
        await self._database.open(CREATE)

    async def close(self) -> None:
        await self._database.close()

    async def _do(self, statement: str, key: str, owner: str, seconds: float, old: str = "") -> list[tuple[Any, ...]]:
        given = {"key": key, "owner": owner, "seconds": float(seconds), "old": old}
        return await self._database.run((statement, given))

    async def begin(self, key: str, owner: str, lease: float) -> Begun:
        await self._sweep()
        while True:
            if await self._do(BEGIN, key, owner, lease):
                return Begun("mine")
            for done, left in await self._do(LOOK, key, owner, lease):
                return Begun("done") if done else Begun("theirs", max(0.0, left))

    async def renew(self, key: str, owner: str, lease: float) -> bool:
        return bool(await self._do(RENEW, key, owner, lease))

    async def finish(self, key: str, owner: str, keep: float) -> bool:
        return bool(await self._do(FINISH, key, owner, keep))

    async def forget(self, key: str, owner: str) -> None:
        await self._do(FORGET, key, owner, 0)

    async def recall(self, key: str) -> str | None:
        for (found,) in await self._do(RECALL, key, "", 0):
            return str(found)
        return None

    async def swap(self, key: str, old: str | None, new: str, keep: float) -> bool:
        await self._sweep()
        return bool(await self._do(NOTE if old is None else SWAP, key, new, keep, old or ""))

    async def _sweep(self) -> None:
        self._written += 1
        if self._written % SWEEP_EVERY == 1:
            await self._do(SWEEP, "", "", 0)
