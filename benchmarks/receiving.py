"""Processes that receive, as the benchmark of handling has them.

``python -m benchmarks.receiving WAY OPTIONS EVENTS NAME`` receives until so many events are handled; with 0 events
until it is told to end. It speaks in lines: ``ready``, then, each time it is asked, how many it has handled, and at its
end what it measured, in JSON.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.clients import ROOT
from benchmarks.raw_consuming import LOOPS, WAYS
from orthanc_events_bridge.consumers import Consumer, Event
from orthanc_events_bridge.transports.options import TransportOptions

#: The ways of a worker of the kit: its handler does nothing, or waits.
KIT, WAITING = "kit", "waiting"
#: Seconds that a handler waits for something else, as for an answer of Orthanc.
WAIT: Final = 0.02
#: Handlers at a time, deliveries held where they do nothing, and where they wait.
HANDLERS: Final = 16
HELD: Final = 512
HELD_WAITING: Final = 32


class Receiver:
    """One of the processes.

    :param way: `KIT`, `WAITING`, or one of `benchmarks.raw_consuming.WAYS`.
    :param options: a file with the pickled options of the transport.
    :param events: that it handles before it ends; 0: it ends when it is told to.
    """

    def __init__(self, way: str, options: Path, events: int, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.receiving", way, str(options), str(events), name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1
        )

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that receives ended by itself, exit code {self._process.wait()}")
        return line

    def _tell(self, what: str) -> None:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)

    def wait_ready(self) -> None:
        """Until it receives."""
        self._line()

    def handled(self) -> int:
        """How many it has handled so far."""
        self._tell("how many")
        return int(self._line())

    def end(self) -> dict[str, Any]:
        """What it measured, when all is handled, or now."""
        self._tell("end")
        found: dict[str, Any] = json.loads(self._line())
        self._process.communicate(timeout=60)
        return found

    def kill(self) -> None:
        """Where something else has failed."""
        self._process.kill()
        self._process.communicate()


# In the process that receives.


class _Seen:
    """What it has handled.

    :ivar times: of each event by its number, when it was handled.
    """

    def __init__(self, events: int) -> None:
        self._events = events
        self._begin = self._cpu = 0.0
        self._found: dict[str, float] = {}
        self.count = 0
        self.times: dict[int, float] = {}
        self.done = asyncio.Event()

    def one(self, number: int) -> None:
        """One more. Timed from when a tenth is handled until all is."""
        self.count += 1
        if self.count == self._events // 10:
            self._begin, self._cpu = time.monotonic(), time.process_time()
        if self.count == self._events:
            seconds, events = time.monotonic() - self._begin, self._events - self._events // 10
            self._found = {"rate": events / seconds, "cpu": (time.process_time() - self._cpu) / events * 1e6}
            self.done.set()
        if not self._events:
            self.times[number] = time.monotonic()

    def found(self) -> dict[str, Any]:
        """What was measured."""
        return {**self._found, "times": self.times}


async def measure(way: str, options: TransportOptions, events: int, name: str) -> dict[str, Any]:
    """Receive, in this process."""
    seen = _Seen(events)
    asked = asyncio.get_running_loop().run_in_executor(None, _answer, lambda: seen.count)
    if way in WAYS:
        _say("ready")
        await LOOPS[options.type](options, way, name, seen.one, seen.done).run()
    else:
        app = Consumer(name, broker=options, concurrency=HANDLERS, prefetch=HELD if way == KIT else HELD_WAITING)

        @app.on("instance.created")
        async def handler(event: Event) -> None:
            if way == WAITING:
                await asyncio.sleep(WAIT)
            seen.one(event.data["seq"])

        working = asyncio.create_task(app.serve())
        while not app.ready:
            await asyncio.sleep(0.01)
        _say("ready")
        await (seen.done.wait() if events else asked)
        app.stop()
        await working
    await asked
    return seen.found()


def _say(what: object) -> None:
    print(what, flush=True)


def _answer(count: Callable[[], int]) -> None:
    for line in sys.stdin:
        if line.startswith("end"):
            return
        _say(count())


def _main() -> None:
    way, options, events, name = sys.argv[1:]
    found = asyncio.run(measure(way, pickle.loads(Path(options).read_bytes()), int(events), name))  # noqa: S301 -- ours
    _say(json.dumps(found))


if __name__ == "__main__":
    _main()
