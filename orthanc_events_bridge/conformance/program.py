"""The program under test: started, ended and killed; and what it prints, a JSON document for each line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orthanc_events_bridge.errors import BridgeError

#: Lines of what it says otherwise that are kept, to be shown where it fails.
_KEPT: Final = 20
_LONGEST: Final = 8 * 1024**2


@dataclass(frozen=True, slots=True)
class Begun:
    """A handler has begun.

    :ivar event: as the program has decoded it, in CloudEvents' JSON format.
    :ivar attempt: which delivery of it the program takes this for.
    :ivar at: when we have read that, by the clock `time.monotonic`.
    :ivar run: of the program, from 0.
    :ivar place: of the line among all.
    """

    event: Mapping[str, Any]
    attempt: int
    at: float
    run: int
    place: int

    @property
    def id(self) -> str:
        """The event's."""
        return str(self.event.get("id", ""))


class Program:
    """Runs of one command, one behind the other, and all that they have said.

    :param command: the program and its arguments.
    :param secret: what it must not say but in the lines that it is asked for.
    :ivar begun: in order.
    :ivar ended: the id of each event whose handler has ended, with the place of the line and the run.
    :ivar ready: whether the present run has subscribed.
    :ivar said: the last lines that are no JSON of ours, of both outputs.
    :ivar told: whether the secret was in one of them.
    """

    def __init__(self, command: Sequence[str], secret: str) -> None:
        self._command = command
        self._secret = secret
        self.begun: list[Begun] = []
        self.ended: list[tuple[str, int, int]] = []
        self.ready = False
        self.said: deque[str] = deque(maxlen=_KEPT)
        self.told = False
        self.run = -1
        self._place = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reading: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start it.

        :raises BridgeError: there is no such program.
        """
        self.run += 1
        self.ready = False
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env=os.environ | environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # so that what it has started itself can be killed with it
                limit=_LONGEST,
            )
        except OSError as error:
            raise BridgeError(
                f"{self._command[0]} can't be started: {error.strerror}", "name the program behind --"
            ) from error
        self._process = process
        assert process.stdout is not None
        assert process.stderr is not None
        self._reading = [
            asyncio.create_task(self._read(process.stdout, self._take)),
            asyncio.create_task(self._read(process.stderr, self._say)),
        ]

    async def _read(self, pipe: asyncio.StreamReader, take: Callable[[str], None]) -> None:
        while line := await pipe.readline():
            take(line.decode("utf-8", "replace").rstrip())
            self._news.set()
        self._news.set()

    def _take(self, line: str) -> None:
        try:
            said = json.loads(line)
            did = said["did"]
            self._place += 1
            if did == "ready":
                self.ready = True
            elif did == "begin":
                event, attempt = dict(said["event"]), int(said["attempt"])
                self.begun.append(Begun(event, attempt, time.monotonic(), self.run, self._place))
            elif did == "end":
                self.ended.append((str(said["id"]), self._place, self.run))
        except (ValueError, KeyError, TypeError):
            self._say(line)

    def _say(self, line: str) -> None:
        self.told |= self._secret in line
        self.said.append(line)

    @property
    def running(self) -> bool:
        """Whether it is there still, or there is something to be read of it."""
        return any(not one.done() for one in self._reading)

    async def wait(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait for something of what it says, or for its end.

        :return: whether the condition holds.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition() and self.running:
                    self._news.clear()
                    await self._news.wait()
        return bool(condition())

    async def end(self, seconds: float) -> int | None:
        """Ask it to end, by SIGTERM.

        :return: its exit code; none where it has not ended in time, and was killed.
        """
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        return await self.gone(seconds)

    async def gone(self, seconds: float) -> int | None:
        """Wait for its end, and read what it has said by then; see `end`."""
        process = self._process
        assert process is not None
        code: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                code = await process.wait()
        await self.kill()
        return code

    async def kill(self) -> None:
        """End it and all that it has started by SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await asyncio.gather(*self._reading)
