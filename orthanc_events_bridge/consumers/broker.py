"""Where a consumer's events come from: a broker's URL, or the options of a transport as the bridge's file has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.transports.blocks import TransportBlock
from orthanc_events_bridge.transports.options import TransportOptions


def broker_options(broker: str | Mapping[str, Any] | TransportOptions) -> TransportOptions:
    """Read a broker that is given in code.

    :param broker: a URL as for `block_of`, or a block of options as in ``transports`` of the bridge's file.
    :raises BridgeError: it is none of these, or an option is wrong. Nothing secret is in the message.
    """
    try:
        options: TransportOptions = TypeAdapter(TransportBlock).validate_python(broker)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        first = found[0].get("ctx", {})
        if not found[0]["loc"] and "wrong" in first:  # of the whole, a URL say
            raise BridgeError(f"the broker {first['wrong']}", str(first["right"])) from None
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
        raise BridgeError(f"the broker: {wrong}", "see docs/configuration.md") from None
    return options
