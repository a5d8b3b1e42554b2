"""Where a consumer's events come from: a broker's URL, or the options of a transport as the bridge's file has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import ValidationError

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.transports import registration, types
from orthanc_events_bridge.transports.options import TransportOptions

#: Scheme of the URL → type of transport. Other schemes are types themselves, of other packages too.
_SCHEMES: Final = {"nats": "nats", "tls": "nats", "amqp": "rabbitmq", "amqps": "rabbitmq", "kafka": "kafka"}


def broker_options(broker: str | Mapping[str, Any] | TransportOptions) -> TransportOptions:
    """Read what a consumer is given as its broker.

    :param broker: ``nats://HOST:PORT``, ``tls://…`` (NATS with TLS), ``amqp://…``, ``amqps://…``,
        ``kafka://HOST:PORT``, several servers with commas between; or a block of options as in ``transports`` of the
        bridge's file.
    :raises BridgeError: it is none of these, or an option is wrong. Nothing secret is in the message.
    """
    if isinstance(broker, TransportOptions):
        return broker
    given = _of_url(broker) if isinstance(broker, str) else dict(broker)
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in types():
        raise BridgeError("which kind the consumer's broker is is not said", f"give its type: {', '.join(types())}")
    try:
        return registration(kind).options.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
        raise BridgeError(f"the consumer's broker: {wrong}", "see docs/configuration.md") from None


def _of_url(text: str) -> dict[str, Any]:
    servers = [one.strip() for one in text.split(",") if one.strip()]
    right = "write nats://HOST:4222, amqp://HOST:5672 or kafka://HOST:9092"
    if not servers:
        raise BridgeError("the consumer's broker is empty", right)
    scheme = urlsplit(servers[0]).scheme
    kind = _SCHEMES.get(scheme)
    if kind is None:
        raise BridgeError("the consumer's broker is no URL of a broker", right)
    if kind == "kafka":  # Kafka's own clients want no scheme
        servers = [one.removeprefix("kafka://").rstrip("/") for one in servers]
    else:  # further servers may leave it out
        servers = [one if "://" in one else f"{scheme}://{one}" for one in servers]
    return {"type": kind, "servers": servers}
