"""The outbox on a real disk: rows and cursor move together, and no number ever names two facts."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.changes.log import TAIL, Row
from orthanc_events_bridge.changes.model import Fact, Resource
from orthanc_events_bridge.errors import LogUnavailableError, OutboxError, OutboxFullError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import JUMP, VERSION, OutboxRow
from orthanc_events_bridge.resources import packed, unpacked

DATE = "20261123T200627"
IDS = {
    "instance": "66a662ce-7430e543-bad44d47-0dc5a943-ec7a538d",
    "series": "f2635388-f01d497a-15f7c06b-ad7dba06-c4c599fe",
    "study": "27f7126f-4f66fb14-03f4081b-f9341db2-53925988",
    "patient": "16738bc3-e47ed42a-43ce044c-a3414a45-cb069bd0",
}
ABOVE = {"instance": ("series", "study", "patient"), "series": ("study", "patient"), "study": ("patient",)}


class Opened:
    """An outbox with everything that was opened of it, to be closed at the end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outbox.db"
        self.time = 1000.0
        self._opened: list[OutboxWriter | OutboxReader] = []

    def writer(self) -> OutboxWriter:
        writer = OutboxWriter(self.path, lambda: self.time)
        self._opened.append(writer)
        return writer

    def reader(self) -> OutboxReader:
        reader = OutboxReader(self.path)
        self._opened.append(reader)
        return reader

    def rows(self) -> list[OutboxRow]:
        reader = OutboxReader(self.path)
        try:
            return reader.rows(0, 10_000_000)
        finally:
            reader.close()

    def close(self) -> None:
        for opened in self._opened:
            if isinstance(opened, OutboxWriter):
                opened.abandon()
            else:
                opened.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(tmp_path)
    yield opened
    opened.close()


def unasked(level: str, resource: str) -> dict[str, str] | None:
    raise AssertionError(f"{level} {resource} was looked up")


def gone(level: str, resource: str) -> dict[str, str] | None:
    return None


def jobs(count: int, first: int = 0) -> list[Fact]:
    return [Fact("JobSubmitted", "job", f"job-{first + number}", 5) for number in range(count)]


def logged(seq: int, change: str = "StablePatient", resource: str = "p") -> Fact:
    return Fact(change, "patient", resource, 5000, seq, DATE)


def parents_of(level: str) -> dict[str, str]:
    return {above: IDS[above] for above in ABOVE.get(level, ())}


def created(level: str, **extra: Any) -> Fact:
    change = f"New{level.capitalize()}"
    return Fact(change, level, IDS[level], 5000, 7, DATE, parents_of(level), dict(extra))


def deleted(level: str) -> Fact:
    return Fact("Deleted", level, IDS[level], 6000)


# -- rows and cursor -----------------------------------------------------------------------------------------


def test_what_is_written_is_read(box: Opened) -> None:
    writer = box.writer()
    facts = [created("instance"), Fact("JobSuccess", "job", "j", 6001, extra={"job": {"state": "Success"}})]
    writer.append(facts, 7, 3, unasked)
    first, second = box.rows()
    assert first == OutboxRow(
        1,
        "NewInstance",
        "instance",
        IDS["instance"],
        5000,
        7,
        DATE,
        None,
        1_000_000,
        3,
        {"parents": parents_of("instance")},
    )
    assert second._replace(minted="") == OutboxRow(
        2, "JobSuccess", "job", "j", 6001, None, None, "", 1_000_000, 3, {"job": {"state": "Success"}}
    )
    assert (writer.position, writer.cursor) == (2, 7)


def test_only_rows_that_were_not_read_from_the_log_get_a_minted_id(box: Opened) -> None:
    writer = box.writer()
    vanished = Fact("StablePatient", "patient", "p", 5000, 8, None)
    inferred = Fact("StablePatient", "patient", "p", 5000, None, DATE, extra={"inferred": True})
    writer.append([logged(7), vanished, inferred, *jobs(2)], 8, 1, unasked)
    minted = [row.minted for row in box.rows()]
    assert minted[0] is None and minted[2] is None
    ids = {minted[1], minted[3], minted[4]}
    assert len(ids) == 3 and None not in ids
    assert all(identifier and len(identifier) == 36 for identifier in ids)


def test_ids_and_rows_survive_a_new_start(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(3), 5, 1, unasked)
    before, recorder = box.rows(), writer.recorder
    writer.close()
    again = box.writer()
    assert (again.recorder, again.cursor, again.position) == (recorder, 5, 3)
    assert box.rows() == before


