"""What can be read of a damaged outbox makes the new one: on a real disk, with real damage."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.changes.log import Row
from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.changes.unordered import Unordered
from orthanc_events_bridge.errors import DamagedError, OutboxError
from orthanc_events_bridge.folder import Folder, identity, set_aside
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import JUMP, OutboxRow
from orthanc_events_bridge.plugin.rescue import Rescue
from orthanc_events_bridge.plugin.upkeep import Upkeep
from orthanc_events_bridge.salvage import Salvage, StoppedError, salvage
from orthanc_events_bridge.status import BridgeView

DATE = "20261123T200627"
PAGE = 4096


def orthanc_id(number: int) -> str:
    digits = f"{number:040x}"
    return "-".join(digits[place : place + 8] for place in range(0, 40, 8))


def parents(number: int) -> dict[str, str]:
    return {"series": orthanc_id(10**6), "study": orthanc_id(10**6 + 1), "patient": orthanc_id(10**6 + 2)}


def stored(count: int, first: int = 1) -> list[Fact]:
    """Instances, each with its row in Orthanc's log and with what only a callback shows."""
    facts = []
    for number in range(first, first + count):
        facts.append(Fact("NewInstance", "instance", orthanc_id(number), 5, number, DATE, parents(number)))
        facts.append(Fact("JobSuccess", "job", f"job-{number}", 6))
    return facts


def unasked(level: str, resource: str) -> dict[str, str] | None:
    raise AssertionError(f"{level} {resource} was looked up")


class Box:
    """An outbox of 1,000 instances, whose first 300 rows every transport has."""

    delivered = 300

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outbox.db"
        self.new = folder / "outbox.db.new"
        writer = OutboxWriter(self.path, lambda: 1000.0)
        writer.keep_settings(4, '{"source": "urn:x"}')
        for first in range(1, 1001, 100):
            writer.append(stored(100, first), first + 99, 4, unasked)
        self.recorder, self.began = writer.recorder, writer.began
        writer.close()
        self.before = rows(self.path)

    def page_of(self, text: str) -> int:
        """Where in the file the page begins that holds a text."""
        return self.path.read_bytes().index(text.encode()) // PAGE * PAGE

    def overwrite(self, place: int, size: int = PAGE) -> None:
        with self.path.open("r+b") as file:
            file.seek(place)
            file.write(random.Random(place).randbytes(size))

    def salvage(self, acknowledged: int | None = 150) -> Salvage:
        with closing(sqlite3.connect(self.path)) as db:
            return salvage(db, self.new, lambda recorder: self.delivered, acknowledged, 2000.0)

    def follows(self, found: Salvage) -> None:
        """What was taken over is a run behind what was delivered, with the same ids."""
        now = rows(self.new)
        assert [row.position for row in now] == list(range(1, found.rows + 1))
        run = self.before[self.delivered : self.delivered + found.rows]
        assert [row._replace(position=0) for row in now] == [row._replace(position=0) for row in run]


def rows(path: Path) -> list[OutboxRow]:
    with closing(OutboxReader(path)) as reader:
        return reader.rows(0, 10**9)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_sound_one_is_taken_over_whole(box: Box) -> None:
    found = box.salvage()
    assert found == Salvage(1700, whole=True, resources=1003, all_resources=True, cursor=1000)
    box.follows(found)
    writer = OutboxWriter(box.new, lambda: 3000.0)
    assert writer.recorder != box.recorder
    assert (writer.cursor, writer.position, writer.began) == (1000, 1700, box.began)
    assert writer.newest_settings() == (4, '{"source": "urn:x"}')
    assert [row.seq for row in writer.tail()] == list(range(901, 1001))
    assert writer.resources.find(orthanc_id(7)) == Resource("instance", orthanc_id(7), parents(7)["series"], 7)
    assert {one.level for one in writer.resources.growing()} == {"series", "study", "patient"}
    writer.append(stored(1, 1001), 1001, 4, unasked)
    assert writer.position == 1702  # no jump: it was closed cleanly
    writer.close()
    assert stat.S_IMODE(box.new.stat().st_mode) == 0o600


