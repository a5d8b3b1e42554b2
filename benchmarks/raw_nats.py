"""The plain client of NATS: nats-py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.raw import Confirmed, Raw, Way
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.nats_options import NatsOptions

#: What nats-py allows to be under way by default.
_PENDING = 4000
_STREAM = "ORTHANC_EVENTS"

#: Subject, body, headers.
_Message = tuple[str, bytes, dict[str, str]]


class RawNats(Raw[_Message]):
    """To the stream's subjects, with the event's id for JetStream to remove duplicates by."""

    ways: ClassVar = {
        "publish_async": Way("nats-py `publish_async`"),
        "inbox": Way("nats-py with an own inbox", held=False),
    }
    how = (
        "nats-py by `publish_async` (4000 under way at most, its default), and by a loop of our own, made for speed,"
        " with one reply inbox"
    )
    options: NatsOptions

    def prepare(self, event: Outgoing) -> _Message:
        subject = f"{self.options.subject_prefix}.{event.site}.{event.level}.{event.verb}.{event.partition}"
        return subject, event.body, {"Nats-Msg-Id": event.id, "content-type": event.content_type}

    async def send(self, way: str, messages: Sequence[_Message], confirmed: Confirmed) -> None:
        client = await nats.connect(self.options.servers[0])
        await {"publish_async": _publish_async, "inbox": _inbox}[way](client, messages)
        confirmed(len(messages))
        await client.close()

    async def send_one(self, message: _Message) -> None:
        subject, body, headers = message
        client = await nats.connect(self.options.servers[0])
        await client.jetstream().publish(subject, body, headers=headers)
        await client.close()

    async def stored_at(self, numbers: Sequence[int]) -> list[float]:
        client = await nats.connect(self.options.servers[0])
        times = [await _stored(client, number) for number in numbers]
        await client.close()
        return times


async def _publish_async(client: Client, messages: Sequence[_Message]) -> None:
    """As nats-py's documentation has it."""
    jetstream = client.jetstream(publish_async_max_pending=_PENDING)
    for subject, body, headers in messages:
        await jetstream.publish_async(subject, body, headers=headers)
    await jetstream.publish_async_completed()


async def _inbox(client: Client, messages: Sequence[_Message]) -> None:
    """The acknowledgements by one subscription of our own, counted."""
    inbox = client.new_inbox()
    acknowledged = 0
    progress = asyncio.Event()

    async def on_answer(message: Msg) -> None:
        nonlocal acknowledged
        if b'"error"' in message.data:
            raise RuntimeError(message.data.decode())
        acknowledged += 1
        progress.set()

    await client.subscribe(inbox, cb=on_answer)
    for sent, (subject, body, headers) in enumerate(messages):
        while sent - acknowledged >= _PENDING:
            progress.clear()
            await progress.wait()
        await client.publish(subject, body, inbox, headers)
        if sent % 100 == 0:
            await asyncio.sleep(0)
    while acknowledged < len(messages):
        progress.clear()
        await progress.wait()


async def _stored(client: Client, number: int) -> float:
    question = json.dumps({"seq": number}).encode()
    answer = json.loads((await client.request(f"$JS.API.STREAM.MSG.GET.{_STREAM}", question, timeout=10)).data)
    text = str(answer["message"]["time"])
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
