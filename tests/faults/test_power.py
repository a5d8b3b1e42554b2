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
from orthanc_events_bridge.outbox import OutboxReader, OutboxRow
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault

#: How many seconds of the outbox are lost. In truth it is one at most, by its flushes.
DISTANCES = (0.3, 1.0, 3.0)


def copy(database: Path, to: Path) -> None:
    """What a power cut would leave if everything up to now were on the disk, and nothing else."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def cut_the_power(line: Line, copies: list[tuple[float, Path]], distance: float) -> list[OutboxRow]:
    """Kill everything, put the outbox back by so many seconds, start everything; the rows that are lost."""
    pid = line.bridge_pid()
    line.orthanc.kill()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    line.broker.kill()
    now = time.monotonic()
    older = next(path for at, path in reversed(copies) if now - at >= distance)
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
    return lost


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
            lost = cut_the_power(line, copies, distance)
            assert len(lost) > 10
            forgotten += [(f"{row.level}.{verb(row.change)}", row.resource or "") for row in lost if row.minted]
            line.wait(lambda document: document["capture"]["state"] == "following")
    return forgotten


@pytest.mark.parametrize("broker", ["nats", pytest.param("kafka", marks=pytest.mark.slow)])
def test_nothing_is_lost_or_told_anew_when_the_power_is_cut(make_line: Callable[..., Line], broker: str) -> None:
    line = make_line(broker=broker)
    forgotten = cut_several_times(line, DISTANCES)
    report = line.report(kills=len(DISTANCES), forgotten=forgotten)
    print(f"{len(forgotten)} facts were in the outbox alone", report, sep="\n")
    report.assert_clean(unrecoverable=len(forgotten) + len(DISTANCES) * 400)
