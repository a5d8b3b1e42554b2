"""Replays on a real line: one consumer gets again what was told, byte for byte, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nats as nats_client
import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import Broker, make_broker
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError, require, skip_or_fail
from orthanc_events_bridge.transports.base import Delivery
from tests.contract.nats_tools import nats_transport
from tests.contract.raw_nats import ask, read_stream
from tests.integration.beside import Beside
from tests.integration.replay_tools import LONG, Command, Raw, everyones, inbox

pytestmark = pytest.mark.integration

BROKERS = ("nats", "rabbitmq", "kafka")
STREAM = "ORTHANC_EVENTS_INBOX"


@pytest.fixture(params=BROKERS)
def line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Line]:
    require("orthanc", "orthanc-python")
    try:
        made = Line(tmp_path / "line", broker=request.param)
    except MissingComponentError as error:
        skip_or_fail(error)
    with made:
        made.ledger.allow("*.stable")
        made.ledger.allow("server.*")
        yield made


def by_position(messages: list[Raw]) -> dict[int, bytes]:
    return {one.position: one.body for one in messages}


def test_one_consumer_gets_again_what_was_told_while_new_events_go_on(line: Line) -> None:
    """Killed in the middle and resumed: nothing is missing, and nobody else has got any of it."""
    for _ in range(12):
        for instance in dicom.make_study(instances=5):
            line.ledger.stored(line.orthanc.upload(instance.data))
    line.settle()
    told = by_position(everyones(line.broker))
    replay = Command(line.folder.path, line.config)
    with Clients(line, adders=1, pause=0.02) as clients:
        process = replay.begin("replay", "--all", "--to", "archive", "--rate", "10")
        try:
            assert wait_until(lambda: len(inbox(line.broker, "archive")) > 20, LONG, every=0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        (kept,) = line.folder.replays.glob("*.json")
        through = json.loads(kept.read_text("utf-8"))["through"]
        before = len(inbox(line.broker, "archive"))
        assert before < len(told)
        acknowledged = clients.acknowledged
        out, _ = replay.run("replay", "--resume", "--rate", "150", "--json")
        assert clients.acknowledged > acknowledged
    assert not list(line.folder.replays.iterdir())
    got = inbox(line.broker, "archive")
    assert all(one.replayed and one.headers["orthanc-event-id"] == one.event["id"] for one in got)
    told = {position: body for position, body in by_position(everyones(line.broker)).items() if position <= through}
    assert by_position(got) == told
    if line.broker.deduplicates:
        assert len(got) == len(told)
    assert json.loads(out)["gone"] == json.loads(out)["refused"] == 0
    assert not any(one.replayed for one in everyones(line.broker))
    line.report().assert_clean()


# -- without Orthanc -----------------------------------------------------------------------------------------


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Broker]:
    try:
        broker = make_broker("nats", tmp_path / "nats")
    except MissingComponentError as error:
        skip_or_fail(error)
    with broker:
        yield broker


@pytest.fixture
def beside(tmp_path: Path, nats: Broker) -> Iterator[tuple[Beside, Command]]:
    with Beside(tmp_path / "beside") as made:
        made.configure({"type": "nats", "servers": [nats.url], "limits": {"max_bytes": "64MiB"}})
        made.start()
        made.wait(lambda: made.transport("nats"))
        yield made, Command(made.folder.path, made.config)


def test_it_can_be_chosen_what_is_sent_and_only_counted(beside: tuple[Beside, Command], nats: Broker) -> None:
    made, replay = beside
    made.record(30)
    made.wait_delivered("nats")
    out, _ = replay.run("replay", "--from", "11", "--dry-run", "--json")
    counted = json.loads(out)
    assert (counted["events"], counted["through"]) == ({"study.created": 20}, 30)
    assert inbox(nats, "one") == []
    out, _ = replay.run("replay", "--from", "00000000000000000011", "--to", "one")
    assert "20 events were sent to one's inbox" in out
    assert [one.position for one in inbox(nats, "one")] == [*range(11, 31)]
    replay.run("replay", "--all", "--study", "study-7", "--to", "one")
    replay.run("replay", "--since", "1h", "--type", "series.*", "--to", "one")
    assert [one.position for one in inbox(nats, "one")][20:] == [7]


def test_a_plain_client_reads_its_inbox_and_what_it_acknowledges_goes(
    beside: tuple[Beside, Command], nats: Broker
) -> None:
    """As docs/events.md says it."""
    made, replay = beside
    made.record(5)
    made.wait_delivered("nats")
    replay.run("replay", "--all", "--to", "archive")
    replay.run("replay", "--all", "--to", "other")

    async def main() -> list[bytes]:
        client = await nats_client.connect(nats.url)
        try:
            subscription = await client.jetstream().pull_subscribe(
                "orthanc.inbox.archive", durable="archive", stream=STREAM
            )
            messages = await subscription.fetch(10, timeout=LONG)
            for message in messages:
                await message.ack_sync(timeout=LONG)
            return [message.data for message in messages]
        finally:
            await client.close()

    told = [one.body for one in everyones(nats)]
    assert asyncio.run(main()) == told
    assert [one.subject for one in read_stream(nats.port, STREAM)] == ["orthanc.inbox.other"] * 5


def test_a_subscriber_at_nats_gets_what_is_replayed_to_it(beside: tuple[Beside, Command], nats: Broker) -> None:
    """It began behind all of it, so nothing else brings it."""
    made, replay = beside
    made.record(5)
    made.wait_delivered("nats")

    async def main() -> list[Delivery]:
        transport = nats_transport(nats.url, limits={"max_bytes": 2**26})
        await transport.connect()
        subscription = await transport.subscribe("archive")
        await asyncio.to_thread(replay.run, "replay", "--all", "--to", "archive")
        found: list[Delivery] = []
        async with asyncio.timeout(LONG):
            while len(found) < 5:
                found += await subscription.receive(5 - len(found), 1.0)
        for delivery in found:
            await delivery.ack()
        await subscription.close()
        await transport.close()
        return found

    messages = [one.message for one in asyncio.run(main())]
    told = read_stream(nats.port, "ORTHANC_EVENTS")
    assert [(one.address, one.body) for one in messages] == [(one.subject, one.body) for one in told]
    assert wait_until(lambda: read_stream(nats.port, STREAM) == [], LONG, every=0.2)


def test_everyone_gets_it_if_that_is_said_twice(beside: tuple[Beside, Command], nats: Broker) -> None:
    made, replay = beside
    made.record(5)
    made.wait_delivered("nats")
    _, err = replay.run("replay", "--all", "--everyone", code=2)
    assert "--yes" in err
    replay.run("replay", "--all", "--everyone", "--yes")
    found = everyones(nats)
    assert [one.position for one in found] == 2 * [*range(1, 6)]
    assert Counter(one.replayed for one in found) == {False: 5, True: 5}


def test_it_waits_while_inboxes_are_full(tmp_path: Path, nats: Broker) -> None:
    with Beside(tmp_path / "beside") as made:
        options = {"type": "nats", "servers": [nats.url], "limits": {"max_bytes": "64MiB"}}
        made.configure({**options, "inbox_max_bytes": "64KiB"})
        made.start()
        made.wait(lambda: made.transport("nats"))
        made.record(200)
        made.wait_delivered("nats")
        process = Command(made.folder.path, made.config).begin("replay", "--all", "--to", "one")
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not any("full" in line for line in lines):
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            got: list[int] = []
            while process.poll() is None or read_stream(nats.port, STREAM):
                messages = read_stream(nats.port, STREAM)
                if messages:  # somebody reads them
                    got += [int(json.loads(one.body)["sequence"]) for one in messages]
                    ask(nats.port, f"STREAM.PURGE.{STREAM}", seq=messages[-1].sequence + 1)
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()
    assert sorted(got) == [*range(1, 201)]


def test_streams_that_overlap_are_named_and_so_is_what_to_do(tmp_path: Path, nats: Broker) -> None:
    with Beside(tmp_path / "beside") as made:
        options = {"type": "nats", "servers": [nats.url], "limits": {"max_bytes": "64MiB"}}
        made.configure({**options, "subject_prefix": "orthanc"})
        made.start()
        made.wait(lambda: made.transport("nats"))
        made.record(1)
        made.wait_delivered("nats")
        _, err = Command(made.folder.path, made.config).run("replay", "--all", "--to", "one", code=1)
        assert "ORTHANC_EVENTS_INBOX" in err and "overlap" in err and "`dead_prefix`; then go on with" in err
