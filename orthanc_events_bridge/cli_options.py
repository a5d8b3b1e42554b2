"""What the commands of ``orthanc-events`` share: where the outbox and the configuration are, and how help looks."""

from __future__ import annotations

import argparse
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge import folder

if TYPE_CHECKING:
    from orthanc_events_bridge.bridge.settings import Settings

#: What argparse's ``add_subparsers`` returns; its type has no public name.
Commands = Any

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


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 78)


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
