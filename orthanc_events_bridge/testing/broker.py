"""What a plain client of the broker reads back, with a decoder of its own.

Nothing here uses the package's own mapping or transports: a fault of theirs must not be able to hide itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

#: The stream's name in the wire contract.
STREAM: Final = "ORTHANC_EVENTS"

_PLURALS = {
    "patient": "patients",
    "study": "studies",
    "series": "series",
    "instance": "instances",
    "job": "jobs",
}


class MalformedEventError(Exception):
    """A message is not what the wire contract promises."""


@dataclass(frozen=True, slots=True)
class Event:
    """One CloudEvent as it was read.

    :param kind: the type without prefix and version: ``study.created``.
    :param resource: Orthanc's id of what changed; empty for the server.
    :param sequence: of the outbox.
    :param key: the partition key.
    :param change: the change as Orthanc spells it.
    :param seq: the change's number in Orthanc's log, where it has one.
    :param position: the message's number in the stream.
    """

    id: str
    kind: str
    resource: str
    source: str
    recorder: str
    sequence: int
    key: str
    time: str = ""
    change: str = ""
    seq: int | None = None
    address: str = ""
    position: int = 0


def decode(body: bytes, address: str = "", position: int = 0) -> Event:
    """Read a message in structured mode.

    :raises MalformedEventError: it is not one, or it contradicts itself.
    """
    try:
        document = json.loads(body)
        if document["specversion"] != "1.0":
            raise MalformedEventError(f"message {position} at {address}: specversion {document['specversion']!r}")
        level, verb, version = document["type"].rsplit(".", 3)[-3:]
        data = document["data"]
        resource = data["id"] or ""
        subject = f"{_PLURALS[level]}/{resource}" if level in _PLURALS else None
        if version != "v1" or data["level"] != level or document.get("subject") != subject:
            raise MalformedEventError(
                f"message {position} at {address}: type {document['type']!r}, subject "
                f"{document.get('subject')!r} and data of a {data['level']} contradict each other"
            )
        return Event(
            id=document["id"],
            kind=f"{level}.{verb}",
            resource=resource,
            source=document["source"],
            recorder=document["recorder"],
            sequence=int(document["sequence"]),
            key=document["partitionkey"],
            time=document["time"],
            change=data["change"],
            seq=data.get("seq"),
            address=address,
            position=position,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedEventError(f"message {position} at {address}: {type(error).__name__}: {error}") from error


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
