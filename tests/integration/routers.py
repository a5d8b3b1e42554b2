"""What the router's tests share: a gateway with the bridge, places to send to, and routers as processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from orthanc_events_bridge.testing.dicom import Instance
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.reacting import consumer_url
from orthanc_events_bridge.testing.servers import OrthancServer
from tests.integration.whole import started

#: Seconds for what takes moments on a machine that is not busy.
PATIENCE = 120.0


class Receiver(OrthancServer):
    """An Orthanc that others send to, and that counts what it was sent."""

    def __init__(self, folder: Path, **options: Any) -> None:
        name = folder.name.upper()
        config = {"DicomAet": name, "DicomAlwaysAllowStore": True, "DicomCheckModalityHost": False}
        super().__init__(folder, config={**config, **options})

    def has(self) -> set[str]:
        """The instances that are there."""
        return set(self.get("/instances"))

    def stored(self) -> Counter[str]:
        """How often each instance was taken as new."""
        found: Counter[str] = Counter()
        since = 0
        while True:
            page = self.get(f"/changes?since={since}&limit=1000")
            found.update(one["ID"] for one in page["Changes"] if one["ChangeType"] == "NewInstance")
            since = page["Last"]
            if page["Done"]:
                return found


@contextlib.contextmanager
def running(*servers: OrthancServer) -> Iterator[None]:
    """All of them; killed at the end, which is quicker than to stop them."""
    try:
        for server in servers:
            server.start()
        yield
        for server in servers:
            server.close(kill=True)
    finally:
        for server in servers:
            server._kill_all()


@contextlib.contextmanager
def gateway(
    folder: Path, kind: str, *, modalities: Sequence[Receiver] = (), peers: Sequence[Receiver] = (), **config: Any
) -> Iterator[Line]:
    """An Orthanc with the bridge, which knows these by their folders' names."""
    known: Mapping[str, Any] = {
        "DicomAet": "GATEWAY",
        "DicomModalities": {
            one.folder.name: [one.folder.name.upper(), "127.0.0.1", one.dicom_port] for one in modalities
        },
        "OrthancPeers": {one.folder.name: [one.url] for one in peers},
        "ConcurrentJobs": 8,
        **config,
    }
    with started(folder, broker=kind, orthanc=known) as line:
        yield line


class Routers:
    """Routers of one configuration, as processes. Used as a context manager, which ends them.

    :param rules: the rest of the file.
    :param without: names of `orthanc_events_bridge.testing.router_mutants`.
    """

    def __init__(self, folder: Path, line: Line, rules: str, without: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        package = "orthanc_events_bridge"
        self._program = [f"{package}.testing.router_mutants", ",".join(without)] if without else [package]
        self.audit_file = folder / "audit.jsonl"
        self.path = folder / "router.yaml"
        self._log = folder / "router.log"
        self._running: list[subprocess.Popen[bytes]] = []
        store = "" if line.broker.kind == "nats" else f"store: sqlite:///{folder}/router.db\n"
        self.path.write_text(
            f"broker: {consumer_url(line.broker)}\northanc: {line.orthanc.url}\nstart: oldest\nack_wait: 5s\n"
            f"audit: {self.audit_file}\n{store}{rules}",
            "utf-8",
        )

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", *self._program, "route", "--config", str(self.path), *more]

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(self.command(*more), capture_output=True, text=True, timeout=PATIENCE, check=False)

    def start(self, count: int = 1, *more: str) -> None:
        """Start some more.

        :param more: options of the command.
        """
        for _ in range(count):
            with self._log.open("ab") as log:
                self._running.append(subprocess.Popen(self.command(*more), stdout=log, stderr=log))

    def kill(self, number: int = 0) -> None:
        """Kill one at once, as `kill -9` does."""
        router = self._running.pop(number)
        router.kill()
        router.wait()

    def stop(self) -> list[int]:
        """Stop all as a user does; their exit codes."""
        for router in self._running:
            router.terminate()
        codes = [router.wait(PATIENCE) for router in self._running]
        self._running.clear()
        return codes

    def __len__(self) -> int:
        return len(self._running)

    def audit(self, what: str = "sent", **more: Any) -> list[dict[str, Any]]:
        """The lines of the audit file that say this."""
        if not self.audit_file.exists():
            return []
        lines = [json.loads(line) for line in self.audit_file.read_text("utf-8").splitlines()]
        return [line for line in lines if line["what"] == what and all(line[name] == more[name] for name in more)]

    def log(self) -> str:
        return self._log.read_text("utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._running:
            self.kill()


def ids(instances: Sequence[Instance]) -> set[str]:
    """Orthanc's ids of them."""
    return {one.id for one in instances}


def wait_for(condition: Any, what: str, seconds: float = PATIENCE) -> None:
    """Until it holds."""
    assert wait_until(condition, seconds, every=0.2), what
