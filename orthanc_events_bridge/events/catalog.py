"""The event types, and the JSON Schema of each one's data. Breaking them is a major version."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

from orthanc_events_bridge.changes.model import KNOWN_NAMES

#: The version behind every type, and in every schema's name.
VERSION: Final = "v1"

LEVELS: Final = ("patient", "study", "series", "instance")

#: Change, as ``/changes`` spells it → verb. Names are those of Orthanc's ``EnumerationToString(ChangeType)``.
_VERBS: Final = {
    "CompletedSeries": "completed",
    "Deleted": "deleted",
    "JobFailure": "failed",
    "JobSubmitted": "submitted",
    "JobSuccess": "succeeded",
    "LogDiscontinuity": "log-discontinuity",
    "NewChildInstance": "instance-added",
    "OrthancStarted": "started",
    "OrthancStopped": "stopped",
    "UpdatedAttachment": "attachment-updated",
    "UpdatedMetadata": "metadata-updated",
    "UpdatedModalities": "modalities-updated",
    "UpdatedPeers": "peers-updated",
}
_VERBS_BY_START: Final = {
    "New": "created",
    "Stable": "stable",
    "Anonymized": "anonymized",
    "Modified": "modified",
}
UNKNOWN: Final = "unknown"


@lru_cache(maxsize=256)
def verb(change: str) -> str:
    """What a change is called in its event's type; ``unknown`` for a kind of the future."""
    if change in _VERBS:
        return _VERBS[change]
    if change in KNOWN_NAMES:
        return next(verb for start, verb in _VERBS_BY_START.items() if change.startswith(start))
    return UNKNOWN


class EventType(NamedTuple):
    """One type of event, without prefix and version."""

    level: str
    verb: str
    meaning: str

    @property
    def name(self) -> str:
        """``study.stable``: what filters and handlers name."""
        return f"{self.level}.{self.verb}"


def _resource_types() -> list[EventType]:
    types = []
    for level in LEVELS:
        created = "The instance was stored." if level == "instance" else f"The {level} began, with its first instance."
        types += [
            EventType(level, "created", created),
            EventType(level, "deleted", f"The {level} was deleted."),
            EventType(level, "attachment-updated", f"A file attached to the {level} was written."),
            EventType(level, "metadata-updated", f"A metadata of the {level} was written."),
            EventType(level, UNKNOWN, f"Something about the {level} that this version has no name for."),
        ]
        if level != "instance":
            types += [
                EventType(level, "instance-added", f"The {level} received one more instance."),
                EventType(level, "stable", f"The {level} has received nothing for Orthanc's StableAge."),
                EventType(level, "anonymized", f"The {level} is an anonymization's result (logs of old Orthancs)."),
                EventType(level, "modified", f"The {level} is a modification's result (logs of old Orthancs)."),
            ]
    return types


TYPES: Final[tuple[EventType, ...]] = (
    *_resource_types(),
    EventType("series", "completed", "The series has all the instances that its headers announce."),
    EventType("job", "submitted", "A job was submitted."),
    EventType("job", "succeeded", "A job has succeeded."),
    EventType("job", "failed", "A job has failed; it may be resubmitted under the same id."),
    EventType("job", UNKNOWN, "Something about a job that this version has no name for."),
    EventType("server", "started", "Orthanc has started."),
    EventType("server", "stopped", "Orthanc is stopping."),
    EventType("server", "peers-updated", "The list of Orthanc peers was changed."),
    EventType("server", "modalities-updated", "The list of DICOM modalities was changed."),
    EventType("server", "log-discontinuity", "Orthanc's change log is not the one that was read before."),
    EventType("server", UNKNOWN, "Something that this version has no name for."),
)