def test_exception_in_the_middle_leaves_rows_cursor_and_family_as_they_were(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(1), 5, 1, unasked)

    def fail(level: str, resource: str) -> dict[str, str] | None:
        raise LogUnavailableError("Orthanc is stopping")

    unknown = Fact("StableSeries", "series", "unknown", 5000, 8, DATE)
    with pytest.raises(LogUnavailableError):
        writer.append([created("instance"), logged(7), unknown, *jobs(1)], 8, 1, fail)
    assert (writer.position, writer.cursor, writer.tail()) == (1, 5, [])
    assert [row.position for row in box.rows()] == [1]
    writer.append([deleted("instance")], 6, 1, unasked)  # nothing of the failed one is known
    assert box.rows()[-1].position == 2
    assert box.rows()[-1].extra == {"parents": {}}


def test_cursor_alone(box: Opened) -> None:
    writer = box.writer()
    cursors = [writer.cursor]
    for cursor in (0, 261):
        writer.move_cursor(cursor)
        cursors.append(writer.cursor)
    assert cursors == [None, 0, 261]
    writer.close()
    assert box.writer().cursor == 261


def test_what_is_recorded_above_the_cursor_is_kept_with_it(box: Opened) -> None:
    writer = box.writer()
    writer.append([logged(3)], 1, 1, unasked, ahead="[3,[[2,2]]]")
    assert writer.ahead == "[3,[[2,2]]]"
    writer.abandon()
    writer = box.writer()
    assert (writer.cursor, writer.ahead) == (1, "[3,[[2,2]]]")
    writer.append([logged(2)], 3, 1, unasked)
    writer.abandon()
    assert box.writer().ahead == ""


def test_nothing_to_append_still_moves_the_cursor(box: Opened) -> None:
    writer = box.writer()
    writer.append([], 9, 1, unasked)
    assert (writer.cursor, writer.position, box.rows()) == (9, 0, [])


def test_recorder_is_one_for_each_outbox(tmp_path: Path) -> None:
    one, other = OutboxWriter(tmp_path / "a.db", lambda: 0.0), OutboxWriter(tmp_path / "b.db", lambda: 0.0)
    assert one.recorder != other.recorder
    one.close()
    other.close()


# -- jumps ---------------------------------------------------------------------------------------------------


def test_clean_stop_leaves_no_jump(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(2), 1, 1, unasked)
    writer.close()
    again = box.writer()
    again.append(jobs(1), 1, 1, unasked)
    assert [row.position for row in box.rows()] == [1, 2, 3]


def test_unclean_stop_jumps_by_a_million(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(2), 1, 1, unasked)
    writer.abandon()
    again = box.writer()
    assert again.position == 2 + JUMP == 1_000_002
    again.append(jobs(2), 1, 1, unasked)
    assert [row.position for row in box.rows()] == [1, 2, 1_000_003, 1_000_004]


def test_start_that_died_before_its_first_row_jumps_too(box: Opened) -> None:
    box.writer().abandon()
    box.writer().abandon()
    assert box.writer().position == 2 * JUMP


def test_jump_is_kept_before_anything_is_written_behind_it(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(2), 1, 1, unasked)
    writer.abandon()
    box.writer().abandon()
    assert box.writer().position == 2 + 2 * JUMP


@pytest.mark.parametrize("kept_from", range(9))
def test_count_across_jumps_is_what_counting_says(box: Opened, kept_from: int) -> None:
    for number in range(4):
        writer = box.writer()
        writer.append(jobs(2), 1, 1, unasked)
        if number == 1:
            writer.close()
        else:
            writer.abandon()
    writer = box.writer()
    positions = [row.position for row in box.rows()]
    assert positions == [1, 2, JUMP + 3, JUMP + 4, JUMP + 5, JUMP + 6, 2 * JUMP + 7, 2 * JUMP + 8]
    if kept_from:
        writer.retain(positions[kept_from - 1], 2**62)
        positions = positions[kept_from:]
    reader = box.reader()
    probes = {0, 1, 5, JUMP, JUMP + 2, JUMP + 3, 2 * JUMP, 2 * JUMP + 6, 2 * JUMP + 8, 9 * JUMP, *positions}
    for after in sorted(probes):
        assert reader.count(after) == sum(position > after for position in positions), after


