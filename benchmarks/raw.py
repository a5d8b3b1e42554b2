"""What the plain clients of the brokers have in common: one small class per broker, all of one shape.

Each sends the same bytes with the same headers to the same place as our transport does, with the same settings where
they bear on durability: every event is confirmed as durably as the bridge has it confirmed.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.options import TransportOptions

#: An event as a client takes it, made before the clock runs.
Message = TypeVar("Message")
#: To be told how many are confirmed so far, now and then.
Confirmed = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to send many events.

    :param title: as texts call it.
    :param held: whether the bridge is held against it: it is what the client itself offers.
    """

    title: str
    held: bool = True


class Raw(ABC, Generic[Message]):
    """A broker's plain client.

    :param options: of our transport, which say where to send.
    """

    #: Ways to send many events in order.
    ways: ClassVar[Mapping[str, Way]]
    #: What they are, in words.
    how: ClassVar[str]

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def prepare(self, event: Outgoing) -> Message:
        """Make what the client takes."""

    @abstractmethod
    async def send(self, way: str, messages: Sequence[Message], confirmed: Confirmed) -> None:
        """Connect, send all of them in order and pipelined, where that can be, and return when all are confirmed.

        :param way: a key of `ways`.
        """

    @abstractmethod
    async def send_one(self, message: Message) -> None:
        """Connect, send one, wait until it is confirmed, close: the way of one connection per event."""

    async def stored_at(self, numbers: Sequence[int]) -> list[float] | None:
        """When the place's first, second … events were stored, in seconds, by the broker's own clock.

        :param numbers: of the events, from 1 on.
        :return: none where the broker doesn't say.
        """
        return None


_CLIENTS: Final[Mapping[str, str]] = {
    "nats": "RawNats",
    "rabbitmq": "RawRabbit",
    "kafka": "RawKafka",
    "webhook": "RawWebhook",
}


def raw_class(kind: str) -> type[Raw[Any]]:
    """The plain client of a broker."""
    found: type[Raw[Any]] = getattr(importlib.import_module(f"benchmarks.raw_{kind}"), _CLIENTS[kind])
    return found


def make_raw(options: TransportOptions) -> Raw[Any]:
    """The plain client for a transport's options."""
    return raw_class(options.type)(options)
