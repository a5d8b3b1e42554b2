"""The outbox and bridge.db damaged and removed, while everything runs and before it starts, and the ledger."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.ledger import Report
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault

_PAGE = 4096


def _overwrite(path: Path, *, begin: int = 0) -> None:
    """Garbage in place of all pages from one on; what is in the write-ahead log comes into the file first."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(random.Random(size).randbytes(size - begin))


def _aside(line: Line, name: str = "outbox.db") -> list[str]:
    return sorted(path.name for path in line.folder.path.glob(f"{name}.corrupt-*Z"))


def _work(line: Line, seconds: float = 1.0, **clients: int) -> None:
    with Clients(line, **(clients or {"adders": 1, "loopers": 1})):
        time.sleep(seconds)


def remove_the_outbox(line: Line) -> Report:
    """While the broker is away; then Orthanc is started again, so that what only the open file held is gone."""
    line.broker.kill()
    _work(line)
    for path in line.folder.path.glob("outbox.db*"):
        path.unlink()
    _work(line)
    # Nothing tells from outside whether it was noticed, where a mutant keeps it from being: a tick is a second.
    time.sleep(3)
    line.orthanc.stop()
    line.broker.start()
    line.orthanc.start()
    return line.report()


@pytest.mark.parametrize("broker", ["nats", pytest.param("rabbitmq", marks=pytest.mark.slow)])
def test_nothing_is_lost_when_the_outbox_is_removed_underneath(make_line: Callable[..., Line], broker: str) -> None:
    line = make_line(broker=broker, transport=BROKERS[broker].impatient)
    report = remove_the_outbox(line)
    print(report)
    report.assert_clean()
    assert "was removed or replaced while it was in use" in line.orthanc.log_text()
    assert re.search(r"\b0 changes", line.status()["outbox"]["rescued"]["result"]) is None


@pytest.mark.parametrize("broker", ["nats", pytest.param("rabbitmq", marks=pytest.mark.slow)])
def test_what_orthanc_still_logs_survives_a_damage_while_running(make_line: Callable[..., Line], broker: str) -> None:
    """All pages behind the first are garbage, with a broker away and clients at work."""
    line = make_line(broker=broker, transport=BROKERS[broker].impatient)
    _work(line)
    line.settle()
    line.broker.kill()
    with Clients(line, adders=1, loopers=1):
        time.sleep(1)
        _overwrite(line.folder.outbox, begin=_PAGE)
        line.wait(lambda document: document["outbox"].get("rescued"), what="the exchange")
        time.sleep(1)
        line.broker.start()
        time.sleep(1)
    report = line.report(kills=1)
    print(report)
    report.assert_clean()
    rescued = line.status()["outbox"]["rescued"]
    assert len(_aside(line)) == 1 and rescued["aside"].endswith(_aside(line)[0])
    assert "LOST is what could not be read" in rescued["result"]
    assert "what can be read of it makes a new one" in line.orthanc.log_text()


def damage_at_start(line: Line, begin: int = 0) -> Report:
    _work(line)
    line.settle()
    line.broker.kill()
    _work(line, adders=1)
    line.orthanc.stop()
    _overwrite(line.folder.outbox, begin=begin)
    line.broker.start()
    line.orthanc.start()
    line.wait(lambda document: document["outbox"].get("rescued"), what="the exchange")
    _work(line)
    return line.report(kills=1)


def test_what_orthanc_still_logs_survives_a_damage_before_the_start(make_line: Callable[..., Line]) -> None:
    line = make_line()
    report = damage_at_start(line)
    print(report)
    report.assert_clean()
    # What was announced is not known any more, but for what Orthanc has: it is remembered, and its end is told.
    existing = line.orthanc.existing()
    study = next(e.resource for e in line.events() if e.kind == "study.created" and e.resource in existing)
    line.wait(lambda document: not document["capture"]["repairing"])
    line.orthanc.stop()
    shim = line.orthanc.shim_path
    shutil.move(shim, line.root / "aside.py")
    shim.write_text("", "utf-8")
    line.orthanc.start()
    line.orthanc.delete("studies", study)
    line.orthanc.stop()
    shutil.move(line.root / "aside.py", shim)
    line.orthanc.start()
    line.settle()
    assert any(e.kind == "study.deleted" and e.resource == study for e in line.events())


def test_a_damaged_bridge_db_is_set_aside_and_nothing_is_lost(make_line: Callable[..., Line]) -> None:
    line = make_line()
    with Clients(line, adders=1, loopers=1):
        time.sleep(1)
        _overwrite(line.folder.bridge)
        line.orthanc.wait_log("every transport gets everything again")
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    assert len(_aside(line, "bridge.db")) == 1


def test_a_bridge_db_that_is_removed_underneath_is_made_again(make_line: Callable[..., Line]) -> None:
    line = make_line()
    with Clients(line, adders=1):
        time.sleep(0.5)
        for path in line.folder.path.glob("bridge.db*"):
            path.unlink()
        line.orthanc.wait_log("was removed or replaced while it was in use, and is made again")
        time.sleep(0.5)
    report = line.report()
    print(report)
    report.assert_clean()


def put_an_older_copy_back(line: Line) -> Report:
    """A plain copy of an outbox that was closed cleanly: nothing in it says that it is one."""
    _work(line, adders=1)
    line.settle()
    line.orthanc.stop()
    shutil.copy(line.folder.outbox, line.root / "copy.db")
    line.orthanc.start()
    _work(line, adders=1)
    line.settle()
    line.orthanc.stop()
    shutil.copy(line.root / "copy.db", line.folder.outbox)
    line.orthanc.start()
    line.wait(lambda document: document["capture"]["state"] == "following")
    _work(line, adders=1)
    line.settle()
    time.sleep(1)
    return line.report(kills=1)


def test_an_older_copy_that_is_put_back_gives_no_number_twice(make_line: Callable[..., Line]) -> None:
    line = make_line()
    report = put_an_older_copy_back(line)
    print(report)
    report.assert_clean()
    assert "a copy was put back" in line.orthanc.log_text()
