"""Events for tests: made by the bridge's own mapping, so that a test gets what a broker brings."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from orthanc_events_bridge.changes.model import KNOWN_NAMES, LOGGED, NAMES
from orthanc_events_bridge.consumers.event import Event, read
from orthanc_events_bridge.consumers.publishing import derive
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.catalog import LEVELS, TYPES, UNKNOWN, verb
from orthanc_events_bridge.events.mapping import NAMESPACE, to_outgoing
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Incoming, Outgoing

#: When events happen, unless something else is said.
AT: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
#: Whose they are.
SOURCE: Final = "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
#: Of the outbox that they come from.
RECORDER: Final = "00000000-0000-4000-8000-000000000000"

_SHAPE: Final = {
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


def event(
    name: str,
    *,
    patient: str | None = None,
    study: str | None = None,
    series: str | None = None,
    instance: str | None = None,
    job_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    job: Mapping[str, Any] | None = None,
    parents: bool = True,
    inferred: bool = False,
    number: int = 1,
    at: datetime = AT,
    source: str = SOURCE,
) -> Event:
    """An event as a handler gets it. Equal arguments give equal events, their ids too.

    ::

        event("study.stable", study="study-1", tags={"Modality": "MR"})
        event("job.failed", job={"type": "DicomModalityStore", "remoteAet": "PACS"})

    :param name: the type without prefix and version (docs/events.md).
    :param patient: with `study`, `series` and `instance`: Orthanc's ids of what has changed and of what is above it;
        any text. Those that are left out are `orthanc_id` of their level:
        ``event("series.stable").study_id == orthanc_id("study")``.
    :param job_id: Orthanc's id of the job, where it is about one.
    :param tags: as if they were allow-listed.
    :param metadata: the same.
    :param job: what was captured of the job (docs/events.md), under the names that events have.
    :param parents: False: they are not known, as with the deletion of something that was never seen.
    :param inferred: Orthanc did not say so itself.
    :param number: its place in the outbox and in Orthanc's log. Events that differ in nothing else are two with two
        numbers.
    :param at: when it happened, with a time zone.
    :param source: which Orthanc it comes from.
    :raises BridgeError: there is no such type, or something is given that no event of that type has.
    """
    given = {"patient": patient, "study": study, "series": series, "instance": instance}
    sent = message(
        name,
        given,
        job_id=job_id,
        tags=tags,
        metadata=metadata,
        job=job,
        parents=parents,
        inferred=inferred,
        number=number,
        at=at,
        source=source,
    )
    return read(Incoming(sent.address, sent.body, {"content-type": sent.content_type}))


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
    """The same as the bridge sends it.

    :param given: Orthanc's id of each level; what is left out is as in `event`.
    :param site: the short name of the Orthanc.
    :param binary: in binary mode.
    :raises BridgeError: as `event`.
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
    return to_outgoing(row, {**_SHAPE, "source": source, "site": site}, RECORDER, binary=binary)


def derived(
    name: str,
    data: Mapping[str, Any],
    *,
    cause: Event,
    producer: str = "derive",
    of: str | None = None,
    linked: bool = True,
    at: datetime = AT,
) -> Event:
    """An event as `Consumer.publish` makes it, as a handler of another consumer gets it.

    ::

        ready = {"rule": "mr", "complete": True, "series": 2, "instances": 40}
        derived("study.ready", ready, cause=event("study.stable", study="study-1"))

    :param name: its type, as `Consumer.publish` takes it; so are `data`, `cause`, `of` and `linked`.
    :param producer: the name of the consumer that publishes it.
    :param at: when it is published, with a time zone.
    :raises BridgeError: there can be no such event.
    """
    sent = derive(name, data, cause, producer=producer, now=at.timestamp(), of=of, linked=linked)
    return read(Incoming(sent.address, sent.body, {"content-type": sent.content_type}))


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
