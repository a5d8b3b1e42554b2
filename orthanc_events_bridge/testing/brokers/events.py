"""What a plain client of a broker reads back, with a decoder of its own.

Nothing here uses the package's own mapping or transports: a fault of theirs must not be able to hide itself. Every
event that is read is judged by the schema that the package has of it: `orthanc_events_bridge.testing.brokers.contract`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orthanc_events_bridge.testing.brokers import contract

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
    :param producer: the consumer that has published it; empty of what the bridge has sent. Only those have a sequence.
    :param cause: the id of the event that it was derived from.
    :param chain: the id of the first event of its chain.
    :param data: of what a consumer has published.
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
    producer: str = ""
    cause: str = ""
    chain: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """As the contract spells it: ``studies/{id}``; empty for the server."""
        level = self.kind.partition(".")[0]
        return f"{_PLURALS[level]}/{self.resource}" if level in _PLURALS else ""


def decode(body: bytes, address: str = "", position: int = 0) -> Event:
    """Read a message in structured mode.

    :raises MalformedEventError: it is not one, it is not as its schema says, or it contradicts itself.
    """
    try:
        document = json.loads(body)
        if document["specversion"] != "1.0":
            raise MalformedEventError(f"message {position} at {address}: specversion {document['specversion']!r}")
        level, verb, version = document["type"].rsplit(".", 3)[-3:]
        data = document["data"]
        if problem := contract.fault(document):
            raise MalformedEventError(f"message {position} at {address} is not as its schema says: {problem}")
        if "producer" in document:
            return _derived(document, f"{level}.{verb}", address, position)
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


def _derived(document: Mapping[str, Any], kind: str, address: str, position: int) -> Event:
    """What a consumer has published: no fact of Orthanc, and of no outbox.

    :raises MalformedEventError: it contradicts itself.
    """
    data = document["data"]
    subject = f"{_PLURALS[data['level']]}/{data['id']}"
    if document["subject"] != subject or "sequence" in document or "recorder" in document:
        raise MalformedEventError(
            f"message {position} at {address}: an event of {document['producer']} whose subject is not {subject}, or"
            " that has a sequence or a recorder"
        )
    return Event(
        id=document["id"],
        kind=kind,
        resource=data["id"],
        source=document["source"],
        recorder="",
        sequence=0,
        key=document["partitionkey"],
        time=document["time"],
        address=address,
        position=position,
        type=document["type"],
        producer=document["producer"],
        cause=document.get("causationid", ""),
        chain=document["correlationid"],
        data=data,
    )
