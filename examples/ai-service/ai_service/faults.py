"""FOR TESTS: the service misbehaves at chosen series, so that what stands around it can be tested. Off by default.

Series are counted as they come, from 1. The numbers are remembered in a file, so that a restart doesn't count anew, and
so that a series that has crashed the service once, or was late once, is then treated as any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ai_service.settings import Settings
from ai_service.store import write

#: The code with which it dies (EX_SOFTWARE of sysexits.h).
EXIT_CODE: Final = 70


class Faults:
    """What is to go wrong. Where nothing is, nothing is remembered.

    :param die: ends the process at once, as a crash does.
    """

    def __init__(self, settings: Settings, folder: Path, die: Callable[[int], object] = os._exit) -> None:
        self._settings = settings
        self._path = folder / "faults.json"
        self._die = die
        self._numbers: dict[str, int] = {}
        self._happened: list[str] = []
        if settings.faults and self._path.exists():
            self._numbers, self._happened = json.loads(self._path.read_text("utf-8"))

    def refuses(self, series: str) -> bool:
        """Whether this series is refused: every time it comes. Also gives a series its number."""
        if not self._settings.faults:
            return False
        if series not in self._numbers:
            self._numbers[series] = len(self._numbers) + 1
            self._write()
        return self._numbers[series] in self._settings.fault_refuse

    def crash(self, series: str) -> None:
        """Die, once, if it is this series' turn: its result is not sent yet."""
        if self._once("crash", series, self._settings.fault_crash):
            self._die(EXIT_CODE)

    def crash_sent(self, series: str) -> None:
        """Die, once, if it is this series' turn: its result was sent, and nobody has written that down."""
        if self._once("crash_sent", series, self._settings.fault_crash_sent):
            self._die(EXIT_CODE)

    def late(self, series: str) -> float:
        """Return by how many seconds this series' result is to be late, once."""
        return self._settings.fault_late_seconds if self._once("late", series, self._settings.fault_late) else 0.0

    def _once(self, fault: str, series: str, numbers: frozenset[int]) -> bool:
        name = f"{fault} {series}"
        if self._numbers.get(series) not in numbers or name in self._happened:
            return False
        self._happened.append(name)
        self._write()
        return True

    def _write(self) -> None:
        write(self._path, json.dumps([self._numbers, self._happened]).encode())
