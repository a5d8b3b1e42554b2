"""The JSON Schemas of events: of each type's data, and of what all have in common, the CloudEvents attributes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.changes.model import KNOWN_NAMES
from orthanc_events_bridge.events import catalog, derived
from orthanc_events_bridge.events.catalog import TYPES, EventType
from orthanc_events_bridge.events.derived import DERIVED
from tools.event_examples import example

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "orthanc_events_bridge" / "events" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

#: All types, each once: one of them is told by the bridge and by consumers.
ALL = tuple(dict.fromkeys((*TYPES, *DERIVED)))


def default(option: str) -> str:
    """What an option at the top of the configuration is when it is left out."""
    return str(Settings.model_fields[option].default)


def file_name(name: str) -> str:
    """Of a schema."""
    return f"{name}.{catalog.VERSION}.json"


def change_of(event_type: EventType) -> str:
    """The change that a type tells, as ``/changes`` spells it; empty for those that aren't Orthanc's own."""
    names = [name for name in KNOWN_NAMES if catalog.verb(name) == event_type.verb]
    if len(names) > 1:  # the level is a part of the name
        names = [name for name in names if name.endswith(event_type.level.capitalize())]
    return names[0] if names else ""


def data_schema(event_type: EventType) -> dict[str, Any]:
    """Of one type's ``data``."""
    made = derived.schema if event_type in DERIVED else catalog.schema
    return made(event_type, default("schema_base")) | {"examples": [example(event_type)["data"]]}


def envelope() -> dict[str, Any]:
    """What all events of the bridge have in common."""
    moment = {"type": "string", "format": "date-time"}
    properties: dict[str, Any] = {
        "specversion": {"const": "1.0"},
        "id": {
            "type": "string",
            "format": "uuid",
            "description": "The key to recognise an event that comes twice. Derived from the row of Orthanc's "
            "log where there is one, else made once and kept.",
        },
        "source": {"type": "string", "format": "uri", "description": "Which Orthanc. Configured."},
        "type": {"type": "string", "description": f"Begins with `{default('type_prefix')}` by default."},
        "subject": {
            "type": "string",
            "description": "Such as `studies/{id}`: the path in Orthanc's REST API. None for the server.",
        },
        "time": moment | {"description": "Of the change, UTC: whole seconds if logged, else milliseconds."},
        "datacontenttype": {"const": "application/json"},
        "dataschema": {"type": "string", "format": "uri", "description": "Of the data: which schema it has."},
        "recorder": {"type": "string", "format": "uuid", "description": "The outbox that recorded it."},
        "sequence": {
            "type": "string",
            "pattern": "^[0-9]{20}$",
            "description": "Sorts the events of one `source` and `recorder`; with gaps.",
        },
        "partitionkey": {
            "type": "string",
            "description": "Events that share it are in order: Orthanc's id of the study for a study and what is "
            "below it, else the resource's own, or `server`.",
        },
        "recordedtime": moment | {"description": "When it was recorded, UTC, milliseconds."},
        "traceparent": {
            "type": "string",
            "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-01$",
            "description": "W3C Trace Context, derived from the id.",
        },
        "data": {"type": "object", "description": "As the type's own schema says."},
    }
    required = [name for name in properties if name != "subject"]
    return {"type": "object", "properties": properties, "required": required}


def derived_envelope() -> dict[str, Any]:
    """The same of events that consumers publish."""
    document = envelope()
    properties = {name: value for name, value in document["properties"].items() if name not in ("recorder", "sequence")}
    properties["id"] = properties["id"] | {
        "description": "The key to recognise an event that comes twice. Derived from what it was derived from."
    }
    properties["time"] = properties["time"] | {"description": "When it was published, UTC, milliseconds."}
    properties["recordedtime"] = properties["recordedtime"] | {"description": "The same as `time`."}
    more = {
        "producer": {"type": "string", "description": "The name of the consumer that has published it."},
        "causationid": {
            "type": "string",
            "description": "The id of the event that it was derived from. None where nothing may lead back to that.",
        },
        "correlationid": {"type": "string", "description": "The id of the first event of its chain."},
    }
    required = [name for name in (*properties, *more) if name not in ("subject", "causationid")]
    return {"type": "object", "properties": properties | more, "required": required}


def schemas() -> dict[str, dict[str, Any]]:
    """Every schema by its name: ``study.stable``, and ``cloudevent`` and ``derived-cloudevent`` of whole events."""
    wholes = {
        "cloudevent": (envelope(), "An event that the bridge sends, in CloudEvents' JSON format."),
        "derived-cloudevent": (derived_envelope(), "An event that a consumer has published."),
    }
    base = default("schema_base")
    found = {
        name: {"$schema": DIALECT, "$id": f"{base}{name}.{catalog.VERSION}", "title": name, "description": text, **one}
        for name, (one, text) in wholes.items()
    }
    examples = {one.name: example(one) for one in ALL}
    found["cloudevent"]["examples"] = [examples["study.stable"]]
    found["derived-cloudevent"]["examples"] = [examples["study.ready"]]
    return found | {one.name: data_schema(one) for one in ALL}


def files() -> dict[Path, str]:
    """What is written of them."""
    return {
        FOLDER / file_name(name): json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in schemas().items()
    }