def test_count_and_extent_of_an_empty_outbox(box: Opened) -> None:
    box.writer()
    reader = box.reader()
    assert reader.count(0) == 0 and reader.extent() == (0, 0, 0)


def test_extent(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(2), 1, 1, unasked)
    box.time = 1001.0
    writer.append(jobs(1), 1, 1, unasked)
    assert box.reader().extent() == (1, 1_000_000, 3)


# -- who is whose child --------------------------------------------------------------------------------------


def test_deletion_still_knows_its_parents_in_the_order_in_which_orthanc_tells_it(box: Opened) -> None:
    writer = box.writer()
    writer.append([created("instance")], 7, 1, unasked)
    writer.append([deleted(level) for level in ("instance", "series", "patient", "study")], 7, 1, unasked)
    told = {row.level: row.extra["parents"] for row in box.rows()[1:]}
    assert told == {level: parents_of(level) for level in IDS}


def test_study_before_patient_too(box: Opened) -> None:
    writer = box.writer()
    writer.append([created("instance")], 7, 1, unasked)
    writer.append([deleted(level) for level in IDS], 7, 1, unasked)
    assert [row.extra["parents"] for row in box.rows()[1:]] == [parents_of(level) for level in IDS]


def test_study_before_its_instances_as_postgresql_tells_it(box: Opened) -> None:
    writer = box.writer()
    writer.append([created("instance")], 7, 1, unasked)
    for level in ("study", "patient", "series", "instance"):
        writer.append([deleted(level)], 7, 1, unasked)
    told = {row.level: row.extra["parents"] for row in box.rows()[1:]}
    assert told == {level: parents_of(level) for level in IDS}


def test_nothing_is_inferred_of_what_another_orthanc_watches_over(box: Opened) -> None:
    writer = box.writer()

    def stored(seq: int, *, foreign: bool) -> list[Fact]:
        facts = [created(level) for level in IDS]
        for offset, fact in enumerate(facts):
            fact.seq, fact.foreign = seq + offset, foreign
        return facts

    writer.append(stored(1, foreign=True), 4, 1, unasked)
    assert (writer.resources.growing(), writer.resources.page("study", "", 10)) == ([], [])
    writer.resources.index_instances(True)
    assert writer.resources.members(Resource("series", IDS["series"], None, None)) == []
    writer.append(stored(5, foreign=True), 8, 1, unasked)  # it went, and the other one has told that
    assert [row.change for row in box.rows()] == ["NewInstance", "NewSeries", "NewStudy", "NewPatient"] * 2
    writer.append(stored(9, foreign=False), 12, 1, unasked)
    assert [one.born for one in writer.resources.page("study", "", 10)] == [11]
    assert len(writer.resources.growing()) == 3
    writer.append([deleted("instance")], 12, 1, unasked)
    assert box.rows()[-1].extra["parents"] == parents_of("instance")


def test_what_was_deleted_is_forgotten(box: Opened) -> None:
    writer = box.writer()
    writer.append([created("instance"), *(deleted(level) for level in IDS)], 7, 1, unasked)
    writer.append([deleted(level) for level in IDS], 7, 1, unasked)
    assert [row.extra["parents"] for row in box.rows()[5:]] == [{}] * 4


def test_what_comes_again_is_known_again(box: Opened) -> None:
    writer = box.writer()
    story = [created("instance"), *(deleted(level) for level in IDS)]
    for _ in range(3):
        writer.append(story, 7, 1, unasked)
    told = [row.extra["parents"] for row in box.rows() if row.change == "Deleted" and row.level == "instance"]
    assert told == [parents_of("instance")] * 3


def test_deletion_of_something_never_seen_has_no_parents_and_asks_nobody(box: Opened) -> None:
    writer = box.writer()
    writer.append([deleted("study")], 7, 1, unasked)
    assert box.rows()[0].extra == {"parents": {}}


def test_new_child_instance_teaches_too(box: Opened) -> None:
    """After an unclean start the first word of a study may be that it received one more instance."""
    writer = box.writer()
    fact = Fact("NewChildInstance", "series", IDS["series"], 5000, parents=parents_of("series"))
    writer.append([fact, deleted("study")], 7, 1, unasked)
    assert box.rows()[1].extra["parents"] == parents_of("study")


