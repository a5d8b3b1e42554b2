"""Orthanc with its index in PostgreSQL, where the numbers of the log come in no order (docs/decisions/0010)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.programs import require

pytestmark = pytest.mark.fault

MakeLine = Callable[..., Line]

#: Seconds; a tenth of the default, so that a test at rest is soon at rest.
GRACE = "capture: {grace: 3s}\n"

#: How the plugin's transactions are isolated: Debian 12's, and those of version 7.0 and later.
MODES = ["serializable", "read-committed"]


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    require("postgres", "orthanc-postgresql")
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    yield server
    server.close()


@pytest.fixture
def make_postgres_line(postgres: PostgresServer, make_line: MakeLine) -> MakeLine:
    """``make_line`` with the index in `postgres`: ``(mode="serializable", **options)``."""

    def make(mode: str = "serializable", *, settings: str = GRACE, **options: Any) -> Line:
        orthanc = postgres.orthanc(read_committed=mode == "read-committed")
        return make_line(orthanc=orthanc, settings=settings, **options)

    return make


class Senders:
    """Threads that send new studies by C-STORE, each over associations of its own."""

    def __init__(self, line: Line, folder: Path, count: int) -> None:
        self._line = line
        self._folder = folder
        self._stop = threading.Event()
        self.acknowledged = 0
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self, number: int) -> None:
        while not self._stop.is_set():
            study = dicom.make_study(series=2, instances=10)
            paths = study.write(self._folder / str(number))
            sent = self._line.orthanc.store_scu(paths)
            for path, instance in zip(paths, study, strict=True):
                if sent[path.absolute()]:
                    ids = instance.id, instance.series, instance.study, instance.patient
                    self._line.ledger.stored_ids(*ids)
                    self.acknowledged += 1
                path.unlink()


class NaiveReader:
    """A plain follower of ``/changes``, as many scripts have it: by ``Last``."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._stop = threading.Event()
        self.cursor = 0
        self.seen: set[int] = set()
        self._thread = threading.Thread(target=self._follow)

    def _follow(self) -> None:
        with httpx.Client(base_url=self._line.orthanc.url, timeout=60.0, trust_env=False) as client:
            while not self._stop.is_set():
                answer = client.get(f"/changes?since={self.cursor}&limit=100")
                if answer.status_code != 200:  # where a resource goes between two of its queries, Orthanc gives up
                    continue
                page = answer.json()
                self.seen.update(row["Seq"] for row in page["Changes"])
                if page["Changes"]:
                    self.cursor = page["Last"]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def lost(self) -> list[int]:
        """The numbers that it has passed and not seen, of the rows that Orthanc still has."""
        log = [row["Seq"] for row in self._line.orthanc.changes()]
        return [seq for seq in log if seq <= self.cursor and seq not in self.seen]


def counter(line: Line) -> int:
    """How many numbers the log has given."""
    return int(line.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"])


@pytest.mark.parametrize("changes", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_with_six_writers(
    make_postgres_line: MakeLine, tmp_path: Path, mode: str, changes: int
) -> None:
    """Where numbers are given out of order, a naive reader beside capture must be seen to lose rows."""
    require("storescu")
    line = make_postgres_line(mode)
    deadline = time.monotonic() + 600
    with (
        NaiveReader(line) as naive,
        Senders(line, tmp_path / "send", 3) as senders,
        Clients(line, adders=2, loopers=1) as clients,
    ):
        while counter(line) < changes or (mode == "read-committed" and not naive.lost()):
            assert time.monotonic() < deadline, f"{counter(line)} changes, the naive reader lost {naive.lost()}"
            time.sleep(0.3)  # Orthanc closes a connection that is idle for a second
    report = line.report()
    lost, capture = naive.lost(), line.status()["capture"]
    print(
        f"{clients.acknowledged} by REST, {senders.acknowledged} by C-STORE, {counter(line)} numbers", report, sep="\n"
    )
    print(f"the naive reader lost {len(lost)}; {capture}")
    report.assert_clean()
    assert senders.acknowledged > 100 and clients.acknowledged > 100
    assert report.duplicated == 0
    assert capture["late"] == 0
    if mode == "read-committed":
        assert lost
    else:
        assert capture["passed"]  # transactions were rolled back


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_when_orthanc_is_killed(make_postgres_line: MakeLine, mode: str, kills: int) -> None:
    line = make_postgres_line(mode)
    # Version 4.0, made to read what is committed, tells a deletion twice if two delete at once.
    with Clients(line, adders=4, loopers=2 if mode == "serializable" else 1) as clients:
        for _ in range(kills):
            time.sleep(random.uniform(0.5, 2.0))
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(1)
    report = line.report(kills=kills)
    print(f"{clients.acknowledged} acknowledged", report, line.status()["capture"], sep="\n")
    report.assert_clean(unrecoverable=kills * 400)
    assert report.duplicated == 0
