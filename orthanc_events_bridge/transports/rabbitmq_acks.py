"""The acknowledgements of one channel, of which RabbitMQ is told by as few words as possible."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from typing import Final

import pamqp.frame
from pamqp.commands import Basic

from orthanc_events_bridge.transports.rabbitmq_connection import Channel, Connection

#: So many are sent at once, or those of so many seconds: what comes by ones and twos RabbitMQ keeps back as soon as it
#: has 32 to do.
_MOST: Final = 64
_SECONDS: Final = 0.002


class Acks:
    """Those of one channel, none of which may be sent otherwise."""

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self._connection = connection
        self._channel = channel
        self._unsettled: OrderedDict[int, None] = OrderedDict()  # in the server's order
        self._settled: list[int] = []
        self._closed = False

    def given(self, tag: int) -> None:
        """A message came."""
        self._unsettled[tag] = None

    def settle(self, tag: int) -> None:
        """It can be forgotten."""
        if self._closed:
            return
        if not self._settled:
            asyncio.get_running_loop().call_later(_SECONDS, self.flush)
        self._settled.append(tag)
        if len(self._settled) >= _MOST:
            self.flush()

    def flush(self) -> None:
        """Say what is settled: by one word all that lies before what isn't."""
        channel = self._channel
        if not self._settled or channel.fault is not None or self._connection.fault is not None:
            return
        for tag in self._settled:
            self._unsettled.pop(tag, None)
        first = next(iter(self._unsettled), math.inf)
        tags, self._settled = sorted(self._settled), []
        before = [tag for tag in tags if tag < first]
        frames = [Basic.Ack(delivery_tag=before[-1], multiple=True)] if before else []
        self._write(*frames, *(Basic.Ack(delivery_tag=tag) for tag in tags[len(before) :]))

    def give_back(self, tag: int) -> None:
        """It is to be given to another, before those that nobody has been given yet."""
        self._unsettled.pop(tag, None)
        if self._channel.fault is None and self._connection.fault is None:
            self._write(Basic.Nack(delivery_tag=tag, requeue=True))

    def _write(self, *frames: Basic.Ack | Basic.Nack) -> None:
        try:
            self._connection.write(b"".join(pamqp.frame.marshal(frame, self._channel.number) for frame in frames))
        except (OSError, RuntimeError) as error:  # it has ended, and nobody has told us yet
            self._connection.fail(self._connection.lost(error))

    def close(self) -> None:
        """The last word: from now on nothing is sent, not even by a channel that gets the same number."""
        self.flush()
        self._closed = True
        self._settled.clear()
