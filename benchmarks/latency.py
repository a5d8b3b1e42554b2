"""From Orthanc's commit to a subscriber of the stream."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import nats
from nats.aio.msg import Msg
from nats.js.api import DeliverPolicy

from benchmarks.clients import Clients, Load
from benchmarks.measure import quantile
from benchmarks.report import Row, Section, say
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.servers import scratch_folder


class Subscriber:
    """A plain consumer of the stream (so that it gets what is stored) on a thread of its own.

    :ivar seen: when it received each ``instance.created``, by instance.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._messages: list[tuple[float, bytes]] = []
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise TimeoutError("the subscriber could not connect")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        client = await nats.connect(self._url)

        async def receive(message: Msg) -> None:
            self._messages.append((time.monotonic(), message.data))

        await client.jetstream().subscribe(
            "orthanc.events.>", cb=receive, ordered_consumer=True, deliver_policy=DeliverPolicy.NEW
        )
        await client.flush()
        self._ready.set()
        await self._stop.wait()
        await client.close()

    def created(self) -> dict[str, float]:
        """When each instance's creation was received."""
        found: dict[str, float] = {}
        for at, body in self._messages.copy():
            event = json.loads(body)
            if event["type"].endswith(".instance.created.v1"):
                found[event["data"]["id"]] = at
        return found

    def wait(self, load: Load, seconds: float = 60.0) -> dict[str, float]:
        """What was received, once it is everything."""
        wanted = {identifier for identifier, _, _ in load.answers}
        if not wait_until(lambda: wanted <= self.created().keys(), seconds, every=0.5):
            raise TimeoutError("not every instance that Orthanc acknowledged came out of the stream")
        return self.created()


def run(*, quick: bool) -> Section:
    """One instance at a time, then many at once."""
    with scratch_folder() as folder:
        return _measure(folder, *((20, 200) if quick else (200, 2000)))


def _measure(folder: Path, singles: int, burst: int) -> Section:
    with Clients() as clients, Line(folder, stable_age=60) as line, Subscriber(line.broker.url) as subscriber:
        line.wait(lambda document: document["transports"][0]["state"] == "connected")
        clients.upload(line.orthanc.port, 10, clients=1, interval=0.1)  # warms up
        time.sleep(1)
        idle = clients.upload(line.orthanc.port, singles, clients=1, interval=0.2)
        from_request, from_answer = _latencies(idle, subscriber.wait(idle))
        say(f"latency: idle, {quantile(from_answer, 0.5):.1f} ms behind the answer")
        time.sleep(1)
        many = clients.upload(line.orthanc.port, burst)
        seen = subscriber.wait(many)
        burst_request, burst_answer = _latencies(many, seen)
        last = max(answered for _, _, answered in many.answers)
        behind = max(seen[identifier] for identifier, _, _ in many.answers) - last
        say(f"latency: burst, {quantile(burst_answer, 0.5):.1f} ms behind the answer")
    took = quantile([1000 * (answered - sent) for _, sent, answered in idle.answers], 0.5)
    p50 = quantile(from_request, 0.5)
    lines: list[Sequence[str]] = [("ms", "p50", "p90", "p99", "longest")]
    for name, values in (
        ("idle, from the request", from_request),
        ("idle, from the answer", from_answer),
        ("burst, from the request", burst_request),
        ("burst, from the answer", burst_answer),
    ):
        lines.append((name, *(f"{quantile(values, share):.1f}" for share in (0.5, 0.9, 0.99, 1.0))))
    return Section(
        "Latency",
        [
            (
                "A plain consumer of the JetStream stream, which gets what NATS has stored, notes when it receives"
                " `instance.created`. The client that uploads, another process on the same clock, notes when it"
                " begins the request and when it has Orthanc's answer. Orthanc commits between the two and queues its"
                " callback before it answers: the time from the answer is slightly too short, and the time from the"
                f" request too long by what Orthanc takes to store the instance (p50 of the whole request:"
                f" {took:.1f} ms). The target is held against the longer one."
            ),
            (
                f"Idle: {singles} instances, one each 200 ms. Burst: {burst} instances by four clients, as fast as"
                f" Orthanc takes them ({many.rate:.0f}/s, which is {4 * many.rate:.0f} events/s)."
            ),
        ],
        [
            Row(
                "latency when idle, from the request, p50",
                "≤ 10 ms",
                f"{p50:.1f} ms",
                p50 <= 10,
                f"{took:.1f} ms of it are Orthanc's own, before there is anything to tell.",
            ),
            Row("latency when idle, from the request, p99", "-", f"{quantile(from_request, 0.99):.1f} ms"),
            Row("latency when idle, from Orthanc's answer, p50", "-", f"{quantile(from_answer, 0.5):.1f} ms"),
            Row(
                "latency in a burst, from Orthanc's answer, p50 and p99",
                "-",
                f"{quantile(burst_answer, 0.5):.0f} ms, {quantile(burst_answer, 0.99):.0f} ms",
            ),
            Row("burst: last answer until the last instance is in the stream", "-", f"{1000 * behind:.0f} ms"),
        ],
        [lines],
    )


def _latencies(load: Load, seen: dict[str, float]) -> tuple[list[float], list[float]]:
    """Milliseconds from the request, and from the answer."""
    return (
        [1000 * (seen[identifier] - sent) for identifier, sent, _ in load.answers],
        [1000 * (seen[identifier] - answered) for identifier, _, answered in load.answers],
    )
