"""NATS for tests: the server, what an administrator does to it, and a plain client that reads it back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext

from orthanc_events_bridge.testing.brokers.base import Broker
from orthanc_events_bridge.testing.brokers.events import Event, decode
from orthanc_events_bridge.testing.servers import NatsServer

#: The stream's name in the wire contract.
STREAM: Final = "ORTHANC_EVENTS"


@dataclass(frozen=True, slots=True)
class StreamState:
    """How much is in a stream: messages kept, and the number of the last one that was ever stored."""

    messages: int
    last: int


def read_nats(url: str, *, stream: str = STREAM, after: int = 0, timeout: float = 60.0, **options: Any) -> list[Event]:
    """Read everything that a stream holds now, in its order.

    :param after: only what is behind this position.
    :param timeout: in seconds, for all of it.
    :param options: for the connection (user, password, tls …).
    :raises TimeoutError: it took longer.
    :raises MalformedEventError: a message is not an event.
    """
    messages = asyncio.run(asyncio.wait_for(_read(url, stream, after, options), timeout))
    return [decode(message.data, message.subject, message.metadata.sequence.stream) for message in messages]


def nats_state(url: str, *, stream: str = STREAM, **options: Any) -> StreamState | None:
    """Return how much a stream holds; None where it, or the server, can't be reached."""
    return asyncio.run(_with_state(url, stream, options, lambda state: True, time.monotonic()))


def wait_nats(
    url: str,
    count: int | Callable[[StreamState], bool] | None = None,
    *,
    quiet: float = 1.0,
    timeout: float = 60.0,
    stream: str = STREAM,
    **options: Any,
) -> StreamState:
    """Wait until a stream is quiet, or until it holds enough. The server may be down, the stream missing.

    :param count: wait until so many messages were ever stored, or until a condition on its state holds; by
        default until nothing new has come for ``quiet`` seconds (at least one message must be there).
    :return: its state at the end.
    :raises TimeoutError: not within ``timeout`` seconds; the message says what was there.
    """
    last: list[StreamState] = [StreamState(0, 0)]
    since = [time.monotonic()]

    def enough(state: StreamState) -> bool:
        if state != last[0]:
            last[0] = state
            since[0] = time.monotonic()
        if count is None:
            return state.last > 0 and time.monotonic() - since[0] >= quiet
        return state.last >= count if isinstance(count, int) else count(state)

    found = asyncio.run(_with_state(url, stream, options, enough, time.monotonic() + timeout))
    if found is None:
        wanted = "quiet" if count is None else f"at {count}" if isinstance(count, int) else "as expected"
        raise TimeoutError(
            f"stream {stream} was not {wanted} within {timeout:.0f} s: it held {last[0].messages} messages, "
            f"the last one number {last[0].last}"
        )
    return found


async def _silent(error: Exception) -> None:
    """Take what nats-py would otherwise log with a traceback."""


async def _connect(url: str, options: dict[str, Any]) -> Client:
    # nats-py tries a dead server for two minutes, and leaves its socket open where a frozen one is silent.
    address = urlsplit(url)
    async with asyncio.timeout(2):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            await reader.readexactly(5)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the server says nothing") from error
        finally:
            writer.close()
    settings = {"allow_reconnect": False, "max_reconnect_attempts": 1, "error_cb": _silent} | options
    return await nats.connect(url, **settings)


async def _with_state(
    url: str, stream: str, options: dict[str, Any], enough: Callable[[StreamState], bool], end: float
) -> StreamState | None:
    client: Client | None = None
    try:
        while True:
            try:
                if client is None:
                    client = await _connect(url, options)
                info = await client.jetstream(timeout=2).stream_info(stream)
                state = StreamState(info.state.messages, info.state.last_seq)
                if enough(state):
                    return state
            except nats.js.errors.NotFoundError:
                pass
            except (nats.errors.Error, OSError, TimeoutError):
                await _give_up(client)
                client = None
            if time.monotonic() > end:
                return None
            await asyncio.sleep(0.02)
    finally:
        await _give_up(client)


async def _give_up(client: Client | None) -> None:
    if client is not None:
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
            await asyncio.wait_for(client.close(), 2)


async def _read(url: str, stream: str, after: int, options: dict[str, Any]) -> list[Msg]:
    client = await _connect(url, options)
    try:
        context = client.jetstream(timeout=5)
        info = await context.stream_info(stream)
        last = info.state.last_seq
        if info.state.messages == 0 or last <= after:
            return []
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=after + 1,
            ack_policy=AckPolicy.NONE,
            mem_storage=True,
        )
        messages: list[Msg] = []
        done = asyncio.get_running_loop().create_future()

        async def take(message: Msg) -> None:
            messages.append(message)
            if message.metadata.sequence.stream >= last and not done.done():
                done.set_result(None)

        subscription = await context.subscribe(
            ">",
            stream=stream,
            cb=take,
            ordered_consumer=True,
            config=config,
            pending_msgs_limit=-1,
            pending_bytes_limit=-1,
        )
        await done
        await subscription.unsubscribe()
        return [message for message in messages if message.metadata.sequence.stream <= last]
    finally:
        await _give_up(client)


class NatsBroker(Broker):
    """One server; the place is the stream."""

    kind = "nats"
    title = "NATS"
    deduplicates = True
    full_words = ("full", "10077", "purge")
    impatient = ("ack_timeout: 1s", "connect_timeout: 1s")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def options(self, *, port: int | None = None) -> list[str]:
        return [f'servers: ["nats://127.0.0.1:{port or self.port}"]']

    def __init__(self, server: NatsServer) -> None:
        super().__init__(server)
        self.server: NatsServer = server
        self._login: dict[str, Any] = {}

    def read(self) -> list[Event]:
        return read_nats(self.url, **self._login)

    def stored(self) -> int:
        state = nats_state(self.url, **self._login)
        return state.last if state else 0

    def remove_place(self) -> None:
        self.administrate(lambda stream: stream.delete_stream(STREAM))

    @classmethod
    def limit_options(cls, events: int) -> list[str]:
        return ["limits:", f"  max_messages: {events}"]

    def make_room(self, through: int) -> None:
        self.administrate(lambda stream: stream.purge_stream(STREAM, seq=through + 1))

    def demand(self, password: str) -> None:
        self._login = {"user": "orthanc", "password": password}
        self.server.config = f'authorization {{ user: "orthanc", password: "{password}" }}'
        if self.running:
            self.server.reload()

    def login(self, password_file: Path) -> list[str]:
        return ["user: orthanc", f"password_file: {password_file}"]

    @contextlib.contextmanager
    def small(self, size: int) -> Iterator[None]:
        self.administrate(lambda stream: _largest(stream, size))
        yield
        self.administrate(lambda stream: _largest(stream, -1))

    def administrate(self, work: Callable[[JetStreamContext], Awaitable[Any]]) -> Any:
        """Do something as an administrator of the stream."""

        async def connected() -> Any:
            client = await _connect(self.url, self._login)
            try:
                return await work(client.jetstream())
            finally:
                await _give_up(client)

        return asyncio.run(connected())


async def _largest(stream: JetStreamContext, size: int) -> None:
    config = (await stream.stream_info(STREAM)).config
    config.max_msg_size = size
    await stream.update_stream(config)
