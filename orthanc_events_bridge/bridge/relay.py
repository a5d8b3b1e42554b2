"""One relay per transport: from the outbox, in order, to the broker, and on over acknowledged rows only.

It never skips a row and never gives up. What the broker can never take is set aside, where the operator sees
it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from orthanc_events_bridge.bridge.state import Progress
from orthanc_events_bridge.errors import (
    BridgeError,
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.events.mapping import short_name, to_outgoing
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Outgoing, Place, PublishError

log = logging.getLogger(__name__)

#: Seconds between two attempts: the first time, at most, and at most when a person has to change something.
_FIRST_WAIT: Final = 0.05
_LONGEST_WAIT: Final = 5.0
_LONGEST_WAIT_FOR_A_PERSON: Final = 30.0
#: The same, where a broker itself asks to be left alone.
_LONGEST_WAIT_ASKED: Final = 3600.0
#: Rows that are mapped before the event loop gets its turn.
_SLICE: Final = 50
#: Seconds after which the outbox is looked at although nobody rang.
_LOOK: Final = 1.0
_RATE_WINDOW: Final = 10.0
#: So many idle looks later, the connection and the place at the broker are looked at too.
_IDLE_LOOKS: Final = 10
#: What the status calls a fault; any that isn't named here is a refusal.
_FAULTS: Final = {TransportConfigurationError: "needs attention", NotConnectedError: "not connected"}
_REFUSED: Final = "refused"
#: The identity of a place that was there when we came, where the broker can't tell one from another.
_FOUND: Final = "found"


class Source(Protocol):
    """What a relay needs of the outbox."""

    recorder: str

    def rows(self, after: int, limit: int) -> list[OutboxRow]: ...
    def shape(self, number: int) -> Mapping[str, Any]: ...
    def detached(self) -> int: ...
    def newest(self) -> int: ...


class Memory(Protocol):
    """What a relay needs of ``bridge.db``."""

    def progress(self, name: str, recorder: str, position: int) -> Progress: ...
    def save(self, name: str, progress: Progress) -> None: ...
    def gap(self, name: str, first: int, last: int) -> None: ...
    def set_aside(self, transport: str, position: int, event: str, type_name: str, reason: str) -> None: ...


@dataclass(slots=True)
class _Batch:
    """Rows, and the events among them that are to be sent."""

    last: int  # position of the last row
    seq: int | None = None  # the highest Seq of Orthanc's log in it
    events: list[Outgoing] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of the events
    names: list[str] = field(default_factory=list)
    read: int = 0

    def leave_out(self, positions: set[int]) -> None:
        """Don't send the events at these positions."""
        kept = [index for index, position in enumerate(self.positions) if position not in positions]
        self.events = [self.events[index] for index in kept]
        self.names = [self.names[index] for index in kept]
        self.positions = [self.positions[index] for index in kept]


