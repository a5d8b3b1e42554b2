"""Workers of one consumer as processes, killed and frozen at will, and what they wrote down."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from orthanc_events_bridge.events.mapping import partition
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.options import TransportOptions

_PROGRAM = Path(__file__).with_name("consumer_process.py")


def cloud_event(number: int, key: str, *, poison: bool = False) -> Outgoing:
    """An event about a study, as the bridge sends it."""
    identifier = f"{number:08d}-0000-5000-8000-000000000000"
    content = {
        "specversion": "1.0",
        "id": identifier,
        "source": "urn:orthanc",
        "type": "io.orthanc-events.study.instance-added.v1",
        "subject": f"studies/{key}",
        "time": "2026-11-27T08:00:00.000Z",
        "partitionkey": key,
        "sequence": f"{number:020d}",
        "data": {"change": "NewChildInstance", "level": "study", "id": key, "parents": {}, "poison": poison},
    }
    body = json.dumps(content).encode()
    where = ("main", "study", "instance-added", key, partition(key))
    return Outgoing(identifier, *where, "application/cloudevents+json", body)


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker wrote down: ``begin``, ``end``, ``fail`` or ``reject`` of an event.

    :ivar at: seconds on the machine's clock, the same for all workers.
    """

    at: float
    worker: int
    what: str
    id: str
    attempt: int


class Group:
    """Workers of one name.

    :param folder: for what they write down.
    :param longest: seconds that a handler takes at most.
    :param failing: the part of handlings that fail by chance.
    :param consumer: further arguments of `Consumer`.
    """

    def __init__(
        self,
        folder: Path,
        broker: TransportOptions,
        name: str,
        *,
        longest: float = 0.002,
        failing: float = 0.0,
        **consumer: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._options = folder / "options"
        self._options.write_bytes(
            pickle.dumps({"broker": broker, "name": name, "longest": longest, "failing": failing, "consumer": consumer})
        )
        self.workers: list[subprocess.Popen[bytes]] = []
        self._told: set[int] = set()  # to end
        self._logs: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        for log in self._logs:
            log.close()

    def start(self, count: int = 1) -> None:
        """Start further workers."""
        for _ in range(count):
            number = len(self.workers)
            log = (self._folder / f"{number}.log").open("wb")
            self._logs.append(log)
            command = [sys.executable, "-P", str(_PROGRAM), str(self._options), str(self._folder / f"{number}.notes")]
            self.workers.append(subprocess.Popen(command, stdout=log, stderr=log))

    @property
    def alive(self) -> list[int]:
        """Numbers of the workers that run."""
        return [number for number, worker in enumerate(self.workers) if worker.poll() is None]

    def send(self, number: int, what: signal.Signals) -> None:
        """Send a worker a signal."""
        if what == signal.SIGTERM:
            if number in self._told:  # a second time it would end at once
                return
            self._told.add(number)
        self.workers[number].send_signal(what)

    def stop(self) -> None:
        """Have all end as they should, and see that they do."""
        for number in self.alive:
            self.send(number, signal.SIGTERM)
        for number in self.alive:
            code = self.workers[number].wait(60)
            # One that had only just been started does not listen to the signal yet.
            assert code == 0 or (code == -signal.SIGTERM and not self.said(number)), f"{code}: {self.said(number)}"

    def said(self, number: int) -> str:
        """What a worker has logged."""
        return (self._folder / f"{number}.log").read_text()

    def notes(self) -> list[Note]:
        """What all have written down, in the order of time."""
        found = []
        for number in range(len(self.workers)):
            path = self._folder / f"{number}.notes"
            for line in path.read_text().splitlines() if path.exists() else ():
                at, what, identifier, attempt = line.split()
                found.append(Note(float(at), number, what, identifier, int(attempt)))
        return sorted(found, key=lambda one: one.at)

    def ended(self) -> set[str]:
        """The events that were handled."""
        return {one.id for one in self.notes() if one.what == "end"}

    def wait(self, until: Callable[[], bool], seconds: float, every: float = 0.25) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                logs = "\n".join(f"{number}: {self.said(number)[-600:]}" for number in range(len(self.workers)))
                raise AssertionError(f"{len(self.ended())} events were handled. The workers say:\n{logs}")
            time.sleep(every)


@dataclass(frozen=True, slots=True)
class Handled:
    """What came of what was sent.

    :ivar lost: never handled.
    :ivar unexpected: handled, and never sent.
    :ivar again: handled more than once.
    :ivar overtaken: first handled to its end before an earlier one of its key had been.
    """

    lost: int
    unexpected: int
    again: int
    overtaken: int

    def __str__(self) -> str:
        return f"lost {self.lost}, unexpected {self.unexpected}, again {self.again}, overtaken {self.overtaken}"


def judge(sent: Sequence[Outgoing], notes: Sequence[Note], settled: Sequence[str] = ()) -> Handled:
    """Compare.

    :param settled: ids of those that were settled otherwise, as dead letters.
    """
    ends: dict[str, int] = defaultdict(int)
    order: dict[str, list[int]] = defaultdict(list)
    by_id = {one.id: one for one in sent}
    for note in notes:
        if note.what == "end":
            if note.id in by_id and not ends[note.id]:
                order[by_id[note.id].key].append(int(note.id[:8]))
            ends[note.id] += 1
    overtaken = sum(before > after for found in order.values() for before, after in pairwise(found))
    done = {*ends, *settled}
    return Handled(
        lost=len(by_id.keys() - done),
        unexpected=len(ends.keys() - by_id.keys()),
        again=sum(count - 1 for count in ends.values() if count > 1),
        overtaken=overtaken,
    )
