"""Whether an event is what the package says of it: every event that a test reads back is judged here, by its schema.

More strictly than consumers need to be: what no schema describes may not be there either. Otherwise a property that
nobody wrote down would be in every event, and in no schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jsonschema_rs import Draft202012Validator

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events import described
from orthanc_events_bridge.events.catalog import VERSION


def fault(event: Mapping[str, Any]) -> str:
    """What is wrong with an event in CloudEvents' JSON format; empty if nothing is.

    :param event: also one of a type of somebody's own, which has no schema: then its attributes alone are judged.
    """
    known = event.get("dataschema")
    name = ".".join(str(event.get("type")).split(".")[-3:]).removesuffix(f".{VERSION}")
    if known is None and "producer" in event:
        name = ""
    elif not str(known).endswith(f"{name}.{VERSION}"):
        return f"its dataschema {known!r} is not that of its type {event.get('type')!r}"
    try:
        validator = _validator(name, derived="producer" in event)
    except BridgeError as error:
        return str(error)
    found = next(iter(validator.iter_errors(event)), None)
    return "" if found is None else f"{'/'.join(map(str, found.instance_path)) or 'the event'}: {found.message}"


@lru_cache(maxsize=256)
def _validator(name: str, *, derived: bool) -> Draft202012Validator:
    whole = described.schema(described.WHOLE_DERIVED if derived else described.WHOLE)
    if name:
        whole["properties"]["data"] = {key: value for key, value in described.schema(name).items() if key[0] != "$"}
    else:
        whole["required"].remove("dataschema")
    return Draft202012Validator(_closed(whole), validate_formats=True)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of which nothing may be in an object but what it describes."""
    if "properties" not in schema:
        return schema
    properties = {name: _closed(one) for name, one in schema["properties"].items()}
    return {"additionalProperties": False, **schema, "properties": properties}
