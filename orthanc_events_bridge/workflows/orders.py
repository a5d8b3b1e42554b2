"""Orders: what one consumer of a workflow puts into the inbox of the next, which nobody else reads."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from orthanc_events_bridge.consumers.publishing import PREFIX
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.catalog import VERSION
from orthanc_events_bridge.events.mapping import NAMESPACE, STRUCTURED, partition, trace_parent
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.base import Outgoing

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.event import Event
    from orthanc_events_bridge.transports.base import Place
    from orthanc_events_bridge.transports.options import TransportOptions


@dataclass(frozen=True, slots=True)
class Origin:
    """What orders take over from the event that led to them.

    :ivar event: its id.
    :ivar prefix: what the names of types begin with.
    :ivar time: when Orthanc said so; empty: that is not known.
    :ivar key: what orders share that are not to be carried out at the same time: the study.
    """

    event: str
    correlation: str
    source: str
    prefix: str
    site: str
    time: str
    subject: str
    trace: str
    key: str

    @classmethod
    def of(cls, event: Event, key: str) -> Self:
        """Of an event."""
        attributes = event.attributes
        return cls(
            event.id,
            event.correlation_id,
            event.source,
            event.prefix or PREFIX,
            event.site or "main",
            attributes.get("time", ""),
            attributes.get("subject", ""),
            attributes.get("traceparent", ""),
            key,
        )


def order(kind: str, spelt: str, origin: Origin, data: Mapping[str, Any]) -> Outgoing:
    """An order: a CloudEvent whose id follows from what is ordered.

    :param kind: the short name of its type.
    :param spelt: what it is to be, in words: the same is the same order.
    :param data: no patient data.
    """
    identifier = str(uuid.uuid5(NAMESPACE, f"order\n{spelt}"))
    now = iso(time.time() * 1000)
    body = {
        "specversion": "1.0",
        "id": identifier,
        "source": origin.source,
        "type": f"{origin.prefix}.{kind}.{VERSION}",
        # When Orthanc said so: what was sent after that counts.
        "time": origin.time or now,
        "datacontenttype": "application/json",
        "partitionkey": origin.key,
        "recordedtime": now,
        "subject": origin.subject,
        "traceparent": origin.trace or trace_parent(identifier),
        "causationid": origin.event,
        "correlationid": origin.correlation,
        "data": dict(data),
    }
    level, _, verb = kind.partition(".")
    content = json.dumps(body).encode()
    return Outgoing(identifier, origin.site, level, verb, origin.key, partition(origin.key), STRUCTURED, content)


class Inboxes:
    """The inboxes of consumers, each over a connection that is made when it is first needed.

    :param broker: where they are.
    """

    def __init__(self, broker: TransportOptions | None) -> None:
        self._broker = broker
        self._places: dict[str, Place] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def put(self, consumer: str, order: Outgoing) -> None:
        """Put an order there, and return when the broker has confirmed it.

        :raises BridgeError: it has not.
        """
        async with self._asking.setdefault(consumer, asyncio.Lock()):
            if consumer not in self._places:
                assert self._broker is not None  # a consumer without one does not begin
                self._places[consumer] = create(self._broker).inbox(consumer)
            inbox = self._places[consumer]
            try:
                await inbox.connect()
                await inbox.publish([order])
            except BridgeError:
                await inbox.close()  # it is connected again by the next
                raise

    async def close(self) -> None:
        """End all connections."""
        places, self._places = self._places, {}
        for inbox in places.values():
            await inbox.close()
