"""Flushing the outbox to its disk, at most once a second, on a thread of its own: a slow disk holds up nobody."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.plugin.host import Host

_EVERY: Final = 1.0


class Flusher(threading.Thread):
    """What was written before `soil` is on the disk a second later; what a power cut takes is that second.

    :param host: Orthanc's log.
    """

    def __init__(self, host: Host) -> None:
        super().__init__(name="orthanc-events-sync", daemon=True)
        self._host = host
        self._repeats = Repeats(time.monotonic)
        self._dirty = threading.Event()
        self._end = threading.Event()
        self._path: Path | None = None

    def soil(self, path: Path) -> None:
        """A file was written to, and has to be flushed."""
        self._path = path
        self._dirty.set()

    def stop(self) -> None:
        """End, without another flush: closing the outbox flushes it."""
        self._end.set()
        self._dirty.set()

    def run(self) -> None:
        while not self._end.is_set():
            self._dirty.wait()
            self._dirty.clear()
            if self._path is not None:
                self._flush(self._path)
            self._end.wait(_EVERY)

    def _flush(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            line = self._repeats.line("sync", f"{path} can't be flushed: {error.strerror}")
            if line:
                self._host.error(line)
