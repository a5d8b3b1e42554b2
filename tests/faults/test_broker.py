"""The broker killed, frozen, cut off, slow, full, emptied and strict: the same questions to every transport."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import BROKERS, make_broker
from orthanc_events_bridge.testing.ledger import Event, Report
from orthanc_events_bridge.testing.line import Clients, Line
from tests.contract.link import Link

pytestmark = pytest.mark.fault

#: Kills in CI: of those that take long to come back, fewer; `make test-slow` has 20 for all, as 20,000 changes.
_KILLS = {"nats": 20, "webhook": 8, "rabbitmq": 5, "kafka": 5}

MakeLine = Callable[..., Line]


@pytest.fixture(params=BROKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(make_line: MakeLine, kind: str, **options: Any) -> Line:
    """A line whose transport gives up waiting soon."""
    transport = [*BROKERS[kind].impatient, *options.pop("transport", [])]
    return make_line(broker=kind, transport=transport, **options)


def judge(line: Line) -> Report:
    """Lost 0, repeated 0, unexpected 0, out of order 0; and no copies where the broker removes them."""
    report = line.report()
    print(report)
    report.assert_clean()
    if line.broker.deduplicates:
        assert report.duplicated == 0
    return report


def transport(line: Line) -> Any:
    return line.status()["transports"][0]


def kill_and_restart(line: Line, times: int) -> None:
    with Clients(line, adders=2, loopers=1):
        for _ in range(times):
            time.sleep(0.7)
            line.broker.kill()
            time.sleep(0.3)
            line.broker.start()


def test_nothing_is_lost_when_the_broker_is_killed_during_ingest(make_line: MakeLine, kind: str) -> None:
    line = start(make_line, kind)
    kill_and_restart(line, _KILLS.get(kind, 5))
    judge(line)


@pytest.mark.slow
def test_nothing_is_lost_when_the_broker_is_killed_20_times_during_ingest(make_line: MakeLine, kind: str) -> None:
    line = start(make_line, kind)
    kill_and_restart(line, 20)
    judge(line)


def test_nothing_is_lost_when_the_broker_freezes_during_ingest(make_line: MakeLine, kind: str) -> None:
    line = start(make_line, kind)
    with Clients(line, adders=2, loopers=1):
        for seconds in (0.3, 1.5):
            time.sleep(0.7)
            line.broker.freeze()
            time.sleep(seconds)
            line.broker.thaw()
        # Longer than every timeout: until the bridge has noticed.
        time.sleep(0.5)
        line.broker.freeze()
        line.wait(lambda document: document["transports"][0]["state"] == "not connected")
        line.broker.thaw()
        time.sleep(0.5)
    judge(line)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, 20_000 if kind == "nats" else 4_000) for kind in BROKERS),
        *(pytest.param(kind, 20_000, marks=pytest.mark.slow) for kind in BROKERS if kind != "nats"),
    ],
)
def test_nothing_is_lost_when_the_broker_is_away_for_long_and_killed_and_frozen_on_its_return(
    make_line: MakeLine, kind: str, changes: int
) -> None:
    line = start(make_line, kind)
    line.broker.kill()
    with Clients(line, adders=3):
        line.wait(lambda document: document["transports"][0]["pending"] >= changes, timeout=300)
    document = transport(line)
    assert document["state"] == "not connected"
    assert document["last_error"]["remedy"]
    # Hours of this must not fill Orthanc's log.
    told = [text for text in line.orthanc.log_text().splitlines() if f"orthanc-events: transport {kind}" in text]
    assert 1 <= len(told) <= 3, told
    line.broker.start()
    position = document["position"]
    for harm in ("kill", "freeze"):  # in the middle of the backlog
        line.wait(lambda document, at=position: document["transports"][0]["position"] > at)
        position = transport(line)["position"]
        if harm == "kill":
            line.broker.kill()
            time.sleep(0.2)
            line.broker.start()
        else:
            line.broker.freeze()
            time.sleep(2.5)
            line.broker.thaw()
    assert judge(line).received >= changes


@pytest.fixture
def behind_link(make_line: MakeLine, kind: str, tmp_path: Path) -> Iterator[Callable[..., tuple[Line, Link]]]:
    """Start a line whose broker is behind a proxy."""
    links: list[Link] = []

    def make(**options: Any) -> tuple[Line, Link]:
        # The broker has to know the proxy's port before it starts (Kafka tells its clients where to connect).
        broker = make_broker(kind, tmp_path / "line" / kind)
        link = Link(broker.proxied_port, **options)
        links.append(link)
        broker.stand_behind(link.port)
        return start(make_line, kind, made=broker, port=link.port), link

    yield make
    for link in links:
        link.close()


def test_nothing_is_lost_when_the_connection_is_silently_dropped(
    behind_link: Callable[..., tuple[Line, Link]],
) -> None:
    line, link = behind_link()
    with Clients(line, adders=2, loopers=1):
        for _ in range(2):
            time.sleep(0.5)
            link.swallows = True
            line.wait(lambda document: document["transports"][0]["state"] == "not connected")
            link.swallows = False
            line.wait(lambda document: document["transports"][0]["state"] == "connected")
        link.cut()
        time.sleep(0.5)
    judge(line)


def test_nothing_is_lost_over_a_slow_link(behind_link: Callable[..., tuple[Line, Link]]) -> None:
    line, link = behind_link(latency=0.05, bandwidth=500_000)
    with Clients(line, adders=2, loopers=1):
        time.sleep(3)
        assert transport(line)["state"] == "connected"
    link.latency, link.bandwidth = 0.0, 0  # what has piled up need not take minutes
    judge(line)


@pytest.mark.parametrize("kind", [kind for kind, broker in BROKERS.items() if broker.has_place])
def test_a_place_that_was_deleted_is_made_again_with_everything_that_is_kept(make_line: MakeLine, kind: str) -> None:
    line = start(make_line, kind)
    with Clients(line, adders=2, loopers=1):
        time.sleep(2)
        line.broker.remove_place()
        time.sleep(2)
    judge(line)
    assert "deleted and made again" in line.orthanc.log_text()


@pytest.mark.parametrize("kind", [kind for kind, broker in BROKERS.items() if broker.can_be_full])
def test_a_full_place_is_named_and_nothing_is_lost_once_it_has_room(make_line: MakeLine, kind: str) -> None:
    line = start(make_line, kind, transport=BROKERS[kind].limit_options(300))
    line.broker.limit(300)
    read: dict[str, Event] = {}
    with Clients(line, adders=1):
        document = line.wait(lambda document: document["transports"][0]["state"] == "refused")
        error = document["transports"][0]["last_error"]
        assert all(word in f"{error['message']} {error['remedy']}" for word in line.broker.full_words)
        time.sleep(0.5)

    # Read what is there, then make room, until all has come through.
    deadline = time.monotonic() + 60
    while transport(line)["pending"]:
        assert time.monotonic() < deadline, line.status()
        found = line.events()
        read |= {event.id: event for event in found}
        line.broker.make_room(max((event.position for event in found), default=0))
        time.sleep(0.2)
    read |= {event.id: event for event in line.events()}
    report = line.ledger.compare(list(read.values()), existing=line.orthanc.existing())
    print(report)
    # Behind a refusal later events of the same batch may have been stored already (docs/guarantees.md).
    assert (report.lost, report.repeated, report.unexpected) == (0, 0, 0)


def test_nothing_is_lost_when_the_credentials_are_revoked_in_mid_stream(
    make_line: MakeLine, kind: str, tmp_path: Path
) -> None:
    broker = make_broker(kind, tmp_path / "line" / kind)
    secret = tmp_path / "password"
    secret.write_text("the-first-password\n", "utf-8")
    broker.demand("the-first-password")
    line = start(make_line, kind, made=broker, transport=broker.login(secret))
    with Clients(line, adders=2, loopers=1):
        time.sleep(1)
        broker.demand("the-second-password")
        document = line.wait(lambda document: document["transports"][0]["state"] == "needs attention")
        assert document["transports"][0]["last_error"]["remedy"]
        secret.write_text("the-second-password\n", "utf-8")
        # It is tried again slowly: an operator who has mended it need not do anything else.
        line.wait(lambda document: document["transports"][0]["state"] == "connected", timeout=90)
        time.sleep(0.5)
    judge(line)
    told = {**what_is_told(line), "its own file": secret.read_bytes()}
    assert len(told) > 6
    for password, places in ((b"the-first-password", []), (b"the-second-password", ["its own file"])):
        assert [place for place, content in told.items() if password in content] == places


def what_is_told(line: Line) -> dict[str, bytes]:
    """Whatever an operator, or another user of the machine, can see of the line."""
    told = {"log": line.orthanc.log_text().encode(), "status": str(line.status()).encode()}
    for process, pid in (("Orthanc", line.orthanc.pid), ("bridge", line.bridge_pid())):
        told[f"process listing: {process}"] = Path(f"/proc/{pid}/cmdline").read_bytes()
    checking = [sys.executable, "-m", "orthanc_events_bridge", "check", "--connect", str(line.config)]
    checked = subprocess.run(checking, capture_output=True, check=True)
    told["check --connect"] = checked.stdout + checked.stderr
    for path in line.folder.path.iterdir():
        told[f"outbox: {path.name}"] = path.read_bytes()
    return told


def test_events_that_can_never_be_taken_are_set_aside_and_can_be_sent_again(
    make_line: MakeLine, kind: str, tmp_path: Path
) -> None:
    broker = make_broker(kind, tmp_path / "line" / kind)
    line = start(make_line, kind, made=broker, settings="data:\n  tags: [StudyDescription]\n")
    with broker.small(850):
        study = dicom.make_study(canary={"StudyDescription": "x" * 60})
        line.ledger.stored(line.orthanc.upload(study.instances[0].data))
        line.wait(
            lambda document: len(document["set_aside"]) >= 4 and document["transports"][0]["state"] == "connected",
            what="the rest, which goes on",
        )
    from orthanc_events_bridge.cli import main

    assert main(["set-aside", "--outbox", str(line.folder.path), "--resend"]) == 0
    line.wait(lambda document: not document["set_aside"])
    report = line.ledger.compare(line.events())
    assert (report.lost, report.repeated, report.unexpected) == (0, 0, 0), report
