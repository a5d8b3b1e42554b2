"""The transports that the contract suite is run on, and what each must be able to do."""

from __future__ import annotations

from typing import Final

from orthanc_events_bridge.transports.base import Capabilities
from tests.contract.harness import Harness, MemoryHarness
from tests.contract.kafka_harness import KafkaHarness
from tests.contract.nats_harness import NatsHarness
from tests.contract.rabbitmq_harness import RabbitHarness
from tests.contract.webhook_harness import WebhookHarness

#: Said here again, so that a transport's own table can't hide a gap.
TABLE: Final[dict[str, tuple[type[Harness], Capabilities]]] = {
    "memory": (
        MemoryHarness,
        Capabilities(
            durable=False,
            deduplicates=True,
            replayable=True,
            ordered=True,
            declares_topology=False,
            refuses_when_full=True,
            identifies_place=True,
            subscribable=True,
            has_inboxes=True,
            counts_deliveries=True,
            pipelined=True,
        ),
    ),
    "nats": (
        NatsHarness,
        Capabilities(
            durable=True,
            deduplicates=True,
            replayable=True,
            ordered=True,
            declares_topology=True,
            refuses_when_full=True,
            identifies_place=True,
            subscribable=True,
            has_inboxes=True,
            counts_deliveries=True,
            pipelined=True,
        ),
    ),
    "kafka": (
        KafkaHarness,
        Capabilities(
            durable=True,
            deduplicates=False,
            replayable=True,
            ordered=True,
            declares_topology=True,
            refuses_when_full=False,
            identifies_place=True,
            subscribable=True,
            has_inboxes=True,
            counts_deliveries=False,
            pipelined=True,
        ),
    ),
    "rabbitmq": (
        RabbitHarness,
        Capabilities(
            durable=True,
            deduplicates=False,
            replayable=True,
            ordered=True,
            declares_topology=True,
            refuses_when_full=False,
            identifies_place=True,
            subscribable=True,
            has_inboxes=True,
            counts_deliveries=True,
            pipelined=True,
        ),
    ),
    "webhook": (
        WebhookHarness,
        Capabilities(
            durable=True,
            deduplicates=False,
            replayable=False,
            ordered=True,
            declares_topology=False,
            refuses_when_full=True,
            identifies_place=False,
            subscribable=False,
            has_inboxes=False,
            counts_deliveries=False,
            pipelined=False,
        ),
    ),
}