@pytest.mark.parametrize("instance", [200, 600, 999])
def test_up_to_the_first_damaged_page(box: Box, instance: int) -> None:
    box.overwrite(box.page_of(f"job-{instance}\0" if instance == 1000 else f"job-{instance}"))
    found = box.salvage()
    print(found)
    box.follows(found)
    assert not found.whole
    # A page holds some dozens of rows, and the one in front of the damaged one is read to its end.
    assert 2 * instance - box.delivered - 80 < found.rows < 2 * instance - box.delivered
    last = max(row.seq or 0 for row in rows(box.new))
    assert found.cursor == last
    assert all(row.seq is None or row.seq <= found.cursor for row in rows(box.new))


class LogWithoutOrder:
    """Orthanc's log on PostgreSQL, a row of which came later than those behind it; and a clock that stands still."""

    def __init__(self, through: int) -> None:
        self.rows = [Row(seq, DATE, "NewInstance", "instance", orthanc_id(seq)) for seq in range(1, through + 1)]

    def page(self, since: int, limit: int) -> list[Row]:
        return [row for row in self.rows if row.seq > since][:limit]

    def tip(self) -> int:
        return len(self.rows)

    def now(self) -> float:
        return 0.0

    def wait(self, seconds: float) -> bool:
        raise AssertionError("it waits")