def test_unknown_parents_are_looked_up_once(box: Opened) -> None:
    writer = box.writer()
    asked: list[tuple[str, str]] = []

    def look_up(level: str, resource: str) -> dict[str, str] | None:
        asked.append((level, resource))
        return parents_of(level)

    stable = Fact("StableSeries", "series", IDS["series"], 5000, 8, DATE)
    study = Fact("StableStudy", "study", IDS["study"], 5000, 9, DATE)
    patient = Fact("StablePatient", "patient", IDS["patient"], 5000, 10, DATE)
    writer.append([stable, stable, study, patient], 10, 1, look_up)
    assert asked == [("series", IDS["series"])]
    assert [row.extra["parents"] for row in box.rows()] == [
        parents_of("series"),
        parents_of("series"),
        parents_of("study"),
        {},
    ]


def test_what_is_gone_before_it_could_be_looked_up_has_no_parents(box: Opened) -> None:
    writer = box.writer()
    writer.append([Fact("StableSeries", "series", "x", 5000, 8, DATE)], 8, 1, gone)
    assert box.rows()[0].extra["parents"] == {}


def test_parents_that_were_only_half_known_are_completed(box: Opened) -> None:
    writer = box.writer()
    half = {"study": IDS["study"]}
    stable = Fact("StableSeries", "series", IDS["series"], 5000, 8, DATE)
    writer.append([stable], 8, 1, lambda level, resource: half)
    writer.append([stable], 8, 1, lambda level, resource: parents_of(level))
    writer.append([stable], 8, 1, unasked)
    assert [row.extra["parents"] for row in box.rows()] == [half, parents_of("series"), parents_of("series")]


def test_names_that_are_no_orthanc_ids_are_kept_as_they_are(box: Opened) -> None:
    writer = box.writer()
    fact = Fact("NewInstance", "instance", "i", 1, 7, DATE, {"series": "se", "study": "ü", "patient": "p" * 21})
    writer.append([fact, Fact("Deleted", "instance", "i", 2)], 7, 1, unasked)
    assert box.rows()[1].extra["parents"] == {"series": "se", "study": "ü", "patient": "p" * 21}


def test_orthanc_ids_take_twenty_bytes() -> None:
    assert len(packed(IDS["study"])) == 20
    assert all(unpacked(packed(identifier)) == identifier for identifier in IDS.values())
    for other in ("x", "ab" * 20, IDS["study"].upper().replace("-", "_"), "ü"):
        assert unpacked(packed(other)) == other


# -- UIDs of what is deleted ---------------------------------------------------------------------------------

UIDS = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3", "SOPInstanceUID": "1.2.3.4"}


def allow(writer: OutboxWriter, number: int, *tags: str) -> None:
    writer.keep_settings(number, json.dumps({"source": "urn:x", "tags": tags, "metadata": []}))


def test_allowed_uids_are_told_once_more_with_the_deletion(box: Opened) -> None:
    writer = box.writer()
    allow(writer, 1, *UIDS, "PatientName")
    writer.append([created("instance", tags={**UIDS, "PatientName": "CANARY"})], 7, 1, unasked)
    writer.append([deleted("instance"), deleted("series")], 7, 1, unasked)
    _, instance, series = box.rows()
    assert instance.extra == {"parents": parents_of("instance"), "tags": UIDS}
    assert series.extra == {"parents": parents_of("series")}


def test_uids_that_are_allowed_no_longer_are_not_told(box: Opened) -> None:
    writer = box.writer()
    allow(writer, 1, *UIDS)
    allow(writer, 2, "StudyInstanceUID")
    writer.append([created("instance", tags=UIDS)], 7, 1, unasked)
    writer.append([deleted("instance")], 7, 2, unasked)
    assert box.rows()[1].extra["tags"] == {"StudyInstanceUID": "1.2"}


def test_without_settings_nothing_is_told(box: Opened) -> None:
    writer = box.writer()
    allow(writer, 1, *UIDS)
    writer.append([created("instance", tags=UIDS)], 7, 1, unasked)
    writer.append([deleted("instance")], 7, 0, unasked)
    assert "tags" not in box.rows()[1].extra


def test_uids_are_kept_when_a_parent_is_learnt_later(box: Opened) -> None:
    writer = box.writer()
    allow(writer, 1, *UIDS)
    lone = Fact("StableStudy", "study", IDS["study"], 5, 7, DATE, {}, {"tags": {"StudyInstanceUID": "1.2"}})
    writer.append([lone], 7, 1, unasked)
    writer.append([created("instance"), deleted("study")], 7, 1, unasked)
    assert box.rows()[-1].extra == {"parents": parents_of("study"), "tags": {"StudyInstanceUID": "1.2"}}


