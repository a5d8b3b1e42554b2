"""A TCP proxy between a transport and its broker: it delays, narrows, swallows, counts turns, and cuts."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import Final

_END: Final = (0.0, b"")


class Link:
    """Passes bytes on, in both directions, each chunk late by the latency.

    :param broker: its port, on 127.0.0.1.
    :param latency: seconds, each way.
    :param bandwidth: bytes per second, each way of each connection; 0: as fast as it goes.
    :param port: to listen at; 0: any.
    :ivar swallows: whether what comes is thrown away, and nobody is told: a cable that was pulled. What was open then
        stays silent for good, as behind a firewall that has forgotten it.
    :ivar port: where a client connects.
    :ivar turns: how often the broker began to speak after the client had; a client that waits for each answer
        makes one for each question.
    """

    def __init__(self, broker: int, latency: float = 0.0, bandwidth: int = 0, *, port: int = 0) -> None:
        self.latency = latency
        self.bandwidth = bandwidth
        self.swallows = False
        self.turns = 0
        self._broker = broker
        self._client_spoke = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listening.getsockname()[1]
        self._start(self._accept)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._broker), timeout=5)
                broker.settimeout(None)
            except OSError:
                client.close()
                continue
            with contextlib.suppress(OSError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                broker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, broker}
            for source, target in ((client, broker), (broker, client)):
                chunks: queue.Queue[tuple[float, bytes]] = queue.Queue(256)
                self._start(self._read, source, chunks, source is client)
                self._start(self._write, target, chunks)

    def _read(self, source: socket.socket, chunks: queue.Queue[tuple[float, bytes]], is_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    if not is_client and self._client_spoke:
                        self.turns += 1
                    self._client_spoke = is_client
                chunks.put((time.monotonic() + self.latency, data))
        chunks.put(_END)

    def _write(self, target: socket.socket, chunks: queue.Queue[tuple[float, bytes]]) -> None:
        broken = False
        while (chunk := chunks.get()) != _END:
            time.sleep(max(0.0, chunk[0] - time.monotonic()))
            if self.bandwidth:
                time.sleep(len(chunk[1]) / self.bandwidth)
            broken = broken or self.swallows
            if not broken:
                try:
                    target.sendall(chunk[1])
                except OSError:
                    broken = True
        self._end(target)

    def _end(self, one: socket.socket) -> None:
        with self._lock:
            if one in self._sockets:
                self._sockets.discard(one)
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def cut(self) -> None:
        """End every connection, both ways, in the middle of whatever is under way."""
        for one in list(self._sockets):
            self._end(one)

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
