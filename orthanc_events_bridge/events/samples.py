"""Changes that never happened, as the bridge would send them: for tests, golden vectors, and to try programs with."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from orthanc_events_bridge.changes.model import KNOWN_NAMES, LOGGED, NAMES
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.catalog import LEVELS, TYPES, UNKNOWN, verb
from orthanc_events_bridge.events.mapping import NAMESPACE, to_outgoing
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Outgoing

#: When events happen, unless something else is said.
AT: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
#: Whose they are.
SOURCE: Final = "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
#: Of the outbox that they come from.
RECORDER: Final = "00000000-0000-4000-8000-000000000000"

#: Of the settings that shape events: the bridge's defaults.
SHAPE: Final = {
    "type_prefix": "io.orthanc-events",
    "schema_base": "urn:orthanc-events:schema:",
    "site": "main",
}
_NAMES: Final = {one.name: one for one in TYPES}
_LOGGED: Final = frozenset(NAMES[kind] for kind in LOGGED)
#: What stands for the kinds of the future.
_FUTURE: Final = "SomethingNew"
_NOTHING: Final[Mapping[str, str | None]] = {}


def orthanc_id(text: str) -> str:
    """An id as Orthanc's are: five groups of eight hexadecimal digits, always the same for the same text."""
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return "-".join(digest[place : place + 8] for place in range(0, 40, 8))


def message(
    name: str,
    given: Mapping[str, str | None] = _NOTHING,
    *,
    job_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    job: Mapping[str, Any] | None = None,
    parents: bool = True,
    inferred: bool = False,
    number: int = 1,
    at: datetime = AT,
    source: str = SOURCE,
    site: str = "main",
    binary: bool = False,
) -> Outgoing:
    """An event of a type as the bridge sends it. Equal arguments give equal bytes.

    :param name: the type without prefix and version (docs/events.md).
    :param given: Orthanc's id of each level, what has changed and what is above it; what is left out is `orthanc_id` of
        its level.
    :param job_id: Orthanc's id of the job, where it is about one.
    :param tags: as if they were allow-listed; so is `metadata`.
    :param job: what was captured of the job.
    :param parents: False: they are not known.
    :param inferred: Orthanc did not say so itself.
    :param number: its place in the outbox and in Orthanc's log.
    :param at: when it happened, with a time zone.
    :param source: which Orthanc it comes from.
    :param site: its short name.
    :param binary: in binary mode.
    :raises BridgeError: there is no such type, or something is given that no event of that type has.
    """
    kind = _NAMES.get(name)
    if kind is None:
        raise BridgeError(f"no event is called {name!r}", f"the names are {', '.join(sorted(_NAMES))}")
    if at.tzinfo is None:
        raise BridgeError("event(at=…) is given a time without a time zone", "write datetime(…, tzinfo=UTC)")
    extra: dict[str, Any] = {}
    resource: str | None = None
    allowed: tuple[str, ...] = ()
    if kind.level in LEVELS:
        allowed = LEVELS[: LEVELS.index(kind.level) + 1]
        ids = {level: given.get(level) or orthanc_id(level) for level in allowed}
        resource = ids.pop(kind.level)
        extra["parents"] = ids if parents else {}
    elif kind.level == "job":
        resource = job_id or orthanc_id("job")
    wrong = [level for level, one in given.items() if one is not None and level not in allowed]
    wrong += [option for option, one in (("tags", tags), ("metadata", metadata)) if one and not allowed]
    wrong += [option for option, one in (("job_id", job_id), ("job", job)) if one and kind.level != "job"]
    if wrong:
        raise BridgeError(f"event({name!r}) is given {', '.join(wrong)}", f"no {name} event has that: leave it out")
    extra |= {option: dict(one) for option, one in (("tags", tags), ("metadata", metadata), ("job", job)) if one}
    extra |= {"inferred": True} if inferred else {}
    row = _row(kind.level, _change(kind.level, kind.verb), resource, extra, number, at, source)
    return to_outgoing(row, {**SHAPE, "source": source, "site": site}, RECORDER, binary=binary)


def _row(
    level: str, change: str, resource: str | None, extra: dict[str, Any], number: int, at: datetime, source: str
) -> OutboxRow:
    moment = int(at.timestamp() * 1000)
    logged = change in _LOGGED
    return OutboxRow(
        position=number,
        change=change,
        level=level,
        resource=resource,
        at=moment // 1000 * 1000 if logged else moment,
        seq=number if logged else None,
        date=at.astimezone(UTC).strftime("%Y%m%dT%H%M%S") if logged else None,
        minted=None if logged else str(uuid.uuid5(NAMESPACE, "\n".join((source, str(number), change, str(resource))))),
        recorded=moment,
        settings=1,
        extra=extra,
    )


def _change(level: str, of: str) -> str:
    """The kind of change, as Orthanc spells it."""
    if of == UNKNOWN:
        return _FUTURE
    found = [change for change in (*KNOWN_NAMES, "LogDiscontinuity") if verb(change) == of]
    # NewStudy, StableStudy …: a kind for each level.
    return found[0] if len(found) == 1 else next(one for one in found if one.endswith(level.capitalize()))