_ID: Final = {
    "type": "string",
    "description": "Orthanc's id: an unsalted SHA-1, a pseudonym and not anonymous.",
}
_JOB: Final = {
    "title": "Job",
    "type": "object",
    "description": "The job as it was when the change was captured.",
    "properties": {
        "type": {"type": "string", "description": "As Orthanc spells it: DicomModalityStore, say."},
        "state": {"type": "string", "description": "As Orthanc spells it: Success, Failure, Pending …"},
        "progress": {"type": "number", "description": "Percent."},
        "errorCode": {"type": "integer", "description": "0: no error."},
        "created": {"type": "string", "description": "As Orthanc spells it, UTC."},
        "completed": {"type": "string", "description": "As Orthanc spells it, UTC."},
        "runtime": {"type": "number", "description": "Seconds."},
        "localAet": {"type": "string", "description": "The application entity title of Orthanc itself."},
        "remoteAet": {"type": "string", "description": "Of the modality that it talks to."},
        "targetAet": {"type": "string", "description": "Of the modality that a C-MOVE sends to."},
        "peer": {"type": "string", "description": "The URL of an Orthanc peer, without user and password."},
        "instances": {"type": "integer", "description": "How many it is about."},
        "failedInstances": {"type": "integer", "description": "How many of them failed."},
        "parentResources": {"type": "array", "items": _ID, "description": "What it is about."},
    },
}

_LOG: Final = {
    "title": "Log",
    "type": "object",
    "description": "What is known of the log.",
    "properties": {
        "reason": {
            "type": "string",
            "x-extensible-enum": ["emptied", "counter-behind", "numbers-reused"],  # others may come
            "description": "emptied: by DELETE /changes. The others: another or a restored database, whose counter is"
            " behind what was recorded, or which has given recorded numbers to other changes.",
        },
        "recorded": {"type": "integer", "description": "The last number that was recorded."},
        "counter": {"type": "integer", "description": "The log's own counter when it was noticed."},
        "continues": {"type": "integer", "description": "The number behind which recording goes on."},
    },
}


def schema(event_type: EventType, base: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of an event's data. New optional properties may come within a version."""
    identifier: dict[str, Any] = _ID if event_type.level != "server" else {"type": "null"}
    if event_type.name == f"server.{UNKNOWN}":
        identifier = {"type": ["string", "null"], "description": "What was given with it, if anything."}
    properties: dict[str, Any] = {
        "change": {"type": "string", "description": "The kind of change, as Orthanc's /changes spells it."},
        "level": {"const": event_type.level, "description": "What it is about, which `id` is of."},
        "id": identifier,
        "seq": {"type": "integer", "description": "Its number in Orthanc's change log, where it has one."},
        "parents": parents(event_type.level),
        "inferred": {"const": True, "description": "Orthanc did not say so; it follows from what exists."},
    }
    if event_type.level in LEVELS:
        strings = {"type": "object", "additionalProperties": {"type": "string"}}
        properties["tags"] = {
            "title": "Tags",
            **strings,
            "description": "Allow-listed DICOM tags, by keyword. Patient data, maybe.",
        }
        properties["metadata"] = {
            "title": "Metadata",
            **strings,
            "description": "Allow-listed metadata of Orthanc, by name.",
        }
    if event_type.level == "job":
        properties["job"] = _JOB
    if event_type.verb == "log-discontinuity":
        properties["log"] = _LOG
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{base}{event_type.name}.{VERSION}",
        "title": event_type.name,
        "description": event_type.meaning,
        "type": "object",
        "properties": properties,
        "required": ["change", "level", "id", "parents"],
    }


def parents(level: str) -> dict[str, Any]:
    """The JSON Schema of what is above something of a level. Its title is what generated code calls it."""
    above = _levels_above(level)
    return {
        "title": f"{level.capitalize()}Parents" if above else "NoParents",
        "type": "object",
        "description": "Level → Orthanc id of what is above it; empty where that is not known, or where nothing is.",
        "properties": dict.fromkeys(above, _ID),
        "additionalProperties": False,
    }


def _levels_above(level: str) -> tuple[str, ...]:
    return LEVELS[: LEVELS.index(level)] if level in LEVELS else ()
