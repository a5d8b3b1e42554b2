"""What the service knows, as files in one folder: what came in, and how far each series is. Safe to kill at any moment.

``series/UID/SOP.dcm`` is what came in, ``series/UID/state.json`` how far it is. A series is taken up again when it gets
another image, or the same once more: its results are made anew, with the same UIDs if the images are the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: A UID becomes a name of a file: what is none must not lead elsewhere (PS3.5, section 9.1).
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(text: str) -> bool:
    """Whether it is a UID, and so safe as the name of a file."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


@dataclass(slots=True)
class State:
    """How far a series is."""

    #: The how-manieth series of this folder it is, from 1.
    number: int
    #: When its last image came, and when its results are to be tried next; seconds since 1970.
    received: float
    due: float = 0.0
    #: How often making or sending its results has failed.
    failures: int = 0
    #: How many images it has by its own account; 0: it doesn't say.
    expected: int = 0
    #: ``open`` until its results are sent, then ``done``; or ``unfit``, for good, and why.
    state: str = "open"
    why: str = ""
    #: Whether it has crashed the service already, where options say that it shall.
    crashed: bool = False


class Store:
    """The folder. To be used by one process, and by one thread at a time.

    :param clock: seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder / "series"
        self._clock = clock
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in self._folder.rglob(".*.part"):  # a kill's
            part.unlink()
        self.states: dict[str, State] = {}
        for folder in self._folder.iterdir():
            path = folder / "state.json"
            # Before its state nothing of a series was acknowledged.
            if path.exists():
                self.states[folder.name] = State(**json.loads(path.read_text("utf-8")))
        numbers = [state.number for state in self.states.values()]
        self._numbers = self._folder.parent / "numbers"
        given = int(self._numbers.read_text("ascii")) if self._numbers.exists() else 0
        self._last = max([given, *numbers])

    def state_of(self, series: str) -> State:
        """Return the state of a series, new or not. It is on the disk once `add` or `note` returns."""
        if series not in self.states:
            self._last += 1
            write(self._numbers, str(self._last).encode())
            self.states[series] = State(self._last, self._clock())
        return self.states[series]

    def add(self, series: str, sop: str, content: bytes, expected: int = 0) -> None:
        """Keep an image: when this returns it is on the disk, and its series is open."""
        state = self.state_of(series)
        state.received, state.expected = self._clock(), expected
        if state.state != "unfit" or not (self._folder / series / f"{sop}.dcm").exists():
            state.state, state.why, state.due, state.failures = "open", "", 0.0, 0
        write(self._folder / series / f"{sop}.dcm", content)
        self.note(series)

    def note(self, series: str) -> None:
        """Write down the state of a series."""
        write(self._folder / series / "state.json", json.dumps(asdict(self.states[series])).encode())

    def images(self, series: str) -> list[Path]:
        """Return what is there of a series."""
        return sorted((self._folder / series).glob("*.dcm"))

    def ready(self, quiet: float) -> Iterator[str]:
        """Give the open series whose turn it is: complete by their own account, or without news for so many seconds."""
        now = self._clock()
        waiting = ((state.due, state.number, series) for series, state in self.states.items() if state.state == "open")
        for due, _, series in sorted(waiting):
            state = self.states[series]
            complete = state.expected > 0 and len(self.images(series)) >= state.expected
            if due <= now and (complete or state.received + quiet <= now):
                yield series

    def forget(self, keep: float) -> None:
        """Delete what has ended, and got nothing for so many seconds."""
        for series, state in list(self.states.items()):
            if state.state != "open" and state.received + keep <= self._clock():
                del self.states[series]
                shutil.rmtree(self._folder / series)

    def counts(self) -> dict[str, int]:
        """Return how many series are in which state."""
        found = dict.fromkeys(("open", "done", "unfit"), 0)
        for state in self.states.values():
            found[state.state] += 1
        return found


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever happens; its name is on the disk too when this returns."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
