"""An event as a handler gets it: typed, and read from whatever a broker brings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.events.catalog import VERSION
from orthanc_events_bridge.events.derived import NAMES
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.transports.headers import ADDRESS, FIRST_FAILURE, OPERATION, SITE

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.base import Incoming

#: ``{prefix}.{level}.{verb}.{version}``, whatever the prefix is.
_OURS: Final = re.compile(r"^(?P<prefix>.+)\.(?P<level>[a-z]+)\.(?P<verb>[a-z-]+)\.(?P<version>v[0-9]+)$")
_NAMES: Final = frozenset(NAMES)
_REQUIRED: Final = ("id", "source", "type")


class UnreadableError(Exception):
    """A message is no event that this version can read.

    :param reason: why, in one sentence and without any of its content.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Event:
    """A change of an Orthanc, as a CloudEvent 1.0.2 says it (docs/events.md).

    :ivar id: the same in every delivery of this event, from every broker, also when it is replayed.
    :ivar source: which Orthanc it comes from.
    :ivar type: in full, with prefix and version: ``io.orthanc-events.study.stable.v1``.
    :ivar name: ``study.stable``: the type without prefix and version; the type itself where it is not one of ours.
    :ivar time: when it happened, as Orthanc says; none where it isn't said.
    :ivar data: of the event; empty where it has none.
    :ivar attributes: all attributes of the CloudEvent but its data, as text.
    :ivar attempt: how often this consumer was given it, this time included; at least 1.
    :ivar operation: why it came again: ``retry``, ``redrive`` or ``replay``; empty for a first delivery.
    :ivar site: the short name of the Orthanc, which is a part of the event's address; empty where that is not known.
    :ivar first_failure: when this consumer failed at it first (RFC 3339); empty where it hasn't, or that is not known.
    """

    id: str
    source: str
    type: str
    name: str
    time: datetime | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1
    operation: str = ""
    site: str = ""
    first_failure: str = ""

    @property
    def ours(self) -> bool:
        """Whether its type is one of `docs/events.md`, and not of another producer."""
        return self.name in _NAMES

    @property
    def prefix(self) -> str:
        """What the names of types begin with where it comes from; empty where it is not ours."""
        return self.type[: -len(f".{self.name}.{VERSION}")] if self.ours else ""

    @property
    def producer(self) -> str:
        """The consumer that has published it; empty of what the bridge has sent (docs/events.md)."""
        return self.attributes.get("producer", "")

    @property
    def causation_id(self) -> str | None:
        """The id of the event that this one was derived from; none where it was from none, or that is not told."""
        return self.attributes.get("causationid")

    @property
    def correlation_id(self) -> str:
        """The id of the first event of its chain, which all that were derived from it share; its own where it is."""
        return self.attributes.get("correlationid") or self.id

    @property
    def level(self) -> str:
        """``patient``, ``study``, ``series``, ``instance``, ``job`` or ``server``; empty where it is not ours."""
        return str(self.data.get("level", ""))

    @property
    def change(self) -> str:
        """The kind of change as Orthanc's ``/changes`` spells it: ``StableStudy``, ``NewInstance`` …"""
        return str(self.data.get("change", ""))

    @property
    def resource_id(self) -> str | None:
        """Orthanc's id of what has changed; none for the server."""
        found = self.data.get("id")
        return None if found is None else str(found)

    @property
    def patient_id(self) -> str | None:
        """Orthanc's id of the patient, where it is about one or something below, and where that is known.

        An Orthanc id: not DICOM's PatientID.
        """
        return self._of("patient")

    @property
    def study_id(self) -> str | None:
        """Orthanc's id of the study, where it is about one or something below, and where that is known."""
        return self._of("study")

    @property
    def series_id(self) -> str | None:
        """Orthanc's id of the series, where it is about one or an instance, and where that is known."""
        return self._of("series")

    @property
    def instance_id(self) -> str | None:
        """Orthanc's id of the instance, where it is about one."""
        return self._of("instance")

    @property
    def job_id(self) -> str | None:
        """Orthanc's id of the job, where it is about one."""
        return self._of("job")

    @property
    def job(self) -> Mapping[str, Any]:
        """The job as it was when the change was captured; empty where that was too late, or it is about none."""
        return self._block("job")

    @property
    def tags(self) -> Mapping[str, str]:
        """Allow-listed DICOM tags, by keyword. Patient data, maybe: never to be logged."""
        return self._block("tags")

    @property
    def metadata(self) -> Mapping[str, str]:
        """Allow-listed metadata of Orthanc, by name. Patient data, maybe: never to be logged."""
        return self._block("metadata")

    @property
    def inferred(self) -> bool:
        """Orthanc did not say so: it follows from what exists (docs/guarantees.md)."""
        return self.data.get("inferred") is True

    @property
    def key(self) -> str:
        """What events share that are to stay in order: ``partitionkey``, else the id."""
        return self.attributes.get("partitionkey") or self.id

    def __repr__(self) -> str:
        return f"Event({self.name!r}, id={self.id!r}, subject={self.attributes.get('subject', '')!r})"  # never its data

    def _of(self, level: str) -> str | None:
        if self.level == level:
            return self.resource_id
        found = self._block("parents").get(level)
        return None if found is None else str(found)

    def _block(self, name: str) -> Mapping[str, Any]:
        found = self.data.get(name)
        return found if isinstance(found, Mapping) else {}


