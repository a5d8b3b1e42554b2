"""The transports: one broker each, behind the contract in `orthanc_events_bridge.transports.base`.

Only options are imported here. A transport's module, and with it the broker's client, is imported when one is
created. Other packages add transports of their own by an entry point (`ENTRY_POINTS`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import MemoryOptions, TransportOptions
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.webhook_options import WebhookOptions

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.base import Transport

#: The group of entry points: the name of each is the ``type``, and it leads to a `Registration`.
ENTRY_POINTS: Final = "orthanc_events_bridge.transports"


@dataclass(frozen=True, slots=True)
class Registration:
    """A type of transport.

    :param options: its options.
    :param implementation: ``module:Class`` of its `orthanc_events_bridge.transports.base.Transport`.
    :param extra: the extra of this package that installs its client; empty where it needs none.
    """

    options: type[TransportOptions]
    implementation: str
    extra: str = ""


#: Ours, by the ``type`` that the configuration names.
REGISTERED: Final[dict[str, Registration]] = {
    "nats": Registration(NatsOptions, "orthanc_events_bridge.transports.nats:NatsTransport", "nats"),
    "rabbitmq": Registration(RabbitOptions, "orthanc_events_bridge.transports.rabbitmq:RabbitTransport", "rabbitmq"),
    "kafka": Registration(KafkaOptions, "orthanc_events_bridge.transports.kafka:KafkaTransport", "kafka"),
    "webhook": Registration(WebhookOptions, "orthanc_events_bridge.transports.webhook:WebhookTransport", "webhook"),
    "memory": Registration(MemoryOptions, "orthanc_events_bridge.transports.memory:MemoryTransport"),
}


@cache
def types() -> tuple[str, ...]:
    """The types that there are: ours, then those that other packages add."""
    return (*REGISTERED, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - REGISTERED.keys()))


@cache
def registration(name: str) -> Registration:
    """What a type is.

    :raises TransportConfigurationError: there is no such type, or the package that adds it is broken.
    """
    if name in REGISTERED:
        return REGISTERED[name]
    for point in entry_points(group=ENTRY_POINTS, name=name):
        package = point.dist.name if point.dist else point.value
        try:
            found = point.load()
        except Exception as error:  # it is not ours
            raise TransportConfigurationError(
                f"the transport type {name} of the package {package} can't be loaded: {error}",
                f"mend or uninstall {package}",
            ) from error
        if isinstance(found, Registration):
            return found
        raise TransportConfigurationError(
            f"the transport type {name} of the package {package} is no Registration", f"mend or uninstall {package}"
        )
    raise TransportConfigurationError(f"there is no transport type {name!r}", f"the types are {', '.join(types())}")


def create(options: TransportOptions) -> Transport:
    """Make the transport for these options, not connected yet.

    :raises TransportConfigurationError: the type is unknown, or its client library can't be loaded.
    """
    found = registration(options.type)
    module, _, name = found.implementation.partition(":")
    try:
        implementation: type[Transport] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        if not found.extra or (error.name or "").startswith("orthanc_events_bridge"):
            raise
        raise TransportConfigurationError(
            f"transport {options.name}: the client library for {options.type} can't be loaded: {error}",
            f'pip install "orthanc-events-bridge[{found.extra}]"',
        ) from error
    return implementation(options)
