"""The types of events that consumers derive from Orthanc's, and the JSON Schema of each one's data.

The bridge sends none of them: they are published by consumers (`orthanc_events_bridge.consumers.publishing`), beside
its own, at the same addresses. They have no ``recorder`` and no ``sequence``, since no outbox holds them. Breaking them
is a major version, as with `orthanc_events_bridge.events.catalog`.
"""

from __future__ import annotations

from typing import Any, Final

from orthanc_events_bridge.events import catalog
from orthanc_events_bridge.events.catalog import VERSION, EventType

#: Which commands publish each of them.
DERIVED: Final[dict[EventType, tuple[str, ...]]] = {
    EventType("study", "ready", "The study is complete by a rule, or the rule's deadline is over."): ("derive",),
    EventType("study", "updated", "More has come to a study that was told ready."): ("derive",),
    EventType("study", "routed", "The study was sent to a destination."): ("route",),
    EventType("series", "routed", "The series was sent to a destination."): ("route",),
    EventType("instance", "routed", "The instance was sent to a destination."): ("route",),
    EventType("transfer", "failed", "What was to be sent to a destination is given up: it is a dead letter."): (
        "route",
        "dispatch",
    ),
    # Old Orthancs write the same into their logs, with the same meaning: it is one type (`catalog.TYPES` has it too).
    next(one for one in catalog.TYPES if one.name == "study.anonymized"): ("anonymize",),
    EventType("result", "received", "A result for an anonymized study has come, and is in the original."): (
        "anonymize",
        "dispatch",
    ),
}

#: A router's own order to send something: in inboxes only, and no contract for others.
ORDERED: Final = "transfer.ordered"
#: An AI dispatch's own order to go on with a workflow: the same.
STEP_ORDERED: Final = "step.ordered"

#: The short names of all types that consumers can meet.
NAMES: Final = tuple(dict.fromkeys((*(one.name for one in (*catalog.TYPES, *DERIVED)), ORDERED, STEP_ORDERED)))

_BY_NAME: Final = {one.name: one for one in DERIVED}
_COUNT: Final = {"type": "integer", "minimum": 0}
_RULE: Final = {"type": "string", "description": "The name of the rule by which it was done or told."}
_DESTINATION: Final = {"type": "string", "description": "The name of the destination, as the router's file has it."}
_READINESS: Final = {
    "rule": _RULE,
    "complete": {"type": "boolean", "description": "Whether nothing is missing of what the rule expects."},
    "missing": {
        "title": "Missing",
        "type": "object",
        "description": "What is missing; not there where nothing is.",
        "properties": {
            "quiet": {"const": True, "description": "Images were still coming when the deadline was over."},
            "series": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Of the expected series those that are missing, by their names in the rule.",
            },
            "instances": _COUNT | {"description": "So many instances less than expected."},
            "count": {"const": True, "description": "How many instances to expect could not be found out."},
        },
        "additionalProperties": False,
    },
    "series": _COUNT | {"description": "Series that are there."},
    "instances": _COUNT | {"description": "Instances that are there."},
    "expected": _COUNT | {"description": "Instances that are expected, where the rule says how to know."},
}

#: Of each type the properties of its data beside those that all have, and which of them are always there.
_DATA: Final[dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "study.ready": (_READINESS, ("rule", "complete", "series", "instances")),
    "study.updated": (_READINESS, ("rule", "complete", "series", "instances")),
    **{
        f"{level}.routed": (
            {
                "rule": _RULE,
                "destination": _DESTINATION,
                "instances": _COUNT | {"description": "Instances that were sent."},
                "job": {"type": "string", "description": "Orthanc's id of the job that sent them, where one did."},
            },
            ("rule", "destination", "instances"),
        )
        for level in ("study", "series", "instance")
    },
    "transfer.failed": (
        {
            "rule": _RULE,
            "destination": _DESTINATION,
            "reason": {"type": "string", "description": "Why it is given up, as the dead letter says it."},
            "attempts": _COUNT | {"description": "How often it was tried."},
        },
        ("rule", "destination", "reason", "attempts"),
    ),
    "study.anonymized": (
        {"rule": _RULE, "instances": _COUNT | {"description": "Instances of the anonymized study."}},
        (),
    ),
    "result.received": (
        {"rule": _RULE, "instances": _COUNT | {"description": "Instances of the result."}},
        ("rule", "instances"),
    ),
}
#: What the data can be about, where that is not the type's own level.
_LEVELS: Final = {
    "transfer.failed": ("study", "series", "instance"),
    "result.received": ("study", "series", "instance"),
}


def derived_type(name: str) -> EventType | None:
    """The type of that short name; none where it is not one that consumers publish."""
    return _BY_NAME.get(name)


def levels(event_type: EventType) -> tuple[str, ...]:
    """What the data of a type can be about."""
    return _LEVELS.get(event_type.name, (event_type.level,))


def schema(event_type: EventType, base: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a derived event's data. New optional properties may come within a version."""
    properties, required = _DATA[event_type.name]
    if event_type in catalog.TYPES:
        told = catalog.schema(event_type, base)
        return {**told, "properties": {**told["properties"], **properties}}
    about = levels(event_type)
    lowest = max(about, key=catalog.LEVELS.index)
    identifier = {"type": "string", "description": "Orthanc's id: an unsalted SHA-1, a pseudonym and not anonymous."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{base}{event_type.name}.{VERSION}",
        "title": event_type.name,
        "description": event_type.meaning,
        "type": "object",
        "properties": {
            "level": {
                **({"const": about[0]} if len(about) == 1 else {"title": "Level", "enum": list(about)}),
                "description": "`study`, `series` or `instance`: what it is about, which `id` is of.",
            },
            "id": identifier,
            "parents": catalog.parents(lowest),
            **properties,
        },
        "required": ["level", "id", "parents", *required],
    }
