"""The resources that the outbox has heard of: who is whose child, and what repair must know of each.

A table of ``outbox.db``, written in the transactions of `orthanc_events_bridge.outbox.OutboxWriter`, with an entry from
first sight until deletion, outside of retention and limit. Standard library only.
"""

from __future__ import annotations

import json
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.changes.repair import deletion

_INDEXES: Final = """
CREATE INDEX IF NOT EXISTS children ON resources (parent) WHERE level <> 'instance';
CREATE INDEX IF NOT EXISTS announced ON resources (level, id) WHERE level <> 'instance';
CREATE INDEX IF NOT EXISTS growing ON resources (id) WHERE growing;
"""
SCHEMA: Final = (
    """
CREATE TABLE IF NOT EXISTS resources (
    id BLOB PRIMARY KEY, level TEXT NOT NULL, parent BLOB, uids TEXT,
    born INTEGER,     -- Seq of its creation; NULL: it was there before we were; 0: another Orthanc watches over it
    growing INTEGER   -- 1: an instance came since it was last told to be stable
) STRICT, WITHOUT ROWID;
"""
    + _INDEXES
)
#: What is needed beside it to find the instances of a series, where their deletions are inferred.
_MEMBERS: Final = "CREATE INDEX IF NOT EXISTS members ON resources (parent) WHERE level = 'instance'"
#: Makes the table of an outbox of version 1 this one.
FROM_1: Final = (
    """
ALTER TABLE resources ADD COLUMN born INTEGER;
ALTER TABLE resources ADD COLUMN growing INTEGER;
"""
    + _INDEXES
)
#: What a resource takes in the file, as measured; and its entry in the index of members.
BYTES: Final = 75
_INDEX_BYTES: Final = 60

_PARENT_OF: Final = {"instance": "series", "series": "study", "study": "patient"}
_ABOVE_INSTANCES: Final = ("series", "study", "patient")
_CREATIONS: Final = {"NewPatient": 0, "NewStudy": 1, "NewSeries": 2, "NewInstance": 3}
_KNOWN: Final = 10_000
#: How many of what was deleted last are remembered: PostgreSQL tells a study's deletion before its instances'.
_GRAVES: Final = 1_000

LookUp = Callable[[str, str], dict[str, str] | None]


