"""A command of ours that works until it is told to stop, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.reacting import consumer_url

#: Seconds for what takes moments on a machine that is not busy.
PATIENCE = 120.0


class Started:
    """Consumers of one configuration, as users start them. Used as a context manager, which ends them.

    :param command: of ``orthanc-events``.
    :param text: the file, behind broker and Orthanc.
    :param program: the module to run, and what comes before the command.
    """

    def __init__(
        self, folder: Path, line: Line, command: str, text: str, program: Sequence[str] = ("orthanc_events_bridge",)
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{command}.yaml"
        self._command = [sys.executable, "-m", *program, command, "--config", str(self.path)]
        self._log = folder / f"{command}.log"
        self._running: list[subprocess.Popen[bytes]] = []
        given = line.broker.kind == "nats" or "store:" in text
        store = "" if given else f"store: sqlite:///{folder}/{command}.db\n"
        self.path.write_text(
            f"broker: {consumer_url(line.broker)}\northanc: {line.orthanc.url}\nstart: oldest\nack_wait: 5s\n"
            f"{store}{text}",
            "utf-8",
        )

    def command(self, *more: str) -> list[str]:
        return [*self._command, *more]

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return ran(self.command(*more))

    def start(self, count: int = 1, *more: str) -> None:
        """Start some more.

        :param more: options of the command.
        """
        for _ in range(count):
            with self._log.open("ab") as log:
                self._running.append(subprocess.Popen(self.command(*more), stdout=log, stderr=log))

    def kill(self, number: int = 0) -> None:
        """Kill one at once, as `kill -9` does."""
        killed = self._running.pop(number)
        killed.kill()
        killed.wait()

    def kill_a_worker(self) -> bool:
        """Kill one that a command with `--workers` has started; whether there was any."""
        for one in self._running:
            for child in Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
                return True
        return False

    def stop(self) -> list[int]:
        """Stop all as a user does; their exit codes."""
        for one in self._running:
            one.terminate()
        codes = [one.wait(PATIENCE) for one in self._running]
        self._running.clear()
        return codes

    def __len__(self) -> int:
        return len(self._running)

    def log(self) -> str:
        return self._log.read_text("utf-8") if self._log.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._running:
            self.kill()


def ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def wait_for(condition: object, what: str, seconds: float = PATIENCE) -> None:
    """Until it holds."""
    assert callable(condition)
    assert wait_until(condition, seconds, every=0.2), what
