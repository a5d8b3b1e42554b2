"""A guard that cleans up behind a process that started servers, whatever happens to it.

The guard, a small process of its own, holds the reading end of a pipe. When the starter goes away (its end,
an interrupt, a crash, ``kill -9``) the pipe ends, and the guard kills what the starter had started, with all
their children, and removes its scratch folders. Children are recognised by a variable in their environment,
which they inherit, so that a bridge process that Orthanc started is found too (on Linux, by ``/proc``;
elsewhere by process group). Containers are recognised by their label, and removed with Docker's command line.

This file is also the guard's program. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

#: The variable by which processes of ours are recognised: ``{run}/{number of the server}/``.
MARK = "TESTING_SERVERS_RUN"

#: The label by which containers of ours are recognised; its value is the run.
LABEL = "io.orthanc-events.tests.run"

#: This process's own runs of servers.
RUN = uuid.uuid4().hex


def marked_processes(mark: str) -> list[int]:
    """Return the ids of the living processes whose mark begins with a text (empty without ``/proc``)."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # gone, or another user's
        if any(entry.startswith(wanted) for entry in environment.split(b"\0")):
            found.append(int(folder.name))
    return sorted(found)


def leftovers() -> list[int]:
    """Return the ids of the processes that servers of this run have left; empty if all is as it should be."""
    return marked_processes(RUN)


def remove_containers(run: str) -> None:
    """Remove the containers of a run with all that they have, then its networks and volumes, as far as Docker's command
    line is there.
    """
    ours = ["--quiet", "--filter", f"label={LABEL}={run}"]
    quiet = 0
    while quiet < 2:  # the engine may just have been making one
        listing = ["docker", "ps", "--all", "--no-trunc", *ours]
        try:
            found = subprocess.run(listing, capture_output=True, text=True, timeout=60, check=True).stdout.split()
            if found:
                subprocess.run(["docker", "rm", "--force", "--volumes", *found], capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return
        quiet = 0 if found else quiet + 1
    for kind in ("network", "volume"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(["docker", kind, "ls", *ours], capture_output=True, text=True, timeout=60)
            if found := listed.stdout.split():
                subprocess.run(["docker", kind, "rm", *found], capture_output=True, timeout=60)


def _guard_main(run: str, lines: IO[str]) -> None:
    """Wait until the starter is gone, then clean up behind it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    folders: set[str] = set()
    containers = False
    for line in lines:
        word, _, value = line.rstrip("\n").partition(" ")
        if word == "group":
            groups.add(int(value))
        elif word == "ended":
            groups.discard(int(value))
        elif word == "folder":
            folders.add(value)
        elif word == "removed":
            folders.discard(value)
        elif word == "containers":
            containers = True
    if containers:
        remove_containers(run)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    # Until none is seen twice in a row: one of them may just have been starting another.
    quiet = 0
    while quiet < 2:
        alive = marked_processes(run)
        quiet = 0 if alive else quiet + 1
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class Guard:
    """The starter's end of the pipe. The guard's process is started with the first word."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def tell(self, word: str, value: int | str) -> None:
        """Say that a process ``group`` has begun or ``ended``, that a ``folder`` was made or ``removed``, or that
        there are ``containers`` with this run's label.
        """
        with self._lock:
            if self._process is None:
                environment = {name: value for name, value in os.environ.items() if name != MARK}
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, RUN],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                    env=environment,
                )
            stream = self._process.stdin
            assert stream is not None
            stream.write(f"{word} {value}\n".encode())
            stream.flush()

    def end(self) -> None:
        """Let the guard clean up what is left, and end."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()


#: This process's own.
guard = Guard()


@contextlib.contextmanager
def scratch_folder(prefix: str = "orthanc-events-") -> Iterator[Path]:
    """Yield a new temporary folder that is removed at the end, also when this process is killed."""
    folder = tempfile.mkdtemp(prefix=prefix)
    guard.tell("folder", folder)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(folder).exists():
            guard.tell("removed", folder)


if __name__ == "__main__":
    _guard_main(sys.argv[1], sys.stdin)
