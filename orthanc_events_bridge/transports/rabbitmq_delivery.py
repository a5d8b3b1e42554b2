"""An event that a subscriber of RabbitMQ holds until it has settled it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery
from orthanc_events_bridge.transports.rabbitmq_message import attempt, incoming


class Holder(Protocol):
    """Whose deliveries they are."""

    def check(self) -> None:
        """See `Delivery.extend`."""

    def acknowledge(self, delivery: RabbitDelivery) -> None:
        """See `Delivery.ack`."""

    async def give_back(self, delivery: RabbitDelivery, delay: float, more: Mapping[str, str]) -> None:
        """See `Delivery.nack`."""

    async def reject(self, delivery: RabbitDelivery, headers: Mapping[str, str]) -> None:
        """See `Delivery.reject`."""


class RabbitDelivery(Delivery):
    """Settled by an acknowledgement, which RabbitMQ does not answer: what got lost with the connection comes again.

    :ivar retry: the answer to the copy of it that is to be given again; none as long as there is no such copy.
    :ivar dead: the same for that among the dead letters. A copy that is not answered yet is never sent once more.
    """

    def __init__(self, holder: Holder, raw: DeliveredMessage) -> None:
        super().__init__(incoming(raw), attempt(raw))
        self._holder = holder
        self.raw = raw
        self.retry: asyncio.Future[str] | None = None
        self.dead: asyncio.Future[str] | None = None

    async def ack(self) -> None:
        self._holder.acknowledge(self)

    async def nack(self, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        await self._holder.give_back(self, delay, headers)

    async def reject(self, headers: Mapping[str, str]) -> None:
        await self._holder.reject(self, headers)

    async def extend(self) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.extend`. RabbitMQ takes nothing back from who lives."""
        self._holder.check()
