"""A transport in a configuration file: a block of options, whose `type` says which there are, or a broker's URL."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, GetJsonSchemaHandler, SerializeAsAny, ValidationInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, ValidationError

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports import REGISTERED, registration, types
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.values import mistake

#: Scheme of the URL → type of transport.
_SCHEMES: Final = {"nats": "nats", "tls": "nats", "amqp": "rabbitmq", "amqps": "rabbitmq", "kafka": "kafka"}


def block_of(text: str) -> dict[str, Any]:
    """Read a URL.

    :param text: ``nats://HOST:PORT``, ``tls://…`` (NATS with TLS), ``amqp://…``, ``amqps://…``,
        ``kafka://HOST:PORT``, several servers with commas between.
    :raises PydanticCustomError: it is none of these. Nothing secret is in the message.
    """
    servers = [one.strip() for one in text.split(",") if one.strip()]
    right = "write nats://HOST:4222, amqp://HOST:5672 or kafka://HOST:9092"
    if not servers:
        raise mistake("is empty", right)
    scheme = urlsplit(servers[0]).scheme
    kind = _SCHEMES.get(scheme)
    if kind is None:
        raise mistake("is no URL of a broker", f"{right}, or a block of options with its type: {', '.join(types())}")
    if kind == "kafka":  # Kafka's own clients want no scheme
        servers = [one.removeprefix("kafka://").rstrip("/") for one in servers]
    else:  # further servers may leave it out
        servers = [one if "://" in one else f"{scheme}://{one}" for one in servers]
    return {"type": kind, "servers": servers}


def transport_of(value: object, info: ValidationInfo) -> TransportOptions:
    """Take the class of options that `type` names, or that a URL stands for."""
    if isinstance(value, TransportOptions):
        return value
    if isinstance(value, str):
        value = block_of(value)
    if not isinstance(value, Mapping):
        raise PydanticCustomError("model_type", "a block of options is expected")
    kind, known = value.get("type"), ", ".join(types())
    if isinstance(kind, str) and kind in types():
        try:
            options = registration(kind).options
        except TransportConfigurationError as wrong:
            error = mistake(wrong.message, wrong.remedy)
        else:
            return options.model_validate(value, context=info.context)
    elif kind is None:
        error = mistake("is required", f"write one of: {known}")
    elif isinstance(kind, str):
        near = difflib.get_close_matches(kind.lower(), types(), 1)
        right = f"did you mean {near[0]}? The types are: {known}" if near else f"the types are: {known}"
        error = mistake("is no type of transport", right, shown=kind)
    else:
        error = mistake("has to be text", f"write one of: {known}")
    raise ValidationError.from_exception_data(
        "transport", [InitErrorDetails(type=error, loc=("type",), input=None)], hide_input=True
    )


class ByType:
    """The JSON Schema of a transport: one of the registered ones, or a URL."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schemas = [handler(ours.options.__pydantic_core_schema__) for ours in REGISTERED.values()]
        return {"anyOf": [{"type": "string"}, {"type": "object", "required": ["type"], "oneOf": schemas}]}


#: An option that is a transport.
TransportBlock = Annotated[SerializeAsAny[TransportOptions], BeforeValidator(transport_of), ByType()]
