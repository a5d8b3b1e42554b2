"""What stores in a database have in common: one table, and every step of an entry one statement.

Each may be said twice, where an answer was lost: it does the same. ``{now}`` is what the database calls the seconds of
the epoch; parameters are named in the driver's own way.
"""

from __future__ import annotations

from typing import Final

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
#: An hour behind its end: an owner that renews late still finds its own.
SWEEP: Final = "DELETE FROM orthanc_events_once WHERE until + 3600 <= {now} RETURNING 1"
#: So many beginnings between two sweeps.
SWEEP_EVERY: Final = 1000
