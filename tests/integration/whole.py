"""What the tests of the whole line share: lines that end quickly, and a reader of the stream with its own eyes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
from nats.aio.msg import Msg

from orthanc_events_bridge.testing.brokers import contract, make_broker
from orthanc_events_bridge.testing.guard import scratch_folder
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import MissingComponentError, require, skip_or_fail

#: In `BridgedOrthanc`'s shim, the place behind the package's import, where Orthanc's process can be prepared.
_BEHIND_IMPORT = "    from orthanc_events_bridge.plugin import start\n"
#: And the place before it.
_BEFORE_IMPORT = "\ntry:\n    spec = "


@contextlib.contextmanager
def started(
    folder: Path, *, before: str = "", behind: str = "", verbose: bool = False, **options: Any
) -> Iterator[Line]:
    """A running line. At its end Orthanc is killed, not stopped: that takes more than two seconds.

    :param before: Python for the shim, before the package is imported.
    :param behind: Python for the shim, behind it.
    :param verbose: Orthanc logs everything.
    :param options: of `Line`.
    """
    require("nats-server", "orthanc", "orthanc-python")
    line = Line(folder, **options)
    prepare(line.orthanc.shim_path, before=before, behind=behind)
    line.orthanc.verbose = verbose
    line.__enter__()
    try:
        yield line
        line.orthanc.close(kill=True)
        line.broker.server.close(kill=True)
    finally:
        line.orthanc._kill_all()
        line.broker.server._kill_all()


def prepare(shim: Path, *, before: str = "", behind: str = "") -> None:
    """Put Python into a shim."""
    text = shim.read_text("utf-8")
    assert _BEFORE_IMPORT in text and _BEHIND_IMPORT in text
    text = text.replace(_BEFORE_IMPORT, f"\n{before}{_BEFORE_IMPORT}")
    indented = "".join(f"    {code}\n" for code in behind.splitlines())
    shim.write_text(text.replace(_BEHIND_IMPORT, _BEHIND_IMPORT + indented), "utf-8")


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the stream, as a plain client reads it."""

    subject: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """The CloudEvent, which is as its schema says."""
        document: dict[str, Any] = json.loads(self.body)
        assert contract.fault(document) == ""
        return document

    @property
    def kind(self) -> str:
        """The type without prefix and version."""
        return ".".join(self.event["type"].rsplit(".", 3)[-3:-1])


def messages(url: str, stream: str = "ORTHANC_EVENTS") -> list[Message]:
    """Read everything that a stream holds now, in its order."""
    return asyncio.run(asyncio.wait_for(_messages(url, stream), 30))


async def _messages(url: str, stream: str) -> list[Message]:
    client = await nats.connect(url)
    try:
        context = client.jetstream()
        count = (await context.stream_info(stream)).state.messages
        if not count:
            return []
        read: asyncio.Queue[Msg] = asyncio.Queue()
        await context.subscribe(">", stream=stream, cb=read.put, ordered_consumer=True, pending_msgs_limit=-1)
        found = [await read.get() for _ in range(count)]
        return [Message(message.subject, dict(message.headers or {}), message.data) for message in found]
    finally:
        await client.close()


def broker_or_skip(kind: str) -> None:
    """End the test where a broker can't be had: skipped with the reason, or failed in CI."""
    try:
        with scratch_folder() as folder:
            make_broker(kind, folder)
    except MissingComponentError as error:
        skip_or_fail(error)
