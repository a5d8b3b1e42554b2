"""An event of each type, as it is sent: for pages, schemas and the AsyncAPI document."""

from __future__ import annotations

import json
from typing import Any

from orthanc_events_bridge.consumers.samples import published
from orthanc_events_bridge.events.catalog import TYPES, EventType
from orthanc_events_bridge.testing import event, orthanc_id

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


def example(event_type: EventType) -> dict[str, Any]:
    """An event of a type, as it is sent."""
    if event_type in TYPES:
        level = event_type.level
        told = event(event_type.name, job=_JOB if level == "job" else None)
        found: dict[str, Any] = {**told.attributes, "data": dict(told.data)}
        if event_type.verb == "log-discontinuity":
            found["data"]["log"] = _LOG
        return found
    return dict(json.loads(published(event_type.name).body))
