"""What the service knows, as files in one folder: what came in, and how far each series is. Safe to kill at any moment.

``series/UID/SOP.dcm`` is what came in, ``series/UID/results`` what was made of it, ``series/UID/state.json`` how far it
is. A series is taken up again when it gets another image, or the same once more: then its results are sent again, byte
for byte if the images are the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

#: A UID becomes a name of a file: what is none must not lead elsewhere (PS3.5, section 9.1).
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(text: str) -> bool:
    """Whether it is a UID, and so safe as the name of a file."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


class InUseError(Exception):
    """Another process has the folder."""


@dataclass(slots=True)
class State:
    """How far a series is. Times are seconds since 1970."""

    #: When its last image came, and when its results are to be tried next.
    received: float
    due: float = 0.0
    #: How often making or sending its results has failed, and the reason of the last time.
    failures: int = 0
    why: str = ""
    #: ``open`` until its results are sent, then ``done``. For good: ``unfit`` (not to be measured), ``undelivered``.
    state: str = "open"
    #: How often images came.
    revision: int = 0


class Store:
    """The folder. To be used by one process, and there by one thread.

    :param clock: seconds since 1970.
    :raises InUseError: another process uses it.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._series, self._clock = folder / "series", clock
        self._staging = folder / "staging"
        self._series.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InUseError(f"another process uses the folder {folder}") from error
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(mode=0o700)
        for part in folder.rglob(".*.part"):  # a kill's
            part.unlink()
        self.states: dict[str, State] = {}
        for one in self._series.iterdir():
            path = one / "state.json"
            if path.exists():
                self.states[one.name] = State(**json.loads(path.read_text("utf-8")))
            else:
                shutil.rmtree(one)  # nothing of it was acknowledged

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    def staging(self) -> tempfile.TemporaryDirectory[str]:
        """Return a folder for what is not accepted yet. It goes away with its context."""
        return tempfile.TemporaryDirectory(dir=self._staging)

    def add(self, series: str, files: Iterable[tuple[str, Path]]) -> None:
        """Move images to a series, by SOP Instance UID: when this returns they are on the disk, and it is open."""
        folder = self._series / series
        folder.mkdir(mode=0o700, exist_ok=True)
        state = self.states.setdefault(series, State(self._clock()))
        for sop, path in files:
            place = folder / f"{sop}.dcm"
            if not (place.exists() and filecmp.cmp(path, place, shallow=False)):
                (folder / "results").unlink(missing_ok=True)
                path.replace(place)
                state.state = "open"
        if state.state != "unfit":  # the same images won't become fit
            state.state, state.why, state.due, state.failures = "open", "", 0.0, 0
        state.received, state.revision = self._clock(), state.revision + 1
        self.note(series)

    def note(self, series: str) -> None:
        """Write down the state of a series."""
        write(self._series / series / "state.json", json.dumps(asdict(self.states[series])).encode())

    def images(self, series: str) -> list[Path]:
        """Return what is there of a series."""
        return sorted((self._series / series).glob("*.dcm"))

    def keep_results(self, series: str, body: bytes) -> None:
        """Keep what was made of the images that are there now."""
        write(self._series / series / "results", body)

    def results(self, series: str) -> bytes | None:
        """Return what was made of the images that are there now."""
        path = self._series / series / "results"
        return path.read_bytes() if path.exists() else None

    def ready(self, quiet: float) -> list[str]:
        """Return the open series whose turn it is, the oldest first: without news for so many seconds."""
        now = self._clock()
        found = [
            (state.received, series)
            for series, state in self.states.items()
            if state.state == "open" and state.due <= now and state.received + quiet <= now
        ]
        return [series for _, series in sorted(found)]

    def forget(self, keep: float) -> None:
        """Delete what has ended, and got nothing for so many seconds."""
        for series, state in list(self.states.items()):
            if state.state != "open" and state.received + keep <= self._clock():
                del self.states[series]
                # First the state: without it, the rest is nothing that anyone knows of.
                (self._series / series / "state.json").unlink()
                shutil.rmtree(self._series / series)

    def counts(self) -> dict[str, int]:
        """Return how many series are in which state."""
        found = dict.fromkeys(("open", "done", "unfit", "undelivered"), 0)
        for state in self.states.values():
            found[state.state] += 1
        return found


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever happens; its name is on the disk too when this returns."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