class Resources:
    """To be used by the outbox's writer, inside of its transactions.

    :param count: of all entries, where it is known: counting reads the whole table.
    :ivar count: the same.
    """

    def __init__(self, db: sqlite3.Connection, count: int | None = None) -> None:
        self._db = db
        self._by_series = False
        #: Series, studies and patients that are in the table with their parents: most facts are about them again.
        self._known: set[str] = set()
        #: And those that are marked as growing.
        self._growing: set[str] = set()
        self.count: int = db.execute("SELECT count(*) FROM resources").fetchone()[0] if count is None else count
        self._graves: OrderedDict[bytes, tuple[str, bytes | None, str | None]] = OrderedDict()

    def forget_cache(self, count: int) -> None:
        """A transaction was rolled back: what it wrote is not there."""
        self._known.clear()
        self._growing.clear()
        self.count = count

    @property
    def bytes_used(self) -> int:
        """What the entries take in the file, about."""
        return self.count * (BYTES + (_INDEX_BYTES if self._by_series else 0))

    # -- facts -------------------------------------------------------------------------------------------------------

    def remember(self, fact: Fact, allowed: frozenset[str], look_up: LookUp) -> dict[str, Any]:
        """Find a fact's parents, keep or drop its entry, and say what its row's `extra` holds.

        :param allowed: tags on the allow-list of now: a UID may be known from a time when it was on the list.
        :param look_up: (level, id) → the parents by Orthanc's word, asked where neither the callbacks nor we know them;
            none when the resource is gone.
        """
        if fact.resource is None or fact.level in ("job", "server"):
            return fact.extra
        if fact.change == "Deleted":
            parents, uids = self._above(fact.resource)
            self._drop(fact.resource)
            tags = {name: value for name, value in uids.items() if name in allowed}
            return {"parents": parents, **({"tags": tags} if tags else {}), **fact.extra}
        known = fact.parents
        if known is None:
            known, _ = self._above(fact.resource)
            if fact.level != "patient" and "patient" not in known:
                known = look_up(fact.level, fact.resource) or known
        uids = {name: value for name, value in fact.extra.get("tags", {}).items() if name.endswith("InstanceUID")}
        # What was inferred has no Seq. It gets a number that no Seq is, of the second that it was inferred from.
        born = 0 if fact.foreign else fact.seq if fact.seq is not None else -fact.at // 1000
        self._keep(fact.level, fact.resource, known, uids, born if fact.change in _CREATIONS else None)
        if fact.change == "NewInstance" and not fact.foreign and not fact.extra.get("inferred"):
            for level in _ABOVE_INSTANCES:
                if level in known:
                    self._grow(known[level])
        elif fact.change in _CREATIONS and fact.extra.get("inferred"):
            self._grow(fact.resource)
        elif fact.change.startswith("Stable"):
            self._growing.discard(fact.resource)
            self._db.execute("UPDATE resources SET growing = NULL WHERE id = ?", (packed(fact.resource),))
        return {"parents": known, **fact.extra}

    def lost_deletions(self, facts: Sequence[Fact], index: int) -> list[Fact]:
        """The deletions that a creation proves: its resource was created already, and nobody has said that it went.

        An instance's creation stands before those of the parents that came with it: what they prove is said first.
        """
        fact = facts[index]
        if fact.change not in _CREATIONS or fact.resource is None or fact.foreign:
            return []
        run = [fact]
        if fact.change == "NewInstance":
            for other in facts[index + 1 : index + 4]:
                if other.change not in _CREATIONS or other.change == "NewInstance":
                    break
                run.append(other)
        for one in sorted(run, key=lambda one: _CREATIONS[one.change]):
            assert one.resource is not None
            known = self.find(one.resource)
            if known is None or known.born in (one.seq, 0):
                continue
            # An instance's creation makes entries for those above it, whose own creations follow. In front of such a
            # run, if it is whole, an entry of before our time is proof as well.
            if known.born is None and (fact.change != "NewInstance" or fact.parents is None):
                continue
            gone = [below for above in self.below(known) for below in (*self.members(above), above)]
            gone += [*self.members(known), known]
            if one is not fact and (own := self.find(fact.resource)) is not None and own not in gone:
                gone.insert(0, own)
            return [deletion(resource, fact.at) for resource in gone]
        return []

    # -- what repair asks --------------------------------------------------------------------------------------------

    def find(self, resource: str) -> Resource | None:
        row = self._db.execute(
            "SELECT level, id, parent, born FROM resources WHERE id = ?", (packed(resource),)
        ).fetchone()
        return _resource(row) if row else None

    def below(self, resource: Resource) -> list[Resource]:
        """The series and studies below it that are known and ours to watch over, children first."""
        if resource.level not in ("patient", "study"):
            return []
        found: list[Resource] = []
        for row in self._db.execute(
            "SELECT level, id, parent, born FROM resources"
            " WHERE parent = ? AND level <> 'instance' AND born IS NOT 0 ORDER BY id",
            (packed(resource.id),),
        ).fetchall():
            child = _resource(row)
            found += [*self.below(child), child]
        return found

    def is_childless(self, resource: Resource) -> bool:
        """Whether no series or study below it is known."""
        found = self._db.execute(
            "SELECT 1 FROM resources WHERE parent = ? AND level <> 'instance' LIMIT 1", (packed(resource.id),)
        )
        return found.fetchone() is None

    def index_instances(self, wanted: bool) -> None:
        """Keep what `members` needs, or don't: about 50 bytes more for each instance.

        Making it reads the whole table: about a second for each million of instances.
        """
        self._db.execute(_MEMBERS if wanted else "DROP INDEX IF EXISTS members")
        self._by_series = wanted

    def members(self, series: Resource) -> list[Resource]:
        """The instances of a series that are known; none unless `index_instances` was asked to keep them found."""
        if not self._by_series or series.level != "series":
            return []
        rows = self._db.execute(
            "SELECT level, id, parent, born FROM resources"
            " WHERE parent = ? AND level = 'instance' AND born IS NOT 0 ORDER BY id",
            (packed(series.id),),
        ).fetchall()
        return [_resource(row) for row in rows]

    def page(self, level: str, after: str, limit: int) -> list[Resource]:
        """Patients, studies or series behind an id that are ours to watch over, in the order of their ids."""
        rows = self._db.execute(
            "SELECT level, id, parent, born FROM resources"
            " WHERE level <> 'instance' AND level = ? AND id > ? AND born IS NOT 0 ORDER BY id LIMIT ?",
            (level, packed(after), limit),
        )
        return [_resource(row) for row in rows]

    def growing(self) -> list[Resource]:
        """Those that got an instance since they were last told to be stable: series, then studies, then patients."""
        rows = self._db.execute("SELECT level, id, parent, born FROM resources WHERE growing").fetchall()
        order = {level: place for place, level in enumerate(_ABOVE_INSTANCES)}
        return sorted(map(_resource, rows), key=lambda one: (order.get(one.level, 3), one.id))

    def meet(self, resources: Iterable[Resource]) -> None:
        """Make entries of what is there, where there are none. Outside of the writer's transactions."""
        rows = [(packed(one.id), one.level, packed(one.parent) if one.parent else None) for one in resources]
        self.count += self._db.executemany(
            "INSERT OR IGNORE INTO resources (id, level, parent) VALUES (?,?,?)", rows
        ).rowcount

    def forget(self, resources: Sequence[Resource]) -> None:
        """Drop entries without a word."""
        for resource in resources:
            self._drop(resource.id)

    # -- the table ---------------------------------------------------------------------------------------------------

    def _keep(
        self, level: str, resource: str, parents: Mapping[str, str], uids: Mapping[str, str], born: int | None
    ) -> None:
        chain: list[tuple[str, str, dict[str, str]]] = [(level, resource, dict(uids))]
        while (level := _PARENT_OF.get(level, "")) and level in parents:
            chain.append((level, parents[level], {}))
        for index, (at_level, identifier, own_uids) in enumerate(chain):
            own_born = born if index == 0 else None
            if identifier in self._known and not own_uids and own_born is None:
                continue
            parent = packed(chain[index + 1][1]) if index + 1 < len(chain) else None
            values = {
                "id": packed(identifier),
                "level": at_level,
                "parent": parent,
                "uids": json.dumps(own_uids) if own_uids else None,
                "born": own_born,
            }
            new = self._db.execute(
                "INSERT OR IGNORE INTO resources (id, level, parent, uids, born)"
                " VALUES (:id, :level, :parent, :uids, :born)",
                values,
            ).rowcount
            self.count += new
            if not new:
                self._db.execute(
                    "UPDATE resources SET parent = coalesce(:parent, parent), uids = coalesce(:uids, uids),"
                    " born = coalesce(:born, born) WHERE id = :id"
                    " AND (:uids IS NOT NULL OR :born IS NOT NULL OR (parent IS NULL AND :parent IS NOT NULL))",
                    values,
                )
            if at_level != "instance" and (parent is not None or at_level == "patient"):
                self._known.add(identifier)
        if len(self._known) > _KNOWN:
            self._known.clear()

    def _grow(self, resource: str) -> None:
        if resource in self._growing:
            return
        self._db.execute("UPDATE resources SET growing = 1 WHERE id = ?", (packed(resource),))
        self._growing.add(resource)
        if len(self._growing) > _KNOWN:
            self._growing.clear()

    def _drop(self, resource: str) -> None:
        key = packed(resource)
        entry = self._entry(key)
        if entry is not None and entry[0] != "instance":
            self._graves[key] = entry
            if len(self._graves) > _GRAVES:
                self._graves.popitem(last=False)
        self.count -= self._db.execute("DELETE FROM resources WHERE id = ?", (key,)).rowcount
        self._known.discard(resource)
        self._growing.discard(resource)

    def _above(self, resource: str) -> tuple[dict[str, str], dict[str, str]]:
        """What we know of a resource: level → id of its parents, and its UIDs if they were allowed."""
        parents: dict[str, str] = {}
        found = self._entry(packed(resource))
        if found is None:
            return {}, {}
        level, parent, uids = found
        while parent is not None and (level := _PARENT_OF.get(level, "")):
            parents[level] = unpacked(parent)
            above = self._entry(parent) or self._graves.get(parent)
            parent = above[1] if above else None
        return parents, json.loads(uids) if uids else {}

    def _entry(self, key: bytes) -> tuple[str, bytes | None, str | None] | None:
        row: tuple[str, bytes | None, str | None] | None = self._db.execute(
            "SELECT level, parent, uids FROM resources WHERE id = ?", (key,)
        ).fetchone()
        return row


def _resource(row: tuple[str, bytes, bytes | None, int | None]) -> Resource:
    level, key, parent, born = row
    return Resource(level, unpacked(key), unpacked(parent) if parent is not None else None, born)


def packed(resource: str) -> bytes:
    """An Orthanc id (SHA-1 in hexadecimal digits, five groups) in 20 bytes; anything else as it is spelt."""
    try:
        key = bytes.fromhex(resource.replace("-", ""))
    except ValueError:
        return resource.encode()
    return key if len(key) == 20 and len(resource) == 44 else resource.encode()


def unpacked(key: bytes) -> str:
    """The id of an entry's key."""
    if len(key) != 20:
        return key.decode()
    digits = key.hex()
    return "-".join(digits[i : i + 8] for i in range(0, 40, 8))
