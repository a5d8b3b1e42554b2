"""``POST /tools/reset``, which tears Orthanc's Python interpreter down and up again in the same process, over and over.

The three lines work at the same time: a reset is two seconds of waiting.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.ledger import Report
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.processes import wait_until
from tests.integration.whole import started

pytestmark = pytest.mark.integration

#: In CI, and in the long form.
RESETS = [8, pytest.param(20, marks=pytest.mark.slow)]
_together = threading.Lock()


def upload(line: Line) -> None:
    for instance in dicom.make_study(instances=2):
        line.ledger.stored(line.orthanc.upload(instance.data))


def reset(line: Line, pid: int, seconds: list[float]) -> None:
    """Reset, and look: the same Orthanc, capture at work again, and one bridge."""
    seconds.append(line.orthanc.reset())
    line.wait(lambda document: document["capture"]["state"] == "following")
    assert line.orthanc.pid == pid
    assert wait_until(lambda: line.orthanc.children() == [line.bridge_pid()], 10), line.orthanc.children()


def finish(name: str, line: Line, seconds: list[float], kills: int = 0) -> Report:
    report = line.report(kills=kills)
    with _together:
        median, longest = statistics.median(seconds), max(seconds)
        print(f"\n{name}: {len(seconds)} resets, {median:.1f} s each (at most {longest:.1f} s)", report, sep="\n")
    assert report.duplicated == 0
    assert report.required > len(seconds)
    kinds = Counter(event.kind for event in line.events())
    assert kinds["server.started"] == len(seconds) + 1
    assert kinds["server.stopped"] == len(seconds)
    text = line.orthanc.log_text()
    assert "Python exception" not in text and "Traceback" not in text
    return report


def idle(folder: Path, resets: int) -> None:
    with started(folder) as line:
        line.ledger.allow("*.stable", "server.*")
        pid, seconds = line.orthanc.pid, list[float]()
        for _ in range(resets):
            upload(line)
            line.settle()
            reset(line, pid, seconds)
        upload(line)
        finish("idle", line, seconds).assert_clean()


def under_load(folder: Path, resets: int) -> None:
    with started(folder) as line:
        line.ledger.allow("*.stable", "server.*")
        pid, seconds = line.orthanc.pid, list[float]()
        with Bursts(line) as bursts:
            for _ in range(resets):
                bursts.wait()
                reset(line, pid, seconds)
        # What only callbacks show of the last second of each life is lost to all: Orthanc calls nobody any more.
        finish("under load", line, seconds, kills=resets).assert_clean(unrecoverable=resets * 400)


class Bursts:
    """Clients that work as hard as they can, and hold their breath in between.

    Orthanc 1.10.1 doesn't even begin to stop or to reset before 100 ms have passed without a change, with or without a
    plugin: its thread for Lua scripts ends only then.
    """

    def __init__(self, line: Line) -> None:
        self.count = 0
        self._line = line
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._work = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._work.result()
        self._pool.shutdown()

    def wait(self) -> None:
        """Until one more burst has been."""
        before = self.count
        assert wait_until(lambda: self.count > before or self._work.done(), 30)

    def _run(self) -> None:
        while not self._stop.is_set():
            with Clients(self._line, adders=2, loopers=1) as clients:
                self._stop.wait(0.3)
            self.count += clients.acknowledged > 0
            self._stop.wait(0.15)


def broker_down(folder: Path, resets: int) -> None:
    with started(folder, settings="drain_timeout: 300ms\n") as line:
        line.ledger.allow("*.stable", "server.*")
        pid, seconds = line.orthanc.pid, list[float]()
        line.settle()
        line.broker.kill()
        for _ in range(resets):
            upload(line)
            cursor = line.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"]
            line.wait(lambda document, cursor=cursor: document["log"]["cursor"] >= cursor)
            reset(line, pid, seconds)
        line.broker.start()
        finish("broker down", line, seconds).assert_clean()


RUNS: dict[str, Callable[[Path, int], None]] = {
    "idle": idle,
    "under load": under_load,
    "with the broker down": broker_down,
}


@pytest.fixture(scope="module", params=RESETS, ids=lambda resets: f"{resets} times")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(run, tmp_path_factory.mktemp("reset"), request.param) for name, run in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_resets_leave_one_orthanc_and_one_bridge_and_lose_nothing(runs: dict[str, Future[None]], name: str) -> None:
    began = time.monotonic()
    runs[name].result()
    print(f"after {time.monotonic() - began:.0f} s more")
