"""Events into a file, one JSON document a line (https://jsonlines.org): the smallest transport that keeps its word."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from file_options import FileOptions

from orthanc_events_bridge.errors import NotConnectedError, RefusedError, TransportConfigurationError
from orthanc_events_bridge.transports.base import Capabilities, Incoming, Outgoing, PublishError, Transport


class FileTransport(Transport):
    """Appends to a file; an event counts as published when it is on the disk."""

    capabilities = Capabilities(
        durable=True,
        deduplicates=False,
        replayable=True,
        ordered=True,
        declares_topology=True,
        refuses_when_full=True,
        identifies_place=False,
        subscribable=False,
        has_inboxes=False,
        counts_deliveries=False,
        pipelined=True,
    )

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._path: Path = options.path
        self._file: int | None = None

    async def connect(self) -> str:
        if self._file is None:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise TransportConfigurationError(
                    f"transport {self.name}: {self._path} can't be opened: {error.strerror}",
                    "let the bridge's user write it",
                ) from error
        return ""  # a file that was deleted and made again can't be told from the one before

    async def publish(self, events: Sequence[Outgoing]) -> None:
        if self._file is None:
            raise PublishError(0, NotConnectedError(f"transport {self.name}: not connected", "connect first"))
        # A disk may take its time; the other transports go on meanwhile.
        await asyncio.to_thread(self._append, self._file, b"".join(event.body + b"\n" for event in events))

    def _append(self, file: int, lines: bytes) -> None:
        before = os.fstat(file).st_size
        try:
            if os.write(file, lines) != len(lines):
                raise OSError(0, "the disk is full")
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, before)  # no half lines
            raise PublishError(
                0, RefusedError(f"transport {self.name}: {self._path} took nothing: {error.strerror}", "make room")
            ) from error

    async def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    async def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        with self._path.open("rb") as file:
            if not oldest:
                file.seek(0, os.SEEK_END)
            line = b""
            while True:
                line += file.readline()
                if line.endswith(b"\n"):
                    headers = {"content-type": "application/cloudevents+json"}
                    yield Incoming(str(self._path), line[:-1], headers, str(file.tell()))
                    line = b""
                else:
                    await asyncio.sleep(0.1)

    async def describe(self) -> list[str]:
        return [f"a file of {self._path.stat().st_size} bytes"]
