"""Protections of consumers, switched off on purpose, to show that the tests would notice.

Test-only. A worker of ``tests/faults/consumer_process.py`` switches off by itself what its test names.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from orthanc_events_bridge.consumers import stores, worker
from orthanc_events_bridge.consumers.event import Event, read
from orthanc_events_bridge.consumers.handling import Handling
from orthanc_events_bridge.consumers.holding import Held, Holding
from orthanc_events_bridge.consumers.keys import Keys
from orthanc_events_bridge.consumers.worker import Worker
from orthanc_events_bridge.transports.base import Incoming
from orthanc_events_bridge.transports.nats_options import NatsOptions


def _acknowledging_first() -> None:
    """What is given is acknowledged before its handlers have returned."""
    handle = Handling.handle

    async def nothing(*_: object) -> None:
        """It is settled."""

    async def acknowledge_and_handle(self: Handling, held: Held) -> None:
        await held.delivery.ack()
        for name in ("ack", "nack", "reject", "extend"):
            setattr(held.delivery, name, nothing)
        await handle(self, held)

    Handling.handle = acknowledge_and_handle  # type: ignore[method-assign]


def _settling_late() -> None:
    """Whoever stood still goes on with what another has by now, and settles it (NATS)."""
    from orthanc_events_bridge.transports.nats_settling import Settling

    Holding.look = lambda self: setattr(self, "ticked", self._clock())  # type: ignore[method-assign]
    Settling._late = lambda self, delivery, now=None: False  # type: ignore[method-assign]


def _counting_in_memory() -> None:
    """Each worker counts the attempts that it has seen itself."""
    counts = Counter[str]()

    def counted(message: Incoming, attempt: int = 1) -> Event:
        event = read(message, attempt)
        counts[event.id] += 1
        return dataclasses.replace(event, attempt=counts[event.id])

    worker.read = counted  # type: ignore[attr-defined]


def _without_keys() -> None:
    """A worker begins what it is given whatever else it does about the same key."""
    add = Keys.add

    def forget_and_add(self: Keys, held: Held) -> None:
        self._behind.clear()
        add(self, held)

    def done(self: Keys, key: str) -> None:
        self._behind.pop(key, None)

    Keys.add = forget_and_add  # type: ignore[method-assign]
    Keys._done = done  # type: ignore[method-assign]


def _without_waiting() -> None:
    """In order, what is behind an event that is given back doesn't wait for it (NATS)."""
    from orthanc_events_bridge.transports.nats_ordered import NatsOrderedSubscription
    from orthanc_events_bridge.transports.nats_settling import Settling

    NatsOrderedSubscription.give_back = Settling.give_back  # type: ignore[method-assign]


def _acknowledging_the_dead() -> None:
    """What goes among the dead letters is acknowledged before it is stored there (NATS)."""
    from orthanc_events_bridge.transports.nats_settling import NatsDelivery, Settling

    async def reject(self: Settling, delivery: NatsDelivery, headers: Mapping[str, str]) -> None:
        if self._ours(delivery):
            await self.settle(delivery, b"+ACK")
            await self._copies.dead(delivery.message, delivery.key, delivery.attempt, headers)

    Settling.reject = reject  # type: ignore[method-assign]


def _without_drain() -> None:
    """A worker that is to stop waits for no handler."""

    async def nothing(self: Worker) -> None:
        """What runs is cut off when the event loop ends."""

    Worker._drain = nothing  # type: ignore[method-assign]


def _without_extending() -> None:
    """A worker gives no sign of life for what it holds."""

    async def nothing(self: Holding) -> None:
        """For what is held."""

    Holding.beat = nothing  # type: ignore[method-assign]


def _with_stores(change: Callable[[stores.Store], None]) -> None:
    make = stores.make

    def make_changed(store: SecretStr | Path | NatsOptions) -> stores.Store:
        made = make(store)
        change(made)
        return made

    stores.make = make_changed


def _without_claims() -> None:
    """That another has begun an effect keeps nobody from it."""

    def change(store: stores.Store) -> None:
        begin = store.begin

        async def begin_always(key: str, owner: str, lease: float) -> stores.Begun:
            found = await begin(key, owner, lease)
            return stores.Begun("mine") if found.state == "theirs" else found

        store.begin = begin_always  # type: ignore[method-assign]

    _with_stores(change)


def _without_notes() -> None:
    """That an effect is done is not noted."""

    def change(store: stores.Store) -> None:
        async def nothing(key: str, owner: str, keep: float) -> bool:
            return True

        store.finish = nothing  # type: ignore[method-assign]

    _with_stores(change)


#: Those of a consumer's process
MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "return": _acknowledging_first,
    "late": _settling_late,
    "counts": _counting_in_memory,
    "keys": _without_keys,
    "waiting": _without_waiting,
    "stored": _acknowledging_the_dead,
    "drain": _without_drain,
    "extend": _without_extending,
    "claim": _without_claims,
    "note": _without_notes,
}
