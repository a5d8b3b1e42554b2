"""A stream that a subscriber at NATS is given events of: is it the one of before, and how long does it keep them?

JetStream settles by a message's number alone. Where a stream is deleted and made again while a subscriber holds events
of it, what that one settles would be the new stream's events of the same numbers, which others are working on. A
request for events that waits at the server is told when its consumer is deleted. Who asks for nothing, since it holds
as much as it may, is not.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

import nats.js.errors

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_pull import Pull
from orthanc_events_bridge.transports.subscriptions import boot_time

#: Seconds for which a stream is taken for the one that it was. One that was made again has no event of these numbers
#: under way by then: who publishes and who subscribes has to notice first.
_SURE: Final = 1.0
#: Seconds behind which it is asked again how long a stream keeps its events.
_STEADY: Final = 60.0
#: Of the time for which a stream keeps an event, the part in which it may wait for its retry; the rest is for handling
#: it. A copy is made anew behind a third of it, or an hour: the stream's age may be shortened meanwhile.
_WAITING: Final = 0.8
_COPY: Final = 1 / 3
_LONGEST_COPY: Final = 3600.0


class Origin:
    """One stream.

    :ivar name: of the stream.
    """

    def __init__(self, connection: Connection, options: NatsOptions, name: str) -> None:
        self.name = name
        self._connection = connection
        self._manager = connection.jsm(timeout=options.connect_timeout * 2)  # the deadline is `ask`'s
        self._created: object = None
        self._max_age = math.inf
        self._seen = self._looked = -math.inf
        self._looking = asyncio.Lock()

    async def look(self) -> None:
        """Ask for it.

        :raises NotConnectedError: it is gone, or another one.
        """
        asked = boot_time()
        try:
            info = await self._connection.ask(self._manager.stream_info(self.name))
        except nats.js.errors.Error as error:
            raise NotConnectedError(
                f"the NATS stream {self.name} is gone, or can't be read: {error}", "it is made or found again by itself"
            ) from error
        if self._created not in (None, info.created):
            raise NotConnectedError(
                f"the NATS stream {self.name} was made again while events of it were held",
                "they are not settled there; what the new one holds is given",
            )
        self._created = info.created
        self._max_age = info.config.max_age or math.inf
        self._seen = self._looked = asked

    def answered(self, pull: Pull) -> None:
        """A request for events has ended: its consumer was there until now, and from when it was sent on."""
        if pull.sent - self._seen <= _SURE:
            self._seen = boot_time()

    async def check(self, *, age: bool = False) -> None:
        """Is it the one of before?

        :param age: it is also to be known how long it keeps events.
        :raises NotConnectedError: no, or it can't be asked.
        """
        if self.is_sure(boot_time(), age=age):
            return
        async with self._looking:
            if not self.is_sure(boot_time(), age=age):
                await self.look()

    def is_sure(self, now: float, *, age: bool = False) -> bool:
        """Whether `check` needn't ask.

        :param now: on the clock `boot_time`.
        """
        return now - self._seen <= _SURE and not (age and now - self._looked > _STEADY)

    def keeps(self, stored: float, delay: float) -> bool:
        """Whether an event is still there in so many seconds, with time enough to handle it.

        :param stored: when it was stored, in seconds of the epoch.
        """
        return time.time() - stored + delay <= _WAITING * self._max_age

    def longest_wait(self, stored: float) -> float:
        """For how many seconds, from now, a copy may wait until it has to be made anew."""
        whole = min(self._max_age * _COPY, _LONGEST_COPY)
        left = _WAITING * self._max_age - (time.time() - stored)
        return min(whole, max(left, min(whole, 1.0)))
