"""What RabbitMQ has answered to the events of one batch."""

from __future__ import annotations

import asyncio

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.transports.base import PublishError


class Batch:
    """The answers to one batch as they come in.

    :param first: the delivery tag of its first event.
    """

    def __init__(self, first: int, size: int) -> None:
        self.first = first
        self.end = size  # those from here on are not sent any more
        self.sent = 0
        self.answered = bytearray(size)
        self.leading = 0  # so many from the first on are answered without a hole
        self.refused: set[int] = set()
        self.returned: set[int] = set()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.progress = 0

    def answer(self, tag: int, multiple: bool, acked: bool) -> None:
        last = min(tag - self.first, len(self.answered) - 1)
        for index in range(self.leading, last + 1) if multiple else (last,):
            if index >= 0 and not self.answered[index]:
                self.answered[index] = 1
                self.progress += 1
                if not acked:
                    self.refused.add(index)
                    self.end = self.sent  # what is refused again and again would be overtaken by too many
        while self.leading < self.end and self.answered[self.leading]:
            self.leading += 1
        if self.leading >= self.end:
            self.finish()

    def give_back(self, tag: int) -> None:
        """It is unroutable; its ack follows."""
        if 0 <= tag - self.first < len(self.answered):
            self.returned.add(tag - self.first)
            self.end = self.sent

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, error: TransportError) -> PublishError:
        """The error of the whole batch, with what is confirmed in spite of it."""
        without = self.refused | self.returned
        confirmed = [bool(answered) and index not in without for index, answered in enumerate(self.answered)]
        leading = confirmed.index(False) if False in confirmed else len(confirmed)
        return PublishError(leading, error, (index for index, one in enumerate(confirmed) if one and index > leading))
