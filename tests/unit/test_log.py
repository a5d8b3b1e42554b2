"""Pages of Orthanc's change log, and how another log is told from the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from orthanc_events_bridge.changes.log import OrthancLog, Row, common_seq, date_to_ms, same_log
from orthanc_events_bridge.errors import LogUnavailableError


def row(seq: int, resource: str = "a", date: str = "20261123T200627") -> Row:
    return Row(seq, date, "NewInstance", "instance", resource)


def answering(answer: object) -> tuple[OrthancLog, list[str]]:
    asked: list[str] = []

    def get(path: str) -> bytes:
        asked.append(path)
        return json.dumps(answer).encode()

    return OrthancLog(get), asked


CHANGE: dict[str, Any] = {
    "ChangeType": "NewStudy",
    "Date": "20261123T200627",
    "ID": "b9c08539-26f93bde-c81ab0d7-bffaf2cb-a4d0bdd0",
    "Path": "/studies/b9c08539-26f93bde-c81ab0d7-bffaf2cb-a4d0bdd0",
    "ResourceType": "Study",
    "Seq": 7,
}


def test_page_has_every_field_as_orthanc_spells_it_but_the_level() -> None:
    log, asked = answering({"Changes": [CHANGE], "Done": True, "Last": 7})
    assert log.page(6, 200) == [Row(7, "20261123T200627", "NewStudy", "study", CHANGE["ID"])]
    assert asked == ["/changes?since=6&limit=200"]


def test_page_takes_text_as_well_as_bytes() -> None:
    log = OrthancLog(lambda path: json.dumps({"Changes": [], "Done": True, "Last": 0}))
    assert log.page(0, 1) == []


def test_tip_is_asked_in_digits_far_behind_everything() -> None:
    """Orthanc reads "9e18" as 0, and would answer with the first row."""
    log, asked = answering({"Changes": [], "Done": True, "Last": 261})
    assert log.tip() == 261
    assert asked == ["/changes?since=9000000000000000000&limit=1"]


def test_the_counter_is_what_the_last_empty_page_told() -> None:
    answers = iter(
        [
            {"Changes": [CHANGE], "Done": True, "Last": 7},
            {"Changes": [], "Done": True, "Last": 9},
            {"Changes": [CHANGE]},
        ]
    )
    log = OrthancLog(lambda path: json.dumps(next(answers)))
    log.page(6, 1)
    assert log.counter is None
    log.page(7, 1)
    assert log.counter == 9


@pytest.mark.parametrize(
    "answer",
    [
        *({}, {"Changes": None, "Last": 1}, {"Changes": []}, [], "text", None),
        *({"Changes": [{"Seq": 1}], "Last": 1}, {"Changes": [{**CHANGE, "Seq": "x"}], "Last": 1}),
        *({"Changes": ["a"], "Last": 1}, {"Changes": [], "Last": "x"}),
    ],
)
def test_answer_that_is_no_page_means_unavailable(answer: object) -> None:
    log, _ = answering(answer)
    with pytest.raises(LogUnavailableError):
        log.tip()


def _raise() -> bytes:
    raise RuntimeError("2038")


@pytest.mark.parametrize("get", [_raise, lambda: b"<html>", lambda: b"\xff"])
def test_whatever_goes_wrong_means_unavailable(get: Callable[[], bytes]) -> None:
    log = OrthancLog(lambda path: get())
    with pytest.raises(LogUnavailableError, match="can't be read"):
        log.page(0, 1)


def test_date_is_utc_in_whole_seconds() -> None:
    expected = datetime(2026, 11, 23, 20, 6, 27, tzinfo=UTC).timestamp() * 1000
    assert date_to_ms("20261123T200627") == expected == row(1).at


@pytest.mark.parametrize("text", ["", "2026-11-23", "20261323T000000", "yesterday"])
def test_date_that_is_none_is_zero_and_no_error(text: str) -> None:
    assert date_to_ms(text) == 0


TAIL = [row(5), row(6, "b"), row(9, "c")]


def test_same_log() -> None:
    assert same_log(TAIL, TAIL, tip=9, cursor=9)
    assert same_log(TAIL, [*TAIL, row(10, "new")], tip=10, cursor=9)


def test_rows_that_are_only_missing_say_nothing() -> None:
    assert same_log(TAIL, [row(6, "b")], tip=9, cursor=9)
    assert same_log(TAIL, [], tip=9, cursor=9)


def test_rows_that_were_never_remembered_say_nothing() -> None:
    assert same_log(TAIL, [row(7, "x"), row(8, "y")], tip=9, cursor=9)


def test_row_with_other_content_is_another_log() -> None:
    assert not same_log(TAIL, [row(5), row(6, "other")], tip=9, cursor=9)
    assert not same_log(TAIL, [row(5, date="20261123T200628")], tip=9, cursor=9)


def test_counter_behind_the_cursor_is_another_log() -> None:
    assert not same_log(TAIL, TAIL[:1], tip=8, cursor=9)
    assert not same_log([], [], tip=0, cursor=1)


def test_nothing_remembered_is_the_same_log() -> None:
    assert same_log([], [row(1)], tip=1, cursor=0)


def test_common_seq_is_the_last_that_agrees_before_the_first_that_does_not() -> None:
    assert common_seq(TAIL, TAIL) == 9
    assert common_seq(TAIL, [row(5), row(6, "other"), row(9, "c")]) == 5
    assert common_seq(TAIL, [row(5), row(9, "c")]) == 9  # 6 is only missing
    assert common_seq(TAIL, [row(5)]) == 5


def test_common_seq_of_strangers_is_zero() -> None:
    assert common_seq(TAIL, [row(5, "x"), row(6, "b")]) == 0
    assert common_seq(TAIL, []) == 0
    assert common_seq([], [row(5)]) == 0


def test_common_seq_needs_no_order() -> None:
    assert common_seq(reversed(TAIL), list(reversed(TAIL))) == 9
