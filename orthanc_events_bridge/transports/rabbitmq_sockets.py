"""The socket of a connection to RabbitMQ."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
from typing import Any, Final

from aiormq.connection import TransportFactory
from yarl import URL

#: Seconds until a name's next address is tried as well: one that swallows everything would take all the time there is
#: (RFC 8305, section 8).
_NEXT_ADDRESS: Final = 0.25


class Sockets(TransportFactory):
    """Opens the socket, and keeps it: only so can it be written to in one go, and cut off."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, name: str | None) -> None:
        self._address = host, port
        self._arguments: dict[str, Any] = {"ssl": tls, "server_hostname": name or host} if tls is not None else {}
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **arguments: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await asyncio.open_connection(sock=await _first(*self._address), **self._arguments)
        return reader, self.writer

    @property
    def encrypted(self) -> bool:
        """Whether it is open, or was, and with TLS."""
        return self.writer is not None and bool(self._arguments)

    @property
    def waiting(self) -> int:
        """How many bytes it has not taken yet."""
        # A closed one of TLS can't be asked.
        if self.writer is None or self.writer.transport.is_closing():
            return 0
        return self.writer.transport.get_write_buffer_size()


async def _first(host: str, port: int) -> socket.socket:
    """A socket to the first of a name's addresses that answers.

    asyncio does the same by ``happy_eyeballs_delay``; but Python 3.11 forgets the socket there, open, when it is
    cancelled in the moment in which it is connected.

    :raises OSError: none does.
    """
    loop = asyncio.get_running_loop()
    by_family: dict[int, list[Any]] = {}
    for found in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        by_family.setdefault(found[0], []).append(found)
    left = [one for turn in itertools.zip_longest(*by_family.values()) for one in turn if one is not None]
    sockets: list[socket.socket] = []
    racing: set[asyncio.Task[socket.socket]] = set()
    errors: list[OSError] = []
    winner: socket.socket | None = None

    async def connect(family: int, kind: int, protocol: int, name: str, address: Any) -> socket.socket:
        one = socket.socket(family, kind, protocol)
        sockets.append(one)
        one.setblocking(False)
        await loop.sock_connect(one, address)
        return one

    try:
        while winner is None and (left or racing):
            if left:
                racing.add(asyncio.create_task(connect(*left.pop(0))))
            patience = _NEXT_ADDRESS if left else None
            done, racing = await asyncio.wait(racing, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    winner = task.result()
                elif isinstance(error, OSError):
                    errors.append(error)
                else:
                    raise error
        if winner is None:
            raise errors[0] if len(errors) == 1 else OSError(", ".join(map(str, errors)))
        return winner
    finally:
        try:
            for task in racing:
                task.cancel()
            if racing:
                await asyncio.wait(racing)
        finally:
            for one in sockets:
                if one is not winner:
                    one.close()
