"""A real bridge process without Orthanc: the test itself records changes, in capture's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml

from orthanc_events_bridge import status
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.upkeep import Upkeep
from orthanc_events_bridge.testing.processes import wait_until

SOURCE: Final = "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
#: The bridge, but it looks at commands and configuration ten times a second.
HURRIED: Final = """\
import sys, orthanc_events_bridge.bridge as bridge
from orthanc_events_bridge.cli import main
bridge._TICK = 0.1
sys.exit(main(sys.argv[1:]))
"""
#: Seconds that anything may take on a busy machine.
LONG: Final = 60.0


class Silent:
    """Orthanc's log, which nobody reads."""

    def info(self, message: str) -> None: ...
    def warning(self, message: str) -> None: ...
    def error(self, message: str) -> None: ...


class Beside:
    """An outbox, a configuration, and a bridge process that can be started, killed and started again.

    :param folder: for all of it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Folder(folder / "outbox")
        self.folder.prepare()
        self.config = folder / "orthanc-events.yaml"
        self._log = folder / "bridge.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._writer = OutboxWriter(self.folder.outbox, time.time)
        self._count = 0

    # -- what a person does ----------------------------------------------------------------------------------

    def configure(self, *transports: Mapping[str, Any], **more: Any) -> None:
        """Write the configuration, all of it at once as careful programs do."""
        self.write(yaml.safe_dump({"source": SOURCE, **more, "transports": [dict(one) for one in transports]}))

    def write(self, text: str) -> None:
        new = self.config.with_suffix(".new")
        new.write_text(text, "utf-8")
        new.replace(self.config)

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run ``orthanc-events`` on this outbox."""
        done = subprocess.run(
            [sys.executable, "-m", "orthanc_events_bridge", *map(str, arguments), "--outbox", str(self.folder.path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    # -- what capture does -----------------------------------------------------------------------------------

    def record(self, count: int = 1) -> list[int]:
        """Record changes, with the settings that the bridge has told, and give their positions."""
        upkeep = Upkeep(self.folder, Silent(), lambda allowed: None)
        try:
            upkeep.take_settings(self._writer)
            first, date = self._count + 1, time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            self._count += count
            facts = [
                Fact("NewStudy", "study", f"study-{n}", int(time.time()) * 1000, n, date, {"patient": "p"})
                for n in range(first, first + count)
            ]
            before = self._writer.position
            self._writer.append(facts, self._count, upkeep.settings, lambda level, resource: None)
            return [*range(before + 1, self._writer.position + 1)]
        finally:
            upkeep.close()

    def retain(self) -> None:
        """Let everything go that was delivered and is old enough."""
        self._keep_up(Upkeep.retain)

    def make_room(self) -> None:
        """Keep the outbox within its limit.

        :raises OutboxFullError: nothing may go.
        """
        self._keep_up(Upkeep.make_room)

    def give_up(self, rows: int) -> None:
        """Let the oldest rows go, whoever needs them."""
        self._writer.detach(0, limit=rows)

    def _keep_up(self, work: Callable[[Upkeep, OutboxWriter], None]) -> None:
        upkeep = Upkeep(self.folder, Silent(), lambda allowed: None)
        try:
            upkeep.take_settings(self._writer)
            work(upkeep, self._writer)
        finally:
            upkeep.close()

    # -- the bridge ------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process is not None and self._process.poll() is None, self.log()
        return self._process.pid

    def start(self, program: str = HURRIED) -> None:
        """Start the bridge.

        :param program: what Python is to run.
        """
        assert self._process is None
        command = [sys.executable, "-c", program, "run"]
        command += ["--outbox", str(self.folder.path), "--config", str(self.config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def hang_up(self) -> None:
        os.kill(self.pid, signal.SIGHUP)

    def stop(self) -> float:
        """Stop it; gives the seconds that this took."""
        assert self._process is not None
        began = time.monotonic()
        self._process.terminate()
        assert self._process.wait(LONG) == 0, self.log()
        self._process = None
        return time.monotonic() - began

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._writer.close()
        if kind is not None:
            print(self.log())

    # -- looking at it ---------------------------------------------------------------------------------------

    def log(self) -> str:
        return self._log.read_text("utf-8") if self._log.exists() else ""

    def status(self) -> dict[str, Any]:
        return status.read(self.folder)

    def transport(self, name: str) -> dict[str, Any]:
        """What the status shows of a transport; nothing where it isn't known."""
        return next((one for one in self.status()["transports"] if one["name"] == name), {})

    def wait(self, condition: Callable[[], object], what: str = "it") -> None:
        """Wait until a condition holds.

        :raises TimeoutError: it didn't.
        """

        def holds() -> bool:
            assert self._process is None or self._process.poll() is None, self.log()
            try:
                return bool(condition())
            except (KeyError, OutboxError):
                return False

        if not wait_until(holds, LONG, every=0.05):
            raise TimeoutError(f"{what} did not happen: {json.dumps(self.status(), indent=1)}")

    def wait_delivered(self, *names: str, through: int | None = None) -> None:
        """Wait until transports have delivered everything, or up to a position."""
        last = self.status()["outbox"]["last_position"] if through is None else through
        self.wait(lambda: all(self.transport(name)["position"] >= last for name in names), f"{names} at {last}")

    def wait_connected(self, *names: str) -> dict[str, str]:
        """Wait until transports are connected and have delivered everything; say since when each is, in their order."""
        self.wait_delivered(*names)
        self.wait(lambda: all(self.transport(name)["state"] == "connected" for name in names), f"{names} connected")
        return {name: self.transport(name)["since"] for name in names}

    def wait_log(self, text: str, count: int = 1) -> None:
        self.wait(lambda: self.log().count(text) >= count, f"the line {text!r}")
