"""What the router's tests share: a gateway with the bridge, places to send to, and routers as processes."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orthanc_events_bridge.testing.dicom import Instance, Study, make_study
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.servers import OrthancServer
from tests.integration.commands import Started
from tests.integration.whole import started


class Receiver(OrthancServer):
    """An Orthanc that others send to, and that counts what it was sent."""

    def __init__(self, folder: Path, **options: Any) -> None:
        name = folder.name.upper()
        config = {"DicomAet": name, "DicomAlwaysAllowStore": True, "DicomCheckModalityHost": False}
        super().__init__(folder, config={**config, **options}, verbose=True)

    def has(self) -> set[str]:
        """The instances that are there."""
        return set(self.get("/instances"))

    def taken(self) -> int:
        """How many instances it was sent, those among them that it had already. (Of these its changes say nothing.)"""
        log = self.log_text()
        return log.count("] New instance stored") + log.count("] Already stored")

    def stored(self) -> Counter[str]:
        """See `stored`."""
        return stored(self)


def stored(orthanc: OrthancServer) -> Counter[str]:
    """How often an Orthanc has taken each instance as new."""
    found: Counter[str] = Counter()
    since = 0
    while True:
        page = orthanc.get(f"/changes?since={since}&limit=1000")
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
    folder: Path,
    kind: str,
    *,
    modalities: Sequence[Receiver] = (),
    peers: Sequence[Receiver] = (),
    environment: Mapping[str, str] | None = None,
    **config: Any,
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
    with started(folder, broker=kind, orthanc=known, environment=environment) as line:
        yield line


class Routers(Started):
    """Routers of one configuration, as processes. Used as a context manager, which ends them.

    :param rules: the rest of the file.
    :param without: names of `orthanc_events_bridge.testing.router_mutants`.
    """

    #: What runs them, and the module that runs it without protections.
    COMMAND = "route"
    MUTANTS = "orthanc_events_bridge.testing.router_mutants"

    def __init__(self, folder: Path, line: Line, rules: str, without: Sequence[str] = ()) -> None:
        self.audit_file = folder / "audit.jsonl"
        program = [self.MUTANTS, ",".join(without)] if without else ["orthanc_events_bridge"]
        super().__init__(folder, line, self.COMMAND, f"audit: {self.audit_file}\n{rules}", program)

    def audit(self, what: str = "sent", **more: Any) -> list[dict[str, Any]]:
        """The lines of the audit file that say this."""
        if not self.audit_file.exists():
            return []
        lines = [json.loads(line) for line in self.audit_file.read_text("utf-8").splitlines()]
        return [line for line in lines if line["what"] == what and all(line[name] == more[name] for name in more)]


@contextlib.contextmanager
def in_a_circle(folder: Path, without: Sequence[str] = (), instances: int = 1) -> Iterator[tuple[Routers, Line, Study]]:
    """A study comes from a place, and is to be sent back there, and to the very Orthanc that the router is at."""
    source = Receiver(folder / "source")
    rules = """
destinations:
  source: {modality: source}
  itself: {peer: gateway}
rules:
  - {name: all, to: [source, itself]}
"""
    with (
        running(source),
        gateway(folder / "line", "nats", modalities=[source], OverwriteInstances=True) as line,
        Routers(folder / "routers", line, rules, without) as routers,
    ):
        orthanc = line.orthanc
        orthanc.client.put("/peers/gateway", json={"Url": orthanc.url}).raise_for_status()
        source.client.put("/modalities/gateway", json=["GATEWAY", "127.0.0.1", orthanc.dicom_port]).raise_for_status()
        study = make_study(modality="CT", instances=instances)
        for instance in study:
            source.upload(instance.data)
        routers.start()
        source.post("/modalities/gateway/store", {"Resources": [study.id]})
        yield routers, line, study


def ids(instances: Sequence[Instance]) -> set[str]:
    """Orthanc's ids of them."""
    return {one.id for one in instances}
