"""The transports: one broker each, behind the contract in `orthanc_events_bridge.transports.base`.

Only options are imported here. A transport's module, and with it the broker's client, is imported when one is
created.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports.options import MemoryOptions, NatsOptions, TransportOptions

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.base import Transport


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


#: By the ``type`` that the configuration names.
REGISTERED: Final[dict[str, Registration]] = {
    "nats": Registration(NatsOptions, "orthanc_events_bridge.transports.nats:NatsTransport", "nats"),
    "memory": Registration(MemoryOptions, "orthanc_events_bridge.transports.memory:MemoryTransport"),
}


def create(options: TransportOptions) -> Transport:
    """Make the transport for these options, not connected yet.

    :raises TransportConfigurationError: the type is unknown, or its client library can't be loaded.
    """
    registration = REGISTERED.get(options.type)
    if registration is None:
        raise TransportConfigurationError(
            f"transport {options.name}: there is no type {options.type!r}",
            f"the types are {', '.join(REGISTERED)}",
        )
    module, _, name = registration.implementation.partition(":")
    try:
        implementation: type[Transport] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        if not registration.extra or (error.name or "").startswith("orthanc_events_bridge"):
            raise
        raise TransportConfigurationError(
            f"transport {options.name}: the client library for {options.type} can't be loaded: {error}",
            f'pip install "orthanc-events-bridge[{registration.extra}]"',
        ) from error
    return implementation(options)
