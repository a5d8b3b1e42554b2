"""Health and metrics over HTTP, for who starts the worker again, and for who watches it.

A process can have several consumers, as a router has: one address tells of all.

``/health/live``
    200 as long as the event loop runs; a handler that blocks it keeps the answer waiting, or gets 503 behind it.
``/health/ready``
    200 while the worker is subscribed, with all its consumers, else 503; and 503 while one receives nothing, since all
    that it may hold waits for a place of retries or dead letters that takes none.
``/metrics``
    Prometheus' text format; 501 where ``prometheus_client`` is not installed.

Nothing about any patient is in the answers. There is no login: listen at an address that only those can reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Final, Protocol

from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.metrics import CONTENT_TYPE, metrics_text
from orthanc_events_bridge.consumers.routes import incomplete
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.transports.subscriptions import boot_time

log = logging.getLogger(__name__)

#: Seconds behind which an event loop that has not ticked counts as blocked.
_BLOCKED: Final = 5.0
#: Seconds that who asks may take, and bytes of a question.
_PATIENCE: Final = 5.0
_LONGEST: Final = 8192
_AWAY: Final = "not subscribed"
_TEXT: Final = "text/plain; charset=utf-8"
_EXTRA: Final = 'metrics need prometheus_client: pip install "orthanc-events-bridge[metrics]"'


class Watched(Protocol):
    """A consumer in this process, as far as it is told about.

    :ivar name: its name.
    :ivar meter: what it counts.
    """

    name: str
    meter: Meter

    @property
    def ready(self) -> bool:
        """Whether it is subscribed."""

    @property
    def stuck(self) -> bool:
        """Whether all that it may hold waits for a place of retries or dead letters."""

    @property
    def ticked(self) -> float:
        """When it last looked at the clock (`boot_time`)."""


class Health:
    """Answers.

    :param consumers: it tells about.
    """

    def __init__(self, consumers: Sequence[Watched]) -> None:
        self._consumers = consumers

    def answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"ask with GET\n"
        path = path.partition("?")[0]
        if path == "/health/live":
            gap = boot_time() - min(one.ticked for one in self._consumers)
            if gap > _BLOCKED:
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"the event loop stands still\n"
            return HTTPStatus.OK, _TEXT, b"alive\n"
        if path == "/health/ready":
            problems = [
                f"{one.name}: {'all it holds waits for a place of retries or dead letters' if one.ready else _AWAY}\n"
                for one in self._consumers
                if one.stuck or not one.ready
            ]
            if problems:
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, "".join(problems).encode()
            return HTTPStatus.OK, _TEXT, b"receiving events\n"
        if path == "/metrics":
            try:
                return HTTPStatus.OK, CONTENT_TYPE, metrics_text(self._consumers)
            except ImportError:
                return HTTPStatus.NOT_IMPLEMENTED, _TEXT, f"{_EXTRA}\n".encode()
        return HTTPStatus.NOT_FOUND, _TEXT, b"there are /health/live, /health/ready and /metrics\n"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one question, and hang up."""
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_PATIENCE):
                question = await reader.readuntil(b"\r\n\r\n")
                words = question.partition(b"\r\n")[0].decode("latin-1").split(" ")
                method, path = (words[0], words[1]) if len(words) == 3 else ("", "")
                status, kind, body = self.answer(method, path)
                head = (
                    f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                writer.write(head.encode() + (b"" if method == "HEAD" else body))
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def health(address: str | None, *consumers: Watched) -> AsyncIterator[int]:
    """Answer as long as the block runs.

    :param address: ``HOST:PORT``; none: nothing is answered.
    :param consumers: that are told about; the first gives its name to the log.
    :return: the port; 0 where there is none.
    :raises BridgeError: the address can't be used.
    """
    if address is None:
        yield 0
        return
    host, _, port = address.rpartition(":")
    answers = Health(consumers)
    try:
        server = await asyncio.start_server(answers.serve, host.strip("[]") or None, int(port), limit=_LONGEST)
    except OSError as error:
        raise BridgeError(
            f"health and metrics can't be told at {address}: {error.strerror or error}",
            "give http another address, or leave it out",
        ) from error
    async with server:
        found = int(server.sockets[0].getsockname()[1])
        log.info("the consumer %s tells its health and metrics at %s:%d", consumers[0].name, host or "*", found)
        yield found


def address_of(consumer: str, address: str | None, number: int) -> str | None:
    """That of one of several workers on a machine: each has a port of its own, unless it is any free one.

    :param address: of the first.
    :param number: of the worker, from 0.
    :raises ConfigError: there is no such port.
    """
    host, _, port = (address or "").rpartition(":")
    if address is None or not int(port):
        return address
    if int(port) + number > 65535:
        wrong = f"the port of worker {number} would be {int(port) + number}, which there isn't"
        raise incomplete(consumer, "http", wrong, "give a lower one, or start fewer workers")
    return f"{host}:{int(port) + number}"
