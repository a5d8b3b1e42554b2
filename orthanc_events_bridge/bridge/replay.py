"""Sending kept events of the outbox again, to one consumer's inbox or to everyone.

The process of the command line does it, with a connection and a `Relay` of its own: in order, pipelined, over
confirmed events only, with backoff, and again from where it was. So the bridge's own relay, and with it what is new,
is not held up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from orthanc_events_bridge.bridge.fleet import Source
from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.bridge.replays import Kept, Run
from orthanc_events_bridge.errors import EventRejectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.events.mapping import partition_key, short_name
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Outgoing, Place, PublishError
from orthanc_events_bridge.transports.headers import EVENT_ID, OPERATION
from orthanc_events_bridge.transports.options import TransportOptions

log = logging.getLogger(__name__)

#: Rows of one look at least: few of them may be wanted.
_PAGE: Final = 500
#: At a rate, so many parts of what may go in a second go at a time.
_PARTS: Final = 4


class Selected(Source):
    """The rows of the outbox that a run is about, and now and then one that it is not, so that it gets on.

    :param accepts: whether an event, by its short name, is wanted.
    """

    def __init__(
        self,
        reader: OutboxReader,
        settings: Callable[[], Mapping[int, Mapping[str, Any]]],
        run: Run,
        accepts: Callable[[str], bool],
    ) -> None:
        super().__init__(reader, settings)
        self.accepts = accepts
        self._run = run

    def rows(self, after: int, limit: int) -> list[OutboxRow]:
        run = self._run
        while True:
            found = self.reader.find(after, run.through, max(limit, _PAGE), recorded=run.since, about=run.study)
            self._count_gone(after)
            about = [row for row in found if not run.study or _study_of(row) == run.study]
            wanted = [row for row in about if self.accepts(short_name(row))]
            if len(wanted) >= limit:
                return wanted[:limit]
            if about or not found:  # its last row, wanted or not, says how far we have looked
                return wanted if wanted[-1:] == about[-1:] else [*wanted, about[-1]]
            after = found[-1].position

    def _count_gone(self, after: int) -> None:
        """Rows go from the oldest on: all in front of the oldest that were not looked at are missed."""
        oldest, _, _ = self.reader.extent()
        through = min(oldest - 1 if oldest else self.newest(), self._run.through)
        begin = max(after, self._run.missed)
        if through > begin:
            self._run.gone += self.reader.span(begin, through)
            self._run.missed = through

    def detached(self) -> int:
        """The relay begins here again, when the place at the broker was made anew."""
        return self._run.first


def _study_of(row: OutboxRow) -> str:
    """The study that a row is about; empty for others."""
    if row.level not in ("study", "series", "instance"):
        return ""
    return partition_key(row.level, row.resource, row.extra.get("parents", {}))


class Pace:
    """Lets so many events go in a second.

    :param rate: how many; 0: as many as can.
    :param now: seconds, monotonic.
    """

    def __init__(
        self,
        rate: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._rate = rate
        self._now = now
        self._sleep = sleep
        self._next = 0.0

    def portion(self, batch: int) -> int:
        """How many go at a time, so that they are spread over the second."""
        return max(1, min(batch, int(self._rate / _PARTS))) if self._rate else batch

    async def take(self, count: int) -> None:
        """Wait until so many may go."""
        if not self._rate:
            return
        now = self._now()
        begin = max(self._next, now)
        self._next = begin + count / self._rate
        if begin > now:
            await self._sleep(begin - now)


class Again(Place):
    """A place that gets events again: each says so, under a dedupe key of this run's.

    :param place: where they go.
    :param run: counts those that are confirmed.
    """

    def __init__(self, place: Place, run: Run, pace: Pace) -> None:
        self._place = place
        self._run = run
        self._pace = pace

    async def connect(self) -> str:
        return await self._place.connect()

    async def publish(self, events: Sequence[Outgoing]) -> None:
        await self._pace.take(len(events))
        try:
            await self._place.publish([self._marked(event) for event in events])
        except PublishError as error:
            self._count([*events[: error.confirmed], *(events[index] for index in error.stored)])
            raise
        self._count(events)

    def _marked(self, event: Outgoing) -> Outgoing:
        headers = ((EVENT_ID, event.id), (OPERATION, "replay"))
        return event._replace(headers=(*event.headers, *headers), dedupe=self._run.dedupe_key(event.id))

    def _count(self, events: Sequence[Outgoing]) -> None:
        for event in events:
            name = f"{event.level}.{event.verb}"
            self._run.sent[name] = self._run.sent.get(name, 0) + 1

    async def close(self) -> None:
        await self._place.close()


class Replay(Relay):
    """A relay that ends when everything is sent, and where a person has to change something.

    :param options: of the transport.
    :param make: makes the place that the events go to.
    :raises TransportConfigurationError: from `run`; the run can be gone on with when that is mended.
    """

    def __init__(
        self,
        options: TransportOptions,
        make: Callable[[], Place],
        source: Selected,
        kept: Kept,
        pace: Pace,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        super().__init__(
            options.name,
            lambda: Again(make(), kept.run, pace),
            options.type,
            pace.portion(getattr(options, "batch", 500)),
            source.accepts,
            source,
            kept,
            binary=options.mode == "binary",
            sleep=sleep,
        )
        self.drain()

    def _faulty(self, error: TransportError) -> None:
        if isinstance(error, TransportConfigurationError):
            raise error
        super()._faulty(error)

    def _tell_set_aside(self, event: Outgoing, name: str, error: EventRejectedError) -> None:
        log.error("transport %s: event %s (%s) is not sent: %s", self.name, event.id, name, error)


def count(source: Selected, run: Run) -> Counter[str]:
    """How many events a run would send now, by short name."""
    found: Counter[str] = Counter()
    position = run.position
    while rows := source.rows(position, _PAGE):
        found.update(filter(source.accepts, map(short_name, rows)))
        position = rows[-1].position
    return found
