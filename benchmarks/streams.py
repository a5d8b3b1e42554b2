"""Filling the stream: by the bridge's own process, and by the plain client with the same bytes.

Both are timed by the same clock, NATS' own: from when a tenth of the messages is stored until the last is, so
that what either does before its first message flows does not count.

``python -m benchmarks.streams KIND FOLDER CONFIG ROWS`` is the plain client.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.clients import ROOT
from benchmarks.measure import cpu_seconds, memory
from orthanc_events_bridge.bridge import Source
from orthanc_events_bridge.bridge.config import load
from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxReader
from orthanc_events_bridge.status import BridgeView
from orthanc_events_bridge.testing.processes import Server, wait_until
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.nats import NatsTransport
from orthanc_events_bridge.transports.nats_options import NatsOptions

STREAM = "ORTHANC_EVENTS"
#: What nats-py allows to be under way by default.
_PENDING = 4000


@dataclass(frozen=True, slots=True)
class Drained:
    """What one filling of the stream took.

    :param rate: events per second, behind the first tenth.
    :param cpu: microseconds per event of the process that sent them, without its start.
    :param memory: its peak, MiB.
    :param parts: events per second in the first and in the last tenth.
    """

    rate: float
    cpu: float
    memory: float
    parts: tuple[float, float]


class BridgeProcess(Server):
    """The bridge, started by hand beside an outbox."""

    title = "the bridge"

    def __init__(self, outbox: Folder, config: Path) -> None:
        super().__init__(outbox.path.parent / "bridge-process")
        self._outbox = outbox.path
        self._config = config

    def _command(self) -> list[str]:
        module = [sys.executable, "-m", "orthanc_events_bridge", "run"]
        return [*module, "--outbox", str(self._outbox), "--config", str(self._config)]

    def _is_ready(self) -> bool:
        return True


def by_bridge(url: str, folder: Folder, config: Path, events: int, last: int) -> Drained:
    """Let the bridge drain an outbox into a new stream.

    :param last: the position that it has to reach.
    """
    asyncio.run(_delete_stream(url))
    view = BridgeView(folder.bridge)
    begun: tuple[int, float] | None = None
    with BridgeProcess(folder, config) as bridge:

        def done() -> bool:
            nonlocal begun
            position = max((transport["position"] for transport in view.transports()), default=0)
            if begun is None and position > last - events:  # its start is over
                begun = position, cpu_seconds(bridge.pid)
            return position >= last

        if not wait_until(done, 600, every=0.05):
            raise TimeoutError(f"the bridge did not drain the outbox:\n{bridge.log_text()[-2000:]}")
        cpu, peak = cpu_seconds(bridge.pid), memory(bridge.pid, "VmHWM")
    view.close()
    position, cpu_before = begun or (last, cpu)
    each = 1e6 * (cpu - cpu_before) / (last - position) if position < last else math.nan
    return asyncio.run(_result(url, events, each, peak))


def by_plain_client(kind: str, url: str, folder: Folder, config: Path, events: int) -> Drained:
    """Send the same bytes with the same headers to the same subjects of the same stream, made anew.

    They are mapped beforehand, and only sent while the clock runs.

    :param kind: ``publish_async`` or ``inbox``.
    """
    asyncio.run(_delete_stream(url))
    arguments = [kind, str(folder.path), str(config), str(events)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.streams", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    used = json.loads(run.stdout)
    return asyncio.run(_result(url, events, 1e6 * used["cpu"] / events, used["memory"]))


# What the stream says.


async def _delete_stream(url: str) -> None:
    client = await nats.connect(url)
    await client.request(f"$JS.API.STREAM.DELETE.{STREAM}", timeout=60)
    await client.close()


async def _result(url: str, events: int, cpu: float, peak: float) -> Drained:
    client = await nats.connect(url)
    answer = json.loads((await client.request(f"$JS.API.STREAM.INFO.{STREAM}", timeout=10)).data)
    state = answer["state"]
    if state["messages"] != events:
        raise RuntimeError(f"the stream holds {state['messages']} events, {events} were sent")
    tenth = events // 10
    marks = (1, tenth, events - tenth + 1, events)
    times = [await _stored(client, number) for number in marks]
    await client.close()
    parts = (tenth / (times[1] - times[0]), tenth / (times[3] - times[2]))
    return Drained((events - tenth) / (times[3] - times[1]), cpu, peak, parts)


async def _stored(client: Client, number: int) -> float:
    """When a message was stored, seconds since the epoch."""
    question = json.dumps({"seq": number}).encode()
    answer = json.loads((await client.request(f"$JS.API.STREAM.MSG.GET.{STREAM}", question, timeout=10)).data)
    text = str(answer["message"]["time"])
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


# The plain client.


async def _publish_async(client: Client, prepared: Sequence[tuple[str, bytes, dict[str, str]]]) -> None:
    """As nats-py's documentation has it."""
    jetstream = client.jetstream(publish_async_max_pending=_PENDING)
    for subject, body, headers in prepared:
        await jetstream.publish_async(subject, body, headers=headers)
    await jetstream.publish_async_completed()


async def _inbox(client: Client, prepared: Sequence[tuple[str, bytes, dict[str, str]]]) -> None:
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
    for sent, (subject, body, headers) in enumerate(prepared):
        while sent - acknowledged >= _PENDING:
            progress.clear()
            await progress.wait()
        await client.publish(subject, body, inbox, headers)
        if sent % 100 == 0:
            await asyncio.sleep(0)
    while acknowledged < len(prepared):
        progress.clear()
        await progress.wait()


def _mapped(folder: Folder, events: int) -> list[Outgoing]:
    reader, state = OutboxReader(folder.outbox), State(folder.path.parent / "unused.db")
    source = Source(reader, state)
    _, _, last = reader.extent()
    rows = reader.rows(last - events, events)
    mapped = [to_outgoing(row, source.shape(row.settings), source.recorder) for row in rows]
    reader.close()
    state.close()
    return mapped


async def _send(kind: str, folder: Folder, config: Path, events: int) -> dict[str, Any]:
    options = load(config).transports[0]
    assert isinstance(options, NatsOptions)
    prepared = [
        (
            f"{options.subject_prefix}.{event.site}.{event.level}.{event.verb}.{event.partition}",
            event.body,
            {"Nats-Msg-Id": event.id, "content-type": event.content_type},
        )
        for event in _mapped(folder, events)
    ]
    declaring = NatsTransport(options)
    await declaring.connect()  # the same stream as the bridge's
    await declaring.close()
    client = await nats.connect(options.servers[0])
    gc.collect()
    gc.freeze()  # what was prepared shall not cost this side anything while the clock runs
    cpu = time.process_time()
    await {"publish_async": _publish_async, "inbox": _inbox}[kind](client, prepared)
    cpu = time.process_time() - cpu
    await client.close()
    return {"cpu": cpu, "memory": memory(os.getpid(), "VmHWM")}


def _main(kind: str, folder: str, config: str, events: str) -> None:
    print(json.dumps(asyncio.run(_send(kind, Folder(Path(folder)), Path(config), int(events)))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
