"""A receiver of signed events, with Python's standard library only.

    WEBHOOK_SECRET=whsec_… python receiver.py [--port 8080] [--database events.sqlite]

It checks each request's signature (Standard Webhooks), stores the event, and only then answers 204: from then on the
event is its own to keep. An event that comes a second time is known by its id, and stored once. It prints a line for
each new event, without its data.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

#: The most bytes of an event, and by how many seconds a signature may be old, or ahead of our clock.
LARGEST = 16 * 1024 * 1024
TOLERANCE = 300


def key_of(secret: str) -> bytes:
    """``whsec_`` and base64, or text that is the key itself."""
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"))
    return secret.encode()


def is_signed(keys: list[bytes], identifier: str, timestamp: str, signatures: str, body: bytes) -> bool:
    """Whether one of the signatures is made with one of the keys, and not long ago."""
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE:
        return False
    content = f"{identifier}.{timestamp}.".encode() + body
    for key in keys:
        right = "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
        # In constant time, so that nobody learns by trying how much of a signature is right.
        if any(hmac.compare_digest(right.encode(), one.encode()) for one in signatures.split(" ")):
            return True
    return False


class Store:
    """The events, in the order in which they came."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")  # what is answered must survive a power cut
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS events"
            " (position INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, event TEXT NOT NULL)"
        )

    def add(self, identifier: str, event: str) -> bool:
        """Store an event; false where it is there already."""
        with self._lock:
            done = self._database.execute(
                "INSERT INTO events (id, event) VALUES (?, ?) ON CONFLICT (id) DO NOTHING", (identifier, event)
            )
            return done.rowcount == 1


class Handler(BaseHTTPRequestHandler):
    """One connection of the bridge, which it keeps."""

    protocol_version = "HTTP/1.1"
    timeout = 120
    disable_nagle_algorithm = True  # an answer is small, and must not wait for more
    keys: ClassVar[list[bytes]]
    store: ClassVar[Store]

    def do_OPTIONS(self) -> None:
        """The bridge asks whether we are there."""
        self._answer(204, allow="POST, OPTIONS")

    def do_POST(self) -> None:
        """An event. What the answers mean to the bridge is in README.md."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._answer(411, close=True)
        if int(length) > LARGEST:
            return self._answer(413, close=True)  # it is set aside
        body = self.rfile.read(int(length))
        identifier = self.headers.get("webhook-id", "")
        timestamp, signatures = self.headers.get("webhook-timestamp", ""), self.headers.get("webhook-signature", "")
        if not is_signed(self.keys, identifier, timestamp, signatures, body):
            return self._answer(401)  # an alarm: nothing is set aside, and nothing lost
        if self.headers.get_content_type() != "application/cloudevents+json":
            return self._answer(415)
        try:
            event = json.loads(body)
            line = f"{event['time']}  {event['type']}  {event.get('subject', '')}".rstrip()
            if event["id"] != identifier:
                return self._answer(400)
        except (ValueError, KeyError, TypeError):
            return self._answer(400)
        if self.store.add(identifier, body.decode()):
            print(line, flush=True)
        return self._answer(204)

    def _answer(self, status: int, *, allow: str = "", close: bool = False) -> None:
        self.send_response(status)
        if allow:
            self.send_header("Allow", allow)
        if close:
            self.send_header("Connection", "close")  # and with it self.close_connection
        if status != 204:
            self.send_header("Content-Length", "0")
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say only what went wrong."""
        if not str(code).startswith("2"):
            print(f"answered {code}", file=sys.stderr, flush=True)


def main() -> None:
    """Run until it is told to stop."""
    parser = argparse.ArgumentParser(description="Receives signed events of orthanc-events-bridge.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--database", type=Path, default=Path("events.sqlite"))
    options = parser.parse_args()
    secrets = os.environ.get("WEBHOOK_SECRET", "").split()
    if not secrets:
        parser.error("WEBHOOK_SECRET is not set: give it the secret that the bridge signs with")
    Handler.keys = [key_of(secret) for secret in secrets]
    Handler.store = Store(options.database)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadingHTTPServer((options.host, options.port), Handler) as server:
        print(f"listening at http://{options.host}:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
