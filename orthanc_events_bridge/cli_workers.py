"""Commands that run a consumer in several processes: what each is told, and how they end together."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from orthanc_events_bridge.cli_options import UsageError
from orthanc_events_bridge.errors import BridgeError

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.configuration import Configuration
    from orthanc_events_bridge.consumers.settings import ConsumerSettings

_Settings = TypeVar("_Settings", bound="ConsumerSettings")

#: Processes that one command starts.
_MOST: Final = 256


def _check_count(count: int) -> None:
    """Can there be so many workers?

    :raises UsageError: no.
    """
    if not 1 <= count <= _MOST:
        raise UsageError(f"--workers {count} makes no sense", f"give 1 to {_MOST}")


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """What all commands know that work by a file until they are told to stop."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONSUMER")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--broker", metavar="URL", help="nats://, amqp://, kafka://; default: $ORTHANC_EVENTS_BROKER")
    parser.add_argument(
        "--http", metavar="HOST:PORT", help="tell health and metrics there; each further worker at the next port"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # its number, of one that is supervised
    parser.add_argument("--of", type=int, default=1, help=argparse.SUPPRESS)  # how many are supervised
    parser.add_argument("--only-load", action="store_true", help=argparse.SUPPRESS)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says in place of the file."""
    said = {name: getattr(options, name) for name in ("broker", "http", "log_level")}
    return {name: value for name, value in said.items() if value is not None}


def configuration(options: argparse.Namespace, settings: type[_Settings]) -> Configuration[_Settings]:
    """What the file, the environment and the command line say.

    :param settings: what can be said.
    :raises UsageError: no file is named, and it can't do without.
    :raises ConfigError: something of that makes no sense; or where events come from, or which Orthanc is asked, is not
        said.
    """
    from orthanc_events_bridge.consumers.configuration import BROKER_ENVIRONMENT, ENVIRONMENT, CommandLine, configure_as
    from orthanc_events_bridge.loading import ConfigError, Problem
    from orthanc_events_bridge.orthanc_api import ENVIRONMENT as ORTHANC_ENVIRONMENT

    file = options.config or os.environ.get(ENVIRONMENT)
    if not file and any(field.is_required() for field in settings.model_fields.values()):
        raise UsageError("which file it works by is not said", f"say --config FILE, or set {ENVIRONMENT}")
    found = configure_as(settings, {}, given=CommandLine(options.config, given(options)))
    place = str(file or f"the consumer {found.settings.name}")
    missing = [
        Problem(place, None, option, wrong, f"give its URL, or set {variable}")
        for option, value, wrong, variable in (
            ("broker", found.settings.broker, "where events come from is not said", BROKER_ENVIRONMENT),
            ("orthanc", found.orthanc, "which Orthanc is asked is not said", f"{ORTHANC_ENVIRONMENT}URL"),
        )
        if value is None
    ]
    if missing:
        raise ConfigError(missing)
    return found


@contextlib.contextmanager
def needs_pydicom() -> Iterator[None]:
    """Around the import of what reads DICOM files.

    :raises BridgeError: pydicom is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pydicom":
            raise
        raise BridgeError("pydicom is not installed", 'pip install "orthanc-events-bridge[anonymizer]"') from error


def several(options: argparse.Namespace, *command: str, alone: bool) -> int | None:
    """Run a command in several processes, where that is asked for.

    :param command: without its options.
    :param alone: it is done by this process, however many are asked for.
    :return: the exit code; none: this process is to do it.
    :raises UsageError: there can't be so many.
    """
    from orthanc_events_bridge.consumers.leaving import logs

    _check_count(options.workers)
    if options.workers == 1 or alone:
        return None
    logs(options.log_level or "info")
    said = {**({} if options.config is None else {"config": options.config}), **given(options)}
    words = [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return _supervise([*command, *words], options.workers)


def _supervise(arguments: list[str], count: int) -> int:
    """Run a command in so many processes, each with its number as ``--worker``, until told to stop.

    :param arguments: of ``orthanc-events``; with ``--only-load`` it has to find what can't be right, and end.
    :return: the exit code.
    """
    from orthanc_events_bridge.consumers.workers import Workers

    command = [sys.executable, "-m", "orthanc_events_bridge", *arguments, "--of", str(count)]
    # Once, and not by each worker: what keeps it from beginning is said one time. As the last of them, for its port.
    trial = [*command, "--worker", str(count - 1), "--only-load"]
    code = subprocess.run(trial, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        return code
    asked = threading.Event()

    def start(number: int) -> subprocess.Popen[bytes]:
        # It gets no signal from the terminal: from us. Our end of the pipe closes with us, however we end.
        return subprocess.Popen([*command, "--worker", str(number)], stdin=subprocess.PIPE, start_new_session=True)

    def wait(seconds: float) -> None:
        if asked.wait(seconds):
            asked.clear()

    workers = Workers(start, count, wait=wait)

    def stop(number: int, frame: object) -> None:
        workers.stop()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return workers.run()


class Working(Protocol):
    """What a worker runs."""

    def numbered(self, number: int) -> Self:
        """Be one of several, each with a port of its own for health and metrics."""

    def complete(self) -> None:
        """Is all said that it needs to begin? Nothing is connected."""

    async def check(self) -> list[str]:
        """Connect everywhere, and leave again; what was found, in a few lines."""

    def run(self) -> None:
        """Work until told to stop."""


def work(options: argparse.Namespace, one: Working) -> int:
    """Do what one worker is told: nothing, where it is only to be loaded; look at everything; or work.

    :return: the exit code.
    """
    from orthanc_events_bridge.consumers.limit import among

    if options.worker is not None:
        among.number, among.count = options.worker, options.of
        one.numbered(options.worker)
    if options.only_load:
        one.complete()
        return 0
    if options.check:
        print("\n".join(asyncio.run(one.check())))
        return 0
    if options.worker is not None:
        _leave_with_the_supervisor()
    one.run()
    return 0


def _leave_with_the_supervisor() -> None:
    """End as if asked to, when the supervisor has ended without asking."""

    def watch() -> None:
        while os.read(0, 1):  # and not by sys.stdin, whose lock Python would want when it ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="supervisor", daemon=True).start()