def test_where_the_log_has_no_order_what_was_open_and_is_lost_is_read_again(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is lower than those of rows that were taken over."""
    monkeypatch.setattr("orthanc_events_bridge.salvage.REREAD", 500)
    writer = OutboxWriter(box.path, lambda: 1000.0)
    late = [fact for fact in stored(1, 1001) if fact.seq]
    writer.append(stored(100, 1002), 1000, 4, unasked, ahead="[1101,[[1001,1001]]]")
    writer.append(late, 1101, 4, unasked)
    writer.append(stored(200, 1102), 1301, 4, unasked)
    writer.close()
    box.before = rows(box.path)
    box.overwrite(box.page_of("job-1090"))
    found = box.salvage()
    box.follows(found)
    told = {row.seq for row in rows(box.new)}
    assert 1001 not in told and found.cursor > 1001 and not found.whole
    writer = OutboxWriter(box.new, lambda: 3000.0)
    assert writer.settled == found.cursor - 500
    merge = Unordered(log := LogWithoutOrder(1301), deque(), writer.settled, log, ahead=writer.ahead)
    for facts in merge.backlog(1301):
        writer.append(facts, merge.cursor, 4, lambda level, resource: parents(0), ahead=merge.ahead)
    writer.close()
    again = OutboxWriter(box.new, lambda: 3000.0)
    assert again.settled is None and again.cursor == 1301
    again.close()
    seqs = Counter(row.seq for row in rows(box.new) if row.seq)
    assert all(seqs[seq] for seq in range(found.cursor - 500, 1302))
    by_seq = {row.seq: (row.date, row.change, row.level, row.resource) for row in box.before}  # what ids are made of
    assert all((row.date, row.change, row.level, row.resource) == by_seq[row.seq] for row in rows(box.new) if row.seq)


def test_what_every_transport_has_is_not_needed(box: Box) -> None:
    box.overwrite(box.page_of("job-50"))
    found = box.salvage()
    assert (found.rows, found.whole, found.cursor) == (1700, True, 1000)


def test_damaged_resources(box: Box) -> None:
    key = bytes.fromhex(orthanc_id(500).replace("-", ""))
    content = box.path.read_bytes()
    place = content.index(key + b"instance") // PAGE * PAGE
    box.overwrite(place)
    found = box.salvage()
    assert found.rows == 1700 and found.whole
    assert not found.all_resources and 300 < found.resources < 500
    writer = OutboxWriter(box.new, lambda: 3000.0)
    assert writer.began == 2_000_000, "what was announced before is not known"
    assert writer.resources.find(orthanc_id(1)) is not None
    writer.abandon()


def test_nothing_can_be_read(box: Box) -> None:
    box.overwrite(0, box.path.stat().st_size)
    assert box.salvage() == Salvage(0, whole=False, resources=0, all_resources=False, cursor=150, settled=0)
    assert salvage(None, box.new, lambda recorder: 0, None, 1.0).cursor == 0
    writer = OutboxWriter(box.new, lambda: 3000.0)
    assert writer.cursor == 0
    writer.abandon()


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_truncated_one(box: Box, part: float) -> None:
    os.truncate(box.path, int(box.path.stat().st_size * part))
    found = box.salvage()
    print(found)
    box.follows(found)
    assert not found.whole
    assert found.cursor == max([150, *(row.seq or 0 for row in rows(box.new))])


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_damage_anywhere_never_makes_up_anything(box: Box, every: int) -> None:
    """One page after the other: what is taken over is a run of what was there, and its cursor never passes a hole."""
    whole = box.path.read_bytes()
    for place in range(0, len(whole), every * PAGE):
        box.path.write_bytes(whole)
        box.overwrite(place)
        found = box.salvage()
        box.follows(found)
        reached = [row.seq for row in rows(box.new) if row.seq]
        assert found.cursor in (1000 if found.whole else -1, max([150, *reached])), place


def test_a_hole_that_is_no_jump_ends_it(box: Box) -> None:
    with closing(sqlite3.connect(box.path, isolation_level=None)) as db:
        db.execute("UPDATE rows SET position = position + ? WHERE position > 1800", (JUMP,))
        db.execute("UPDATE meta SET value = value + ? WHERE key = 'position'", (JUMP,))
    assert box.salvage().rows == 1700
    with closing(sqlite3.connect(box.path, isolation_level=None)) as db:
        db.execute("DELETE FROM rows WHERE position = 1000")
    found = box.salvage()
    assert (found.rows, found.whole, found.cursor) == (699, False, 500)


def test_one_of_the_first_version(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    shutil.copy(Path(__file__).with_name("data") / "outbox-v1.db", path)
    with closing(sqlite3.connect(path)) as db:
        found = salvage(db, tmp_path / "new", lambda recorder: 1, 1, 2000.0)
    assert (found.rows, found.whole, found.all_resources) == (3, True, False)
    assert [row.change for row in rows(tmp_path / "new")] == ["NewSeries", "NewStudy", "NewPatient"]


def test_stopped_in_between_everything_is_as_it_was(box: Box) -> None:
    before = box.path.read_bytes()
    with closing(sqlite3.connect(box.path)) as db, pytest.raises(StoppedError):
        salvage(db, box.new, lambda recorder: 0, None, 1.0, lambda: True)
    assert box.path.read_bytes() == before


# -- the write-ahead log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["missing", "garbage", "truncated", "half", "shm"])
def test_a_lost_write_ahead_log_is_like_a_power_cut(tmp_path: Path, harm: str) -> None:
    """What was not in the file itself yet is gone with the cursor that says so, and numbers jump."""
    path = tmp_path / "from" / "outbox.db"
    path.parent.mkdir()
    writer = OutboxWriter(path, lambda: 1.0)
    writer.append(stored(2), 2, 1, unasked)
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(FULL)").fetchall()
    writer.append(stored(100, 3), 102, 1, unasked)
    killed = tmp_path / "outbox.db"
    for suffix in ("", "-wal", "-shm"):
        shutil.copy(f"{path}{suffix}", f"{killed}{suffix}")
    writer.abandon()
    wal, shm = Path(f"{killed}-wal"), Path(f"{killed}-shm")
    if harm == "missing":
        wal.unlink()
    elif harm == "garbage":
        wal.write_bytes(random.Random(1).randbytes(wal.stat().st_size))
    elif harm == "truncated":
        os.truncate(wal, 1000)
    elif harm == "half":
        os.truncate(wal, wal.stat().st_size // 2)
    else:
        shm.write_bytes(random.Random(1).randbytes(shm.stat().st_size))
    again = OutboxWriter(killed, lambda: 1.0)
    assert again.cursor is not None
    found = rows(killed)
    assert [row.position for row in found] == list(range(1, len(found) + 1))
    assert again.cursor == max(row.seq or 0 for row in found)
    assert again.position == len(found) + JUMP
    if harm == "shm":
        assert len(found) == 204
    again.abandon()


# -- setting aside, and putting in place ---------------------------------------------------------------------


class Log:
    """Orthanc's log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)

    warning = error = info


class Rescued:
    """A folder, and what rescues the outbox in it."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        self.folder.prepare()
        self.log = Log()
        self.stopping = False
        self.upkeep = Upkeep(self.folder, self.log, lambda document: None)
        self.rescue = Rescue(self.folder, self.log, self.upkeep, lambda: self.stopping)
        self._outbox: OutboxWriter | None = None

    def open(self) -> OutboxWriter:
        self._outbox = self.rescue.open()
        return self._outbox

    def exchange(self, outbox: OutboxWriter | None, error: DamagedError) -> OutboxWriter:
        self.rescue.exchange(outbox, self.rescue.save(outbox, error), error)
        return self.open()

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.abandon()
        self.upkeep.close()

    def deliver(self, recorder: str, position: int, seq: int) -> None:
        with closing(State(self.folder.bridge)) as state:
            progress = state.progress("one", recorder)
            progress.position, progress.seq = position, seq
            state.save("one", progress)


@pytest.fixture
def rescued(tmp_path: Path) -> Iterator[Rescued]:
    found = Rescued(tmp_path / "folder")
    yield found
    found.close()


def test_a_damaged_one_is_found_at_opening_and_exchanged(rescued: Rescued) -> None:
    outbox = rescued.open()
    outbox.append(stored(100), 100, 0, unasked)
    rescued.deliver(outbox.recorder, 120, 60)
    outbox.close()
    path = rescued.folder.outbox
    with path.open("r+b") as file:
        file.write(b"garbage" * 100)
    with pytest.raises(DamagedError) as caught:
        rescued.open()
    outbox = rescued.exchange(None, caught.value)
    assert (outbox.cursor, outbox.position) == (60, 0)
    aside = next(rescued.folder.path.glob("outbox.db.corrupt-*"))
    assert aside.read_bytes().startswith(b"garbage") and stat.S_IMODE(aside.stat().st_mode) == 0o600
    said = outbox.noted("rescue")
    assert said["aside"] == str(aside) and "LOST" in said["result"] and "Seq 60" in said["result"]
    assert any(aside.name in line for line in rescued.log.lines)
    rescued.folder.prepare()
    assert stat.S_IMODE(rescued.folder.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("removed", ["all", "db", "wal", "replaced"])
def test_one_that_is_removed_while_it_is_open_loses_nothing(rescued: Rescued, removed: str) -> None:
    outbox = rescued.open()
    outbox.append(stored(100), 100, 0, unasked)
    before = rows(rescued.folder.outbox)
    rescued.deliver(outbox.recorder, 120, 60)
    reader = OutboxReader(rescued.folder.outbox)
    rescued.rescue.look(outbox)
    path = rescued.folder.outbox
    for suffix in {"db": ("",), "wal": ("-wal",)}.get(removed, ("", "-wal", "-shm")):
        Path(f"{path}{suffix}").unlink()
    if removed == "replaced":
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE other (x)")
    outbox.append(stored(10, 101), 110, 0, unasked)  # nobody has looked yet
    with pytest.raises(DamagedError, match="was removed or replaced") as caught:
        rescued.rescue.look(outbox)
    new = rescued.exchange(outbox, caught.value)
    assert (new.cursor, new.position) == (110, 100)
    now = rows(path)
    assert [row.minted for row in now[:80]] == [row.minted for row in before[120:]]
    assert reader.exchanged()
    reader.close()
    rescued.rescue.look(new)
    new.append(stored(1, 111), 111, 0, unasked)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM rows").fetchone() == (102,)


def test_killed_between_the_renamings_the_new_one_is_found(rescued: Rescued) -> None:
    outbox = rescued.open()
    outbox.append(stored(10), 10, 0, unasked)
    rescued.rescue.save(outbox, DamagedError("x"))
    outbox.close()
    set_aside(rescued.folder.outbox)
    again = rescued.open()
    assert again.recorder != outbox.recorder and again.position == 20
    assert not list(rescued.folder.path.glob("*.new"))


def test_without_room_everything_is_as_it_was(rescued: Rescued, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = rescued.open()
    outbox.append(stored(10), 10, 0, unasked)
    making = Path(f"{rescued.folder.outbox}.making")
    making.mkdir()
    with pytest.raises(OutboxError, match="can't be made"):
        rescued.rescue.save(outbox, DamagedError("x"))
    making.rmdir()
    outbox.append(stored(1, 11), 11, 0, unasked)
    rescued.stopping = True
    with pytest.raises(StoppedError):
        rescued.rescue.save(outbox, DamagedError("x"))


def test_the_bridge_says_which_file_is_damaged(rescued: Rescued) -> None:
    outbox = rescued.open()
    with closing(State(rescued.folder.bridge)) as state:
        state.note("damage", {"file": [1, 2], "message": "of another"})
        rescued.rescue.look(outbox)
        state.note("damage", {"file": identity(rescued.folder.outbox)[0], "message": "of this"})
    with pytest.raises(DamagedError, match="of this"):
        rescued.rescue.look(outbox)


def test_an_emptied_outbox_is_said(rescued: Rescued) -> None:
    rescued.deliver("recorder", 10, 7)
    rescued.open()
    assert any("there was no outbox.db" in line and "behind Seq 7" in line for line in rescued.log.lines)


def test_the_very_first_start_is_no_loss(rescued: Rescued) -> None:
    with closing(State(rescued.folder.bridge)) as state:
        state.progress("one", "recorder")
    rescued.open()
    assert rescued.log.lines == []


# -- older than what was told --------------------------------------------------------------------------------


def test_an_older_copy_goes_on_under_another_recorder(rescued: Rescued, tmp_path: Path) -> None:
    outbox = rescued.open()
    outbox.append(stored(10), 10, 0, unasked)
    outbox.close()
    copy = tmp_path / "copy"
    shutil.copy(rescued.folder.outbox, copy)
    outbox = rescued.open()
    outbox.append(stored(10, 11), 20, 0, unasked)
    rescued.deliver(outbox.recorder, 40, 20)
    outbox.close()
    shutil.copy(copy, rescued.folder.outbox)
    again = rescued.open()
    assert again.recorder != outbox.recorder and (again.position, again.cursor) == (20, 10)
    assert any("a copy was put back" in line for line in rescued.log.lines)
    with closing(State(rescued.folder.bridge)) as state, closing(OutboxReader(rescued.folder.outbox)) as reader:
        meta = reader.meta()
        state.succeed(again.recorder, meta["former"], meta["former_position"])
        # What it had of the older one counts on; what is recorded from now on is new to it.
        assert state.progress("one", again.recorder).position == 20
    view = BridgeView(rescued.folder.bridge)
    assert view.recorder() == again.recorder
    view.close()


def test_a_power_cut_is_no_older_copy(rescued: Rescued) -> None:
    outbox = rescued.open()
    outbox.append(stored(10), 10, 0, unasked)
    rescued.deliver(outbox.recorder, 500, 10)  # rows that a power cut took
    outbox.abandon()
    again = rescued.open()
    assert again.recorder == outbox.recorder and again.position == 20 + JUMP


# -- bridge.db -----------------------------------------------------------------------------------------------


def test_a_bridge_db_that_is_removed_while_it_is_open_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "bridge.db"
    with closing(State(path)) as state:
        state.pause("one")
        assert not state.put_back()
        for name in ("bridge.db", "bridge.db-wal", "bridge.db-shm"):
            (tmp_path / name).unlink()
        with closing(State(path)) as other:  # the command line has made another one
            other.ask("pause", "two")
        assert state.put_back()
        state.pause("three")
        assert not state.put_back()
    with closing(State(path)) as again:
        assert set(again.paused()) == {"one", "three"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("when", ["opened", "running"])
def test_a_damaged_bridge_db_is_recognised(tmp_path: Path, when: str) -> None:
    path = tmp_path / "bridge.db"
    state = State(path)
    for number in range(200):
        state.note(f"note-{number}", {"text": "x" * 500})
    if when == "opened":
        state.close()
        path.write_bytes(b"garbage" * 1000)
        with pytest.raises(DamagedError, match="file is not a database"):
            State(path)
        return
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("r+b") as file:
        file.seek(PAGE)
        file.write(random.Random(1).randbytes(path.stat().st_size - PAGE))
    with closing(state):
        state._db.execute("PRAGMA shrink_memory")
        with pytest.raises(DamagedError):
            _write_all(state)
        assert state.damage is not None


def _write_all(state: State) -> None:
    for number in range(200):
        state.note(f"note-{number}", {"text": "y" * 500})
