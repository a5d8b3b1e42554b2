"""The outbox's disk full, and its limit reached."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

pytestmark = pytest.mark.fault


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        skip_or_fail(MissingComponentError("a small file system can't be mounted here: that takes root"))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_nothing_is_lost_while_the_outboxs_disk_is_full(make_line: Callable[..., Line], small_disk: Path) -> None:
    line = make_line(environment={"ORTHANC_EVENTS_OUTBOX": str(small_disk / "outbox")})
    filler = small_disk / "filler"
    with Clients(line, adders=1, loopers=1, pause=0.005):
        time.sleep(1)
        _fill(filler)
        line.wait(lambda document: document["capture"]["state"] == "paused")
        problem = line.status()["capture"]["problem"]["message"]
        assert "outbox.db" in problem
        assert "disk" in problem
        time.sleep(2)
        filler.unlink()
        line.wait(lambda document: document["capture"]["state"] == "following")
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    assert line.status()["capture"]["dropped"] == 0


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                if file.write(b"\0" * size) < size:
                    raise OSError
            except OSError:
                size //= 2


def test_nothing_is_lost_when_the_outbox_has_reached_its_limit(make_line: Callable[..., Line]) -> None:
    line = make_line(settings="outbox:\n  max_bytes: 300KiB\n")
    line.broker.kill()
    with Clients(line, adders=1, loopers=1):
        line.wait(lambda document: document["capture"]["state"] == "paused")
        problem = line.status()["capture"]["problem"]["message"]
        assert "limit" in problem
        assert "outbox.max_bytes" in problem
        time.sleep(2)
        line.broker.start()
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    assert line.status()["outbox"]["bytes"] < 400 * 1024


def test_a_detached_transport_is_marked_with_its_gap(make_line: Callable[..., Line]) -> None:
    line = make_line(settings="outbox:\n  max_bytes: 300KiB\n  on_full: detach\n")
    line.broker.kill()
    with Clients(line, adders=1):
        line.wait(lambda document: document["outbox"]["last_position"] > 3000)
        assert line.status()["capture"]["state"] == "following"
        line.broker.start()
    line.settle()
    first, last = line.status()["transports"][0]["gap"]
    told = {event.sequence for event in line.events()}
    assert all(position not in told for position in range(first, last + 1))
    assert all(position in told for position in range(last + 1, line.status()["outbox"]["last_position"] + 1))
    assert "lost its place" in line.orthanc.log_text()
