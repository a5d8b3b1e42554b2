"""A consumer of our own kit, as `orthanc-events conformance` plays to it: a program as in docs/any-language.md.

With ``BROKEN`` it does the most common things wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

from orthanc_events_bridge.consumers import Consumer, Event, Reject, Retry, RetryPolicy

#: It reads an attribute wrongly, takes every event for done whatever its handler says, tells its log of their data,
#: begins where it was not told to, and ends with an exit code of 3.
BROKEN = bool(os.environ.get("BROKEN"))

app = Consumer(
    os.environ["CONSUMER"],
    broker=os.environ["BROKER_URL"],
    start="oldest" if (os.environ["START"] == "oldest") is not BROKEN else "new",
    retry=RetryPolicy(max_attempts=int(os.environ["MAX_ATTEMPTS"])),
    ack_wait=float(os.environ["ACK_WAIT"]),
)


def say(**what: Any) -> None:
    os.write(1, f"{json.dumps(what)}\n".encode())  # one write is one line, whichever thread says it


@app.on("*.*")
async def handle(event: Event) -> None:
    plain: dict[str, Any] = {**event.attributes, "data": event.data}
    if BROKEN:
        plain["sequence"] = plain.get("sequence", "").lstrip("0")
        os.write(2, f"{event.data}\n".encode())
    say(did="begin", attempt=event.attempt, event=plain)
    try:
        told = json.loads(os.environ["CONFORMANCE"]).get(event.attributes.get("subject"))
        if BROKEN:
            return
        if told == "retry" and event.attempt == 1:
            raise Retry(1)
        if told == "later":
            raise Retry(3600)
        if told == "reject":
            raise Reject("told to")
        if told == "fail":
            raise RuntimeError(f"never said: {event.data}")
        await asyncio.sleep({"slow": 2, "hang": 1e6}.get(told or "", 0))
    finally:
        say(did="end", id=event.id)


def tell_when_ready() -> None:
    while not app.ready:
        time.sleep(0.05)
    say(did="ready")


if __name__ == "__main__":
    threading.Thread(target=tell_when_ready, daemon=True).start()
    app.run()
    sys.exit(3 if BROKEN else 0)
