"""Workers of one consumer as processes, killed and frozen at will, and what they wrote down."""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from orthanc_events_bridge.consumers import RetryPolicy
from orthanc_events_bridge.events.mapping import partition
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.options import TransportOptions
from tests.contract.harness import Harness
from tests.faults.judging import Note

_PROGRAM = Path(__file__).with_name("consumer_process.py")

KEYS = [f"study-{number}" for number in range(200)]
#: For what fails by chance.
QUICK = RetryPolicy(max_attempts=20, initial=0.1, maximum=1.0)


def cloud_event(number: int, key: str, *, poison: bool = False, takes: float | None = None) -> Outgoing:
    """An event about a study, as the bridge sends it.

    :param takes: seconds that its handler takes, where that is not left to chance.
    """
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
        "data": {
            "change": "NewChildInstance",
            "level": "study",
            "id": key,
            "parents": {},
            "poison": poison,
            "takes": takes,
        },
    }
    body = json.dumps(content).encode()
    where = ("main", "study", "instance-added", key, partition(key))
    return Outgoing(identifier, *where, "application/cloudevents+json", body)


def events(count: int, *, poison: int = 0, keys: Sequence[str] = KEYS) -> list[Outgoing]:
    """In order, their keys in turn; each so many-th is poison."""
    return [
        cloud_event(number, keys[number % len(keys)], poison=bool(poison) and number % poison == 7)
        for number in range(count)
    ]


def options(harness: Harness) -> TransportOptions:
    """What workers of their own processes need to reach the broker."""
    return harness.transport()._options  # type: ignore[attr-defined,no-any-return]  # every transport's own name


def publish(broker: TransportOptions, sent: Sequence[Outgoing]) -> None:
    """As the bridge does."""

    async def main() -> None:
        transport = create(broker)
        await transport.connect()
        try:
            for start in range(0, len(sent), 500):
                await transport.publish(sent[start : start + 500])
        finally:
            await transport.close()

    asyncio.run(main())


def dead(broker: TransportOptions, name: str, *, remove: bool = False) -> list[dict[str, str]]:
    """The headers of a consumer's dead letters.

    :param remove: clear them away, too.
    """

    async def read() -> list[dict[str, str]]:
        transport = create(broker)
        await transport.connect()
        letters = await transport.dead_letters(name)
        try:
            found = [one async for one in letters.read()]
            if remove:
                await letters.remove(found)
            return [one.message.headers for one in found]
        finally:
            await letters.close()
            await transport.close()

    return asyncio.run(read())


def id_of(headers: Mapping[str, str]) -> str:
    """Of the event that a dead letter was."""
    return headers.get("orthanc-event-id") or headers["nats-msg-id"][:36]


def clock() -> float:
    """Seconds, the same for all processes of this machine."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class Group:
    """Workers of one name.

    :param folder: for what they write down.
    :param name: of their consumer.
    :param busy: seconds that a handler takes at most.
    :param failing: the part of handlings that fail by chance.
    :param blocking: the handler is no coroutine function: it blocks a thread.
    :param lease: seconds; the handler does what it does once (docs/once.md). 0: it doesn't.
    :param without: protections that are switched off (`orthanc_events_bridge.testing.consumer_mutants`).
    :param consumer: further arguments of `Consumer`.
    """

    def __init__(
        self,
        folder: Path,
        broker: TransportOptions,
        name: str,
        *,
        busy: float = 0.002,
        failing: float = 0.0,
        blocking: bool = False,
        lease: float = 0.0,
        without: Sequence[str] = (),
        **consumer: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._folder = folder
        self._options = folder / "options"
        how = {"busy": busy, "failing": failing, "blocking": blocking, "lease": lease, "without": without}
        self._options.write_bytes(pickle.dumps({"broker": broker, "name": name, "consumer": consumer, **how}))
        self.workers: list[subprocess.Popen[bytes]] = []
        self.killed: dict[int, float] = {}
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
        if what == signal.SIGKILL:
            self.workers[number].wait()
            self.killed[number] = clock()

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

    def quiet(self, until: Callable[[], bool], seconds: float = 8.0) -> None:
        """Wait until something is so, or nobody has written anything down for so long."""
        count, since = -1, time.monotonic()
        while not until() and time.monotonic() - since < seconds:
            time.sleep(0.1)
            if (now := len(self.notes())) != count:
                count, since = now, time.monotonic()

    def wait(self, until: Callable[[], bool], seconds: float, every: float = 0.25) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                logs = "\n".join(f"{number}: {self.said(number)[-600:]}" for number in range(len(self.workers)))
                raise AssertionError(f"{len(self.ended())} events were handled. The workers say:\n{logs}")
            time.sleep(every)


def trouble(group: Group, chance: random.Random, seconds: float, workers: int, frozen: float) -> None:
    """Kill, freeze, stop and start workers at random.

    :param frozen: seconds for which one is at most.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(chance.uniform(0.3, 1.0))
        alive = group.alive
        if len(alive) < workers:
            group.start(workers - len(alive))
            continue
        victim, what = chance.choice(alive), chance.random()
        if what < 0.4:
            group.send(victim, signal.SIGKILL)
        elif what < 0.7:
            group.send(victim, signal.SIGTERM)
        else:
            group.send(victim, signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, frozen))
            group.send(victim, signal.SIGCONT)
