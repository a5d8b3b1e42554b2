"""What consumers publish, of studies that never were: for golden vectors, pages, and to try programs with."""

from __future__ import annotations

import json
from typing import Any, Final

from orthanc_events_bridge.consumers.event import read
from orthanc_events_bridge.consumers.publishing import derive
from orthanc_events_bridge.events.samples import AT, SOURCE, message, orthanc_id
from orthanc_events_bridge.transports.base import Incoming, Outgoing

_READY: Final = {"rule": "mr-brain", "complete": True, "series": 2, "instances": 40, "expected": 40}
_SENT: Final = {"rule": "everything", "destination": "pacs", "instances": 40, "job": orthanc_id("job")}
#: Of what must not lead back to its cause.
_APART: Final = {"level": "study", "id": orthanc_id("apart"), "parents": {"patient": orthanc_id("apart patient")}}
#: Name of the type → who publishes it, and its data, beside what it is about where that is what its cause is about.
_PUBLISHED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "study.ready": ("derive", _READY),
    "study.updated": (
        "derive",
        _READY | {"complete": False, "instances": 39, "missing": {"series": ["t2"], "instances": 1}},
    ),
    "study.routed": ("route", _SENT),
    "series.routed": ("route", _SENT),
    "instance.routed": ("route", _SENT | {"instances": 1}),
    "transfer.failed": (
        "route",
        {"rule": "everything", "destination": "pacs", "reason": "failed 20 times of 20", "attempts": 20},
    ),
    "study.anonymized": ("anonymize", {"change": "AnonymizedStudy", **_APART, "rule": "trial", "instances": 40}),
    "result.received": ("anonymize", {**_APART, "rule": "trial", "instances": 1}),
}
#: Types of the causes where it is not ``study.stable``.
_CAUSES: Final = {"series.routed": "series.stable", "instance.routed": "instance.created"}


def published(
    name: str, *, number: int = 1, source: str = SOURCE, site: str = "main", binary: bool = False
) -> Outgoing:
    """An event of a type as a consumer publishes it. Equal arguments give equal bytes.

    :param name: one of `orthanc_events_bridge.events.derived.DERIVED`.
    :param number: of the event that it follows from; so are `source` and `site`.
    :param binary: in binary mode, as a program of somebody else may publish it. Our consumers never do.
    """
    producer, data = _PUBLISHED[name]
    before = message(_CAUSES.get(name, "study.stable"), number=number, source=source, site=site)
    cause = read(Incoming(before.address, before.body, {"content-type": before.content_type}))
    apart = data.keys() >= _APART.keys()
    of = json.dumps([source, number]) if apart else None
    sent = derive(name, data, cause, producer=producer, now=AT.timestamp(), of=of, linked=not apart)
    if not binary:
        return sent
    attributes = json.loads(sent.body)
    content, kind = attributes.pop("data"), attributes.pop("datacontenttype")
    return sent._replace(content_type=kind, body=json.dumps(content).encode(), attributes=tuple(attributes.items()))
