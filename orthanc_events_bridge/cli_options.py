"""What the commands of ``orthanc-events`` share: where the outbox and the configuration are, and how help looks."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from orthanc_events_bridge import folder
from orthanc_events_bridge.errors import BridgeError, OrthancError

if TYPE_CHECKING:
    from orthanc_events_bridge.bridge.settings import Settings
    from orthanc_events_bridge.orthanc_api import OrthancOptions

#: What argparse's ``add_subparsers`` returns; its type has no public name.
Commands = Any


class UsageError(BridgeError):
    """The arguments can't be meant like this: exit code 2."""


EXIT_CODES: Final = "exit codes: 0 done, 1 failed, 2 wrong configuration or arguments"


def add_command(
    commands: Commands, name: str, run: object, summary: str, text: str = "", *, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Add a command.

    :param run: takes the parsed options, and returns the exit code.
    :param summary: one line, without a full stop.
    :param text: what else its help says, in front of its options.
    :param epilog: behind them, as it stands.
    """
    description = f"{summary[0].upper()}{summary[1:]}. {text}".strip()
    raw = argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter
    if epilog:
        description = _wrapped(description)
    sub: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=raw
    )
    sub.set_defaults(run=run)
    return sub


def add_actions(
    parser: argparse.ArgumentParser, actions: Mapping[str, tuple[str, str]], run: object, *, epilog: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Add the actions of a command, whose parsed options have the chosen one's name as `action`.

    :param actions: of each its summary, and what else its help says.
    :param run: of all of them.
    :return: each with its parser, for its options.
    """
    added = parser.add_subparsers(title="actions", metavar="ACTION")
    for name, (summary, text) in actions.items():
        action = add_command(added, name, run, summary, text, epilog=epilog)
        action.set_defaults(action=name)
        yield name, action


def add_group(commands: Commands, name: str, summary: str, *, epilog: str) -> argparse.ArgumentParser:
    """Add a command that does nothing without an action: it then shows its help."""

    def show(options: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    parser = add_command(commands, name, show, summary, epilog=epilog)
    return parser


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 78)


class Meter:
    """How far long work is, on standard error, while that is a terminal. Used as a context manager.

    :param what: is done.
    :param shown: how a number is shown.
    """

    def __init__(self, what: str, shown: Callable[[int], str] = str) -> None:
        self._what = what
        self._shown = shown
        self._on = sys.stderr.isatty()
        self._next = 0.0

    def step(self, what: str, done: int, of: int) -> None:
        """The same as `show`, of one part of the work.

        :param what: is done now.
        """
        self._what = what
        self.show(done, of)

    def show(self, done: int, of: int = 0) -> None:
        """Show it, a few times a second at most.

        :param of: how much there is; 0 where that is not known.
        """
        now = time.monotonic()
        if not self._on or now < self._next:
            return
        self._next = now + 0.2
        whole = f" of {self._shown(of)}" if of else ""
        print(f"\r{self._what}: {self._shown(done)}{whole}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take it away: something else is to be printed."""
        if self._on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def outbox_options(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """The options that name the outbox's folder.

    :param again: the command before this one has them too, and what was given there must stay.
    """
    default = argparse.SUPPRESS if again else None
    parser.add_argument(
        "--outbox",
        type=Path,
        metavar="DIR",
        default=default,
        help=f"the outbox's folder; default: ${folder.ENVIRONMENT}",
    )
    parser.add_argument(
        "--orthanc-config",
        type=Path,
        metavar="FILE",
        default=default,
        help="find the folder from Orthanc's configuration",
    )


def outbox_folder(options: argparse.Namespace) -> folder.Folder:
    """The folder that the options, or the environment, name.

    :raises FolderError: nothing names it.
    """
    if options.outbox:
        return folder.Folder(options.outbox.absolute())
    path = options.orthanc_config
    if path is None:
        return folder.find(None, Path(), os.environ)
    base = path if path.is_dir() else path.parent
    return folder.find(folder.read_orthanc_configuration(path), base.absolute(), {})


def settings_of(path: Path | None) -> Settings:
    """The settings in a file, or in the one that the environment names.

    :raises ConfigError: with every mistake.
    """
    from orthanc_events_bridge.bridge.config import find_config, load

    return load(path or find_config(None))


def moment(text: str) -> int:
    """A time on the command line: RFC 3339, UTC if it names no offset; or how long ago, as a duration with its unit.

    :return: milliseconds since the epoch.
    :raises argparse.ArgumentTypeError: it is neither, or not yet.
    """
    from pydantic_core import PydanticCustomError

    from orthanc_events_bridge.values import Duration

    now = time.time()
    try:
        if not re.search("[a-z]", text):
            raise ValueError
        found = now - (Duration().parse(text) or 0.0)
    except (ValueError, PydanticCustomError):
        try:
            read = datetime.fromisoformat(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no time: write 2026-11-23T21:36:00Z, 2026-11-23, or how long ago: 90m, 12h, 7d"
            ) from None
        found = (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    if found > now:
        raise argparse.ArgumentTypeError(f"{text!r} is yet to come")
    return int(found * 1000)


#: Option → what it takes, and its help. Each is also found in the environment, behind ORTHANC_EVENTS_ORTHANC_.
_ORTHANC: Final[dict[str, tuple[type, str, str]]] = {
    "user": (str, "NAME", "log in with a password, which is given by the file or the environment"),
    "password-file": (Path, "FILE", "the file with the password"),
    "token-file": (Path, "FILE", "log in with the token in the file (bearer)"),
    "ca-file": (Path, "FILE", "trust the authorities in the file (PEM) in place of the system's"),
    "cert-file": (Path, "FILE", "our own certificate (PEM), for servers that verify their clients"),
    "key-file": (Path, "FILE", "its key, not encrypted"),
    "timeout": (float, "SECONDS", "to wait for an answer; default: 30"),
}

#: For the help of commands that have `orthanc_options`.
ORTHANC_ENVIRONMENT: Final = """\
Where Orthanc is and how to log in can also be said in the environment, and a secret
itself only there: ORTHANC_EVENTS_ORTHANC_URL, _USER, _PASSWORD, _PASSWORD_FILE, _TOKEN,
_TOKEN_FILE, _CA_FILE, _CERT_FILE, _KEY_FILE, _TIMEOUT. What is given as an option wins."""


def orthanc_options(parser: argparse.ArgumentParser, text: str = "the address of Orthanc's REST API") -> None:
    """The options that name an Orthanc, and how to log in there.

    :param text: the help of the first.
    """
    group = parser.add_argument_group("Orthanc over HTTP")
    group.add_argument("--orthanc", metavar="URL", help=f"{text}; default: $ORTHANC_EVENTS_ORTHANC_URL")
    for name, (kind, metavar, says) in _ORTHANC.items():
        group.add_argument(f"--orthanc-{name}", type=kind, metavar=metavar, help=says)


def orthanc_of(options: argparse.Namespace) -> OrthancOptions:
    """What they say, or else the environment.

    :raises UsageError: something is wrong or missing.
    """
    from orthanc_events_bridge.orthanc_api import OrthancOptions

    given = {name.replace("-", "_"): getattr(options, f"orthanc_{name.replace('-', '_')}") for name in _ORTHANC}
    try:
        return OrthancOptions.find({"url": options.orthanc, **given}, os.environ)
    except OrthancError as error:
        raise UsageError(error.message, error.remedy) from error
