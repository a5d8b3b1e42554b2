"""The example consumers in other languages: built as their READMEs say, kept in ``.cache``, and started."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from orthanc_events_bridge.testing.guard import MARK, RUN
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "examples"
CACHE: Final = ROOT / ".cache" / "languages"
#: Seconds for what takes moments on a machine that is not busy.
PATIENCE: Final = 120.0
_BUILD: Final = 600.0


@dataclass(frozen=True, slots=True)
class Language:
    """One of the examples.

    :ivar folder: in examples/.
    :ivar broker: that it is for.
    :ivar tools: program → the arguments by which it says its version, and the oldest one that will do.
    :ivar build: its commands, in the folder.
    :ivar command: that starts it; ``{}`` stands for the folder.
    """

    folder: str
    broker: str
    tools: Mapping[str, tuple[str, tuple[int, ...]]]
    build: Sequence[Sequence[str]]
    command: Sequence[str] = field(default=())

    def built(self) -> list[str]:
        """The command, built where that is not done yet. Ends the test where a tool for it is missing."""
        try:
            for tool, (ask, oldest) in self.tools.items():
                _check(tool, ask, oldest)
        except MissingComponentError as error:
            skip_or_fail(error)
        here = EXAMPLES / self.folder
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=here, capture_output=True, text=True
        )
        names = sorted(name for name in tracked.stdout.split() if not name.endswith(".md"))
        digest = hashlib.sha256(b"".join(name.encode() + (here / name).read_bytes() for name in names)).hexdigest()[:16]
        place = CACHE / f"{self.folder}-{digest}"
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"{self.folder}.lock").open("w") as lock:  # several runs of tests can be side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "built").exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                for name in names:
                    shutil.copy(here / name, place / name)
                for command in self.build:
                    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=_BUILD)
                    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
                (place / "built").touch()
        return [part.format(place) for part in self.command]


LANGUAGES: Final = {
    "javascript": Language(
        "javascript-nats", "nats",
        {"node": ("--version", (20,)), "npm": ("--version", (9,))},
        [["npm", "ci", "--no-audit", "--no-fund"]],
        ["node", "{}/consumer.js"],
    ),
    "go": Language(
        "go-kafka", "kafka",
        {"go": ("version", (1, 26))},
        [["go", "vet", "."], ["go", "build", "-o", "consumer", "."]],
        ["{}/consumer"],
    ),
    "java": Language(
        "java-rabbitmq", "rabbitmq",
        {"mvn": ("--version", (3, 6)), "javac": ("--version", (17,))},
        [["mvn", "--batch-mode", "--quiet", "package"]],
        ["java", "-jar", "{}/target/consumer.jar"],
    ),
    "python": Language(
        "python-faststream", "nats",
        {"python3": ("--version", (3, 11))},
        [
            ["python3", "-m", "venv", "venv"],
            ["venv/bin/pip", "install", "--quiet", "--require-hashes", "--requirement", "requirements.txt"],
        ],
        ["{}/venv/bin/python", "{}/consumer.py"],
    ),
}  # fmt: skip


def _check(tool: str, ask: str, oldest: tuple[int, ...]) -> None:
    """Is a tool there, and new enough?

    :raises MissingComponentError: no.
    """
    path = shutil.which(tool)
    if path is None:
        raise MissingComponentError(f"{tool} is not installed")
    said = subprocess.run([path, ask], capture_output=True, text=True, timeout=60).stdout
    said = re.sub(r"\x1b\[[0-9;]*m", "", said)  # Maven's colours
    found = re.search(r"\d+(\.\d+)+|\d+", said)
    version = tuple(map(int, found[0].split("."))) if found else ()
    if version < oldest:
        raise MissingComponentError(f"{tool} {'.'.join(map(str, oldest))} is needed, and {said.split()[:3]} is here")


class Consumer:
    """One of the programs at work, with all that it has printed. Used as a context manager; ends by SIGTERM."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        folder.mkdir(parents=True)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            marked = {MARK: f"{RUN}/0/"}  # what is left behind is found
            self._process = subprocess.Popen(command, env=os.environ | environment | marked, stdout=out, stderr=err)

    def lines(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        *whole, _ = self._out.read_text("utf-8").split("\n")
        return [json.loads(line) for line in whole]

    def events(self) -> list[dict[str, Any]]:
        """The events that its handler was given, as it has decoded them."""
        return [one["event"] for one in self.lines() if one["did"] == "begin"]

    def wait(self, condition: Any) -> None:
        """Wait until it has said something."""
        done = wait_until(lambda: condition() or self._process.poll() is not None, PATIENCE, every=0.1)
        assert done and condition(), f"{self.lines()[-3:]}\n{self._err.read_text('utf-8')[-2000:]}"

    def __enter__(self) -> Self:
        self.wait(lambda: any(one["did"] == "ready" for one in self.lines()))
        return self

    def terminate(self) -> None:
        """End it by SIGTERM; that is waited for."""
        self._process.terminate()
        code = self._process.wait(PATIENCE)
        assert code == 0, self._err.read_text("utf-8")[-2000:]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.terminate()
        finally:
            self._process.kill()
            self._process.wait()