def test_no_uid_is_kept_that_was_not_allowed(box: Opened) -> None:
    writer = box.writer()
    writer.append([created("instance")], 7, 1, unasked)
    writer.close()
    with sqlite3.connect(box.path) as db:
        assert db.execute("SELECT count(*) FROM resources WHERE uids IS NOT NULL").fetchone() == (0,)
    db.close()


# -- the log's last rows -------------------------------------------------------------------------------------


def test_tail_is_what_was_read_of_the_log(box: Opened) -> None:
    writer = box.writer()
    vanished = Fact("StablePatient", "patient", "p", 5000, 8, None)
    writer.append([logged(7), vanished, *jobs(1), logged(9)], 9, 1, unasked)
    assert writer.tail() == [Row(seq, DATE, "StablePatient", "patient", "p") for seq in (7, 9)]


def test_tail_keeps_the_last_hundred_numbers(box: Opened) -> None:
    writer = box.writer()
    for first in range(1, 400, 57):
        writer.append([logged(seq) for seq in range(first, first + 57)], first + 56, 1, unasked)
    assert [row.seq for row in writer.tail()] == list(range(399 - TAIL + 1, 400))


def test_tail_after_one_large_batch(box: Opened) -> None:
    writer = box.writer()
    writer.append([logged(seq) for seq in range(1, 1000)], 999, 1, unasked)
    assert len(writer.tail()) == TAIL and writer.tail()[-1].seq == 999


def test_tail_can_be_forgotten(box: Opened) -> None:
    writer = box.writer()
    writer.append([logged(7)], 7, 1, unasked)
    writer.append([], 3, 1, unasked, another_log=True)
    assert writer.tail() == []
    assert writer.cursor == 3


# -- bounds --------------------------------------------------------------------------------------------------


def recorded_at(box: Opened, writer: OutboxWriter, *seconds: float) -> None:
    for second in seconds:
        box.time = second
        writer.append(jobs(1), 1, 1, unasked)


def test_retain_takes_what_is_delivered_and_old(box: Opened) -> None:
    writer = box.writer()
    recorded_at(box, writer, 10, 20, 30, 40)
    assert writer.retain(delivered=3, recorded_before=25_000) == 2
    assert [row.position for row in box.rows()] == [3, 4]
    assert writer.retain(delivered=3, recorded_before=25_000) == 0
    assert writer.retain(delivered=3, recorded_before=2**62) == 1
    assert writer.retain(delivered=0, recorded_before=2**62) == 0
    assert [row.position for row in box.rows()] == [4]


def test_retain_never_takes_what_is_not_delivered(box: Opened) -> None:
    writer = box.writer()
    recorded_at(box, writer, 10, 20)
    assert writer.retain(delivered=0, recorded_before=2**62) == 0


def test_retain_is_done_in_small_steps(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(25), 1, 1, unasked)
    assert [writer.retain(20, 2**62, limit=10) for _ in range(3)] == [10, 10, 0]
    assert [row.position for row in box.rows()] == [21, 22, 23, 24, 25]


def test_retain_reads_the_oldest_rows_only(box: Opened) -> None:
    """Asked every ten seconds of ten million young rows, it must not read them all."""
    writer = box.writer()
    writer.append(jobs(5000), 1, 1, unasked)
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    writer._db.set_progress_handler(count, 100)
    assert writer.retain(5000, 0, limit=10) == 0
    writer._db.set_progress_handler(None, 0)
    assert steps < 20


def test_retain_goes_on_although_the_clock_was_set_back(box: Opened) -> None:
    writer = box.writer()
    recorded_at(box, writer, 900, 10, 20)
    assert writer.retain(delivered=3, recorded_before=15_000) == 2


def test_detach_takes_the_oldest_and_remembers_up_to_where(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(10), 1, 1, unasked)
    reader = box.reader()
    assert reader.detached() == 0
    assert writer.detach(delivered=2, limit=4) == 4
    assert reader.detached() == 4
    assert [row.position for row in reader.rows(0, 100)] == [5, 6, 7, 8, 9, 10]
    assert writer.detach(delivered=2, limit=100) == 6
    assert reader.detached() == 10
    assert writer.detach(delivered=2) == 0


def test_detach_of_what_was_delivered_is_no_gap(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(4), 1, 1, unasked)
    writer.detach(delivered=4, limit=2)
    assert box.reader().detached() == 0


