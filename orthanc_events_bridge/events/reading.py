"""A message of a broker → the event in it, whichever mode it came in."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from orthanc_events_bridge.transports.base import Escaped

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.base import Incoming

#: Prefixes of the headers that carry attributes in binary mode: of Kafka's binding, and of the others.
_PREFIXES: Final = ("ce-", "ce_")
_STRUCTURED: Final = "application/cloudevents+json"
_DECODER: Final = json.JSONDecoder()
#: Of JSON.
_SPACES: Final = " \t\n\r"


def event_of(message: Incoming) -> dict[str, Any] | None:
    """A message as an event in CloudEvents' JSON format, whichever mode it came in; none where it isn't one."""
    if message.headers.get("content-type", "").startswith(_STRUCTURED):
        return _from_json(message.body)
    attributes = {
        name[len(prefix) :]: value
        for prefix in _PREFIXES
        for name, value in message.headers.items()
        if name.startswith(prefix)
    }
    if "specversion" not in attributes:
        return _from_json(message.body)
    content_type = message.headers.get("content-type", "")
    if isinstance(message, Escaped):
        attributes = {name: unquote(value) for name, value in attributes.items()}
    event = {**attributes, **({"datacontenttype": content_type} if content_type else {})}
    if not message.body:
        return event
    try:
        return {**event, "data": json.loads(message.body)}
    except ValueError:
        return {**event, "data_base64": b64encode(message.body).decode()}


def _from_json(body: bytes) -> dict[str, Any] | None:
    try:
        if body[:1] == b"{" and body[1:2] != b"\0":
            # `json.loads` looks for the encoding, and for spaces around: that takes longer than half of the rest.
            text = body.decode("utf-8", "surrogatepass")
            event, end = _DECODER.raw_decode(text)
            if text[end:].strip(_SPACES):
                return None
        else:
            event = json.loads(body)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "specversion" in event else None
