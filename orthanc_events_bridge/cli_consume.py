"""``orthanc-events consume``: run a consumer of the user's own, in one process or several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, UsageError, add_command
from orthanc_events_bridge.cli_workers import add_worker_options, given, several, work

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers import Consumer

_EPILOG: Final = f"""\
examples:
  orthanc-events consume router:app                    `app` in router.py of this folder
  orthanc-events consume router:app --workers 4        four processes that share the events
  orthanc-events consume router:app --broker nats://nats:4222 --http 127.0.0.1:9100
  orthanc-events consume router:app --config consumer.yaml --check

What is given here comes before the environment (ORTHANC_EVENTS_BROKER,
ORTHANC_EVENTS_ORTHANC_URL ...), that before the file (--config, or
ORTHANC_EVENTS_CONSUMER), and that before what the code says.

SIGTERM and SIGINT end it: no event is begun any more, those that are being handled may
end within `drain`, and what is left goes back to the broker. A second signal ends it at
once. A worker that dies is started again, after 1 second and at most 30.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "More of them, here or elsewhere, share the events."
    parser = add_command(commands, "consume", _consume, "run a consumer of your own", text, epilog=_EPILOG)
    parser.add_argument(
        "target", metavar="MODULE:NAME", help="the consumer; the module alone, where there is one in it"
    )
    add_worker_options(parser)
    parser.add_argument("--check", action="store_true", help="connect, say what was found, and leave")


def _consume(options: argparse.Namespace) -> int:
    if (code := several(options, "consume", options.target, alone=options.check)) is not None:
        return code
    return work(options, _find(options))


def _find(options: argparse.Namespace) -> Consumer:
    """The consumer, with what the command line says.

    :raises UsageError: there is none.
    """
    from orthanc_events_bridge.consumers import configuration
    from orthanc_events_bridge.consumers.finding import TargetError, find
    from orthanc_events_bridge.consumers.leaving import logs

    configuration.command_line.file = options.config and options.config.absolute()
    configuration.command_line.options = given(options)
    if options.log_level == "debug":
        logs("debug")
    try:
        consumer = find(options.target, Path.cwd())
    except TargetError as error:
        raise UsageError(error.message, error.remedy) from error
    return consumer
