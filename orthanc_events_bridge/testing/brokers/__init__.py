"""The brokers for tests, each as the line, the faults, the demo and the benchmarks need it.

Two ways to start their servers: as processes of this machine, or in containers (``TEST_SERVERS=containers``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from orthanc_events_bridge.testing.brokers.base import Broker
from orthanc_events_bridge.testing.brokers.kafka import KafkaBroker, KafkaServer
from orthanc_events_bridge.testing.brokers.nats import NatsBroker
from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitBroker, RabbitServer
from orthanc_events_bridge.testing.brokers.webhook import WebhookBroker, WebhookServer
from orthanc_events_bridge.testing.processes import Server
from orthanc_events_bridge.testing.servers import NatsServer

__all__ = ["BROKERS", "Broker", "make_broker", "make_server", "way"]

BROKERS: Final[dict[str, type[Broker]]] = {
    "nats": NatsBroker,
    "rabbitmq": RabbitBroker,
    "kafka": KafkaBroker,
    "webhook": WebhookBroker,
}

_PROCESSES: Final[dict[str, Callable[..., Server]]] = {
    "kafka": KafkaServer,
    "nats": NatsServer,
    "rabbitmq": RabbitServer,
    "webhook": WebhookServer,
}


def way() -> str:
    """``processes`` or ``containers``: how servers are started."""
    return os.environ.get("TEST_SERVERS", "processes")


def make_server(kind: str, folder: Path, *, config: str = "") -> Server:
    """Make the server of a broker, not started yet.

    :param kind: ``nats`` …
    :param config: text for the end of its configuration file.
    :raises MissingComponentError: it can't be had; the message says what to install.
    """
    if way() == "containers":
        # Only here: what it needs is not installed wherever the demo runs.
        from orthanc_events_bridge.testing.brokers.webhook_container import WebhookContainer
        from orthanc_events_bridge.testing.containers import KafkaContainer, NatsContainer, RabbitMQContainer

        contained: dict[str, Callable[..., Server]] = {
            "kafka": KafkaContainer,
            "nats": NatsContainer,
            "rabbitmq": RabbitMQContainer,
            "webhook": WebhookContainer,
        }
        return contained[kind](folder, config=config)
    return _PROCESSES[kind](folder, config=config)


def make_broker(kind: str, folder: Path) -> Broker:
    """Make a broker with the defaults that a user would have, not started yet.

    :raises MissingComponentError: its server can't be had.
    """
    return BROKERS[kind](make_server(kind, folder))
