"""What the tests of replays share: what brokers hold, as bytes and headers, by plain clients; and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthanc_events_bridge.testing.brokers import Broker, contract
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer
from tests.contract.harness import aside
from tests.contract.kafka_tools import read_topic
from tests.contract.rabbitmq_harness import read_stream as read_history
from tests.contract.rabbitmq_harness import stored, take_all, there
from tests.contract.raw_nats import NatsRefusalError, read_stream

#: Seconds that a replay may take on a busy machine.
LONG = 180.0


@dataclass(frozen=True, slots=True)
class Raw:
    """A message as it is there."""

    body: bytes
    headers: dict[str, str]

    @property
    def event(self) -> dict[str, Any]:
        """The CloudEvent, which is as its schema says."""
        document: dict[str, Any] = json.loads(self.body)
        assert contract.fault(document) == ""
        return document

    @property
    def position(self) -> int:
        """In the outbox."""
        return int(self.event["sequence"])

    @property
    def replayed(self) -> bool:
        return self.headers.get("orthanc-operation") == "replay"


def everyones(broker: Broker) -> list[Raw]:
    """What is there for everyone."""
    return _read(broker, "ORTHANC_EVENTS", "orthanc.events.history", "orthanc.events")


def inbox(broker: Broker, consumer: str) -> list[Raw]:
    """What is there for one consumer alone."""
    name = f"orthanc.inbox.{consumer}"
    found = _read(broker, "ORTHANC_EVENTS_INBOX", name, name)
    assert all(one.headers["orthanc-consumer"] == consumer for one in found)
    return found


def _read(broker: Broker, stream: str, queue: str, topic: str) -> list[Raw]:
    if broker.kind == "nats":
        try:
            messages = read_stream(broker.port, stream)
        except NatsRefusalError:
            return []
        return [Raw(one.body, {name.lower(): value for name, value in one.headers}) for one in messages]
    if broker.kind == "rabbitmq":
        if not there(broker.url, queue):
            return []
        reader = read_history if queue.endswith(".history") else take_all
        return [Raw(one.body, stored(one).headers) for one in reader(broker.url, queue)]
    assert isinstance(broker.server, KafkaServer)
    rows = aside(read_topic(f"127.0.0.1:{broker.server.admin_port}", topic))
    return [Raw(row.value, {name: value.decode() for name, value in row.headers}) for row in rows]


class Command:
    """``orthanc-events`` on an outbox, as a process."""

    def __init__(self, outbox: Path, config: Path) -> None:
        self._environment = {**os.environ, "ORTHANC_EVENTS_OUTBOX": str(outbox), "ORTHANC_EVENTS_CONFIG": str(config)}

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orthanc_events_bridge", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )

    def run(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        """Output and errors of a command that ends with this exit code."""
        process = self.begin(*arguments)
        try:
            out, err = process.communicate(timeout=LONG)
        finally:
            process.kill()
        assert "Traceback" not in out + err, err
        assert process.returncode == code, f"{process.returncode}: {out}\n{err}"
        return out, err
