"""Where a consumer's events come from: a broker's URL, or the options of a transport as the bridge's file has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.transports import types
from orthanc_events_bridge.transports.blocks import TransportBlock
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


def broker_options(broker: str | Mapping[str, Any] | TransportOptions) -> TransportOptions:
    """Read a broker that is given in code.

    :param broker: a URL as for `block_of`, or a block of options as in ``transports`` of the bridge's file.
    :raises BridgeError: it is none of these, or an option is wrong. Nothing secret is in the message.
    """
    try:
        given: object = block_of(broker) if isinstance(broker, str) else broker
        options: TransportOptions = TypeAdapter(TransportBlock).validate_python(given)
    except PydanticCustomError as error:
        context = error.context or {}
        raise BridgeError(f"the broker {context['wrong']}", str(context["right"])) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
        raise BridgeError(f"the broker: {wrong}", "see docs/configuration.md") from None
    return options