def test_bytes_shrink_with_the_rows(box: Opened) -> None:
    writer = box.writer()
    empty = writer.bytes_used()
    writer.append([Fact("JobSuccess", "job", "j" * 500, 1) for _ in range(2000)], 1, 1, unasked)
    full = writer.bytes_used()
    assert full > empty + 1_000_000
    assert box.reader().bytes_used() == full
    writer.retain(2000, 2**62)
    assert writer.bytes_used() < empty + 100_000
    writer.close()
    assert box.path.stat().st_size < full / 2  # given back to the disk


def test_a_spike_gives_its_disk_back_in_small_steps_while_it_is_open(box: Opened) -> None:
    writer = box.writer()
    reader = box.reader()
    for _ in range(10):
        writer.append([Fact("JobSuccess", "job", "j" * 500, 1) for _ in range(3000)], 1, 1, unasked)
    wal = Path(f"{box.path}-wal")
    full = box.path.stat().st_size
    assert full > 15_000_000
    free = 0
    while writer.retain(30_000, 2**62):
        before, free = free, writer._db.execute("PRAGMA freelist_count").fetchone()[0]
        assert free <= before + 1000, "what a step frees is given back by it"
    assert reader.rows(0, 1) == []
    assert box.path.stat().st_size < full / 20
    assert wal.stat().st_size < 20_000_000


def test_the_write_ahead_log_shrinks_when_nobody_holds_it_any_more(box: Opened) -> None:
    writer = box.writer()
    frozen = sqlite3.connect(box.path, isolation_level=None)
    frozen.execute("BEGIN")
    frozen.execute("SELECT count(*) FROM rows").fetchone()
    wal = Path(f"{box.path}-wal")
    while wal.stat().st_size < 40_000_000:
        writer.append([Fact("JobSuccess", "job", "j" * 500, 1) for _ in range(3000)], 1, 1, unasked)
    frozen.close()
    for _ in range(3):
        writer.append(jobs(10), 1, 1, unasked)
    assert wal.stat().st_size <= 33_554_432


def test_full_disk_is_said_as_such_and_leaves_everything_as_it_was(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(3), 3, 1, unasked)
    pages = writer._db.execute("PRAGMA page_count").fetchone()[0]
    writer._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(OutboxFullError, match=r"can't be written.*free space"):
        writer.append([*jobs(200), created("instance")], 9, 1, unasked)
    assert (writer.position, writer.cursor) == (3, 3)
    assert len(box.rows()) == 3
    writer._db.execute("PRAGMA max_page_count = 1000000")
    writer.append(jobs(200), 9, 1, unasked)
    assert [row.position for row in box.rows()] == list(range(1, 204))


def test_read_only_file_is_said_as_such(box: Opened) -> None:
    writer = box.writer()
    writer._db.execute("PRAGMA query_only = 1")
    with pytest.raises(OutboxFullError):
        writer.append(jobs(1), 1, 1, unasked)


# -- files ---------------------------------------------------------------------------------------------------


def test_files_are_closed_to_others(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new" / "orthanc-events")
    mask = os.umask(0)
    try:
        folder.prepare()
        writer = OutboxWriter(folder.outbox, lambda: 0.0)
        writer.append(jobs(1), 1, 1, unasked)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()}
    writer.close()
    assert modes == {"outbox.db": 0o600, "outbox.db-wal": 0o600, "outbox.db-shm": 0o600}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_folder_of_ours_is_closed_to_others_again(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").touch()
    tmp_path.chmod(0o755)
    Folder(tmp_path).prepare()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_folder_that_others_use_too_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "of-somebody").touch()
    tmp_path.chmod(0o755)
    Folder(tmp_path).prepare()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_newer_version_is_refused_with_one_clear_message(box: Opened) -> None:
    box.writer().close()
    db = sqlite3.connect(box.path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(OutboxError, match="was made by a newer version") as caught:
        box.writer()
    assert "install that version again" in str(caught.value)
    with pytest.raises(OutboxError, match=f"has version {VERSION + 1}, this package reads 1 to {VERSION}"):
        box.reader()


def test_file_that_is_no_outbox_is_said_as_such(box: Opened) -> None:
    box.path.write_bytes(b"no database" * 1000)
    for opening in (box.writer, box.reader):
        opened: Callable[[], object] = opening
        with pytest.raises(OutboxError, match="can't be used: file is not a database"):
            opened()


def test_folder_that_is_not_there_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="can't be opened: No such file"):
        OutboxWriter(tmp_path / "no" / "outbox.db", lambda: 0.0)
    with pytest.raises(OutboxError, match="there is no outbox at"):
        OutboxReader(tmp_path / "outbox.db")
    assert list(tmp_path.iterdir()) == []