def read(message: Incoming, attempt: int = 1) -> Event:
    """Read a message in structured or in binary mode.

    :param attempt: how often it was given.
    :raises UnreadableError: it is no CloudEvent, or one of a version that this package doesn't know.
    """
    if message.headers.get("content-type", "").lower().startswith("application/cloudevents-batch"):
        raise UnreadableError("it is a batch of CloudEvents, and events come one by one")
    try:
        found = event_of(message)
    except (RecursionError, UnicodeDecodeError):
        found = None
    if found is None:
        raise UnreadableError("it is no CloudEvent: neither JSON with a specversion, nor are there ce- headers")
    if found["specversion"] != "1.0":
        raise UnreadableError("it is a CloudEvent of another version than 1.0")
    for needed in _REQUIRED:
        if not isinstance(found.get(needed), str) or not found[needed]:
            raise UnreadableError(f"it is a CloudEvent without {needed}")
    data = found.pop("data", None)
    if "data_base64" in found or not (data is None or isinstance(data, dict)):
        raise UnreadableError("its data is no JSON object")
    name, version = _name(found["type"])
    if version not in ("", VERSION):
        raise UnreadableError(f"it is of the version {version} of its type, and this package reads {VERSION}")
    if set(map(type, found.values())) != {str}:
        found = {attribute: str(value) for attribute, value in found.items()}
    return Event(
        id=found["id"],
        source=found["source"],
        type=found["type"],
        name=name,
        time=_time(found.get("time")),
        data=data or {},
        attributes=found,
        attempt=attempt,
        operation=message.headers.get(OPERATION, ""),
        site=message.headers.get(SITE) or address_parts(message.headers.get(ADDRESS, message.address))[0],
        first_failure=message.headers.get(FIRST_FAILURE, ""),
    )


@lru_cache(maxsize=4096)
def address_parts(address: str) -> tuple[str, str, str, str]:
    """``{…}.{site}.{level}.{verb}.{partition}``; empty ones of what has no such address."""
    parts = address.split(".")
    if len(parts) >= 4 and re.fullmatch(r"[0-9]{2}", parts[-1]):
        return parts[-4], parts[-3], parts[-2], parts[-1]
    return "", "", "", ""


@lru_cache(maxsize=1024)
def _name(event_type: str) -> tuple[str, str]:
    """The short name, and the version; the type itself and none where it is not one of ours."""
    ours = _OURS.match(event_type)
    name = f"{ours['level']}.{ours['verb']}" if ours else ""
    return (name, ours["version"]) if ours and name in _NAMES else (event_type, "")


def _time(text: object) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        raise UnreadableError("its time is none") from None
    if found.tzinfo is None:
        raise UnreadableError("its time has no time zone")
    return found
