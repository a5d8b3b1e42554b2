"""A worker as a process of its own: writes down what it does, so that it can be killed at any moment.

``consumer_process.py OPTIONS LOG``: OPTIONS is a file that `tests.faults.consumers.Group` has written.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import random
import sys
import time
from pathlib import Path

from orthanc_events_bridge.consumers import Consumer, Event, Reject
from orthanc_events_bridge.testing.consumer_mutants import MUTANTS


def main() -> None:
    options = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 -- of the test itself
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for protection in options["without"]:
        MUTANTS[protection]()
    app = Consumer(options["name"], broker=options["broker"], **options["consumer"])
    busy, failing, lease = options["busy"], options["failing"], options["lease"]

    def note(what: str, event: Event) -> None:
        line = f"{time.clock_gettime(time.CLOCK_MONOTONIC):.6f} {what} {event.id} {event.attempt}\n"
        os.write(log, line.encode())  # one write is one line, whoever is killed

    def seconds(event: Event) -> float:
        takes: float | None = event.data.get("takes")
        return random.uniform(0, busy) if takes is None else takes

    def end(event: Event) -> None:
        if event.data.get("poison"):
            note("reject", event)
            raise Reject("poison")
        if random.random() < failing:
            note("fail", event)
            raise RuntimeError("by chance")
        note("end", event)

    async def handle(event: Event) -> None:
        async with app.once(event, "effect", lease=lease) if lease else contextlib.nullcontext(True) as first:
            if not first:
                note("skip", event)
                return
            note("begin", event)
            try:
                await asyncio.sleep(seconds(event))
            except asyncio.CancelledError:
                note("cut", event)
                raise
            end(event)
        if lease:
            note("noted", event)

    def block(event: Event) -> None:
        note("begin", event)
        time.sleep(seconds(event))
        end(event)

    app.on("*")(block if options["blocking"] else handle)
    app.run()


main()
