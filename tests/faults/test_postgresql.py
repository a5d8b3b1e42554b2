"""Orthanc with its index in PostgreSQL, where the numbers of the log come in no order (docs/decisions/0010)."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import httpx
import pytest

from orthanc_events_bridge.events.mapping import event_id
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.bridged import SOURCE, BridgedOrthanc
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import require

pytestmark = pytest.mark.fault

MakeLine = Callable[..., Line]

#: Seconds; a tenth of the default, so that a test at rest is soon at rest.
GRACE = "capture: {grace: 3s}\n"

CREATIONS = ("NewInstance", "NewSeries", "NewStudy", "NewPatient")

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


class Senders(Clients):
    """Threads that send new studies by C-STORE, each over associations of its own."""

    def __init__(self, line: Line, folder: Path, count: int) -> None:
        super().__init__(line)
        self._stored = line
        self._threads = [
            threading.Thread(target=self._guarded, args=(partial(self._send, folder / str(number)),))
            for number in range(count)
        ]

    def _send(self, folder: Path) -> None:
        study = dicom.make_study(series=2, instances=10)
        paths = study.write(folder)
        sent = self._stored.orthanc.store_scu(paths)
        for path, instance in zip(paths, study, strict=True):
            if sent[path.absolute()]:
                ids = instance.id, instance.series, instance.study, instance.patient
                self._stored.ledger.stored_ids(*ids)
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
                try:
                    answer = client.get(f"/changes?since={self.cursor}&limit=100")
                except httpx.RemoteProtocolError:  # Orthanc closes a connection that is idle for a second
                    continue
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
        log = [row["Seq"] for row in self._log()]
        return [seq for seq in log if seq <= self.cursor and seq not in self.seen]

    def _log(self) -> list[dict[str, Any]]:
        while True:
            try:
                return self._line.orthanc.changes()
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 404:  # as above, it has given up
                    raise


def counter(line: Line) -> int:
    """How many numbers the log has given."""
    return int(line.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"])


@pytest.mark.parametrize("changes", [3_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_with_six_writers(
    make_postgres_line: MakeLine, tmp_path: Path, mode: str, changes: int
) -> None:
    """Where numbers are given out of order, a naive reader beside capture must be seen to lose rows."""
    require("storescu")
    line = make_postgres_line(mode)
    deadline = time.monotonic() + 600 + changes / 10
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


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
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


@pytest.mark.slow
@pytest.mark.mutant
def test_the_ledger_reports_what_the_grace_period_prevents(make_postgres_line: MakeLine) -> None:
    line = make_postgres_line("read-committed", without=["grace"])
    with NaiveReader(line) as naive, Clients(line, adders=6):
        assert wait_until(lambda: len(naive.lost()) > 50, 300, every=0.3)
    report = line.report()
    print(report)
    # Rows of numbers that were passed are lost, or told by their callbacks under other ids; others are told twice.
    assert report.lost or report.repeated, f"nobody noticed\n{report}"


def test_an_emptied_log_is_announced_and_loses_nothing(make_postgres_line: MakeLine) -> None:
    line = make_postgres_line()
    line.ledger.stored(line.orthanc.upload(dicom.make_study().instances[0].data))
    line.settle()
    with Clients(line, adders=2, loopers=1):
        time.sleep(2)
        line.orthanc.client.delete("/changes").raise_for_status()
        time.sleep(2)
    line.wait(lambda document: document["capture"]["discontinuities"] == 1)
    report = line.report()
    print(report)
    report.assert_clean()


def test_an_older_database_put_back_is_announced_and_compared(
    make_postgres_line: MakeLine, postgres: PostgresServer
) -> None:
    line = make_postgres_line()
    kept, gone, back = (dicom.make_study(series=2) for _ in range(3))
    for instance in (*kept, *back):
        line.ledger.stored(line.orthanc.upload(instance.data))
    line.settle()
    line.orthanc.stop()
    postgres.stop()
    older = postgres.data.with_name("older")
    subprocess.run(["cp", "-a", postgres.data, older], check=True)
    postgres.start()
    line.orthanc.start()
    for instance in gone:
        line.ledger.stored(line.orthanc.upload(instance.data))
    assert line.orthanc.delete("studies", back.id)
    line.ledger.deleted("studies", back.id)
    line.settle()
    line.orthanc.kill()
    postgres.stop()
    shutil.rmtree(postgres.data)
    older.rename(postgres.data)
    postgres.start()
    line.ledger.deleted("studies", gone.id)
    for instance in back:
        line.ledger.stored_ids(instance.id, instance.series, instance.study, instance.patient)
    line.orthanc.start()
    line.wait(lambda document: document["capture"]["discontinuities"] == 1)
    line.wait(lambda document: document["capture"]["inferred"].get("Deleted", 0) >= 3)
    line.ledger.allow("instance.*", "*.instance-added")
    report = line.report(kills=1)
    print(report, line.status()["capture"])
    report.assert_clean()
    assert sum(event.kind == "server.log-discontinuity" for event in line.events()) == 1


# -- several Orthancs on one database ------------------------------------------------------------------------------


class Beside:
    """One more Orthanc on a line's database and files, with a bridge and an outbox of its own, and the same source.

    :param log: `capture.log` of it.
    """

    def __init__(self, line: Line, folder: Path, *, log: bool = True) -> None:
        self.ledger = line.ledger
        self.log = log
        yaml = line.config.read_text("utf-8")
        if not log:
            yaml = yaml.replace("capture: {", "capture: {log: false, ")
        shared = ("Plugins", "PostgreSQL", "StorageDirectory")
        config = {name: line.orthanc.config[name] for name in shared}
        self.orthanc = BridgedOrthanc(folder, yaml=yaml, config=config)

    def __enter__(self) -> Self:
        self.orthanc.start()
        assert wait_until(lambda: self.orthanc.status()["capture"]["state"] == "following", 60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.orthanc.__exit__(kind, error, trace)

    def settle(self) -> None:
        """Wait until it has told everything, what it had to wait for as well."""
        tip = int(self.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"])

        def at_rest() -> bool:
            status = self.orthanc.status()
            transport = status["transports"][0]
            return (
                (status["log"]["cursor"] >= tip or not self.log)
                and not status["capture"]["waiting"]
                and transport["position"] == status["outbox"]["last_position"]
            )

        assert wait_until(at_rest, 120, every=0.2), self.orthanc.status()

    def clients(self, **options: Any) -> Clients:
        """Clients of this Orthanc."""
        return Clients(cast(Line, self), **options)


def rows_of(folder: Path) -> list[OutboxRow]:
    reader = OutboxReader(folder / "outbox.db")
    try:
        return reader.rows(0, 1_000_000)
    finally:
        reader.close()


def ids_of(folder: Path) -> dict[int, str]:
    """Seq → the id of its event, of the rows of the log that an outbox has."""
    return {row.seq: event_id(row, SOURCE) for row in rows_of(folder) if row.seq is not None and row.date is not None}


def told_twice(*folders: Path) -> int:
    """How many creations the server that acted told without their row, which another one had read."""
    outboxes = [rows_of(folder) for folder in folders]
    count = 0
    for outbox in outboxes:
        gone = Counter((row.change, row.resource) for row in outbox if row.minted and row.change in CREATIONS)
        own = {row.seq for row in outbox}
        other = {row.seq: (row.change, row.resource) for rows in outboxes for row in rows if row.seq not in own}
        read = Counter(other.values())
        count += sum(min(times, read[what]) for what, times in gone.items())
    return count


def test_several_orthancs_on_one_database_tell_each_change_once_on_jetstream(
    make_postgres_line: MakeLine, tmp_path: Path
) -> None:
    """What was minted by the server that acted, and read by another one, is told twice: counted."""
    line = make_postgres_line()
    with Beside(line, tmp_path / "second") as second, Beside(line, tmp_path / "third") as third:
        time.sleep(4)  # what is read right behind a start may be one's own, of which a callback was lost
        with (
            Clients(line, adders=1, loopers=1),
            second.clients(adders=1, loopers=1),
            third.clients(adders=1),
        ):
            time.sleep(10)
        line.settle()
        second.settle()
        third.settle()
        report = line.report()
        twice = told_twice(line.folder.path, second.orthanc.outbox, third.orthanc.outbox)
        print(report, f"{twice} told twice", line.status()["capture"], sep="\n")
        assert not (report.lost or report.unexpected or report.out_of_order or report.duplicated)
        assert report.repeated == twice <= 0.05 * report.required
        ids = [ids_of(line.folder.path), ids_of(second.orthanc.outbox), ids_of(third.orthanc.outbox)]
        common = set(ids[0]) & set(ids[1]) & set(ids[2])
        assert len(common) > 100
        assert all(ids[0][seq] == ids[1][seq] == ids[2][seq] for seq in common)
        for one in (line.orthanc, second.orthanc, third.orthanc):
            assert "Deleted" not in one.status()["capture"]["inferred"]  # what became of it, the other one tells


def test_several_orthancs_on_one_database_tell_copies_that_the_id_removes(
    make_postgres_line: MakeLine, tmp_path: Path
) -> None:
    line = make_postgres_line(broker="rabbitmq")
    with Beside(line, tmp_path / "second") as second:
        with Clients(line, adders=1), second.clients(adders=1):
            time.sleep(5)
        line.settle()
        second.settle()
        before = len(ids_of(line.folder.path).keys() & ids_of(second.orthanc.outbox).keys())
        report = line.report()
        print(report)
        report.assert_clean()
        after = len(ids_of(line.folder.path).keys() & ids_of(second.orthanc.outbox).keys())
        assert 0 < before <= report.duplicated <= after  # a stable event may still have come


def test_what_the_acting_server_finds_gone_and_another_has_read_is_told_twice(
    make_postgres_line: MakeLine, tmp_path: Path
) -> None:
    line = make_postgres_line()
    study = dicom.make_study()
    ids = {study.id, study.patient, study.instances[0].id, study.instances[0].series}
    with Beside(line, tmp_path / "second") as second:
        line.settle()
        with closing(sqlite3.connect(line.folder.outbox, isolation_level=None)) as lock:
            lock.execute("BEGIN IMMEDIATE")  # the acting server can't record
            line.ledger.stored(line.orthanc.upload(study.instances[0].data))
            assert wait_until(lambda: ids <= {row.resource for row in rows_of(second.orthanc.outbox)}, 60, every=0.2)
            line.orthanc.delete("studies", study.id)
            line.ledger.deleted("studies", study.id)
            # What it has in hand has the row still; it puts that back when the file stays locked.
            assert line.wait(lambda document: document["capture"]["problem"], what="capture's problem")
            lock.execute("ROLLBACK")
        second.settle()
        report = line.report()
        print(report)
        assert (report.lost, report.repeated, report.unexpected) == (0, 4, 0)
        assert told_twice(line.folder.path, second.orthanc.outbox) == 4


def test_with_one_reader_of_the_log_there_are_no_copies(make_postgres_line: MakeLine, tmp_path: Path) -> None:
    """And what happened while the reader was down, it reads when it is back."""
    line = make_postgres_line(broker="rabbitmq")
    # What is logged comes from the one, what is not from the other, in no common order.
    line.ledger.allow("*.instance-added")
    with Beside(line, tmp_path / "second", log=False) as second:
        with Clients(line, adders=1), second.clients(adders=1):
            time.sleep(5)
        line.settle()
        line.orthanc.stop()
        for instance in dicom.make_study(instances=5):
            line.ledger.stored(second.orthanc.upload(instance.data))
        line.orthanc.start()
        second.settle()
        report = line.report()
        print(report, second.orthanc.status()["capture"])
        report.assert_clean()
        assert report.duplicated == 0
        assert {row.change for row in rows_of(second.orthanc.outbox)} >= {"NewChildInstance", "OrthancStarted"}
        assert not ids_of(second.orthanc.outbox)
        # The other one becomes a reader too: all that was logged since it began comes once more, with the same ids.
        second.orthanc.config_path.write_text(line.config.read_text("utf-8"), "utf-8")
        second.log = True
        logged = set(ids_of(line.folder.path))
        assert wait_until(lambda: logged <= ids_of(second.orthanc.outbox).keys(), 120, every=0.2)
        second.settle()
        report = line.report()
        report.assert_clean()
        after = len(ids_of(line.folder.path).keys() & ids_of(second.orthanc.outbox).keys())
        assert len(logged) <= report.duplicated <= after  # a stable event may still have come
