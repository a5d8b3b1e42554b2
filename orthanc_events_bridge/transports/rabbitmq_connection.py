"""Connections to RabbitMQ, for publishing and for subscribing alike.

What aiormq leaves to us, as measured: a frozen server surfaces as a bare ``CancelledError``, and closing waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import aiormq
from aiormq.exceptions import AMQPError
from yarl import URL

from orthanc_events_bridge.errors import (
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.rabbitmq_amqp import Amqp, Channel, ClosedError, closed, words
from orthanc_events_bridge.transports.rabbitmq_defect import defect
from orthanc_events_bridge.transports.rabbitmq_login import HungUpError, not_connected
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_sockets import Sockets
from orthanc_events_bridge.transports.tls import client_context, cut

__all__ = ["Channel", "ClosedError", "Connection"]

_T = TypeVar("_T")

#: Seconds that saying goodbye may take, and then cutting the connection off.
_GOODBYE: Final = 0.4
_CUTTING: Final = 0.3
#: Seconds between two heartbeats; a server that is silent for three and a half times that is given up.
_HEARTBEAT: Final = 10


class Connection:
    """One connection to one server; made by `Servers.open`, used once, and ended by `give_up`.

    :ivar fault: why it can't be used any more.
    :ivar alarm: why the server takes no messages at the moment; empty when it takes them.
    """

    def __init__(self, options: RabbitOptions, server: str) -> None:
        host, port, vhost = options.address(server)
        self.vhost = vhost
        self.url = f"{'amqps' if options.tls_required else 'amqp'}://{f'[{host}]' if ':' in host else host}:{port}"
        self.fault: TransportError | None = None
        self.alarm = ""
        self._faulty: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._number = 0  # of the channel that was opened last
        self._options = options
        self._server = server
        tls = client_context(options.tls, "RabbitMQ") if options.tls_required else None
        self._sockets = Sockets(host, port, tls, options.tls.server_hostname)
        query = {"heartbeat": str(_HEARTBEAT), "name": f"orthanc-events-bridge {options.name}", "auth": options.auth}
        # The password is read now, so that a rotated one is used.
        user, password = (options.user, options.secret("password")) if options.user else (None, None)
        address = URL.build(scheme="amqp", host=host, port=port, user=user, password=password, query=query)
        self._amqp = Amqp(address, transport_factory=self._sockets)
        self._amqp.vhost = vhost
        self._amqp.on_blocked = self._on_blocked

    @classmethod
    async def open(cls, options: RabbitOptions, server: str) -> Connection:
        """Connect to a server.

        :raises NotConnectedError: it can't be reached.
        :raises TransportConfigurationError: it refuses us, or we refuse it.
        """
        # It was on its way down, or its answer got lost behind the end of the connection.
        with contextlib.suppress(HungUpError):
            return await cls._open(options, server)
        try:
            return await cls._open(options, server)
        except HungUpError as error:
            raise TransportConfigurationError(error.message, error.remedy) from None

    @classmethod
    async def _open(cls, options: RabbitOptions, server: str) -> Connection:
        connection = cls(options, server)
        opening = asyncio.ensure_future(connection._amqp.connect())
        try:
            await asyncio.wait([opening], timeout=options.connect_timeout)
            if not opening.done():
                raise connection._refused(TimeoutError())
            if opening.cancelled():
                raise connection._refused(ConnectionError("given up"))
            error = opening.exception()
            if error is not None:
                raise connection._refused(error)
        except BaseException:
            opening.cancel()
            await connection.give_up()
            await asyncio.wait([opening], timeout=_CUTTING)  # its socket is not left open behind us
            raise
        connection._amqp.closing.add_done_callback(connection._on_closed)
        return connection

    def _refused(self, error: BaseException) -> TransportError:
        return not_connected(self.url, self._options, error, vhost=self.vhost, encrypted=self.encrypted)

    async def another(self) -> Connection:
        """Open a second one to the same server.

        :raises TransportError: as `open`.
        """
        return await self.open(self._options, self._server)

    # What it is.

    @property
    def encrypted(self) -> bool:
        """Whether it runs over TLS."""
        return self._sockets.encrypted

    @property
    def version(self) -> str:
        """The server's version."""
        return str(dict(self._amqp.server_properties).get("version", "of unknown version"))

    @property
    def major(self) -> int:
        """The first number of it; 0 if that is unknown."""
        first = self.version.partition(".")[0]
        return int(first) if first.isdecimal() else 0

    @property
    def frame_max(self) -> int:
        """How large a frame can be, in bytes, its own eight included."""
        return self._amqp.connection_tune.frame_max or 131072

    # What goes over it.

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Open a channel.

        :param confirms: the server is to confirm what is published on it.
        :raises TransportError: as `ask`.
        """
        self.check()
        if self.alarm:  # it doesn't read what we would ask
            raise self.alarmed()
        # None that was used a moment ago: what RabbitMQ has closed it still waits to hear of from us.
        most = self._amqp.connection_tune.channel_max or 65535
        numbers = itertools.chain(range(self._number + 1, most + 1), range(1, self._number + 1))
        number = next((number for number in numbers if number not in self._amqp.channels), 0)
        if not number:
            raise TransportConfigurationError(
                f"RabbitMQ lets a connection have {most} channels only", "raise channel_max in rabbitmq.conf"
            )
        self._number = number
        channel = Channel(self._amqp, number, confirms=confirms)
        channel.on_defect = self.defect
        self._amqp.channels[number] = channel
        try:
            await self.ask(channel.open())
        except ClosedError as error:
            raise self.lost(error) from error
        return channel

    async def end(self, channel: Channel) -> None:
        """Close a channel. Never raises, and does not wait for a server that doesn't answer."""
        if channel.fault is None and self.fault is None:
            with contextlib.suppress(TransportError, ClosedError):
                await self.ask(channel.close())

    async def ask(self, question: Awaitable[_T]) -> _T:
        """The answer to a request on a channel, within ``connect_timeout``.

        :raises ClosedError: the server has closed the channel for it.
        :raises TransportError: there is no answer, or there will be none while an alarm is on.
        """
        asking = asyncio.ensure_future(question)
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at, also if nobody waits
        try:
            if not await self.wait(asking, self._options.connect_timeout):
                if self.alarm:  # then the server doesn't even read from this connection
                    raise self.alarmed()
                raise NotConnectedError(
                    f"RabbitMQ at {self.url} does not answer within {self._options.connect_timeout:g} s",
                    "check that the server is well",
                )
        finally:
            if not asking.done():
                asking.cancel()
        if asking.cancelled():  # aiormq's way to say that the connection is gone; to us it would be an order to stop
            raise self.lost()
        error = asking.exception()
        if error is None:
            return asking.result()
        # Not chained: aiormq's errors lead back to themselves.
        if isinstance(error, aiormq.exceptions.ChannelClosed):
            raise closed(error)
        if isinstance(error, AMQPError | OSError | RuntimeError):
            raise self.lost(error)
        raise error

    def write(self, frames: bytes) -> None:
        """Hand over whole frames as the protocol spells them."""
        assert self._sockets.writer is not None
        self._sockets.writer.write(frames)

    @property
    def waiting(self) -> int:
        """How many bytes the socket has not taken yet."""
        return self._sockets.waiting

    async def drain(self) -> None:
        """Wait while too much is under way to the socket.

        :raises OSError: the connection is gone.
        """
        assert self._sockets.writer is not None
        await self._sockets.writer.drain()

    async def wait(self, future: asyncio.Future[Any], seconds: float | None) -> bool:
        """Wait for something, but not longer than the connection lasts.

        :return: whether it came in time.
        :raises TransportError: the connection can't be used any more.
        """
        if not future.done():
            self.check()
            await asyncio.wait({future, self._faulty}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                self.check()
        return future.done()

    async def wait_for(self, event: asyncio.Event, seconds: float | None = None) -> bool:
        """The same for an event, or for as long as it takes."""
        waiting = asyncio.ensure_future(event.wait())
        try:
            return await self.wait(waiting, seconds)
        finally:
            waiting.cancel()

    # Its end.

    def fail(self, error: TransportError) -> None:
        """From now on it can't be used any more; who waits for it is told."""
        if self.fault is None:
            self.fault = error
        if not self._faulty.done():
            self._faulty.set_result(None)

    def defect(self, error: BaseException) -> None:
        """Something of ours has failed that should not: the connection ends, so that what was held comes again."""
        self.fail(defect(self.url, error))

    def watched(self, task: asyncio.Task[Any]) -> None:
        """To be called when a task has ended that nobody waits for."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.defect(error)

    def guarded(self, call: Callable[..., None]) -> Callable[..., None]:
        """The same for what the event loop is to call: it would only log what that raises."""

        def guard(*arguments: object) -> None:
            try:
                call(*arguments)
            except Exception as error:
                self.defect(error)

        return guard

    def when_lost(self, tell: Callable[[], None]) -> None:
        """Have something called as soon as it can't be used any more; at once where it can't be already."""
        self._faulty.add_done_callback(lambda done: tell())

    def lost(self, error: BaseException | None = None) -> NotConnectedError:
        """The error that says so."""
        text = f": {words(error)}" if error and words(error) else ""
        return NotConnectedError(
            f"the connection to RabbitMQ at {self.url} was lost{text}", "it is made again by itself"
        )

    def check(self) -> None:
        """Is it still there?

        :raises TransportError: no.
        """
        if self.fault is None and not self._amqp.is_opened:
            self.fail(self.lost())
        if self.fault is not None:
            raise self.fault

    def alarmed(self) -> RefusedError:
        """The error that says that an alarm is on."""
        return RefusedError(
            f"RabbitMQ takes no events, since an alarm is on: {self.alarm}",
            "give the server memory or disk, or raise vm_memory_high_watermark or lower disk_free_limit; it goes on by "
            "itself",
        )

    def _on_blocked(self, reason: str) -> None:
        self.alarm = reason

    def _on_closed(self, closing: asyncio.Future[Any]) -> None:
        self.fail(self.lost(None if closing.cancelled() else closing.exception()))

    async def give_up(self, goodbye: float = _GOODBYE) -> None:
        """End it: politely where the server answers at once; nothing that a frozen one doesn't take holds it up.

        :param goodbye: seconds that being polite may take; cutting it off takes 0.3 more at most.
        """
        # While an alarm is on, the server does not read what we would say.
        healthy = self.fault is None and self._amqp.is_opened and not self.alarm
        self.fail(self.lost())
        writer = self._sockets.writer
        if writer is None:
            return
        if not healthy or self.waiting:
            cut(writer)
        closing = asyncio.ensure_future(self._amqp.close())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([closing], timeout=goodbye)
        if not closing.done():
            cut(writer)
            await asyncio.wait([closing], timeout=_CUTTING)
