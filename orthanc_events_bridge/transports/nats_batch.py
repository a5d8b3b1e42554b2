"""The events of one batch for NATS: their headers, and their acknowledgements."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import quote

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.transports.base import Outgoing

#: What a header's value can hold as it is: the draft of the binding's 1.0.3, section 3.1.3.2.
_SAFE: Final = "".join(chr(number) for number in range(0x21, 0x7F) if chr(number) not in '"%')


def more_headers(event: Outgoing) -> str:
    """The event's own further headers, and those of binary mode, in ASCII; of that, none in structured mode.

    The draft calls for ``ce-datacontenttype``, and SDKs read ``content-type``: both are given.
    """
    if not event.attributes and not event.headers:
        return ""
    further = "".join(f"{name}: {value}\r\n" for name, value in event.headers)
    if not event.attributes:
        return further
    attributes = (*event.attributes, ("datacontenttype", event.content_type))
    return further + "".join(f"ce-{name}: {quote(value, safe=_SAFE)}\r\n" for name, value in attributes)


def size_of(event: Outgoing) -> int:
    """How many bytes of ``max_payload`` it takes, but for what NATS itself adds."""
    return len(event.body) + len(more_headers(event))


class Batch:
    """The acknowledgements of one batch as they come in.

    In a cluster a refusal can overtake the acknowledgements of the events before it: it counts only when they
    are there.
    """

    def __init__(self, size: int) -> None:
        self.acknowledged = bytearray(size)
        self.leading = 0  # so many from the first on are confirmed without a hole
        self.end = size  # those from here on don't matter any more
        self.error: TransportError | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.progress = 0

    def acknowledge(self, index: int) -> None:
        self.acknowledged[index] = 1
        self.progress += 1
        while self.leading < self.end and self.acknowledged[self.leading]:
            self.leading += 1
        self._look()

    def fail(self, index: int, error: TransportError) -> None:
        if index < self.end:
            self.end, self.error = index, error
        self._look()

    def _look(self) -> None:
        if self.leading >= self.end and not self.done.done():
            self.done.set_result(None)