class Relay:
    """Moves one transport along the outbox.

    :param name: of the transport.
    :param make: makes it; may raise, when its client isn't installed, and is then asked again.
    :param kind: its type, for the status.
    :param size: events in a batch, at most.
    :param accepts: whether an event, by its short name, is for this transport.
    :param source: the outbox.
    :param memory: where the position is kept.
    :param binary: whether events go out in binary mode.
    :param start: where a transport begins that `memory` doesn't know: ``oldest`` or ``now``.
    :param replay: whether a place that was made again gets everything that the outbox keeps.
    :param sleep: so that tests need not wait.
    """

    #: A seam for `make test-mutants`: protections that are left out.
    without: frozenset[str] = frozenset()

    def __init__(
        self,
        name: str,
        make: Callable[[], Place],
        kind: str,
        size: int,
        accepts: Callable[[str], bool],
        source: Source,
        memory: Memory,
        *,
        binary: bool = False,
        start: str = "oldest",
        replay: bool = True,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self._make = make
        self._made: Place | None = None
        self._kind = kind
        self._size = size
        self._accepts = accepts
        self._source = source
        self._memory = memory
        self._replay = replay
        self._sleep = sleep
        self._binary = binary
        # What was given up before a transport was there is no gap of its own.
        first = source.newest() if start == "now" else source.detached()
        self._progress = memory.progress(self.name, source.recorder, first)
        # After a fault the broker is asked with one event, then with twice as many each time.
        self._allowed = size
        self._stored: set[int] = set()  # positions behind ours whose events the broker has confirmed already
        self._wake = asyncio.Event()
        self._draining = False
        self._leaving = False
        self._busy = False
        self._state = "connecting"
        self._since = time.time()
        self._error: dict[str, Any] | None = None
        self._faulty_since = 0.0
        self._repeats = Repeats(time.monotonic)
        self._sent: deque[tuple[float, int]] = deque()

    @property
    def position(self) -> int:
        return self._progress.position

    def wake(self) -> None:
        """There are new rows."""
        self._wake.set()

    def drain(self) -> None:
        """Send what is there, then end."""
        self._draining = True
        self._wake.set()

    def leave(self) -> bool:
        """Begin no batch any more.

        :return: whether one is under way: `run` ends behind it. If not, `run` can be cancelled without an event
            that the broker has and that is sent again.
        """
        self._leaving = True
        return self._busy

    def status(self) -> dict[str, Any]:
        """What the status shows of this transport; rates in events per second over the last ten seconds."""
        now = time.monotonic()
        while self._sent and self._sent[0][0] < now - _RATE_WINDOW:
            self._sent.popleft()
        return {
            "type": self._kind,
            "state": self._state,
            "since": iso(self._since * 1000),
            "rate": round(sum(count for _, count in self._sent) / _RATE_WINDOW, 1),
            "last_error": self._error,
        }

    @property
    def _transport(self) -> Place:
        if self._made is None:
            self._made = self._make()
        return self._made

    async def _close(self) -> None:
        if self._made is not None:
            await self._made.close()

    async def run(self) -> None:
        """Work until cancelled, or until everything is sent once `drain` was called."""
        wait = _FIRST_WAIT
        try:
            while True:
                before = self._progress.position
                try:
                    self._same_place(await self._transport.connect())
                    # After a fault, only a confirmed event says that it is over.
                    if self._state == "connecting":
                        self._healthy()
                    await self._pump()
                    return
                except TransportError as error:
                    fault = error.error if isinstance(error, PublishError) else error
                except BridgeError as error:  # the outbox's disk is full, say
                    fault = RefusedError(error.message, error.remedy)
                except Exception as error:  # a defect of ours must not stop the others, nor be silent
                    log.debug("transport %s", self.name, exc_info=True)
                    fault = NotConnectedError(f"{type(error).__name__}: {error}", "please report this")
                self._faulty(fault)
                if isinstance(fault, NotConnectedError | TransportConfigurationError):
                    await self._close()
                if self._leaving:
                    return
                if self._progress.position > before:
                    wait = _FIRST_WAIT
                asked = (isinstance(fault, RefusedError) and fault.retry_after) or 0.0
                await self._sleep(max(wait * random.uniform(0.5, 1.0), min(asked, _LONGEST_WAIT_ASKED)))
                person = isinstance(fault, TransportConfigurationError)
                wait = min(wait * 2, _LONGEST_WAIT_FOR_A_PERSON if person else _LONGEST_WAIT)
        finally:
            await self._close()

    async def _pump(self) -> None:
        """Send batch after batch; while one is under way, the next is read and mapped.

        :raises TransportError: what stopped it; the position says how far it came.
        """
        batch = await self._read(self._progress.position)
        idle = 0
        while True:
            idle = 0 if batch.read else idle + 1
            if idle >= _IDLE_LOOKS:  # nobody would notice otherwise, until the next event
                self._same_place(await self._transport.connect())
                idle = 0
            if not batch.read:
                self._healthy()
                draining = self._draining  # asked before the last look: what came until then is sent
                if not draining:
                    await self._wait()
                batch = await self._read(self._progress.position)
                if draining and not batch.read:
                    return
                continue
            self._busy = True
            publishing = asyncio.ensure_future(self._publish(batch))
            try:
                await asyncio.sleep(0)
                following = await self._read(batch.last)
            finally:
                try:
                    await asyncio.shield(publishing)
                except asyncio.CancelledError:
                    publishing.cancel()
                    await asyncio.gather(publishing, return_exceptions=True)
                    raise
                finally:
                    self._busy = False
            if self._leaving:
                return
            batch = following

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), _LOOK)
        except TimeoutError:
            return
        finally:
            self._wake.clear()

    async def _read(self, after: int) -> _Batch:
        """The next rows, mapped and filtered; empty when there are none."""
        while True:
            self._wake.clear()
            rows = self._source.rows(after, self._allowed)
            detached = self._source.detached()  # asked behind the rows: none of them can be missing unseen
            if after >= detached:
                break
            # With a batch under way, what becomes of it says where the gap begins.
            if after != self._progress.position:
                self._wake.set()
                return _Batch(last=after)
            self._memory.gap(self.name, after + 1, detached)
            log.error(
                "transport %s has lost its place: the outbox was full and gave up the rows up to position %d"
                " that were not delivered yet",
                self.name,
                detached,
            )
            self._move(detached, None)
            after = detached
        batch = _Batch(last=rows[-1].position if rows else after, read=len(rows))
        for index, row in enumerate(rows):
            if index % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
            if row.seq is not None:
                batch.seq = max(batch.seq or 0, row.seq)
            name = short_name(row)
            if not self._accepts(name):
                continue
            if row.position in self._stored:
                continue
            shape = self._source.shape(row.settings)
            batch.events.append(to_outgoing(row, shape, self._source.recorder, binary=self._binary))
            batch.positions.append(row.position)
            batch.names.append(name)
        return batch

    async def _publish(self, batch: _Batch) -> None:
        """Send a batch, set aside what can't be taken, and move on over the rest.

        :raises TransportError: it stopped before the end; the position is behind the last confirmed event.
        """
        done = 0
        while done < len(batch.events):
            try:
                await self._transport.publish(batch.events[done:])
                self._count(len(batch.events) - done)
                done = len(batch.events)
            except PublishError as error:
                done += error.confirmed
                self._count(error.confirmed + len(error.stored))
                self._stored.update(batch.positions[done - error.confirmed + index] for index in error.stored)
                if isinstance(error.error, EventRejectedError):
                    self._set_aside(batch, done, error.error)
                    done += 1
                    batch.leave_out(self._stored)
                    continue
                if done:
                    self._move(batch.positions[done - 1], self._progress.seq)
                # A broker that keeps what it never confirms would get all of it each time.
                if isinstance(error.error, RefusedError) or not done:
                    self._allowed = 1
                if "replay" in self.without:  # a mutant: what was not confirmed counts as sent
                    self._move(batch.last, batch.seq)
                raise
        self._move(batch.last, batch.seq)
        if batch.events:
            self._allowed = min(2 * self._allowed, self._size)
            self._healthy()

    def _count(self, events: int) -> None:
        self._progress.published += events
        self._sent.append((time.monotonic(), events))

    def _set_aside(self, batch: _Batch, index: int, error: EventRejectedError) -> None:
        event, position = batch.events[index], batch.positions[index]
        self._memory.set_aside(self.name, position, event.id, batch.names[index], str(error))
        self._tell_set_aside(event, batch.names[index], error)

    def _tell_set_aside(self, event: Outgoing, name: str, error: EventRejectedError) -> None:
        log.error(
            "transport %s: event %s (%s) is set aside: %s. See `orthanc-events set-aside`",
            self.name,
            event.id,
            name,
            error,
        )

    def _move(self, position: int, seq: int | None) -> None:
        self._progress.position = max(self._progress.position, position)
        if self._stored:
            self._stored = {stored for stored in self._stored if stored > position}
        if seq is not None:
            self._progress.seq = max(self._progress.seq or 0, seq)
        self._memory.save(self.name, self._progress)

    def _same_place(self, identity: str) -> None:
        """Was the place at the broker deleted and made again? Then what it held is gone."""
        if not identity and not self._progress.identity and self._transport.capabilities.identifies_place:
            identity = _FOUND  # whatever is told of it later is told of another one
        if not identity or identity == self._progress.identity:
            return
        if self._progress.identity:
            self._stored.clear()
            if self._replay:
                # From the oldest kept row; what was given up before is gone, and was told then.
                self._progress.position = min(self._progress.position, self._source.detached())
            log.error(
                "transport %s: its place at the broker was deleted and made again; %s",
                self.name,
                "everything that the outbox keeps is sent again" if self._replay else "going on where it was",
            )
        self._progress.identity = identity
        self._memory.save(self.name, self._progress)

    # -- health ----------------------------------------------------------------------------------------------

    def _healthy(self) -> None:
        ended = [state for state in (*_FAULTS.values(), _REFUSED) if self._repeats.over(state)]
        if ended:
            log.warning("transport %s is well again after %.0f s", self.name, time.monotonic() - self._faulty_since)
        if self._state != "connected":
            self._state, self._since = "connected", time.time()

    def _faulty(self, error: TransportError) -> None:
        state = _FAULTS.get(type(error), _REFUSED)
        if self._state != state:
            self._since = time.time()
        if self._state == "connected" or not self._faulty_since:
            self._faulty_since = time.monotonic()
        count = self._error["count"] + 1 if self._error and self._error["message"] == error.message else 1
        self._error = {
            "message": error.message,
            "remedy": error.remedy,
            "at": iso(time.time() * 1000),
            "count": count,
        }
        self._state = state
        line = self._repeats.line(state, f"transport {self.name}: {error}")
        if line:
            log.error(line)
