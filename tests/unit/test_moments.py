"""Moments as text, and what headers say of copies."""

from __future__ import annotations

import random

import pytest

from orthanc_events_bridge.moments import iso, seconds_of
from orthanc_events_bridge.transports.headers import attempts_before, due_of, due_text


def test_a_moment_is_read_as_it_was_written() -> None:
    assert iso(1_700_000_000_999) == "2023-11-14T22:13:20.999Z"
    assert iso(1_700_000_000_999, "seconds") == "2023-11-14T22:13:20Z"
    chance = random.Random(7)
    for _ in range(1000):
        milliseconds = chance.randrange(10**12, 2 * 10**12)
        assert round((seconds_of(iso(milliseconds)) or 0) * 1000) == milliseconds


def test_offsets_and_what_is_no_moment() -> None:
    assert seconds_of("2026-01-01T00:00:00+01:00") == seconds_of("2025-12-31T23:00:00Z")
    assert seconds_of("2025-12-31T23:00:00") == seconds_of("2025-12-31T23:00:00Z")
    assert seconds_of("soon") is None is seconds_of("")


def test_what_is_due_is_never_written_as_an_earlier_time() -> None:
    assert due_text(0.0001) == "1970-01-01T00:00:00.001Z"
    assert due_text(1_700_000_000.9995) == "2023-11-14T22:13:21.000Z"
    chance = random.Random(8)
    for _ in range(1000):
        moment = chance.uniform(1.6e9, 2.2e9)
        assert 0 <= due_of({"orthanc-due": due_text(moment)}) - moment < 0.0011
    assert due_of({}) == due_of({"orthanc-due": "soon"}) == 0


@pytest.mark.parametrize(
    ("said", "consumer", "before"),
    [("3", "one", 3), ("3", "other", 0), ("", "one", 0), ("-3", "one", 0), ("many", "one", 0), ("9" * 10, "one", 0)],
)
def test_attempts_are_those_of_the_same_consumer(said: str, consumer: str, before: int) -> None:
    assert attempts_before({"orthanc-attempts": said, "orthanc-consumer": consumer}, "one") == before
