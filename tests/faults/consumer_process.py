"""A worker as a process of its own: writes down what it does, so that it can be killed at any moment.

``consumer_process.py OPTIONS LOG``: OPTIONS is a file that `tests.faults.consumers.Group` has written.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import sys
import time
from pathlib import Path

from orthanc_events_bridge.consumers import Consumer, Event, Reject


def main() -> None:
    options = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 -- of the test itself
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    app = Consumer(options["name"], broker=options["broker"], **options["consumer"])
    longest, failing = options["longest"], options["failing"]

    def note(what: str, event: Event) -> None:
        line = f"{time.clock_gettime(time.CLOCK_MONOTONIC):.6f} {what} {event.id} {event.attempt}\n"
        os.write(log, line.encode())  # one write is one line, whoever is killed

    @app.on("*")
    async def handle(event: Event) -> None:
        note("begin", event)
        await asyncio.sleep(random.uniform(0, longest))
        if event.data.get("poison"):
            note("reject", event)
            raise Reject("poison")
        if random.random() < failing:
            note("fail", event)
            raise RuntimeError("by chance")
        note("end", event)

    app.run()


main()
