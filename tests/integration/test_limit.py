"""A burst does not drown Orthanc: requests in flight, counted at a real HTTP server, of one worker and of several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

#: A consumer with a burst before it: handlers of both kinds, which download, upload, and do both at once.
APP = """\
import asyncio, json, os
from orthanc_events_bridge import transports
from orthanc_events_bridge.consumers import Consumer, app as module, clients, limit
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport

if os.environ.get("WITHOUT"):
    clients.limit_of = lambda url, most: limit.Limit(10_000)
broker = Broker()
for number in range(36):
    kind = ("deleted", "created", "stable")[number % 3]
    event = {"specversion": "1.0", "id": str(number), "source": "urn:a", "type": f"io.x.study.{kind}.v1",
             "partitionkey": str(number), "data": {}}
    content = json.dumps(event).encode()
    mime = "application/cloudevents+json"
    broker.store(Outgoing(str(number), "main", "study", kind, str(number), "00", mime, content))
module.create = lambda options: MemoryTransport(options, broker)
app = Consumer("burst", broker={"type": "memory"}, start="oldest", concurrency=30,
               orthanc={"url": os.environ["SERVER"], "max_requests": int(os.environ["MOST"])})

@app.on("study.created")
async def several(event, orthanc):
    await asyncio.gather(*(orthanc.get(f"/{event.id}/{number}") for number in range(3)))

@app.on("study.deleted")
def streams(event, orthanc):
    with orthanc.stream("GET", f"/{event.id}") as answer:
        for part in answer.iter_bytes():
            pass

@app.on("study.stable")
async def both(event, orthanc):
    async def parts():
        async with orthanc.stream("GET", f"/{event.id}") as answer:
            async for part in answer.aiter_bytes():
                yield part
    (await orthanc.post("/done", content=parts())).raise_for_status()

@app.on("study.*")
async def handled(event, orthanc):
    (await orthanc.post("/handled")).raise_for_status()
"""


class Server(ThreadingHTTPServer):
    """Counts the requests that it is at. It holds the first ones until so many are there, and a moment more."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, wanted: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.wanted = wanted
        self.changed = threading.Condition()
        self.at = self.peak = self.handled = 0
        self.open = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def begin(self) -> None:
        with self.changed:
            self.at += 1
            self.peak = max(self.peak, self.at)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.open or self.at >= self.wanted, 60)
        if not self.open:
            time.sleep(1.0)  # for those that should not come
            self.open = True

    def end(self, path: str) -> None:
        with self.changed:
            self.at -= 1
            self.handled += path == "/handled"
            self.changed.notify_all()


class Handler(BaseHTTPRequestHandler):
    """Answers in two pieces, the second a moment later."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.begin()
        self.send_response(200)
        self.send_header("Content-Length", "2000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)
        time.sleep(0.01)
        self.server.end(self.path)  # before its last bytes: behind them the next may come at once
        self.wfile.write(b"x" * 1000)

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            # It is fed by a download, which is let in with it, and is counted for both.
            while int(self.rfile.readline(), 16):
                self.rfile.readline()
            self.rfile.readline()
            return self._stored()
        self.server.begin()
        self.server.end(self.path)
        return self._stored()

    def _stored(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(8)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.mark.parametrize("limited", [True, False], ids=["limited", "without"])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_burst_of_all_workers_together_is_bounded(
    tmp_path: Path, server: Server, workers: int, limited: bool
) -> None:
    (tmp_path / "burst.py").write_text(APP, "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "orthanc_events_bridge", "consume", "burst:app", "--workers", str(workers)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=os.environ | {"SERVER": server.url, "MOST": "8", "WITHOUT": "" if limited else "1"},
    )
    try:
        with server.changed:
            server.changed.wait_for(
                lambda: server.handled == 36 * workers or process.poll() is not None or server.peak > 8, 120
            )
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1].decode()
    if limited:
        assert server.peak == 8, said
        assert server.handled == 36 * workers and "WARNING" not in said, said
    else:
        assert server.peak > 8, said
