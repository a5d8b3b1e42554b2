"""The user's own Python script beside ours: Orthanc takes one script and one OnChange callback only."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.plugin.host import Host

OnChange = Callable[[int, int, str], object]


class Guest:
    """Runs the user's OnChange callback behind ours, on a thread of its own, in order.

    A slow callback would cost events on a kill if it ran before ours, or in its thread
    (`docs/guarantees.md`).

    :param orthanc: Orthanc's module.
    :param host: Orthanc's log.
    :param on_change: the callback, where it is known already.
    """

    def __init__(self, orthanc: Any, host: Host, on_change: OnChange | None) -> None:
        self._orthanc = orthanc
        self._host = host
        self._on_change = on_change
        self._queue: deque[tuple[int, int, str]] = deque()
        self._bell = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._repeats = Repeats(time.monotonic)

    @property
    def wanted(self) -> bool:
        return self._on_change is not None

    def intercept(self) -> None:
        """From now on we hear ``orthanc.RegisterOnChangeCallback``: a second one would raise in Orthanc."""

        def register(on_change: OnChange) -> None:
            if self._on_change is not None:
                raise RuntimeError("Can only register one Python on-changes callback")
            self._on_change = on_change

        self._orthanc.RegisterOnChangeCallback = register

    def load(self, script: str) -> None:
        """Import the user's script as Orthanc would: by its file, its folder in front on the path.

        :raises Exception: what the script raises: Orthanc then doesn't start, as without us.
        """
        path = Path(script).absolute()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python script")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)

    def offer(self, kind: int, level: int, resource: str) -> None:
        """Queue a change for the user's callback; called in Orthanc's own thread."""
        self._queue.append((kind, level, resource))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="orthanc-events-guest", daemon=True)
            self._thread.start()
        self._bell.set()

    def _run(self) -> None:
        while True:
            self._bell.clear()
            if not self._queue:
                if self._stop.is_set():
                    return
                self._bell.wait()
                continue
            change = self._queue.popleft()
            try:
                assert self._on_change is not None
                self._on_change(*change)
            except (Exception, SystemExit) as error:
                name = type(error).__name__
                line = self._repeats.line(
                    f"{name} {_raised_at(error)}", f"your OnChange callback raised {name}: {error}"
                )
                if line:
                    self._host.error(line)

    def stop(self, deadline: float) -> None:
        """Let the callback see what waits, as far as the time reaches.

        :param deadline: by `time.monotonic`.
        """
        if self._thread is None or self._stop.is_set():
            return
        self._stop.set()
        self._bell.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._host.warning(f"your OnChange callback was too slow: {len(self._queue)} changes were not shown to it")
            self._queue.clear()


def _raised_at(error: BaseException) -> str:
    """File and line: what makes two exceptions the same, since messages name ids."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""


class StorageAreas:
    """Notices a storage area written in Python.

    Together with any thread that calls Orthanc's API it deadlocks Orthanc within seconds: the database's
    mutex against the interpreter's lock (measured on 1.10.1 and 1.13.0; ``AllowThreads`` ends it where the
    plugin has it).
    """

    def __init__(self, orthanc: Any) -> None:
        self._orthanc = orthanc
        self._registered = ""

    def intercept(self) -> None:
        for name in dir(self._orthanc):
            if name.startswith("RegisterStorageArea"):
                setattr(self._orthanc, name, self._noticing(name, getattr(self._orthanc, name)))

    def _noticing(self, name: str, register: Callable[..., Any]) -> Callable[..., Any]:
        def noticing(*arguments: Any) -> Any:
            self._registered = name
            return register(*arguments)

        return noticing

    def reason(self) -> str:
        """Why capture must not start; empty when it may."""
        if not self._registered:
            return ""
        return (
            f"changes are NOT recorded: a Python script calls orthanc.{self._registered}, and reading Orthanc's log"
            ' beside it would deadlock Orthanc. Set "Python": {"AllowThreads": true} where the Python plugin has it'
            " (4.3 and later), or keep the storage area out of Python"
        )
