"""What a plain client of a broker reads back, with a decoder of its own.

Nothing here uses the package's own mapping or transports: a fault of theirs must not be able to hide itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

_PLURALS = {
    "patient": "patients",
    "study": "studies",
    "series": "series",
    "instance": "instances",
    "job": "jobs",
}


class MalformedEventError(Exception):
    """A message is not what the wire contract promises."""


@dataclass(frozen=True, slots=True)
class Event:
    """One CloudEvent as it was read.

    :param type: the type as it was read.
    :param kind: the type without prefix and version: ``study.created``.
    :param resource: Orthanc's id of what changed; empty for the server.
    :param sequence: of the outbox.
    :param key: the partition key.
    :param change: the change as Orthanc spells it.
    :param seq: the change's number in Orthanc's log, where it has one.
    :param position: the message's number in the stream.
    """

    id: str
    kind: str
    resource: str
    source: str
    recorder: str
    sequence: int
    key: str
    time: str = ""
    change: str = ""
    seq: int | None = None
    address: str = ""
    position: int = 0
    type: str = ""

    @property
    def subject(self) -> str:
        """As the contract spells it: ``studies/{id}``; empty for the server."""
        level = self.kind.partition(".")[0]
        return f"{_PLURALS[level]}/{self.resource}" if level in _PLURALS else ""


def decode(body: bytes, address: str = "", position: int = 0) -> Event:
    """Read a message in structured mode.

    :raises MalformedEventError: it is not one, or it contradicts itself.
    """
    try:
        document = json.loads(body)
        if document["specversion"] != "1.0":
            raise MalformedEventError(f"message {position} at {address}: specversion {document['specversion']!r}")
        level, verb, version = document["type"].rsplit(".", 3)[-3:]
        data = document["data"]
        resource = data["id"] or ""
        subject = f"{_PLURALS[level]}/{resource}" if level in _PLURALS else None
        if version != "v1" or data["level"] != level or document.get("subject") != subject:
            raise MalformedEventError(
                f"message {position} at {address}: type {document['type']!r}, subject "
                f"{document.get('subject')!r} and data of a {data['level']} contradict each other"
            )
        return Event(
            id=document["id"],
            kind=f"{level}.{verb}",
            resource=resource,
            source=document["source"],
            recorder=document["recorder"],
            sequence=int(document["sequence"]),
            key=document["partitionkey"],
            time=document["time"],
            change=data["change"],
            seq=data.get("seq"),
            address=address,
            position=position,
            type=document["type"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedEventError(f"message {position} at {address}: {type(error).__name__}: {error}") from error