def test_reader_of_an_outbox_in_the_making(box: Opened) -> None:
    box.path.touch()
    with pytest.raises(OutboxError, match="has version 0"):
        box.reader()


def test_first_start_that_died_half_way_is_made_good(box: Opened) -> None:
    db = sqlite3.connect(box.path)
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID")
    db.close()
    writer = box.writer()
    writer.append(jobs(1), 1, 1, unasked)
    assert len(box.rows()) == 1


# -- reading while writing -----------------------------------------------------------------------------------


def test_reader_sees_whole_transactions_while_they_are_written(box: Opened) -> None:
    writer = box.writer()
    reader = box.reader()
    done = threading.Event()
    problems: list[str] = []

    def look() -> None:
        own = OutboxReader(box.path)
        while not done.is_set():
            rows = own.rows(0, 100_000)
            if len(rows) % 10:
                problems.append(f"{len(rows)} rows: half a transaction")
            if [row.position for row in rows] != list(range(1, len(rows) + 1)):
                problems.append("a hole")
        own.close()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(200):
            writer.append(jobs(10, number * 10), number, 1, unasked)
    finally:
        done.set()
        thread.join()
    assert problems == []
    assert reader.count(0) == 2000


def test_frozen_reader_never_blocks_the_writer(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(10), 1, 1, unasked)
    frozen = sqlite3.connect(box.path, isolation_level=None)
    frozen.execute("BEGIN")
    frozen.execute("SELECT count(*) FROM rows").fetchone()
    for number in range(50):
        writer.append(jobs(10), number, 1, unasked)
    writer.retain(500, 2**62)
    assert frozen.execute("SELECT count(*) FROM rows").fetchone() == (10,)
    frozen.close()


def test_data_version_changes_with_each_commit(box: Opened) -> None:
    writer = box.writer()
    reader = box.reader()
    before = reader.version()
    assert reader.version() == before
    writer.append(jobs(1), 1, 1, unasked)
    assert reader.version() != before


def test_reader_writes_nothing(box: Opened) -> None:
    box.writer()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        box.reader()._db.execute("DELETE FROM rows")


def test_rows_from_a_position_on_and_at_most_so_many(box: Opened) -> None:
    writer = box.writer()
    writer.append(jobs(10), 1, 1, unasked)
    reader = box.reader()
    assert [row.position for row in reader.rows(3, 4)] == [4, 5, 6, 7]
    assert reader.rows(10, 4) == []


# -- settings and notes --------------------------------------------------------------------------------------


def test_settings_are_kept_as_they_were_first_used(box: Opened) -> None:
    writer = box.writer()
    writer.keep_settings(5, '{"source": "urn:a"}')
    writer.keep_settings(5, '{"source": "urn:b"}')
    writer.keep_settings(6, '{"source": "urn:c"}')
    assert box.reader().settings() == {5: {"source": "urn:a"}, 6: {"source": "urn:c"}}


def test_notes_are_replaced(box: Opened) -> None:
    writer = box.writer()
    writer.note("capture", {"state": "starting"})
    writer.note("capture", {"state": "following"})
    meta = box.reader().meta()
    assert json.loads(meta["note.capture"]) == {"state": "following"}
    assert meta["recorder"] == writer.recorder == box.reader().recorder


def test_an_outbox_of_the_first_version_goes_on(box: Opened) -> None:
    """Its rows are read as ever, also before it was written to; what repair has to know is known from then on."""
    shutil.copy(Path(__file__).with_name("data") / "outbox-v1.db", box.path)
    assert [(row.position, row.change) for row in box.rows()] == [
        (1, "NewInstance"),
        (2, "NewSeries"),
        (3, "NewStudy"),
        (4, "NewPatient"),
    ]
    writer = box.writer()
    assert (writer.cursor, writer.position, writer.began) == (4, 4, 1_795_507_200_000)
    study, instance = ("-".join([letter * 8] * 5) for letter in "bd")
    assert writer.resources.find(study) == Resource("study", study, "-".join(["a" * 8] * 5), None)
    assert writer.resources.growing() == []
    writer.append([Fact("UpdatedMetadata", "instance", instance, 0, 5, "20261124T080001")], 5, 1, unasked)
    assert box.rows()[-1].extra["parents"]["study"] == study
    writer.close()
    again = box.writer()
    assert again.position == 5


