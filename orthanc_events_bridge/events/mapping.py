"""A row of the outbox → a CloudEvent 1.0.2. Pure: the same row and settings always give the same bytes."""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from orthanc_events_bridge.events.catalog import VERSION, verb
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.subscriptions import PARTITIONS

NAMESPACE: Final = uuid.UUID("8be797cd-5573-46b7-8097-bea664a99a80")
STRUCTURED: Final = JSONFormat.CONTENT_TYPE

#: Where a resource is in Orthanc's REST API, by its level; so begins an event's subject.
SUBJECTS: Final = {
    "patient": "patients",
    "study": "studies",
    "series": "series",
    "instance": "instances",
    "job": "jobs",
}
#: Writes the bytes of the SDK's `JSONFormat.write` in two thirds of its time (docs/decisions/0007-encoding.md).
_ENCODE: Final = json.JSONEncoder(check_circular=False).encode


class Event(CloudEvent):
    """A CloudEvent whose attributes are known to be right.

    The SDK's constructor would check each of them again, which costs as much as the rest of the mapping;
    tests hand the same attributes to the SDK's own class.
    """

    def __init__(self, attributes: dict[str, Any], data: dict[str, Any] | str | bytes | None = None) -> None:
        self._attributes = attributes
        self._data = data


@lru_cache(maxsize=1024)
def _time(milliseconds: int, digits: bool) -> str:
    """RFC 3339, UTC: whole seconds, which is what the log knows, or always three digits behind them."""
    return iso(milliseconds, "milliseconds" if digits else "seconds")


def partition(key: str) -> str:
    """``00`` to ``63``: CRC-32 of the key's UTF-8 bytes, modulo 64. Fixed for good, in every language."""
    return f"{zlib.crc32(key.encode()) % PARTITIONS:02d}"


def partition_key(level: str, resource: str | None, parents: Mapping[str, str]) -> str:
    """What events must share to stay in order: instances, series and studies their study."""
    if level == "server" or resource is None:
        return "server"
    return parents.get("study", resource) if level in ("instance", "series") else resource


def event_id(row: OutboxRow, source: str) -> str:
    """The minted id, or one derived from the log's own row: every reader of that row derives the same."""
    if row.minted is not None:
        return row.minted
    number = "inferred" if row.extra.get("inferred") else str(row.seq)
    spelt = (source, number, row.date or "", row.change, row.level.capitalize(), row.resource or "")
    # As uuid.uuid5 does (RFC 9562, section 5.5), without its detours.
    digest = bytearray(hashlib.sha1(NAMESPACE.bytes + "\n".join(spelt).encode(), usedforsecurity=False).digest())
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:32]}"


def trace_parent(identifier: str) -> str:
    """W3C Trace Context derived from the event's id: the same row gives the same bytes."""
    digest = hashlib.sha256(b"trace" + identifier.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"


def short_name(row: OutboxRow) -> str:
    """``study.stable``: the type without prefix and version."""
    return f"{row.level}.{verb(row.change)}"


def data_of(row: OutboxRow) -> dict[str, Any]:
    """The event's data: Orthanc's ids, and nothing of the patient but what was allow-listed at capture."""
    data: dict[str, Any] = {"change": row.change, "level": row.level, "id": row.resource}
    if row.seq is not None:
        data["seq"] = row.seq
    return {**data, "parents": {}, **row.extra}


def to_event(row: OutboxRow, shape: Mapping[str, Any], recorder: str) -> Event:
    """The CloudEvent of a row.

    :param shape: the settings that the row names: ``source``, ``type_prefix``, ``schema_base``.
    :param recorder: the outbox's UUID.
    """
    name = short_name(row)
    identifier = event_id(row, shape["source"])
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": identifier,
        "source": shape["source"],
        "type": f"{shape['type_prefix']}.{name}.{VERSION}",
        "time": _time(row.at, row.date is None),
        "datacontenttype": "application/json",
        "dataschema": f"{shape['schema_base']}{name}.{VERSION}",
        "recorder": recorder,
        "sequence": f"{row.position:020d}",
        "partitionkey": partition_key(row.level, row.resource, row.extra.get("parents", {})),
        "recordedtime": _time(row.recorded, True),
        "traceparent": trace_parent(identifier),
    }
    if row.resource is not None and row.level in SUBJECTS:
        attributes["subject"] = f"{SUBJECTS[row.level]}/{row.resource}"
    return Event(attributes, data_of(row))


def to_outgoing(row: OutboxRow, shape: Mapping[str, Any], recorder: str, *, binary: bool = False) -> Outgoing:
    """The event of a row, addressed, in structured or in binary mode."""
    event = to_event(row, shape, recorder)
    attributes = event.get_attributes()
    key, identifier = attributes["partitionkey"], attributes["id"]
    headers: tuple[tuple[str, str], ...] = ()
    if binary:
        content_type, content = attributes.pop("datacontenttype"), event.get_data()
        headers = tuple(attributes.items())
    else:
        content_type, content = STRUCTURED, {**attributes, "data": event.get_data()}
    body = _ENCODE(content).encode()
    where = shape["site"], row.level, verb(row.change), key, partition(key)
    return Outgoing(identifier, *where, content_type, body, headers)
