"""A fault that repeats for an hour is a few lines."""

from __future__ import annotations

from orthanc_events_bridge.logs import INTERVAL, Repeats


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_first_time_is_told_as_it_is() -> None:
    assert Repeats(Clock()).line("key", "it broke") == "it broke"


def test_repeated_within_the_interval_is_silent() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    repeats.line("key", "it broke")
    clock.time = INTERVAL - 0.001
    assert repeats.line("key", "it broke") is None


def test_next_line_says_how_often_it_was_silent() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    for _ in range(4):
        repeats.line("key", "it broke")
    clock.time = INTERVAL
    assert repeats.line("key", "it broke") == "it broke (and 3 times more since the last line about it)"
    clock.time = 2 * INTERVAL
    assert repeats.line("key", "it broke") == "it broke"


def test_an_hour_of_a_fault_each_five_seconds_is_twelve_lines() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    lines = 0
    for second in range(0, 3600, 5):
        clock.time = second
        lines += repeats.line("key", "the broker is down") is not None
    assert lines == 12


def test_different_faults_are_different() -> None:
    repeats = Repeats(Clock())
    assert repeats.line("one", "a") == "a"
    assert repeats.line("other", "b") == "b"


def test_over_forgets_and_says_whether_there_was_one() -> None:
    repeats = Repeats(Clock())
    assert not repeats.over("key")
    repeats.line("key", "it broke")
    assert repeats.over("key")
    assert not repeats.over("key")
    assert repeats.line("key", "it broke again") == "it broke again"


def test_own_interval() -> None:
    clock = Clock()
    repeats = Repeats(clock, interval=1.0)
    repeats.line("key", "a")
    clock.time = 1.0
    assert repeats.line("key", "a") == "a"