def test_what_is_inferred_behind_another_log_is_another_fact(box: Opened) -> None:
    """The same resource can come back with a database, and be stable or gone once more."""
    writer = box.writer()

    def infer() -> None:
        stable = Fact("StableStudy", "study", IDS["study"], 0, None, DATE, {"patient": IDS["patient"]})
        stable.extra["inferred"] = True
        writer.append([stable], 1, 0, lambda level, resource: None)

    infer()
    infer()
    writer.append([Fact("LogDiscontinuity", "server", None, 0)], 1, 0, lambda level, resource: None, emptied=True)
    infer()
    writer.append([Fact("LogDiscontinuity", "server", None, 0)], 1, 0, lambda level, resource: None, another_log=True)
    infer()
    assert [row.date for row in box.rows() if row.level == "study"] == [DATE, DATE, DATE, f"{DATE}/1"]
    assert all(row.minted is None for row in box.rows() if row.level == "study")


def test_what_is_to_be_looked_for_is_kept_with_the_break_in_the_log(box: Opened) -> None:
    fact, note = Fact("LogDiscontinuity", "server", None, 0), ("repair", {"place": "", "listed": 0})
    box.writer().append([fact], 1, 0, lambda level, resource: None, another_log=True, note=note)
    assert box.writer().noted("repair") == {"place": "", "listed": 0}


@pytest.mark.parametrize("published", [0, 9])
def test_a_creation_that_is_published_proves_no_deletion(box: Opened, published: int) -> None:
    """A power cut took it from the outbox, with the deletion in front of it, and it is read again."""
    writer = box.writer()
    parents = {"patient": IDS["patient"]}
    first, second = (Fact("NewStudy", "study", IDS["study"], 0, seq, DATE, parents) for seq in (1, 9))
    writer.append([first], 1, 0, lambda level, resource: None)
    writer.published = published
    writer.append([second], 9, 0, lambda level, resource: None)
    assert [row.change for row in box.rows()] == ["NewStudy", *([] if published else ["Deleted"]), "NewStudy"]


def test_the_number_of_resources_is_not_counted_at_each_start(box: Opened) -> None:
    writer = box.writer()
    writer.append(
        [Fact("NewStudy", "study", IDS["study"], 0, 1, DATE, {"patient": IDS["patient"]})], 1, 0, lambda *_: None
    )
    assert box.writer().resources.count == writer.resources.count == 2
    writer.append([Fact("Deleted", "study", IDS["study"], 0)], 1, 0, lambda *_: None)
    assert box.writer().resources.count == 1


def test_one_process_at_a_time_records(tmp_path: Path) -> None:
    """And the same process again, as behind a reset of Orthanc's, whose interpreter is made anew."""
    folder = Folder(tmp_path)
    held = folder.hold_outbox()
    os.close(folder.hold_outbox())
    held_again = folder.hold_outbox()
    command = [sys.executable, "-c", f"from pathlib import Path\n{_HOLD}Folder(Path({str(tmp_path)!r})).hold_outbox()"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "another process records into the outbox" in run.stderr
    os.close(held)
    os.close(held_again)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


_HOLD = "from orthanc_events_bridge.folder import Folder\n"


def test_a_reader_in_the_writers_process_takes_nobodys_locks_away(box: Opened) -> None:
    """As without the plugin: the reader is there first. Else the last of others to close would delete the log of what
    is written, and all that comes later with it."""
    box.writer().close()
    mine = OutboxReader(box.path)
    assert mine.rows(0, 1) == []
    writer = box.writer()
    look = (
        "import sys\nfrom pathlib import Path\nfrom orthanc_events_bridge.outbox_reader import OutboxReader\n"
        "reader = OutboxReader(Path(sys.argv[1]))\nprint(len(reader.rows(0, 9)))\nreader.close()"
    )
    for count in (1, 2):
        writer.append([Fact("StableStudy", "study", IDS["study"], 0, count, DATE, {})], count, 0, lambda *_: None)
        told = subprocess.run([sys.executable, "-c", look, str(box.path)], capture_output=True, check=True)
        assert int(told.stdout) == count == len(mine.rows(0, 9))
        assert writer.sync_path.exists()
    mine.close()
