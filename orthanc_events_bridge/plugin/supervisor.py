"""Keeps the bridge process running beside Orthanc, and passes its log lines on.

The child's standard input is the bell (a byte: new rows) and the lifeline (end of file: Orthanc is gone). Its standard
error carries log lines, each with its level in front: ``I ``, ``W `` or ``E ``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.plugin.host import Host

#: Seconds before the bridge is started again: the first time, at most, and at most when a person has to
#: change something.
_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 5.0
_LONGEST_WAIT_FOR_A_PERSON: Final = 30.0
#: A bridge that lived this long starts afresh with the first wait.
_SETTLED: Final = 10.0

#: What the bridge's exit codes mean (`orthanc_events_bridge.bridge`).
_REASONS: Final = {
    0: "it ended by itself",
    1: "it failed",
    2: "its configuration is wrong",
    75: "another bridge works on this outbox",
}


def interpreter(environment: Mapping[str, str], shim: str | None) -> str:
    """The Python that runs the bridge: the environment's word, the shim's, else that of Orthanc's own Python.

    ``sys.executable`` is of no use: inside Orthanc it is Orthanc, and running it would start another one.
    """
    if environment.get("ORTHANC_EVENTS_PYTHON"):
        return environment["ORTHANC_EVENTS_PYTHON"]
    if shim:
        return shim
    return str(Path(sys.prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


class Supervisor:
    """Runs one child process for as long as Orthanc lives.

    :param command: the child's command line.
    :param folder: its working directory.
    :param host: Orthanc's log.
    """

    def __init__(self, command: Sequence[str], folder: Path, host: Host) -> None:
        self._command = list(command)
        self._folder = folder
        self._host = host
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._bell: int | None = None
        self._repeats = Repeats(time.monotonic)
        self._said = ""
        self.note: dict[str, Any] = {"pid": None, "since": None, "restarts": 0, "last_exit": None}
        self._thread = threading.Thread(target=self._run, name="orthanc-events-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        """Tell the bridge that there are new rows. Never blocks: a full pipe has woken it already."""
        with self._lock:
            if self._bell is not None:
                with contextlib.suppress(OSError):
                    os.write(self._bell, b"\n")

    def hang_up(self) -> None:
        """Close the lifeline: the bridge sends what is left and ends."""
        self._stop.set()
        with self._lock:
            self._close_bell()

    def stop(self, deadline: float) -> None:
        """See the child and the thread off.

        :param deadline: by `time.monotonic`; a child that is still there then is killed.
        """
        self.hang_up()
        with self._lock:
            process = self._process
        if process is not None:
            try:
                process.wait(max(0.1, deadline - 0.3 - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._host.warning("the bridge did not end in time and was killed; it goes on from its position")
                process.send_signal(signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
        self._thread.join(max(0.1, deadline - time.monotonic()))

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait = _FIRST_WAIT
        while not self._stop.is_set():
            started = time.monotonic()
            reason = self._once()
            if self._stop.is_set():
                return
            lived = time.monotonic() - started
            longest = _LONGEST_WAIT if reason.startswith("killed") else _LONGEST_WAIT_FOR_A_PERSON
            wait = _FIRST_WAIT if lived > _SETTLED else min(wait * 2, longest)
            self.note = {
                "pid": None,
                "since": None,
                "restarts": self.note["restarts"] + 1,
                "last_exit": {"reason": reason, "at": iso(time.time() * 1000)},
            }
            line = self._repeats.line(reason, f"the bridge has stopped: {reason}; it is started again")
            if line:
                self._host.error(line)
            self._stop.wait(wait)

    def _once(self) -> str:
        """Run the child until it ends, and say why it did."""
        self._said = ""
        try:
            process = self._spawn()
        except OSError as error:
            return (
                f"{self._command[0]} can't be run: {error.strerror}; name the Python that orthanc-events-bridge is"
                " installed for in ORTHANC_EVENTS_PYTHON, or run `orthanc-events init` again"
            )
        if process is None:
            return "Orthanc is stopping"
        assert process.stderr is not None
        self._pass_on(process.stderr)
        code = process.wait()
        with self._lock:
            self._close_bell()
            self._process = None
        process.stderr.close()
        if code < 0:
            return f"killed by {_signal_name(-code)}"
        return f"{_REASONS.get(code, f'exit code {code}')}{f': {self._said}' if self._said else ''}"

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        with self._lock:
            if self._stop.is_set():
                return None
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=self._folder,
                env=environment,
                start_new_session=True,  # a Ctrl-C is Orthanc's; the bridge then sees its lifeline close
                bufsize=0,
            )
            assert process.stdin is not None
            self._process = process
            self._bell = os.dup(process.stdin.fileno())
            process.stdin.close()
            os.set_blocking(self._bell, False)
            self.note = {**self.note, "pid": process.pid, "since": iso(time.time() * 1000)}
            return process

    def _close_bell(self) -> None:
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None

    def _pass_on(self, lines: IO[bytes]) -> None:
        """The child's log lines into Orthanc's log; what isn't one (an interpreter's last words) is remembered."""
        say = {"I": self._host.info, "W": self._host.warning, "E": self._host.error}
        for raw in lines:
            line = raw.decode("utf-8", "replace").rstrip()
            if line[:1] in say and line[1:2] == " ":
                text: str | None = line[2:]
                if line[0] == "E":
                    self._said = line[2:]
                    text = self._repeats.line(line, line[2:])  # each new child says the same again
                if text:
                    say[line[0]](text)
            elif line.strip():
                self._said = line.strip()[:300]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
