"""A transport as a block of options in a configuration file, whose `type` says which options there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, GetJsonSchemaHandler, SerializeAsAny, ValidationInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, ValidationError

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports import REGISTERED, registration, types
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.values import mistake


def transport_of(value: object, info: ValidationInfo) -> TransportOptions:
    """Take the class of options that `type` names."""
    if isinstance(value, TransportOptions):
        return value
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
    """The JSON Schema of a transport: one of the registered ones."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schemas = [handler(ours.options.__pydantic_core_schema__) for ours in REGISTERED.values()]
        return {"type": "object", "required": ["type"], "oneOf": schemas}


#: An option that is a transport.
TransportBlock = Annotated[SerializeAsAny[TransportOptions], BeforeValidator(transport_of), ByType()]
