"""Whether Orthanc's log is the one that was read before, and what is said where it isn't."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from orthanc_events_bridge.changes.log import Row
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.plugin.continuity import Continuity
from orthanc_events_bridge.resources import SCHEMA, Resources

DATE = "20261124T080000"


class Log:
    """A change log, what Orthanc has, and what was announced of it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.counter = 0
        self.there: set[str] = set()
        db = sqlite3.connect(":memory:", isolation_level=None)
        db.executescript(SCHEMA)
        self.resources = Resources(db)
        self.continuity = Continuity(self, lambda level, resource: {} if resource in self.there else None)

    def page(self, since: int, limit: int) -> Sequence[Row]:
        return [row for row in self.rows if row.seq > since][:limit]

    def tip(self) -> int:
        return self.counter

    def create(self, *studies: str, told: bool = True) -> None:
        for study in studies:
            self.counter += 1
            self.rows.append(Row(self.counter, DATE, "NewStudy", "study", study))
            self.there.add(study)
            if told:
                self.tell(study, self.counter)

    def tell(self, study: str, seq: int) -> None:
        self.resources.remember(Fact("NewStudy", "study", study, 0, seq, DATE, {}), frozenset(), lambda *_: None)

    def delete(self, *studies: str) -> None:
        self.rows = [row for row in self.rows if row.resource not in studies]
        self.there -= set(studies)

    def is_emptied(self, cursor: int) -> bool:
        outbox: Any = SimpleNamespace(resources=self.resources)
        return self.continuity.is_emptied(outbox, cursor)


@pytest.fixture
def log() -> Log:
    made = Log()
    made.create("a", "b", "c")
    return made


def test_the_same_log_is_recognised_also_where_rows_are_gone(log: Log) -> None:
    tail = list(log.rows)
    log.delete("b")
    assert log.continuity.recognise(tail, 3) is None


def test_a_counter_behind_goes_on_where_both_agree(log: Log) -> None:
    tail = list(log.rows)
    log.rows, log.counter = log.rows[:2], 2
    found = log.continuity.recognise(tail, 3)
    assert found is not None
    assert (found.reason, found.tip, found.going_on) == ("counter-behind", 2, 2)


def test_numbers_that_are_given_again_go_on_in_front_of_these(log: Log) -> None:
    tail = list(log.rows)
    log.rows, log.counter = log.rows[:2], 2
    log.create("d", "e")
    found = log.continuity.recognise(tail, 3)
    assert found is not None
    assert (found.reason, found.tip, found.going_on) == ("numbers-reused", 4, 2)


def test_where_the_two_have_nothing_in_common_the_callbacks_say_where_to_go_on(log: Log) -> None:
    tail = list(log.rows)
    log.rows, log.counter = [], 0
    log.create("x", "y")
    found = log.continuity.recognise(tail, 3)
    assert found is not None
    assert (found.reason, found.going_on) == ("counter-behind", None)


def test_an_emptied_log_is_noticed_at_the_second_look(log: Log) -> None:
    assert not log.is_emptied(3)
    log.rows = []
    assert not log.is_emptied(3)
    assert log.is_emptied(3)
    assert not log.is_emptied(3)


def test_what_was_deleted_and_stored_again_is_no_emptied_log_however_late_it_is_heard_of(log: Log) -> None:
    assert not log.is_emptied(3)
    log.delete("a", "b", "c")
    log.create("a", "b", "c", told=False)
    for _ in range(5):  # capture is far behind
        assert not log.is_emptied(3)
    for number, study in enumerate("abc"):
        log.tell(study, 4 + number)
    assert not log.is_emptied(6)
    assert not log.is_emptied(6)


def test_with_one_page_it_is_seen_whether_a_log_goes_on(log: Log) -> None:
    tail = list(log.rows)
    assert log.continuity.is_followed([])
    assert log.continuity.is_followed(tail)
    log.delete("b")
    assert log.continuity.is_followed(tail)
    log.rows, log.counter = log.rows[:1], 1
    log.create("d", "e")
    assert not log.continuity.is_followed(tail)
