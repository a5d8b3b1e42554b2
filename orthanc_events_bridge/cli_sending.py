"""A replay at work: until all is sent, or it is interrupted, and how far it is meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from typing import Any, Final

from orthanc_events_bridge.bridge.replay import Pace, Replay, Selected
from orthanc_events_bridge.bridge.replays import Kept, Run
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.logs import quiet_clients
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.options import TransportOptions

#: Seconds between two lines of progress: on a terminal, where each writes over the last one, and elsewhere.
_TERMINAL: Final = 0.5
_ELSEWHERE: Final = 10.0
#: Seconds that a batch under way may take when the command is interrupted.
_LEAVE: Final = 10.0


def again(run: Run) -> str:
    """How a run that was interrupted is gone on with."""
    return f"go on with `orthanc-events replay --resume {run.number}`"


def send(transport: TransportOptions, kept: Kept, source: Selected, pace: Pace) -> int:
    """Do what is left of a run; when all is sent, its file goes.

    :return: the number of the signal that has interrupted it, or 0.
    :raises BridgeError: a person has to change something first.
    """
    run = kept.run
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_clients()
    relay = Replay(
        transport,
        lambda: create(transport).inbox(run.consumer) if run.consumer else create(transport),
        source,
        kept,
        pace,
    )
    print(f"replay {run.number} to {run.where} by transport {run.transport}", file=sys.stderr)
    try:
        number = asyncio.run(_work(relay, source, run))
    except BridgeError as error:
        raise BridgeError(error.message, f"{error.remedy}; then {again(run)}") from error
    if not number:
        kept.remove()
    return number


async def _work(relay: Replay, source: Selected, run: Run) -> int:
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    working, telling = asyncio.create_task(relay.run()), asyncio.create_task(_tell(source, run))
    try:
        either: set[asyncio.Future[Any]] = {working, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            if relay.leave():
                await asyncio.wait({working}, timeout=_LEAVE)
            working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return stopped.result() if stopped.done() else 0
    finally:
        telling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await telling


async def _tell(source: Selected, run: Run) -> None:
    """Show how far it is."""
    terminal = sys.stderr.isatty()
    rows = source.reader.span(run.first, run.through)
    before, began = sum(run.sent.values()), time.monotonic()
    try:
        while True:
            await asyncio.sleep(_TERMINAL if terminal else _ELSEWHERE)
            left, sent = source.reader.span(run.position, run.through), sum(run.sent.values())
            part = 100 * (rows - left) // rows if rows else 100
            rate = (sent - before) / (time.monotonic() - began)
            line = f"replay {run.number}: {part} %, {sent} events sent, {rate:.0f} a second"
            print(f"\r{line:<79}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    finally:
        if terminal:
            print(file=sys.stderr)
