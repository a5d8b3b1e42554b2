"""The transports that the contract suite is run on, and what each must be able to do."""

from __future__ import annotations

from typing import Final

from orthanc_events_bridge.transports.base import Capabilities
from tests.contract.harness import Harness, MemoryHarness
from tests.contract.nats_harness import NatsHarness

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
            counts_deliveries=True,
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
            counts_deliveries=True,
        ),
    ),
}
