"""The process beside Orthanc: outbox → mapping → one relay per transport.

Run by the plugin's supervisor (``--supervised``), whose pipe is our standard input: a byte means new rows, its end
means that Orthanc is gone. Where there is no plugin, capture runs in this process (`Recorder`). SIGHUP: read the
configuration again. Exit codes: 0 ended as told, 1 failed, 2 wrong configuration, 75 another bridge works here.
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
from collections.abc import Callable
from typing import Any, Final, Protocol

from orthanc_events_bridge import __version__
from orthanc_events_bridge.bridge.commands import obey
from orthanc_events_bridge.bridge.configuration import Configuration
from orthanc_events_bridge.bridge.fleet import Fleet, Source
from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.errors import BridgeError, DamagedError, OutboxError
from orthanc_events_bridge.folder import Folder, identity, set_aside
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox_reader import OutboxReader

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
    """Another process does this already."""


class Recorder(Protocol):
    """What writes the outbox in the bridge's own process, where no plugin does."""

    def begin(self, ring: Callable[[], None]) -> None:
        """Start, on a thread of its own.

        :param ring: to be called, from any thread, when there are new rows.
        """

    def end(self) -> None:
        """Record what was read, and close the outbox. Blocks for some seconds at most."""


class Bridge:
    """Wires outbox and transports, and runs until it is told to stop.

    :param folder: of the outbox; prepared.
    :param configuration: without mistakes; watched from now on.
    :param supervised: whether standard input is the supervisor's pipe.
    :param recorder: writes the outbox, as long as it is ours; none where capture runs in Orthanc's process.
    """

    def __init__(
        self, folder: Folder, configuration: Configuration, *, supervised: bool, recorder: Recorder | None = None
    ) -> None:
        self._folder = folder
        self._configuration = configuration
        self._supervised = supervised
        self._recorder = recorder
        self._started = time.time()
        self._fleet: Fleet | None = None
        self._noted: dict[str, Any] = {}
        self._repeats = Repeats(time.monotonic)
        self._stop = asyncio.Event()
        self._hung_up = False

    async def run(self) -> int:
        """Until standard input ends, or a signal comes.

        :return: the exit code.
        :raises BusyError: another bridge works on this outbox.
        :raises BridgeError: the folder can't be used.
        """
        self._listen()
        lock = await self._lock()
        try:
            self._begin_recording()
            while not await self._run_until_damaged():
                await self._pause(_TICK)
        finally:
            if self._recorder is not None:
                self._recorder.end()
            os.close(lock)
        return 0

    def _begin_recording(self) -> None:
        if self._recorder is None:
            return
        loop = asyncio.get_running_loop()

        def ring() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._wake)

        self._recorder.begin(ring)

    async def _run_until_damaged(self) -> bool:
        """Run; a ``bridge.db`` that is damaged is set aside, to begin with a new one.

        :return: whether we were told to stop.
        """
        state: State | None = None
        try:
            state = State(self._folder.bridge)
            await self._run(state)
        except DamagedError as error:
            if state is not None and state.damage is None:
                raise
            damage = error
        else:
            return True
        finally:
            if state is not None:
                state.close()
        aside = set_aside(self._folder.bridge)
        log.error(
            "%s. It is kept as %s, and a new one is made: every transport gets everything again that the outbox keeps;"
            " pauses, events set aside and transports that are not configured any more are forgotten",
            damage.message,
            aside.name if aside else "nothing",
        )
        return self._stop.is_set()

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
        if self._supervised or not os.isatty(0):  # a terminal that is closed ends us, as it does others
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        if self._supervised:
            os.set_blocking(0, False)
            loop.add_reader(0, self._on_stdin)

    def _on_hangup(self) -> None:
        self._hung_up = True

    def _signalled(self) -> None:
        """Supervised, the end of Orthanc is what counts: until then changes may still come."""
        loop = asyncio.get_running_loop()
        loop.call_later(_SIGNAL_WAIT if self._supervised else 0.0, self._stop.set)

    def _on_stdin(self) -> None:
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            return
        self._wake()
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            self._stop.set()

    def _wake(self) -> None:
        if self._fleet is not None:
            self._fleet.wake()

    async def _run(self, state: State) -> None:
        self._tell_capture(state)
        self._note(state)
        while (reader := await self._outbox(state)) is not None:
            try:
                if await self._follow(reader, state):
                    return
            finally:
                reader.close()

    async def _follow(self, reader: OutboxReader, state: State) -> bool:
        """Work on one outbox.

        :return: whether we were told to stop; if not, there is another outbox now.
        """
        source = Source(reader, state.settings)
        state.succeed(source.recorder, *source.former())
        fleet = self._fleet = Fleet(source, state, self._configuration.settings)
        try:
            for command in state.commands():
                if command.command != "resend":  # every pause must be there before anything is sent
                    await obey(command, fleet, state, running=False)
            await fleet.settle()
            # Events come and go in thousands and never in cycles: looking for those takes a tenth of a drain.
            gc.freeze()
            gc.set_threshold(50_000, 20, 100)
            log.info("bridge %s is running: %s", __version__, ", ".join(fleet.status()))
            tasks = [asyncio.create_task(self._tend(state, fleet)), asyncio.create_task(self._work(fleet))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in done:
                task.result()
            if not self._stop.is_set():
                log.warning("the outbox was exchanged: the new one is opened")
                return False
            if self._recorder is not None:
                await asyncio.to_thread(self._recorder.end)
            await self._drain(fleet)
            self._note(state)
            return True
        finally:
            self._fleet = None
            await fleet.end()

    def _tell_capture(self, state: State) -> None:
        """Say which settings are to shape what is recorded from now on, and what capture must know besides."""
        settings = self._configuration.settings
        number = state.number_settings(settings.shape())
        state.note("capture", {**settings.capture_document(), "settings": number})

    def _report(self, state: State, error: DamagedError) -> None:
        """Tell capture that the outbox is damaged: who writes it makes a new one."""
        state.note("damage", {"file": identity(self._folder.outbox)[0], "message": error.message})

    async def _outbox(self, state: State) -> OutboxReader | None:
        """Capture makes the outbox, once it has read our settings; none when told to stop before."""
        patient_until = time.monotonic() + 5.0  # it may be in the making
        while not self._stop.is_set():
            try:
                reader = OutboxReader(self._folder.outbox)
                if reader.recorder:
                    return reader
                reader.close()
            except OutboxError as error:
                if isinstance(error, DamagedError):
                    self._report(state, error)
                late = self._folder.outbox.exists() and time.monotonic() > patient_until
                if late and (line := self._repeats.line("outbox", str(error))):
                    log.error(line)
            await self._pause(0.05)
        return None

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _work(self, fleet: Fleet) -> None:
        """Until told to stop. Where nobody rings, look for new rows."""
        seen = -1
        while not self._stop.is_set():
            if self._supervised or self._recorder is not None:
                await self._stop.wait()
                return
            if (version := fleet.source.reader.version()) != seen:
                seen = version
                fleet.wake()
            await self._pause(_POLL)

    async def _tend(self, state: State, fleet: Fleet) -> None:
        """Once a second: look at the files and the configuration, obey commands, keep the status fresh.

        It ends when there is another outbox.

        :raises DamagedError: ``bridge.db`` is damaged.
        """
        while not fleet.source.exchanged():
            if state.damage is not None:
                raise state.damage
            try:
                if state.put_back():
                    log.error("%s was removed or replaced while it was in use, and is made again", self._folder.bridge)
                if fleet.source.damage is not None:
                    self._report(state, fleet.source.damage)
                asked, self._hung_up = self._hung_up, False
                self._configuration.look(asked=asked)
                if fleet.settings is not self._configuration.settings:
                    self._take_over(state, fleet)
                await fleet.settle()
                # One that is to be forgotten may have been taken out of the file a moment ago.
                if not self._configuration.restless:
                    await self._obey(state, fleet)
                self._note(state)
                state.shrink()
                self._repeats.over("state")
            except OutboxError as error:  # a full disk must not end us
                if line := self._repeats.line("state", str(error)):
                    log.error(line)
            await asyncio.sleep(_TICK)

    async def _obey(self, state: State, fleet: Fleet) -> None:
        """Do what was asked; thousands of events that are to be sent again must hold up nothing else."""
        until = time.monotonic() + _TICK
        for command in sorted(state.commands(), key=lambda command: command.command == "resend"):
            await obey(command, fleet, state)
            if time.monotonic() > until:
                return

    def _take_over(self, state: State, fleet: Fleet) -> None:
        """Use changed settings: they are told to capture first, so that a failure leaves all as it was.

        Only then is it said that they apply.
        """
        settings = self._configuration.settings
        self._tell_capture(state)
        logging.getLogger().setLevel(settings.log_level.upper())
        before, fleet.settings = fleet.settings, settings
        self._configuration.applied(before)

    async def _drain(self, fleet: Fleet) -> None:
        """Send what is there, within the deadline."""
        seconds = self._configuration.settings.drain_timeout
        # Whatever hangs, we don't outlive Orthanc by more than this.
        watchdog = threading.Timer(seconds + 1.0, os._exit, (EXIT_FAILED,))
        watchdog.daemon = True
        watchdog.start()
        await fleet.drain(seconds)
        watchdog.cancel()

    def _note(self, state: State) -> None:
        """What the status shows of the bridge itself."""
        note = {
            "version": __version__,
            "pid": os.getpid(),
            "since": iso(self._started * 1000),
            "configuration": self._configuration.status(),
            "transports": {} if self._fleet is None else self._fleet.status(),
        }
        if note != self._noted:
            state.note("bridge", note)
            self._noted = note
