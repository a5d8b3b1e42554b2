"""RabbitMQ for tests: what an administrator does to it, and a plain client that reads it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import aiormq
import aiormq.abc
from pamqp.common import FieldValue

from orthanc_events_bridge.testing.brokers.base import Broker
from orthanc_events_bridge.testing.brokers.events import Event, decode
from orthanc_events_bridge.testing.processes import Server
from orthanc_events_bridge.testing.rabbitmq_server import RabbitServer

__all__ = ["EXCHANGE", "HISTORY", "RabbitBroker", "RabbitServer", "rabbit_messages", "rabbit_stored", "read_rabbit"]

_T = TypeVar("_T")

#: The names of the wire contract.
EXCHANGE: Final = "orthanc.events"
HISTORY: Final = "orthanc.events.history"

#: Seconds after which a stream that shows nothing is empty; more messages than are ever stored together.
_EMPTY: Final = 2.0
_TOGETHER: Final = 10_000
_POLL: Final = 0.1


def read_rabbit(url: str, *, queue: str = HISTORY, timeout: float = 60.0) -> list[Event]:
    """Read everything that the history stream holds now, in its order.

    :param timeout: in seconds, for all of it.
    :raises TimeoutError: it took longer.
    :raises MalformedEventError: a message is not an event.
    """
    messages = asyncio.run(asyncio.wait_for(rabbit_messages(url, queue), timeout))
    return [
        decode(message.body, message.routing_key or "", position) for position, message in enumerate(messages, start=1)
    ]


def rabbit_stored(url: str, *, queue: str = HISTORY, timeout: float = 60.0) -> int:
    """Return how many events a stream holds; 0 where it, or the server, can't be asked."""
    try:
        return len(asyncio.run(asyncio.wait_for(rabbit_messages(url, queue), timeout)))
    except (aiormq.exceptions.AMQPError, OSError, TimeoutError, asyncio.CancelledError):
        return 0


async def rabbit_messages(url: str, queue: str) -> list[aiormq.abc.DeliveredMessage]:
    """Everything that a stream queue holds now, as a plain client gets it."""
    while True:
        try:
            return await _with_channel(url, lambda channel: _read(channel, queue))
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            if "running replica" not in str(error):
                raise
        await asyncio.sleep(_POLL)  # the server has just started, and its streams are still to come


async def _with_channel(url: str, work: Callable[[aiormq.abc.AbstractChannel], Awaitable[_T]]) -> _T:
    connection = await aiormq.connect(url)
    try:
        return await work(await connection.channel())
    finally:
        await connection.close()


async def _read(channel: aiormq.abc.AbstractChannel, stream: str) -> list[aiormq.abc.DeliveredMessage]:
    """Read a stream to its end, and leave nothing in it: the server's count of messages is seconds old."""
    last = await _last(channel, stream)
    messages: list[aiormq.abc.DeliveredMessage] = []
    if last < 0:
        return messages
    done = asyncio.get_running_loop().create_future()

    async def take(message: aiormq.abc.DeliveredMessage) -> None:
        messages.append(message)
        await channel.basic_ack(message.delivery_tag or 0, wait=False)
        if _offset(message) >= last and not done.done():
            done.set_result(None)

    await channel.basic_qos(prefetch_count=1000)
    await channel.basic_consume(stream, take, arguments={"x-stream-offset": "first"})
    await done
    return [message for message in messages if _offset(message) <= last]


async def _last(channel: aiormq.abc.AbstractChannel, stream: str) -> int:
    """The number of a stream's last message; -1 where nothing shows up."""
    seen: list[int] = []
    something = asyncio.Event()

    async def see(message: aiormq.abc.DeliveredMessage) -> None:
        seen.append(_offset(message))
        something.set()

    await channel.basic_qos(prefetch_count=_TOGETHER)
    consuming = await channel.basic_consume(stream, see, arguments={"x-stream-offset": "last"})
    while not seen:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(something.wait(), _EMPTY)
        # What is stored together is handed over before the next question is answered.
        if not (await channel.queue_declare(stream, passive=True)).message_count:
            break
    await channel.basic_cancel(consuming.consumer_tag or "")
    return max(seen, default=-1)


def _offset(message: aiormq.abc.DeliveredMessage) -> int:
    return int(str((message.header.properties.headers or {})["x-stream-offset"]))


class RabbitBroker(Broker):
    """One node; the place is the exchange and the history stream."""

    kind = "rabbitmq"
    title = "RabbitMQ"
    impatient = ("ack_timeout: 1s", "connect_timeout: 1s")
    #: Of a queue that an operator has bound to the exchange, and that is full.
    full_words = ("queue", "refus")

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._user, self._password = "guest", "guest"

    @property
    def url(self) -> str:
        return f"amqp://{self._user}:{self._password}@127.0.0.1:{self.port}/"

    def options(self, *, port: int | None = None) -> list[str]:
        return [f'servers: ["amqp://127.0.0.1:{port or self.port}"]']

    def read(self) -> list[Event]:
        return read_rabbit(self.url)

    def stored(self) -> int:
        return rabbit_stored(self.url)

    def settle(self) -> None:
        # For about a second after its first stream was declared, RabbitMQ 3.10 has not written down that there are
        # streams at all: killed then, it never finds them again.
        self.server.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")  # type: ignore[attr-defined]

    def remove_place(self) -> None:
        async def remove(channel: aiormq.abc.AbstractChannel) -> None:
            await channel.queue_delete(HISTORY)
            await channel.exchange_delete(EXCHANGE)

        self.administrate(remove)

    def limit(self, events: int) -> None:
        """Bind a queue beside ours that refuses what it has no room for."""

        async def bind(channel: aiormq.abc.AbstractChannel) -> None:
            arguments: dict[str, FieldValue] = {"x-max-length": events, "x-overflow": "reject-publish"}
            await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            await channel.queue_declare("full", durable=True, arguments=arguments)
            await channel.queue_bind("full", EXCHANGE, "#")

        self.administrate(bind)

    def make_room(self, through: int) -> None:
        self.administrate(lambda channel: channel.queue_purge("full"))

    def demand(self, password: str) -> None:
        server = self.server
        assert isinstance(server, RabbitServer)
        self._user, self._password = "orthanc", password
        if self.running:
            server.ctl("change_password", self._user, password)
            server.ctl("close_all_connections", "the password was changed")
        else:
            server.config += f"\ndefault_user = {self._user}\ndefault_pass = {password}\n"

    def login(self, password_file: Path) -> list[str]:
        return [f"user: {self._user}", f"password_file: {password_file}"]

    @contextlib.contextmanager
    def small(self, size: int) -> Iterator[None]:
        self._largest(size)
        yield
        self._largest(128 * 2**20)

    def _largest(self, size: int) -> None:
        server = self.server
        assert isinstance(server, RabbitServer)
        # A channel learns of it when it is opened: by 3.10 in the one place, by 4.0 in the other.
        set_env, put = (
            f"application:set_env(rabbit, max_message_size, {size})",
            f"persistent_term:put(max_message_size, {size})",
        )
        server.ctl("eval", f"{set_env}, {put}.")
        server.ctl("close_all_connections", "the limit was changed")

    def administrate(self, work: Callable[[aiormq.abc.AbstractChannel], Awaitable[_T]], *, timeout: float = 30.0) -> _T:
        """Do something as an administrator, within so many seconds."""
        return asyncio.run(asyncio.wait_for(_with_channel(self.url, work), timeout))
