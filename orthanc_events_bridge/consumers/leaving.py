"""How a consumer's process begins to log, and how it leaves: at a signal, and in time whatever its handlers do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Final

from orthanc_events_bridge.consumers.threads import USUAL, DaemonThreads
from orthanc_events_bridge.logs import quiet_clients

log = logging.getLogger(__name__)

#: Seconds behind the deadline of the handlers in which the rest of the process has to come to its end.
_GRACE: Final = 10.0
#: As Python calls what failed.
FAILED: Final = 1
#: At which a consumer stops.
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def logs(level: str) -> None:
    """Log to standard error with time and level, unless the program has set logging up itself."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger().setLevel(level.upper())
        quiet_clients()


def run_until_told(
    name: str,
    serve: Callable[[], Awaitable[None]],
    stop: Callable[[], None],
    drain: float,
    running: Callable[[], list[str]],
) -> None:
    """Work in an event loop of its own until SIGTERM or SIGINT; to be called in the main thread.

    :param name: of the consumer.
    :param serve: works until it is stopped.
    :param stop: begins to stop; called in the loop.
    :param drain: seconds that handlers have.
    :param running: what handlers are at, for the log.
    """
    over = threading.Event()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    async def main() -> None:
        # Those of `asyncio.to_thread`, too, are not to keep the process from leaving.
        threads = DaemonThreads(USUAL, f"{name}-thread")
        asyncio.get_running_loop().set_default_executor(threads)
        leave_at_signals(stop, drain, over, running)
        await serve()
        if left := threads.busy:
            log.warning("the consumer %s ends while threads run on: %s", name, ", ".join(left))

    try:
        asyncio.run(main())
    finally:
        over.set()
        # Not sooner: a signal that comes while the loop is closed is not to end the process at once.
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_signals(
    stop: Callable[[], None], drain: float, over: threading.Event, running: Callable[[], list[str]]
) -> None:
    """Stop at SIGTERM and SIGINT, in the running event loop; to be called in the main thread.

    :param stop: begins to stop; called in the loop.
    :param drain: seconds that handlers have.
    :param over: set when the event loop is closed: that, too, waits for what a handler has left running.
    :param running: the names of the handlers that run, for who asks why the process did not end well.
    """
    loop = asyncio.get_running_loop()

    def watch() -> None:
        if not over.wait(drain + _GRACE):
            what = ", ".join(running()) or "what it has begun"
            log.error("a handler does not end: the process does, and what it held comes again: %s", what)
            _end()

    def asked(number: int, frame: object) -> None:
        # Python calls it between two steps of whatever the main thread does, also where that blocks the loop.
        if over.is_set():
            return
        if watching.is_alive():
            log.warning("asked a second time: the process ends, and what it held comes again")
            _end()
        watching.start()
        loop.call_soon_threadsafe(stop)

    watching = threading.Thread(target=watch, name="leaving", daemon=True)
    for number in SIGNALS:
        signal.signal(number, asked)


def _end() -> None:
    logging.shutdown()
    sys.stderr.flush()
    os._exit(FAILED)
