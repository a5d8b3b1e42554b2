"""A receiver of webhooks as a process of its own: it writes down each event before it answers 2xx, and obeys a file.

    python webhook_receiver.py FOLDER PORT [HOST]

It is run by its path, in a container too, and needs the standard library only. What it has received is in FOLDER's
``received``, one request per line: its path, a space, and JSON (`webhook.Received` reads it). What it is to do is in
``control.json``, which may be replaced at any time:

``places``
    By path: ``dropped``, how many of the oldest events were deleted, and ``room``, how many it takes beside those; what
    is more is answered with 503.
``answers``
    How the next requests are answered, one each; then ``always``. An answer: ``status`` (200), ``headers``, ``body``,
    ``length``, what it says of the body's length, ``delay`` in seconds, ``store`` (true for 2xx), ``close`` for the
    connection's end behind it, ``hang_up`` for that in place of an answer. Where there is none: 200, or as the rest of
    this has it.
``together``
    So many events are answered together, when all of them are there.
``unwelcome``
    By the id of an event: the status with which it is answered, and not stored.
``largest``
    The most bytes in a body; more is answered with 413.
``authorization``
    The values of that header of which a request must have one; another is answered with 401.
``keys``
    Base64 of the keys of which one must have signed a request (Standard Webhooks); another is answered with 401.
``certificate``, ``key``, ``clients``
    Files for TLS: its own, and the authorities of clients' certificates, which it then insists on. Read at its start.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import ssl
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONTROL, RECEIVED = "control.json", "received"
_LARGEST = 64 * 1024 * 1024


class Receiver:
    """All of it.

    :param folder: for what it receives and for what controls it.
    """

    def __init__(self, folder: Path) -> None:
        self._control_file = folder / CONTROL
        self._control: dict[str, Any] = {}
        self._seen: tuple[int, int] | None = None
        self._answers: list[dict[str, Any]] = []
        path = folder / RECEIVED
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # it was killed while it wrote, and had not answered
            os.truncate(path, sum(map(len, lines[:-1])))
            lines.pop()
        self._waiting: list[asyncio.Event] = []
        self._counts: dict[str, int] = {}
        for line in lines:
            self._count(line.split(b" ", 1)[0].decode())
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _count(self, place: str) -> None:
        self._counts[place] = self._counts.get(place, 0) + 1

    def control(self) -> dict[str, Any]:
        """What it is to do now."""
        with contextlib.suppress(FileNotFoundError):
            status = self._control_file.stat()
            seen = (status.st_mtime_ns, status.st_ino)
            if seen != self._seen:
                self._seen, self._control = seen, json.loads(self._control_file.read_bytes())
                self._answers = list(self._control.get("answers", []))
        return self._control

    def context(self) -> ssl.SSLContext | None:
        """TLS, where it is asked for."""
        control = self.control()
        if "certificate" not in control:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(control["certificate"], control["key"])
        if "clients" in control:
            context.load_verify_locations(control["clients"])
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        print("connection", flush=True)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while await self._request(reader, writer):
                pass
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; false where the connection ends behind it."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, place, _ = head[0].split(" ")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in head[1:-2])]
        named = dict(headers)
        length = int(named.get("content-length", 0))
        if "transfer-encoding" in named or length > _LARGEST:
            await self._answer(writer, {"status": 411})
            return False
        body = await reader.readexactly(length)
        if method != "POST":
            print(method, place, flush=True)
        place = urlsplit(place).path or "/"  # a proxy's client sends the whole URL
        answer = self._decide(method, place, named, body)
        if answer.get("delay"):
            await asyncio.sleep(answer["delay"])
        if method == "POST" and "together" in self._control:
            await self._together(self._control["together"])
        if method == "POST" and answer.get("store", 200 <= answer.get("status", 200) < 300):
            self._store(place, headers, body)
        if answer.get("hang_up"):
            return False
        await self._answer(writer, answer)
        return named.get("connection", "").lower() != "close" and not answer.get("close")

    def _decide(self, method: str, place: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        control = self.control()
        if "authorization" in control and headers.get("authorization") not in control["authorization"]:
            return {"status": 401}
        if method != "POST":
            return {"status": 204 if method == "OPTIONS" else 405}
        if self._answers:
            return self._answers.pop(0)
        if "always" in control:
            return dict(control["always"])
        if "keys" in control and not _signed(control["keys"], headers, body):
            return {"status": 401}
        if headers.get("orthanc-event-id") in control.get("unwelcome", {}):
            return {"status": control["unwelcome"][headers["orthanc-event-id"]]}
        if len(body) > control.get("largest", _LARGEST):
            return {"status": 413}
        limits = control.get("places", {}).get(place, {})
        if "room" in limits and self._counts.get(place, 0) - limits.get("dropped", 0) >= limits["room"]:
            return {"status": 503}
        return {"status": 200}

    async def _together(self, count: int) -> None:
        all_there = asyncio.Event()
        self._waiting.append(all_there)
        if len(self._waiting) >= count:
            while self._waiting:
                self._waiting.pop().set()
        await all_there.wait()

    def _store(self, place: str, headers: list[tuple[str, str]], body: bytes) -> None:
        line = f"{place} {json.dumps([headers, body.decode('latin-1')])}\n".encode()
        while line:
            line = line[os.write(self._file, line) :]
        self._count(place)

    @staticmethod
    async def _answer(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        status, body = answer.get("status", 200), answer.get("body", "").encode()
        phrase = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Unheard Of"
        lines = [f"HTTP/1.1 {status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in answer.get("headers", {}).items()]
        if status != 204:
            lines.append(f"Content-Length: {answer.get('length', len(body))}")
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body if status != 204 else b""))
        await writer.drain()


def _signed(keys: list[str], headers: dict[str, str], body: bytes) -> bool:
    """As a receiver of Standard Webhooks checks it."""
    identifier, when = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not when.isdigit() or abs(time.time() - int(when)) > 300:
        return False
    content = f"{identifier}.{when}.".encode() + body
    right = [base64.b64encode(hmac.digest(base64.b64decode(key), content, hashlib.sha256)).decode() for key in keys]
    given = headers.get("webhook-signature", "").split(" ")
    return any(hmac.compare_digest(one, f"v1,{other}") for one in given for other in right)


async def _main(folder: Path, port: int, host: str) -> None:
    receiver = Receiver(folder)
    server = await asyncio.start_server(
        receiver.serve, host, port, ssl=receiver.context(), limit=2**20, backlog=1000, reuse_address=True
    )
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if sys.argv[3:] else "127.0.0.1"))
