"""The broker killed, frozen, down for long, full, and its stream deleted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import nats
import pytest
from nats.js.client import JetStreamContext

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault

_SHORT = ["ack_timeout: 1s", "connect_timeout: 1s"]


def on_stream(line: Line, work: Callable[[JetStreamContext], Awaitable[Any]]) -> Any:
    """Do something as an administrator of the broker."""

    async def connected() -> Any:
        client = await nats.connect(line.broker.url)
        try:
            return await work(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(connected())


def test_nothing_is_lost_when_nats_is_killed_during_ingest(make_line: Callable[..., Line]) -> None:
    line = make_line(transport=_SHORT)
    with Clients(line, adders=2, loopers=1):
        for _ in range(6):
            time.sleep(0.7)
            line.broker.kill()
            time.sleep(0.3)
            line.broker.start()
    report = line.report()
    print(report)
    report.assert_clean()
    assert report.duplicated == 0


def test_nothing_is_lost_when_nats_freezes_during_ingest(make_line: Callable[..., Line]) -> None:
    line = make_line(transport=_SHORT)
    with Clients(line, adders=2, loopers=1):
        for seconds in (0.3, 1.5, 3.0):
            time.sleep(0.7)
            line.broker.freeze()
            time.sleep(seconds)
            line.broker.thaw()
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    assert report.duplicated == 0


def test_nothing_is_lost_when_nats_is_away_for_20000_changes_and_killed_and_frozen_on_its_return(
    make_line: Callable[..., Line],
) -> None:
    line = make_line(transport=_SHORT)
    line.broker.kill()
    with Clients(line, adders=3):
        line.wait(lambda document: document["transports"][0]["pending"] >= 20_000, timeout=300)
    document = line.status()
    transport = document["transports"][0]
    assert transport["state"] == "not connected"
    assert transport["last_error"]["remedy"]
    # Hours of this must not fill Orthanc's log.
    told = [text for text in line.orthanc.log_text().splitlines() if "orthanc-events: transport nats" in text]
    assert 1 <= len(told) <= 3, told
    line.broker.start()
    position = transport["position"]
    for harm in ("kill", "freeze"):  # in the middle of the backlog
        line.wait(lambda document, at=position: document["transports"][0]["position"] > at)
        position = line.status()["transports"][0]["position"]
        if harm == "kill":
            line.broker.kill()
            time.sleep(0.2)
            line.broker.start()
        else:
            line.broker.freeze()
            time.sleep(2.5)
            line.broker.thaw()
    report = line.report()
    print(report)
    report.assert_clean()
    assert report.received >= 20_000
    assert report.duplicated == 0


def test_a_full_stream_is_named_and_nothing_is_lost_once_it_has_room(make_line: Callable[..., Line]) -> None:
    line = make_line(transport=["limits:", "  max_messages: 300"])
    read: list[Any] = []
    with Clients(line, adders=1):
        document = line.wait(lambda document: document["transports"][0]["state"] == "refused")
        assert "full" in document["transports"][0]["last_error"]["message"]
        assert "10077" in document["transports"][0]["last_error"]["message"]
        assert "purge" in document["transports"][0]["last_error"]["remedy"]
        time.sleep(0.5)

    # Read what is there, then make room, until all has come through.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        seen = {event.id for event in read}
        read += [event for event in line.events() if event.id not in seen]
        document = line.status()
        if not document["transports"][0]["pending"]:
            break
        # Only what was read: more may have been stored since.
        last = max(event.position for event in read)
        on_stream(line, partial(_purge, last=last))
        time.sleep(0.2)
    seen = {event.id for event in read}
    read += [event for event in line.events() if event.id not in seen]
    report = line.ledger.compare(read, existing=line.orthanc.existing())
    print(report)
    # Behind a refusal later events of the same batch may have been stored already (docs/guarantees.md).
    assert (report.lost, report.repeated, report.unexpected) == (0, 0, 0)


def test_a_stream_that_was_deleted_is_made_again_with_everything_that_is_kept(make_line: Callable[..., Line]) -> None:
    line = make_line(transport=_SHORT)
    with Clients(line, adders=2, loopers=1):
        time.sleep(2)
        on_stream(line, lambda stream: stream.delete_stream("ORTHANC_EVENTS"))
        time.sleep(2)
    report = line.report()
    print(report)
    report.assert_clean()
    assert "deleted and made again" in line.orthanc.log_text()


def test_events_that_nats_can_never_take_are_set_aside_and_can_be_sent_again(make_line: Callable[..., Line]) -> None:
    line = make_line(settings="data:\n  tags: [StudyDescription]\n")
    on_stream(line, lambda stream: _largest(stream, 1000))
    study = dicom.make_study(canary={"StudyDescription": "x" * 60})
    line.ledger.stored(line.orthanc.upload(study.instances[0].data))
    line.wait(
        lambda document: len(document["set_aside"]) >= 4 and document["transports"][0]["state"] == "connected",
        what="the rest, which goes on",
    )
    on_stream(line, lambda stream: _largest(stream, -1))
    from orthanc_events_bridge.cli import main

    assert main(["set-aside", "--outbox", str(line.folder.path), "--resend"]) == 0
    line.wait(lambda document: not document["set_aside"])
    report = line.ledger.compare(line.events())
    assert (report.lost, report.repeated, report.unexpected) == (0, 0, 0), report


async def _purge(stream: JetStreamContext, last: int) -> None:
    await stream.purge_stream("ORTHANC_EVENTS", seq=last + 1)


async def _largest(stream: JetStreamContext, size: int) -> None:
    config = (await stream.stream_info("ORTHANC_EVENTS")).config
    config.max_msg_size = size
    await stream.update_stream(config)
