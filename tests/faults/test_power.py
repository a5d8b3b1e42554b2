"""Power cuts: everything is killed at once, and what was not on the disk yet is gone."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from orthanc_events_bridge.events.catalog import verb
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.ledger import Report
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault

#: How many seconds of the outbox are lost. In truth it is one at most, by its flushes.
DISTANCES = (0.3, 1.0, 3.0)


def copy(database: Path, to: Path) -> None:
    """What a power cut would leave if everything up to now were on the disk, and nothing else."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def cut_the_power(line: Line, older: Path) -> list[tuple[str, str]]:
    """Kill everything, put an older outbox in its place, start everything.

    :return: the facts that the outbox lost for good, by kind and resource: those that no log holds.
    """
    pid = line.bridge_pid()
    line.orthanc.kill()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    line.broker.kill()
    outbox = line.folder.outbox
    with closing(OutboxReader(older)) as reader:
        kept = int(reader.meta()["position"])
    with closing(OutboxReader(outbox)) as reader:
        lost = reader.rows(kept, 1_000_000)
    for name in ("", "-wal", "-shm"):
        Path(f"{outbox}{name}").unlink(missing_ok=True)
    copy(older, outbox)
    line.broker.start()
    line.orthanc.start()
    assert lost
    return [(f"{row.level}.{verb(row.change)}", row.resource or "") for row in lost if row.minted]


def cut_several_times(line: Line, distances: tuple[float, ...]) -> list[tuple[str, str]]:
    """The facts that each of several cuts takes from the outbox for good: those that no log holds."""
    forgotten: list[tuple[str, str]] = []
    copies: list[tuple[float, Path]] = []
    with Clients(line, adders=1, loopers=1, pause=0.005):
        for distance in distances:
            copies.clear()
            until = time.monotonic() + distance + 1.5
            while time.monotonic() < until:
                path = line.root / f"copy-{len(copies)}-{distance}.db"
                copy(line.folder.outbox, path)
                copies.append((time.monotonic(), path))
                time.sleep(0.1)
            now = time.monotonic()
            older = next(path for at, path in reversed(copies) if now - at >= distance)
            forgotten += cut_the_power(line, older)
            line.wait(lambda document: document["capture"]["state"] == "following")
    return forgotten


@pytest.mark.parametrize("broker", ["nats", pytest.param("kafka", marks=pytest.mark.slow)])
def test_nothing_is_lost_or_told_anew_when_the_power_is_cut(make_line: Callable[..., Line], broker: str) -> None:
    line = make_line(broker=broker)
    forgotten = cut_several_times(line, DISTANCES)
    report = line.report(kills=len(DISTANCES), forgotten=forgotten)
    print(f"{len(forgotten)} facts were in the outbox alone", report, sep="\n")
    report.assert_clean(unrecoverable=len(forgotten) + len(DISTANCES) * 400)


def cut_behind_a_second_life(line: Line) -> Report:
    """A study is deleted and stored again, which is published, and the outbox loses it."""
    study = dicom.make_study()
    line.ledger.stored(line.orthanc.upload(study.instances[0].data))
    line.settle()
    older = line.root / "older.db"
    copy(line.folder.outbox, older)
    assert line.orthanc.delete("studies", study.id)
    line.ledger.deleted("studies", study.id)
    line.ledger.stored(line.orthanc.upload(study.instances[0].data))
    line.settle()
    forgotten = cut_the_power(line, older)
    report = line.report(kills=1, forgotten=forgotten)
    story = [event.kind for event in line.events() if event.resource == study.id]
    story = [kind for kind in story if kind in ("study.created", "study.deleted")]
    if story[-1] != "study.created":
        report.add("out_of_order", f"study {study.id} is there and was told to be deleted last: {story}")
    return report


def test_what_was_stored_again_before_the_power_was_cut_stays_told_so(make_line: Callable[..., Line]) -> None:
    """Its creation is read again, and dropped by the broker: its deletion must not come again in front of that."""
    report = cut_behind_a_second_life(make_line())
    print(report)
    report.assert_clean()
