"""The relays of all configured transports, started and ended one by one while the others go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.errors import DamagedError
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.options import TransportOptions

log = logging.getLogger(__name__)

#: Seconds that a batch under way may take when its transport is to end. Cut off, its events could be sent twice.
_LEAVE: Final = 10.0


class Source:
    """The outbox as the relays read it, with the settings that rows name.

    :param settings: gives all that ``bridge.db`` has numbered.
    """

    def __init__(self, reader: OutboxReader, settings: Callable[[], Mapping[int, Mapping[str, Any]]]) -> None:
        self.reader = reader
        self.recorder = reader.recorder
        #: What shows that the outbox is damaged, once something was read that is.
        self.damage: DamagedError | None = None
        self._settings = settings
        self._shapes: dict[int, Mapping[str, Any]] = {}

    def rows(self, after: int, limit: int) -> list[OutboxRow]:
        try:
            rows = self.reader.rows(after, limit)
        except DamagedError as error:
            self.damage = error
            raise
        # Under another recorder these numbers may be other facts'. Asked behind the rows: then these are still ours.
        return rows if self.reader.recorder == self.recorder else []

    def exchanged(self) -> bool:
        """Whether it has to be opened anew: capture has made another one, or goes on under another recorder."""
        if self.reader.exchanged():
            return True
        try:
            return self.reader.recorder != self.recorder
        except DamagedError as error:
            self.damage = error
            return False

    def former(self) -> tuple[str, int]:
        """The recorder that the outbox had before it was renewed, and the last position under it."""
        meta = self.reader.meta()
        return str(meta.get("former", "")), int(meta.get("former_position", 0))

    def detached(self) -> int:
        return self.reader.detached()

    def newest(self) -> int:
        return int(self.reader.meta().get("position", 0))

    def shape(self, number: int) -> Mapping[str, Any]:
        """The settings of a number; 0 stands for the first that came, without tags."""
        if number not in self._shapes:
            known = {**self._settings(), **self.reader.settings()}
            # Where both files were damaged, a number may be known to nobody: the newest stand for it.
            self._shapes[number] = known.get(number or min(known)) or known[max(known)]
        return self._shapes[number]


@dataclass(frozen=True, slots=True)
class _Running:
    options: TransportOptions
    relay: Relay
    task: asyncio.Task[None]


class Fleet:
    """What runs, and what should: `settle` brings the one in line with the other.

    :param state: ``bridge.db``.
    :ivar source: the outbox.
    :ivar settings: those that apply; set anew, they take effect with the next `settle`.
    """

    def __init__(self, source: Source, state: State, settings: Settings) -> None:
        self.source = source
        self.settings = settings
        self._state = state
        self._running: dict[str, _Running] = {}
        self._paused = state.paused()
        self._told: set[str] = set()

    def options(self, name: str) -> TransportOptions | None:
        """Those of a configured transport; none where it isn't configured."""
        return next((options for options in self.settings.transports if options.name == name), None)

    def wake(self) -> None:
        """There are new rows."""
        for running in self._running.values():
            running.relay.wake()

    def status(self) -> dict[str, Any]:
        """What the status shows of each configured transport, by its name."""
        found = {}
        for options in self.settings.transports:
            running, since = self._running.get(options.name), self._paused.get(options.name)
            if running is not None:
                found[options.name] = running.relay.status()
            elif since is not None:
                still = {"state": "paused", "since": iso(since), "rate": 0.0, "last_error": None}
                found[options.name] = {"type": options.type, **still}
        return found

    # -- what runs -------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """End what is no longer wanted, or not like this; then start what is missing.

        :raises OutboxError: ``bridge.db`` or the outbox can't be used; to be called again.
        """
        wanted = {options.name: options for options in self.settings.transports if options.name not in self._paused}
        over = [
            name
            for name, running in self._running.items()
            if wanted.get(name) != running.options or running.task.done()
        ]
        await asyncio.gather(*map(self._end, over))
        missing = {name for name in wanted if name not in self._running}
        known = self._state.known()
        new = [o for o in self.settings.transports if o.name in missing or o.name not in known]
        if new:
            # Where none is known, this is the very first start: "now" was when capture began, and that is the oldest
            # row. All of them become known at once, so that the next start can't take itself for the second.
            with self._state.together():
                relays = [(options, self._relay(options, first=not known)) for options in new]
            for options, relay in relays:
                if options.name in missing:  # one that is paused has its place now, and that will do
                    task = asyncio.create_task(relay.run(), name=relay.name)
                    self._running[relay.name] = _Running(options, relay, task)
        self._tell()

    def _relay(self, options: TransportOptions, *, first: bool) -> Relay:
        def accepts(name: str) -> bool:
            return self.settings.events.accepts(name) and options.events.accepts(name)

        return Relay(
            options.name,
            lambda: create(options),
            options.type,
            getattr(options, "batch", 500),
            accepts,
            self.source,
            self._state,
            binary=options.mode == "binary",
            start="oldest" if first else options.start,
            replay=getattr(options, "on_recreate", "replay") == "replay",
        )

    async def _end(self, name: str) -> None:
        running = self._running[name]
        if running.relay.leave():
            await asyncio.wait([running.task], timeout=_LEAVE)
        while not running.task.done():  # a client may swallow a cancellation, and two of one name must never run
            running.task.cancel()
            await asyncio.wait([running.task], timeout=1.0)
        del self._running[name]
        if not running.task.cancelled() and (error := running.task.exception()) is not None:
            log.error("transport %s ended by a defect, and is started again: %r; please report this", name, error)

    def _tell(self) -> None:
        """Say once which transports hold the outbox though nobody works for them."""
        known = self._state.known()
        removed = known.keys() - {options.name for options in self.settings.transports}
        for name in sorted(removed - self._told):
            log.warning(
                "transport %s is not configured any more and keeps its place: the outbox holds everything behind"
                " position %d for it. Put it back, or `orthanc-events transports forget %s`",
                name,
                known[name],
                name,
            )
        self._told = removed

    async def end(self) -> None:
        """End all, behind the batches that are under way."""
        await asyncio.gather(*map(self._end, list(self._running)))

    async def drain(self, seconds: float) -> None:
        """Send what is there, within the deadline, and end."""
        tasks = [running.task for running in self._running.values()]
        for running in self._running.values():
            running.relay.drain()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- what the operator asks for --------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """Send nothing to a transport, from the next `settle` on and until `resume`, whatever is started again."""
        self._state.pause(name)
        self._paused = self._state.paused()

    def resume(self, name: str) -> None:
        """Go on, with the next `settle`."""
        self._state.resume(name)
        self._paused = self._state.paused()

    def forget(self, name: str) -> None:
        """Give up the place of a transport; only of one that isn't configured, which would take a new one at once."""
        self._state.forget(name)
        self._paused = self._state.paused()
        self._told.discard(name)

    def paused(self, name: str) -> str:
        """Since when it is paused, in RFC 3339; empty where it isn't."""
        return iso(self._paused[name]) if name in self._paused else ""

    def pending(self, name: str) -> int:
        """How many rows it has not had."""
        return self.source.reader.count(self._state.known().get(name, 0))
