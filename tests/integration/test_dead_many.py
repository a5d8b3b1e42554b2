"""Dead letters by the ten thousand, at a real broker: the commands hold a few of them at a time only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from orthanc_events_bridge.cli import main
from orthanc_events_bridge.testing.servers import NatsServer
from orthanc_events_bridge.transports.base import DeadLetter, Incoming
from orthanc_events_bridge.transports.nats_dead import NatsDeadLetters
from tests.contract.harness import events, run
from tests.contract.nats_tools import nats_server, nats_transport
from tests.contract.raw_nats import ask

pytestmark = pytest.mark.integration

COUNT = 20_000
#: What is shown, moved or removed in one go, and as much again that is just being read.
FEW = 250


class Held(Incoming):
    """A message that knows how many of its kind there are.

    :cvar alive: now.
    :cvar peak: at most.
    :cvar read: in all.
    """

    alive = peak = read = 0

    @classmethod
    def of(cls, message: Incoming) -> Held:
        cls.read += 1
        cls.alive += 1
        cls.peak = max(cls.peak, cls.alive)
        return cls(message.address, message.body, message.headers, message.position)

    def __del__(self) -> None:
        Held.alive -= 1


def count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read = NatsDeadLetters.read

    async def counted(self: NatsDeadLetters) -> AsyncGenerator[DeadLetter]:
        async for one in read(self):
            yield DeadLetter(Held.of(one.message), one.mark)

    monkeypatch.setattr(NatsDeadLetters, "read", counted)


async def reject_many(server: NatsServer) -> None:
    """Half of them of studies, half of series."""
    transport = nats_transport(server, limits={"max_bytes": 2**28}, inbox_max_bytes=2**28, dead_max_bytes=2**28)
    await transport.connect()
    subscription = await transport.subscribe("one", in_flight=1000)
    rejected = 0
    for start in range(0, COUNT, 500):
        kind = "study" if start < COUNT // 2 else "series"
        text = json.dumps({"specversion": "1.0", "source": "urn:o", "type": f"io.orthanc-events.{kind}.stable.v1"})
        sent = events(500, start=start)
        await transport.publish([one._replace(body=(text[:-1] + f', "id": "{one.id}"}}').encode()) for one in sent])
        while rejected < start + 500:
            found = await subscription.receive(500, 5.0)
            await asyncio.gather(*(one.reject({"orthanc-reason": "no"}) for one in found))
            rejected += len(found)
    await subscription.close()
    await transport.close()


def test_as_many_as_there_are_are_listed_given_again_and_deleted_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with nats_server(tmp_path) as server:
        run(reject_many(server), seconds=300)

        def dlq(*arguments: str) -> str:
            Held.peak = Held.read = 0
            assert main(["dlq", arguments[0], "--consumer", "one", "--broker", server.url, *arguments[1:]]) == 0
            assert Held.read >= COUNT // 2
            return capsys.readouterr().out

        def stored(stream: str) -> int:
            return int(ask(server.port, f"STREAM.INFO.{stream}")["state"]["messages"])

        count_them(monkeypatch)
        lines = dlq("list").splitlines()
        assert len(lines) == COUNT + 1 and Held.peak <= FEW
        assert len({line.index("no") for line in lines[1:200]}) == 1  # under each other
        rows = json.loads(dlq("list", "--json", "--type", "study.*"))
        assert len(rows) == COUNT // 2 and Held.peak <= FEW
        assert dlq("redrive", "--type", "study.*") == f"{COUNT // 2} given to consumer one again\n"
        assert Held.peak <= FEW
        assert (stored("ORTHANC_EVENTS_INBOX"), stored("ORTHANC_EVENTS_DEAD")) == (COUNT // 2, COUNT // 2)
        assert dlq("discard", "--all", "--yes") == f"{COUNT // 2} of consumer one deleted\n"
        assert Held.peak <= FEW
        assert stored("ORTHANC_EVENTS_DEAD") == 0
