"""A backup taken while everything runs, and restored: no row is skipped, and no number names two facts."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.programs import require
from tests.integration.test_salvage import stored, unasked

pytestmark = pytest.mark.integration


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "folder")
    folder.prepare()
    return folder


def run(place: Folder, target: Path) -> int:
    return main(["backup", str(target), "--outbox", str(place.path)])


def test_a_folder_and_an_archive(place: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = OutboxWriter(place.outbox, lambda: 1.0)
    writer.append(stored(100), 100, 0, unasked)
    with closing(State(place.bridge)) as state:
        state.pause("one")
    mask = os.umask(0)
    try:
        assert run(place, tmp_path / "to") == 0
        assert run(place, tmp_path / "to.tar.gz") == 0
    finally:
        os.umask(mask)
    assert "checked" in capsys.readouterr().out
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "to").iterdir()}
    assert modes == {"bridge.db": 0o600, "outbox.db": 0o600}
    assert stat.S_IMODE((tmp_path / "to").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "to.tar.gz").stat().st_mode) == 0o600
    with tarfile.open(tmp_path / "to.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["bridge.db", "outbox.db"]
        archive.extractall(tmp_path / "again", filter="data")
    for folder in ("to", "again"):
        restored = OutboxWriter(tmp_path / folder / "outbox.db", lambda: 2.0)
        assert restored.recorder != writer.recorder and (restored.position, restored.cursor) == (200, 100)
        recorder = restored.recorder
        restored.close()
        once_more = OutboxWriter(tmp_path / folder / "outbox.db", lambda: 2.0)
        assert (once_more.recorder, once_more.position) == (recorder, 200), "it is a backup no more"
        once_more.close()
        with closing(State(tmp_path / folder / "bridge.db")) as state:
            assert set(state.paused()) == {"one"}
    writer.append(stored(1, 101), 101, 0, unasked)
    writer.close()


def test_it_never_writes_over_anything(place: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, tmp_path / "none") == 1
    assert "there is no outbox" in capsys.readouterr().err
    OutboxWriter(place.outbox, lambda: 1.0).close()
    (tmp_path / "there").mkdir()
    assert run(place, tmp_path / "there") == 0
    assert run(place, tmp_path / "there") == 1
    (tmp_path / "there.tar").touch()
    assert run(place, tmp_path / "there.tar") == 1
    assert run(place, tmp_path / "no" / "folder") == 1
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there", "there.tar"]


def test_a_damaged_outbox_is_not_passed_off_as_a_backup(
    place: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = OutboxWriter(place.outbox, lambda: 1.0)
    writer.append(stored(500), 500, 0, unasked)
    writer.close()
    with place.outbox.open("r+b") as file:
        file.seek(place.outbox.stat().st_size // 2)
        file.write(b"\xff" * 8192)
    assert run(place, tmp_path / "to") == 1
    assert "damaged" in capsys.readouterr().err or "malformed" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_a_writer_is_not_held_up_and_the_copy_is_of_one_moment(place: Folder, tmp_path: Path) -> None:
    writer = OutboxWriter(place.outbox, lambda: 1.0)
    writer.append(stored(20_000), 20_000, 0, unasked)
    done, written = threading.Event(), 20_000

    def write() -> None:
        nonlocal written
        while not done.is_set():
            writer.append(stored(10, written + 1), written + 10, 0, unasked)
            written += 10

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert run(place, tmp_path / "to") == 0
    finally:
        done.set()
        thread.join()
    assert written > 20_000, "nothing was written meanwhile"
    with closing(OutboxReader(tmp_path / "to" / "outbox.db")) as reader:
        meta = reader.meta()
        assert reader.count(0) == meta["position"] == 2 * meta["cursor"]
    writer.close()


def restore(line: Line, copy: Path, *names: str) -> None:
    line.orthanc.stop()
    for path in line.folder.path.glob("*.db*"):
        if not names or path.name.split(".db")[0] + ".db" in names:
            path.unlink()
    for path in copy.iterdir():
        if not names or path.name in names:
            shutil.copy(path, line.folder.path)
    line.orthanc.start()


@pytest.mark.parametrize("what", ["both", pytest.param("outbox.db", marks=pytest.mark.slow)])
def test_a_restored_one_skips_nothing_and_gives_no_number_twice(tmp_path: Path, what: str) -> None:
    require("nats-server", "orthanc", "orthanc-python")
    with Line(tmp_path / "line") as line:
        line.ledger.allow("*.stable", "server.*")
        with Clients(line, adders=1, loopers=1):
            line.wait(lambda document: document["outbox"]["last_position"] > 200)
            assert run(line.folder, tmp_path / "copy") == 0
            line.wait(lambda document: document["outbox"]["last_position"] > 600)
        line.settle()
        restore(line, tmp_path / "copy", *([what] if what != "both" else []))
        line.settle()
        with Clients(line, adders=1, loopers=1):
            line.wait(lambda document: document["capture"]["state"] == "following")
            line.wait(lambda document: document["outbox"]["last_position"] > 700)
        report = line.report()
        events = line.events()
    print(report)
    assert report.lost == 0
    assert_no_number_twice(events)


def assert_no_number_twice(events: list[Any]) -> None:
    numbers: dict[tuple[str, int], str] = {}
    for event in events:
        assert numbers.setdefault((event.recorder, event.sequence), event.id) == event.id, "a number names two facts"
