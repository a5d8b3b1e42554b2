"""Server processes that can be started, stopped, killed, frozen and started again. Standard library only."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Protocol, Self

from orthanc_events_bridge.testing.guard import MARK, RUN, guard, marked_processes

_POLL = 0.01


class ServerError(Exception):
    """A server did not start, did not stop, or ended by itself. The message ends with the end of its log."""


_given_ports: set[int] = set()


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on, never the same one twice.

    It lies below the range from which systems take ports for outgoing connections, so that a client that
    knocks at a stopped server can't occupy its port, or even connect to itself. Test runs side by side (pytest-xdist)
    have a part of the range each, so that none takes the port of another's server that is being started again.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(1000):
        port = random.randrange(15000 + worker, 32000, workers)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port
    raise ServerError("no free TCP port found between 15000 and 31999")


class Process(Protocol):
    """What a server needs of its process, as `subprocess.Popen` has it; one in a container has it too."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> Any: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Server:
    """A server process that can be started, stopped, killed, frozen and started again in the same place.

    Used as a context manager it is started on entry and closed on exit. Methods may be called from several
    threads, but only one at a time may start or end the process.

    :param folder: where its configuration, data and log are; made if it isn't there.
    """

    #: As messages call it.
    title: ClassVar[str] = "the server"
    #: How long a start or a stop may take, in seconds.
    deadline: ClassVar[float] = 60.0
    #: The exit codes after SIGTERM that mean that all went well; the last one is Java's way to say it.
    ends: ClassVar[tuple[int, ...]] = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    #: Where clients connect.
    port: int

    _numbers: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "server.log"
        self.environment: dict[str, str] = dict(environment or {})
        self._mark = f"{RUN}/{next(Server._numbers)}/"
        self._process: Process | None = None
        self._frozen = False
        #: How long its own children may outlive it when it is closed, in seconds.
        self.grace = 10.0

    # What a kind of server defines.

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _is_ready(self) -> bool:
        raise NotImplementedError

    # What another way to run it defines.

    def _launch(self, command: Sequence[str]) -> Process:
        """Start the process, with its output at the end of the log."""
        environment = {
            name: value
            for name, value in os.environ.items()
            # What a developer's shell holds for Python or for the bridge must not change a test's result.
            if not name.startswith("ORTHANC_EVENTS_") and name not in ("PYTHONPATH", "PYTHONHOME")
        }
        environment |= self.environment | {MARK: self._mark}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
                cwd=self.folder,
            )
        guard.tell("group", process.pid)
        return process

    def _complete(self, command: Sequence[str]) -> int:
        """Run a program of the server's to its end, with its output at the end of the log; return its exit code."""
        with self.log.open("ab") as log:
            return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode

    # Life.

    @property
    def pid(self) -> int:
        """The process id of the running server.

        :raises ServerError: it isn't running.
        """
        if self._process is None:
            raise ServerError(f"{self.title} in {self.folder} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there (frozen or not)."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> float:
        """Start the process, and wait until it answers.

        :param wait: return as soon as the process is there, without waiting for an answer.
        :return: the seconds from the start to readiness.
        :raises ServerError: it runs already, it ended, or it was not ready in time.
        """
        if self._process is not None:
            raise ServerError(f"{self.title} in {self.folder} was started already")
        command = self._command()
        began = time.monotonic()
        self._process = self._launch(command)
        self._frozen = False
        _running.add(self)
        if not wait:
            return time.monotonic() - began
        try:
            self.wait_ready()
        except BaseException:
            self._kill_all()
            raise
        return time.monotonic() - began

    def wait_ready(self) -> None:
        """Wait until the started process answers.

        :raises ServerError: it ended, or it was not ready in time.
        """
        end = time.monotonic() + self.deadline
        while not self._is_ready():
            process = self._process
            if process is None or process.poll() is not None:
                code = None if process is None else process.returncode
                raise ServerError(self._message(f"ended while it was starting, exit code {code}"))
            if time.monotonic() > end:
                raise ServerError(self._message(f"was not ready within {self.deadline:.0f} s"))
            time.sleep(_POLL)

    def stop(self) -> float:
        """Ask the process to end (SIGTERM) and wait for it. Does nothing when it isn't running.

        :return: the seconds that it took.
        :raises ServerError: it did not end in time (then it is killed), it crashed on the way, or it had
            ended by itself before.
        """
        if self._process is None:
            return 0.0
        if self._process.poll() is not None:
            self._ended_by_itself()
        began = time.monotonic()
        self.thaw()
        self._process.terminate()
        try:
            code = self._process.wait(self.deadline)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._forget()
            raise ServerError(self._message(f"did not stop within {self.deadline:.0f} s; it was killed")) from None
        self._forget()
        if code not in self.ends:
            raise ServerError(self._message(f"stopped with exit code {code}"))
        return time.monotonic() - began

    def kill(self) -> None:
        """Kill the process (SIGKILL), frozen or not, and wait until it is gone. Its children are not touched.

        :raises ServerError: it isn't running, or it had ended by itself before.
        """
        if self._process is None:
            raise ServerError(f"{self.title} in {self.folder} is not running")
        if self._process.poll() is not None:
            self._ended_by_itself()
        self._process.kill()
        self._forget()

    def restart(self) -> float:
        """Stop, if it is running, and start again in the same place and on the same ports; see `start`."""
        self.stop()
        return self.start()

    def freeze(self) -> None:
        """Freeze the process (SIGSTOP): its sockets stay open and nobody answers. Its children go on."""
        os.kill(self.pid, signal.SIGSTOP)
        self._frozen = True
        # On a busy machine its threads go on until the signal's turn comes.
        wait_until(lambda: _stopped(self.pid), 5)

    def thaw(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        if self._frozen:
            os.kill(self.pid, signal.SIGCONT)
            self._frozen = False

    def children(self) -> list[int]:
        """Return the ids of the living processes that this server started, also if they have outlived it."""
        own = self._process.pid if self._process is not None else None
        return [pid for pid in marked_processes(self._mark) if pid != own]

    def close(self, *, kill: bool = False) -> None:
        """Stop, and make sure that no child is left.

        :param kill: kill it in place of stopping it, where a stop is slow and not what the test is about.
        :raises ServerError: as `stop`; or children outlived the server by more than `grace` seconds, and were
            killed.
        """
        try:
            if kill and self._process is not None:
                self.kill()
            else:
                self.stop()
            end = time.monotonic() + self.grace
            while (left := self.children()) and time.monotonic() < end:
                time.sleep(_POLL)
            if left:
                names = ", ".join(f"{pid} ({_command_line(pid)})" for pid in left)
                raise ServerError(self._message(f"left {len(left)} processes behind for {self.grace:.0f} s: {names}"))
        finally:
            self._kill_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._kill_all()

    # The log.

    def log_text(self) -> str:
        """Return the whole log, of all runs in this folder."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def wait_log(self, text: str, *, count: int = 1, timeout: float = 30.0) -> None:
        """Wait until a text is in the log at least so many times.

        :raises ServerError: it was not there in time, in seconds.
        """
        if not wait_until(lambda: self.log_text().count(text) >= count, timeout):
            raise ServerError(self._message(f"did not log {text!r} {count} times within {timeout:.0f} s"))

    # Inner works.

    def _message(self, what: str) -> str:
        end = self.log_text().splitlines()[-30:]
        return f"{self.title} {what}. The end of {self.log}:\n" + "\n".join(f"    {line}" for line in end)

    def _ended_by_itself(self) -> NoReturn:
        assert self._process is not None
        code = self._process.returncode
        self._forget()
        raise ServerError(self._message(f"had ended by itself, exit code {code}"))

    def _forget(self) -> None:
        if self._process is not None:
            self._process.wait()
            guard.tell("ended", self._process.pid)
        self._process = None
        self._frozen = False

    def _kill_all(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._forget()
        for pid in self.children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.children(), 5)
        _running.discard(self)


def _stopped(pid: int) -> bool:
    """Whether all threads of a process are stopped (where that can't be asked: yes)."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            states.append(stat.read_text("utf-8", "replace").rpartition(")")[2].split()[0])
    return all(state == "T" for state in states)


_running: set[Server] = set()


def running_servers() -> list[Server]:
    """Return the servers that were started and not closed, the oldest first."""
    return sorted(_running, key=lambda server: int(server._mark.split("/")[1]))


def _command_line(pid: int) -> str:
    """The beginning of what a process was started with, and its state; nothing where it has ended."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text("utf-8").replace("\0", " ")[:200]
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return f"{state}: {command.strip()}"


@atexit.register
def kill_all_servers() -> None:
    """Kill every server of this process and their children; done by itself when the interpreter ends."""
    for server in list(_running):
        server._kill_all()
    guard.end()


def wait_until(condition: Callable[[], bool], timeout: float, *, every: float = _POLL) -> bool:
    """Wait until a condition holds, at most so many seconds, and return whether it does."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
