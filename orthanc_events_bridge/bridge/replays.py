"""What is kept of a replay, so that it can be interrupted and goes on.

A file for each in the outbox's folder, written by the command line that does the replay: ``bridge.db`` is the bridge's
own, and is not to wait for a command line. It is there until the replay is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.bridge import BusyError
from orthanc_events_bridge.bridge.state import Progress
from orthanc_events_bridge.errors import BridgeError, OutboxFullError
from orthanc_events_bridge.folder import Folder

#: So many refused events are listed; all are counted.
_LISTED: Final = 100


@dataclass(slots=True)
class Run:
    """One replay: what is to be sent, and how far it is.

    :ivar number: of this replay, in its events' dedupe keys; never given twice.
    :ivar consumer: whose inbox they go to; empty: to everyone.
    :ivar recorder: the outbox that the positions belong to.
    :ivar types: patterns of the events' short names.
    :ivar study: only what is about it; empty: all.
    :ivar since: only what was recorded from then on, milliseconds since the epoch.
    :ivar first: it begins behind this position.
    :ivar through: and ends with this one.
    :ivar position: everything up to here is sent, or refused, or was not wanted.
    :ivar identity: of the place at the broker.
    :ivar sent: how many were confirmed, by short name.
    :ivar refused: how many the broker can never take.
    :ivar refusals: the first of them: position, event, type, reason.
    :ivar gone: rows that were deleted before they could be looked at.
    :ivar missed: up to here, those are counted.
    """

    number: int
    transport: str
    consumer: str
    recorder: str
    types: list[str]
    study: str
    since: int
    first: int
    through: int
    position: int = 0
    identity: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    refusals: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    missed: int = 0

    def __post_init__(self) -> None:
        self.position = max(self.position, self.first)
        self.missed = max(self.missed, self.first)

    @property
    def where(self) -> str:
        """Where its events go, for people."""
        return f"{self.consumer}'s inbox" if self.consumer else "everyone"

    def dedupe_key(self, event: str) -> str:
        """Inside its window JetStream drops an equal key on any subject, and a repeated one is to be dropped."""
        return f"{event}:replay:{self.number}"


class Kept:
    """A run's file, held by this process until `close`; what the relay remembers is kept in it.

    :ivar run: what is in it.
    """

    def __init__(self, folder: Path, run: Run, lock: int) -> None:
        self.run = run
        self._folder = folder
        self._lock = lock

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.run.number}.json"

    def keep(self) -> None:
        """Write it down.

        :raises OutboxFullError: it can't be written.
        """
        new = self._path.with_suffix(".new")
        try:
            descriptor = os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self.run), file)
            new.replace(self._path)
        except OSError as error:
            raise OutboxFullError(
                f"{self._path} can't be written: {error.strerror}", "free space on its disk, or make it writable again"
            ) from error

    def remove(self) -> None:
        """It is over: nothing is left of it."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._lock)

    # -- what a relay remembers (`orthanc_events_bridge.bridge.relay.Memory`) ---------------------------------

    def progress(self, name: str, recorder: str, position: int) -> Progress:
        return Progress(self.run.position, None, self.run.identity, sum(self.run.sent.values()))

    def save(self, name: str, progress: Progress) -> None:
        self.run.position, self.run.identity = progress.position, progress.identity
        self.keep()

    def gap(self, name: str, first: int, last: int) -> None:
        """What is gone is counted where the rows are read."""

    def set_aside(self, transport: str, position: int, event: str, type_name: str, reason: str) -> None:
        self.run.refused += 1
        if len(self.run.refusals) < _LISTED:
            found = {"position": position, "event": event, "type": type_name, "reason": reason}
            self.run.refusals.append(found)
        self.keep()


class Replays:
    """The replays of an outbox that are not done yet."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder.replays

    def begin(self, make: Callable[[int], Run]) -> Kept:
        """Begin a replay.

        :param make: is given its number. That is the time in milliseconds, so that none is given twice, even if all is
            lost.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        owner = self._folder.parent.stat()
        if os.geteuid() == 0:  # in a folder of Orthanc's user
            os.chown(self._folder, owner.st_uid, owner.st_gid)
        number = int(time.time() * 1000)
        while (self._folder / f"{number}.json").exists() or (self._folder / f"{number}.lock").exists():
            number += 1
        kept = Kept(self._folder, make(number), self._hold(number))
        kept.keep()
        return kept

    def unfinished(self) -> list[int]:
        """The numbers of those that are not done."""
        found = (path.stem for path in self._folder.glob("*.json"))
        return sorted(int(stem) for stem in found if stem.isdecimal())

    def resume(self, number: int) -> Kept:
        """Take up one that was interrupted.

        :raises BridgeError: there is none, or it can't be read.
        :raises BusyError: another process does it.
        """
        path = self._folder / f"{number}.json"
        if not path.exists():
            others = self.unfinished()
            known = f"there are: {', '.join(map(str, others))}" if others else "every replay is done"
            raise BridgeError(f"there is no replay {number} to go on with", known)
        lock = self._hold(number)
        try:
            return Kept(self._folder, Run(**json.loads(path.read_text("utf-8"))), lock)
        except (OSError, ValueError, TypeError) as error:
            os.close(lock)
            raise BridgeError(f"{path} can't be read: {error}", "delete it, and begin the replay again") from error

    def _hold(self, number: int) -> int:
        descriptor = os.open(self._folder / f"{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise BusyError(f"another process is at work on replay {number}", "wait for it, or end it") from None
        return descriptor
