"""An event of each type, as it is sent: for pages, schemas and the AsyncAPI document."""

from __future__ import annotations

from typing import Any

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.events.catalog import TYPES, EventType
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.testing import derived, event, orthanc_id

_JOB = {
    "type": "DicomModalityStore",
    "state": "Success",
    "progress": 100,
    "errorCode": 0,
    "created": "20261123T213601.000000",
    "completed": "20261123T213602.000000",
    "runtime": 0.487,
    "localAet": "ORTHANC",
    "remoteAet": "PACS",
    "instances": 40,
    "failedInstances": 0,
    "parentResources": [orthanc_id("study")],
}
_LOG = {"reason": "emptied", "recorded": 41, "counter": 41, "continues": 41}
_READY = {"rule": "mr-brain", "complete": True, "series": 2, "instances": 40, "expected": 40}
_SENT = {"rule": "everything", "destination": "pacs", "instances": 40, "job": orthanc_id("job")}
#: Data of what consumers publish, beside what it is about.
_DERIVED: dict[str, dict[str, Any]] = {
    "study.ready": _READY,
    "study.updated": _READY | {"complete": False, "instances": 39, "missing": {"series": ["t2"], "instances": 1}},
    "study.routed": _SENT,
    "series.routed": _SENT,
    "instance.routed": _SENT | {"instances": 1},
    "transfer.failed": {"rule": "everything", "destination": "pacs", "reason": "failed 20 times of 20", "attempts": 20},
    "result.received": {"rule": "ai", "instances": 1},
}


def example(event_type: EventType) -> dict[str, Any]:
    """An event of a type, as it is sent."""
    if event_type in TYPES:
        level = event_type.level
        told = event(event_type.name, job=_JOB if level == "job" else None)
        found = _document(told)
        if event_type.verb == "log-discontinuity":
            found["data"]["log"] = _LOG
        return found
    level = event_type.level if event_type.level in ("study", "series", "instance") else "study"
    cause = event("instance.created" if level == "instance" else f"{level}.stable")
    data, by = _DERIVED[event_type.name], DERIVED[event_type][0]
    if event_type.name != "result.received":
        return _document(derived(event_type.name, data, cause=cause, producer=by))
    # Nothing leads from a result to the study that was sent away (docs/events.md#derived-events).
    about = {"level": "series", "id": orthanc_id("result"), "parents": {"study": orthanc_id("study")}}
    return _document(derived(event_type.name, about | data, cause=cause, producer=by, of="result", linked=False))


def _document(told: Event) -> dict[str, Any]:
    return {**told.attributes, "data": dict(told.data)}
