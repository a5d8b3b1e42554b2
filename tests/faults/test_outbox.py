"""The outbox's disk full or read-only, its limit reached, and others at work on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.bridged import BridgedOrthanc
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.processes import wait_until
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


def pause(line: Line) -> str:
    """Wait until recording pauses, and say why it does. At the limit it may go on for moments."""

    def paused(document: dict[str, Any]) -> bool:
        return document["capture"]["state"] == "paused" and bool(document["capture"]["problem"])

    return str(line.wait(paused)["capture"]["problem"]["message"])


def test_nothing_is_lost_while_the_outboxs_disk_is_full(make_line: Callable[..., Line], small_disk: Path) -> None:
    line = make_line(environment={"ORTHANC_EVENTS_OUTBOX": str(small_disk / "outbox")})
    filler = small_disk / "filler"
    with Clients(line, adders=1, loopers=1, pause=0.005):
        time.sleep(1)
        _fill(filler)
        problem = pause(line)
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
        problem = pause(line)
        assert "limit" in problem
        assert "outbox.max_bytes" in problem
        time.sleep(2)
        line.broker.start()
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    # What came at once, up to a thousand rows, may pass the limit.
    assert line.status()["outbox"]["bytes"] < 700 * 1024


def test_a_detached_transport_is_marked_with_its_gap(make_line: Callable[..., Line]) -> None:
    line = make_line(settings="outbox:\n  max_bytes: 300KiB\n  on_full: detach\n")
    line.broker.kill()
    with Clients(line, adders=1):
        line.wait(lambda document: document["outbox"]["last_position"] > 3000)
        assert line.status()["capture"]["state"] == "following"
        line.broker.start()
    line.settle()
    first, last = line.status()["transports"][0]["gap"]
    newest = line.status()["transports"][0]["position"]  # what becomes stable now comes behind it
    told = {event.sequence for event in line.events()}
    assert all(position not in told for position in range(first, last + 1))
    assert all(position in told for position in range(last + 1, newest + 1))
    assert "lost its place" in line.orthanc.log_text()


def test_nothing_is_lost_when_the_outboxs_disk_comes_up_read_only(
    make_line: Callable[..., Line], small_disk: Path
) -> None:
    """As a disk with errors does. Orthanc runs, what it tells waits, and all goes on when the disk is mended."""
    line = make_line(environment={"ORTHANC_EVENTS_OUTBOX": str(small_disk / "outbox")})
    with Clients(line, adders=1, loopers=1, pause=0.005):
        time.sleep(0.5)
    line.settle()
    line.orthanc.kill()
    assert wait_until(lambda: not line.orthanc.children(), 20)  # nobody may have it open for writing
    _remount(small_disk, "ro")
    line.orthanc.start()
    with Clients(line, adders=1, loopers=1, pause=0.005):
        line.orthanc.wait_log("Read-only file system")
        time.sleep(2)
        _remount(small_disk, "rw")
        line.wait(lambda document: document["capture"]["state"] == "following")
        time.sleep(0.5)
    report = line.report(kills=1)
    print(report)
    report.assert_clean(unrecoverable=400)
    assert line.status()["capture"]["dropped"] == 0


def _remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def test_nothing_is_lost_while_the_outbox_can_not_be_written(make_line: Callable[..., Line]) -> None:
    """While it is open: the file is made immutable, as root can on most file systems."""
    line = make_line()
    files = [str(path) for path in line.folder.path.glob("outbox.db*") if not path.name.endswith("-shm")]
    with Clients(line, adders=1, loopers=1, pause=0.005):
        time.sleep(0.5)
        if subprocess.run(["chattr", "+i", *files], check=False, capture_output=True).returncode:
            skip_or_fail(
                MissingComponentError("files can't be made immutable here: that takes root, and ext4 or the like")
            )
        try:
            line.wait(lambda document: document["capture"]["state"] == "paused")
            time.sleep(2)
        finally:
            subprocess.run(["chattr", "-i", *files], check=True)
        line.wait(lambda document: document["capture"]["state"] == "following")
        time.sleep(0.5)
    report = line.report()
    print(report)
    report.assert_clean()
    assert line.status()["capture"]["dropped"] == 0


@pytest.mark.parametrize("broker", ["nats", pytest.param("rabbitmq", marks=pytest.mark.slow)])
def test_of_several_bridges_on_one_outbox_one_works(make_line: Callable[..., Line], broker: str) -> None:
    line = make_line(broker=broker)
    command = [sys.executable, "-m", "orthanc_events_bridge", "run", "--outbox", str(line.folder.path)]
    logs = [line.root / "one.log", line.root / "other.log"]
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(_running([*command, "--config", str(line.config)], log)) for log in logs]
        with Clients(line, adders=2, loopers=1):
            pid = line.bridge_pid()
            os.kill(pid, signal.SIGKILL)  # one of the others takes its place, or the one that Orthanc starts again
            refused = [log.read_text("utf-8") for one, log in zip(others, logs, strict=True) if _ends(one)]
        report = line.report()
    print(report, *refused, sep="\n")
    report.assert_clean()
    assert refused
    assert all("another bridge works on" in text for text in refused)


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()


def _ends(process: subprocess.Popen[bytes]) -> bool:
    """Whether it gives up soon: the one that holds the outbox does not."""
    return wait_until(lambda: process.poll() is not None, 30)


def test_of_two_orthancs_on_one_outbox_one_records(make_line: Callable[..., Line], tmp_path: Path) -> None:
    """By a copied configuration, say. The other says so, and disturbs nothing."""
    line = make_line()
    other = BridgedOrthanc(
        tmp_path / "other",
        yaml=line.config.read_text("utf-8"),
        environment={"ORTHANC_EVENTS_OUTBOX": str(line.folder.path)},
    )
    with other, Clients(line, adders=1, loopers=1, pause=0.005):
        for instance in dicom.make_study(instances=3):
            other.upload(instance.data)
        other.wait_log("another process records into the outbox")
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    assert line.status()["capture"]["discontinuities"] == 0
