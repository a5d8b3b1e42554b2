"""The user's own OnChange callback, behind ours and in order; and storage areas in Python."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orthanc_events_bridge.plugin.guest import Guest, StorageAreas


class Host:
    """Orthanc's log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(f"I {message}")

    def warning(self, message: str) -> None:
        self.lines.append(f"W {message}")

    def error(self, message: str) -> None:
        self.lines.append(f"E {message}")


def soon() -> float:
    """A deadline that is only reached when something is wrong."""
    return time.monotonic() + 10


def guest(on_change: Callable[[int, int, str], object] | None = None) -> tuple[Guest, Host, Any]:
    orthanc, host = SimpleNamespace(RegisterOnChangeCallback=None), Host()
    return Guest(orthanc, host, on_change), host, orthanc


def test_everything_is_shown_in_order_on_another_thread() -> None:
    seen: list[tuple[int, int, str, int]] = []
    made, host, _ = guest(lambda *change: seen.append((*change, threading.get_ident())))
    for number in range(500):
        made.offer(number, 1, f"r{number}")
    made.stop(soon())
    assert [change[:3] for change in seen] == [(number, 1, f"r{number}") for number in range(500)]
    assert {change[3] for change in seen} - {threading.get_ident()}
    assert threading.get_ident() not in {change[3] for change in seen}
    assert host.lines == []


def test_offer_never_waits_for_the_callback() -> None:
    gate = threading.Event()
    made, _, _ = guest(lambda *change: gate.wait(10))
    for number in range(1000):
        made.offer(number, 1, "r")
    gate.set()
    made.stop(soon())


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), KeyError("x")])
def test_what_the_callback_raises_is_logged_and_the_next_change_is_shown(error: BaseException) -> None:
    seen: list[int] = []

    def on_change(kind: int, level: int, resource: str) -> None:
        seen.append(kind)
        if kind == 1:
            raise error

    made, host, _ = guest(on_change)
    for number in (1, 2):
        made.offer(number, 1, "r")
    made.stop(soon())
    assert seen == [1, 2]
    assert len(host.lines) == 1
    assert host.lines[0].startswith(f"E your OnChange callback raised {type(error).__name__}")


def test_stop_without_a_change_has_no_thread_to_wait_for() -> None:
    made, host, _ = guest(lambda *change: None)
    made.stop(soon())
    assert host.lines == []


def test_slow_callback_is_not_waited_for_beyond_the_deadline() -> None:
    entered, gate = threading.Event(), threading.Event()

    def on_change(*change: object) -> None:
        entered.set()
        gate.wait(10)

    made, host, _ = guest(on_change)
    for number in range(3):
        made.offer(number, 1, "r")
    assert entered.wait(10)
    made.stop(time.monotonic())
    assert host.lines == ["W your OnChange callback was too slow: 2 changes were not shown to it"]
    gate.set()
    made.stop(soon())


def test_changes_between_two_batches_wake_the_thread() -> None:
    shown = threading.Semaphore(0)
    made, _, _ = guest(lambda *change: shown.release())
    for number in range(3):
        made.offer(number, 1, "r")
        assert shown.acquire(timeout=10)
    made.stop(soon())


def test_registered_callback_is_taken_over() -> None:
    seen: list[int] = []
    made, _, orthanc = guest()
    before = made.wanted
    made.intercept()
    orthanc.RegisterOnChangeCallback(lambda kind, level, resource: seen.append(kind))
    assert (before, made.wanted) == (False, True)
    made.offer(7, 1, "r")
    made.stop(soon())
    assert seen == [7]


def test_second_callback_is_refused_as_orthanc_does() -> None:
    made, _, orthanc = guest(lambda *change: None)
    made.intercept()
    with pytest.raises(RuntimeError, match="only register one"):
        orthanc.RegisterOnChangeCallback(lambda *change: None)


# -- storage areas -------------------------------------------------------------------------------------------


def test_storage_area_in_python_is_noticed_and_still_registered() -> None:
    registered: list[tuple[object, ...]] = []
    orthanc = SimpleNamespace(
        RegisterStorageArea=lambda *given: registered.append(given), LogError=lambda message: None
    )
    areas = StorageAreas(orthanc)
    areas.intercept()
    assert areas.reason() == ""
    orthanc.RegisterStorageArea(1, 2, 3)
    assert registered == [(1, 2, 3)]
    assert "orthanc.RegisterStorageArea" in areas.reason()
    assert "AllowThreads" in areas.reason() and "out of Python" in areas.reason()


def test_other_ways_to_register_one_are_noticed_too() -> None:
    orthanc = SimpleNamespace(RegisterStorageArea3=lambda *given: "answer")
    areas = StorageAreas(orthanc)
    areas.intercept()
    assert orthanc.RegisterStorageArea3() == "answer"
    assert "RegisterStorageArea3" in areas.reason()


def test_what_orthanc_raises_passes() -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("Can only register one storage area")

    orthanc = SimpleNamespace(RegisterStorageArea=refuse)
    areas = StorageAreas(orthanc)
    areas.intercept()
    with pytest.raises(RuntimeError, match="only register one"):
        orthanc.RegisterStorageArea()
