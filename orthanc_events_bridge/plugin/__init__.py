"""What runs inside Orthanc's process: `start`, called by the shim that ``orthanc-events init`` writes.

Standard library only: Orthanc tears its Python interpreter down and up again on ``POST /tools/reset``, and a C
extension that is imported a second time makes Orthanc exit (`docs/decisions/0001-two-processes.md`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge import __version__
from orthanc_events_bridge import status as statuses
from orthanc_events_bridge.changes.model import Callback, ChangeKind
from orthanc_events_bridge.errors import BridgeError, GoneError
from orthanc_events_bridge.folder import Folder, find
from orthanc_events_bridge.plugin.capture import Capture
from orthanc_events_bridge.plugin.guest import Guest, OnChange, StorageAreas
from orthanc_events_bridge.plugin.host import OrthancHost
from orthanc_events_bridge.plugin.supervisor import Supervisor, interpreter

STATUS_ROUTE: Final = "/orthanc-events/status"
#: Seconds by which stopping may take longer, all in all.
STOP_WITHIN: Final = 5.0
#: Of these, how many Orthanc waits for capture, and then for the user's callback, before it begins to stop.
_CAPTURE_WITHIN: Final = 1.5
_GUEST_WITHIN: Final = 2.0
#: And how many there are in any case for all threads to end, behind Orthanc's own stopping.
_AT_LEAST: Final = 1.0
_STABLE_AGE: Final = 60.0  # Orthanc's default, in seconds
_UNKNOWN_RESOURCE: Final = 17  # OrthancPluginErrorCode_UnknownResource

#: What Orthanc was given to call back. When it ends, the Python plugin lets go of these without the interpreter's lock.
#: What nobody else refers to is freed then, which crashed each stop of Orthanc 1.12.7 (plugin 5.0, Python 3.13).
_kept: Final[list[Any]] = []


def start(
    *,
    python: str | None = None,
    config: str | None = None,
    script: str | None = None,
    on_change: OnChange | None = None,
) -> None:
    """Record every change of this Orthanc, and keep the bridge running. To be called while Orthanc loads its script.

    What is wrong with the bridge is said in Orthanc's log and never raised: Orthanc would not start.

    :param python: the interpreter that the package is installed for (environment: ``ORTHANC_EVENTS_PYTHON``).
    :param config: ``orthanc-events.yaml`` (environment: ``ORTHANC_EVENTS_CONFIG``).
    :param script: a Python script of the user's own, loaded as Orthanc would; its OnChange callback goes on working.
    :param on_change: the user's own OnChange callback, where it is the user's script that calls `start`. It runs behind
        ours on a thread of its own, in order; what it raises is logged.
    :raises Exception: what the user's script raises at import, as without us.
    """
    import orthanc

    host = OrthancHost(orthanc)
    queue: deque[Callback] = deque()
    bell = threading.Event()
    guest = Guest(orthanc, host, on_change)
    areas = StorageAreas(orthanc)
    append: Callable[[Callback], object] = queue.append
    ring, clock = bell.set, time.time
    leaving: list[Callable[[], None]] = []

    def on_every_change(kind: int, level: int, resource: str) -> None:
        append(Callback(kind, level, resource, clock()))
        ring()
        if guest.wanted:
            guest.offer(kind, level, resource)
        if kind == ChangeKind.ORTHANC_STOPPED:
            for leave in leaving:
                leave()

    def give_up(error: Exception) -> None:
        nonlocal append
        append = bool  # nobody empties the queue
        problem = f"changes are NOT recorded: {error if isinstance(error, BridgeError) else repr(error)}"
        host.error(problem)
        with contextlib.suppress(Exception):  # where it is registered already, this is no news
            _register_status(orthanc, _answering(lambda: {"problem": problem}))

    areas.intercept()
    registered = False
    try:
        _register(orthanc, on_every_change)
        guest.intercept()
        registered = True
    except Exception as error:
        give_up(error)
    if script:
        guest.load(script)  # before any thread of ours runs: where it raises, Orthanc exits at once
    if registered:
        try:
            leaving.append(_start(orthanc, host, queue, bell, guest, areas, python, config))
        except Exception as error:
            give_up(error)


def _register(orthanc: Any, on_change: OnChange) -> None:
    _kept.append(on_change)
    try:
        orthanc.RegisterOnChangeCallback(on_change)
    except Exception as error:
        raise BridgeError(
            f"Orthanc has an OnChange callback already ({error})", "hand yours to start(on_change=…) instead"
        ) from error


def _register_status(orthanc: Any, route: Callable[..., None]) -> None:
    _kept.append(route)
    orthanc.RegisterRestCallback(STATUS_ROUTE, route)


def _start(
    orthanc: Any,
    host: OrthancHost,
    queue: deque[Callback],
    bell: threading.Event,
    guest: Guest,
    areas: StorageAreas,
    python: str | None,
    config: str | None,
) -> Callable[[], None]:
    """Start everything; what is returned is to be called at ORTHANC_STOPPED."""
    if sys.platform == "win32":
        raise BridgeError("the plugin does not run on Windows", "run Orthanc on Linux, in a container say")
    configuration = json.loads(orthanc.GetConfiguration())
    own = Path(orthanc.GetConfigurationPath() or ".")
    folder = find(configuration, own if own.is_dir() else own.parent, os.environ)
    folder.prepare()
    command = [interpreter(os.environ, python), "-P", "-m", "orthanc_events_bridge", "run", "--supervised"]
    command += ["--outbox", str(folder.path)]
    config = os.environ.get("ORTHANC_EVENTS_CONFIG") or config
    supervisor = Supervisor(command + (["--config", config] if config else []), folder.path, host)
    threads_allowed = bool(configuration.get("Python", {}).get("AllowThreads"))

    def get(path: str) -> bytes:
        try:
            return bytes(orthanc.RestApiGet(path))
        except orthanc.OrthancException as error:
            if error.args and error.args[0] == _UNKNOWN_RESOURCE:
                raise GoneError(f"{path} is not there") from error
            raise

    def blocked() -> str:
        return "" if threads_allowed else areas.reason()

    stable_age = float(configuration.get("StableAge", _STABLE_AGE))
    capture = Capture(folder, get, queue, bell, supervisor.ring, host, blocked, stable_age)
    capture.notes["supervisor"] = lambda: supervisor.note
    _register_status(orthanc, _status_route(folder, capture, supervisor))

    left_at: list[float] = []

    def leave() -> None:
        """Orthanc has told that it stops, waits for us, and must not be asked anything afterwards."""
        left_at.append(time.monotonic())
        capture.leave(_CAPTURE_WITHIN)
        supervisor.hang_up()  # the bridge sends what is left while Orthanc goes on stopping
        guest.stop(time.monotonic() + _GUEST_WITHIN)

    def stop() -> None:
        """Orthanc has stopped, or `POST /tools/reset` is tearing the interpreter down."""
        now = time.monotonic()
        deadline = max(left_at[0] + STOP_WITHIN, now + _AT_LEAST) if left_at else now + STOP_WITHIN
        capture.stop(deadline - _AT_LEAST / 2)
        supervisor.hang_up()
        guest.stop(deadline - _AT_LEAST / 2)
        supervisor.stop(deadline)

    atexit.register(stop)
    capture.start()
    supervisor.start()
    return leave


def _status_route(folder: Folder, capture: Capture, supervisor: Supervisor) -> Callable[..., None]:
    def document() -> dict[str, Any]:
        try:
            found = statuses.read(folder)
        except BridgeError as error:
            found = {"problem": str(error)}
        found["capture"] = {**found.get("capture", {}), **capture.status()}
        found["bridge"] = {**found.get("bridge", {}), **supervisor.note}
        return found

    return _answering(document)


def _answering(document: Callable[[], dict[str, Any]]) -> Callable[..., None]:
    """A REST callback that answers a GET with a document."""

    def answer(output: Any, _uri: str, **request: Any) -> None:
        if request.get("method") != "GET":
            output.SendMethodNotAllowed("GET")
            return
        found = {"version": __version__, **document()}
        output.AnswerBuffer(json.dumps(found, indent=2) + "\n", "application/json")

    return answer
