"""The process beside Orthanc: outbox → mapping → one relay per transport.

Run by the plugin's supervisor (``--supervised``), whose pipe is our standard input: a byte means new rows, its end
means that Orthanc is gone. Exit codes: 0 ended as told, 1 failed, 2 wrong configuration, 75 another bridge works here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from orthanc_events_bridge import __version__
from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.bridge.state import Command, State
from orthanc_events_bridge.errors import BridgeError, OutboxError, TransportError
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.outbox import OutboxReader, OutboxRow
from orthanc_events_bridge.status import iso
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.options import TransportOptions

log = logging.getLogger(__name__)

EXIT_FAILED: Final = 1
EXIT_CONFIGURATION: Final = 2
EXIT_BUSY: Final = 75  # EX_TEMPFAIL of sysexits.h

#: Seconds that the bridge before us may take to leave.
_LOCK_WAIT: Final = 10.0
_TICK: Final = 1.0
#: How often an unsupervised bridge looks for new rows, seconds: nobody rings.
_POLL: Final = 0.05
#: A supervised bridge that is told to end by a signal (systemd tells all at once) still waits this long for Orthanc's.
_SIGNAL_WAIT: Final = 10.0


class BusyError(BridgeError):
    """Another bridge works on this outbox."""


class Source:
    """The outbox as the relays read it, with the settings that rows name."""

    def __init__(self, reader: OutboxReader, state: State) -> None:
        self.reader = reader
        self.recorder = reader.recorder
        self._state = state
        self._shapes: dict[int, Mapping[str, Any]] = {}

    def rows(self, after: int, limit: int) -> list[OutboxRow]:
        return self.reader.rows(after, limit)

    def detached(self) -> int:
        return self.reader.detached()

    def newest(self) -> int:
        return int(self.reader.meta().get("position", 0))

    def shape(self, number: int) -> Mapping[str, Any]:
        """The settings of a number; 0 stands for the first that came, without tags."""
        if number not in self._shapes:
            known = {**self._state.settings(), **self.reader.settings()}
            self._shapes[number] = known[number or min(known)]
        return self._shapes[number]


class Bridge:
    """Wires outbox and transports, and runs until it is told to stop.

    :param folder: of the outbox; prepared.
    :param settings: validated.
    :param supervised: whether standard input is the supervisor's pipe.
    """

    def __init__(self, folder: Folder, settings: Settings, *, supervised: bool) -> None:
        self._folder = folder
        self._settings = settings
        self._supervised = supervised
        self._started = time.time()
        self._relays: list[Relay] = []
        self._noted: dict[str, Any] = {}
        self._repeats = Repeats(time.monotonic)
        self._stop = asyncio.Event()
        self._rang = asyncio.Event()

    async def run(self) -> int:
        """Until standard input ends, or a signal comes.

        :return: the exit code.
        :raises BusyError: another bridge works on this outbox.
        :raises BridgeError: the folder can't be used.
        """
        self._listen()
        lock = await self._lock()
        try:
            state = State(self._folder.bridge)
            try:
                await self._run(state)
            finally:
                state.close()
        finally:
            os.close(lock)
        return 0

    async def _lock(self) -> int:
        """Hold the outbox for ourselves as long as we live, even if we are killed."""
        descriptor = os.open(self._folder.lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError:
                if time.monotonic() >= until or self._stop.is_set():
                    os.close(descriptor)
                    raise BusyError(
                        f"another bridge works on {self._folder.path}", "stop it, or name another folder"
                    ) from None
                await asyncio.sleep(0.05)

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        if self._supervised:
            os.set_blocking(0, False)
            loop.add_reader(0, self._on_stdin)

    def _signalled(self) -> None:
        """Supervised, the end of Orthanc is what counts: until then changes may still come."""
        loop = asyncio.get_running_loop()
        loop.call_later(_SIGNAL_WAIT if self._supervised else 0.0, self._stop.set)

    def _on_stdin(self) -> None:
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            return
        self._rang.set()
        for relay in self._relays:
            relay.wake()
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            self._stop.set()

    async def _run(self, state: State) -> None:
        number = state.number_settings(self._settings.shape())
        state.note("capture", {**self._settings.capture_document(), "settings": number})
        self._note(state)
        reader = await self._outbox()
        if reader is None:
            return
        source = Source(reader, state)
        try:
            for options in self._settings.transports:
                self._relays.append(self._relay(options, source, state))
            tasks = [asyncio.create_task(relay.run(), name=relay.name) for relay in self._relays]
            # Events come and go in thousands and never in cycles: looking for those takes a tenth of a drain.
            gc.freeze()
            gc.set_threshold(50_000, 20, 100)
            log.info("bridge %s is running: %s", __version__, ", ".join(relay.name for relay in self._relays))
            await self._work(state, source)
            await self._drain(tasks)
            self._note(state)
        finally:
            reader.close()

    def _relay(self, options: TransportOptions, source: Source, state: State) -> Relay:
        def accepts(name: str) -> bool:
            return self._settings.events.accepts(name) and options.events.accepts(name)

        return Relay(
            options.name,
            lambda: create(options),
            options.type,
            getattr(options, "batch", 500),
            accepts,
            source,
            state,
            binary=options.mode == "binary",
            start=options.start,
            replay=getattr(options, "on_recreate", "replay") == "replay",
        )

    async def _outbox(self) -> OutboxReader | None:
        """Capture makes the outbox, once it has read our settings; none when told to stop before."""
        patient_until = time.monotonic() + 5.0  # it may be in the making
        while not self._stop.is_set():
            try:
                reader = OutboxReader(self._folder.outbox)
                if reader.recorder:
                    return reader
                reader.close()
            except OutboxError as error:
                late = self._folder.outbox.exists() and time.monotonic() > patient_until
                if late and (line := self._repeats.line("outbox", str(error))):
                    log.error(line)
            await self._pause(0.05)
        return None

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _work(self, state: State, source: Source) -> None:
        """Keep the status fresh, obey commands, and, unsupervised, look for new rows."""
        seen, next_tick = -1, 0.0
        while not self._stop.is_set():
            if not self._supervised and (version := source.reader.version()) != seen:
                seen = version
                for relay in self._relays:
                    relay.wake()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK
                try:
                    self._note(state)
                    for command in state.commands():
                        await self._obey(command, state, source)
                    self._repeats.over("state")
                except OutboxError as error:  # a full disk must not end us
                    if line := self._repeats.line("state", str(error)):
                        log.error(line)
            await self._pause(_TICK if self._supervised else _POLL)

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        """Send what is there, within the deadline."""
        # Whatever hangs, we don't outlive Orthanc by more than this.
        watchdog = threading.Timer(self._settings.drain_timeout + 1.0, os._exit, (EXIT_FAILED,))
        watchdog.daemon = True
        watchdog.start()
        for relay in self._relays:
            relay.drain()
        _, late = await asyncio.wait(tasks, timeout=self._settings.drain_timeout)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        watchdog.cancel()

    def _note(self, state: State) -> None:
        """What the status shows of the bridge itself."""
        note = {
            "version": __version__,
            "pid": os.getpid(),
            "since": iso(self._started * 1000),
            "transports": {relay.name: relay.status() for relay in self._relays},
        }
        if note != self._noted:
            state.note("bridge", note)
            self._noted = note

    async def _obey(self, command: Command, state: State, source: Source) -> None:
        """Send an event that was set aside once more, over a connection of its own."""
        options = next((o for o in self._settings.transports if o.name == command.transport), None)
        rows = source.rows(int(command.argument) - 1, 1) if command.argument else []
        state.done(command)
        if command.command != "resend" or options is None or not rows or rows[0].position != command.argument:
            log.error("what was asked of transport %s can't be done: its event is no longer kept", command.transport)
            return
        transport = create(options)
        try:
            await transport.connect()
            await transport.publish([to_outgoing(rows[0], source.shape(rows[0].settings), source.recorder)])
            state.taken_back(command.transport, command.argument)
            log.warning("transport %s: the event at %s was sent again", command.transport, command.argument)
        except TransportError as error:
            log.error(
                "transport %s: the event at %s was not taken again: %s", command.transport, command.argument, error
            )
        finally:
            await transport.close()
