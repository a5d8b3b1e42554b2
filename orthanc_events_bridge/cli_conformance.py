"""``orthanc-events conformance``: does a consumer, in whatever language, do what docs/any-language.md asks for?"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, UsageError, add_command
from orthanc_events_bridge.cli_status import table
from orthanc_events_bridge.errors import BridgeError

if TYPE_CHECKING:
    from orthanc_events_bridge.conformance.playing import Play
    from orthanc_events_bridge.conformance.rules import Verdicts

#: So many details of a rule that is not met are shown to people.
_SHOWN: Final = 5

_EPILOG: Final = f"""\
examples:
  orthanc-events conformance --broker nats://127.0.0.1:4222 -- node consumer.js
  orthanc-events conformance --broker kafka://127.0.0.1:9092 --json -- ./consumer
  orthanc-events conformance --broker amqp://127.0.0.1:5672 -- java -jar consumer.jar --verbose

The program is started, ended by SIGTERM and by kill -9, and started again, while events
are sent that it has to handle, to try again, or to bury. Each rule is one of
docs/any-language.md, by its number. There is also what the program has to print, and how
it is told what to do, in environment variables: BROKER_URL, CONSUMER, START,
MAX_ATTEMPTS, ACK_WAIT and CONFORMANCE.

USE A BROKER FOR TESTS: the events go where the bridge's go, under the site `conformance`,
and everybody who reads there gets them. What is made for the consumer's name (its inbox,
its delays, its dead letters) stays, and what is made for a second name, that with `-oldest`
behind it. It takes about half a minute.

{EXIT_CODES}; 1 is also: some rule is not met"""


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "play events to a consumer in any language, and say which rules it meets"
    parser = add_command(commands, "conformance", _conformance, summary, epilog=_EPILOG)
    parser.usage = "orthanc-events conformance --broker URL [options] -- COMMAND [ARGUMENT ...]"
    parser.add_argument("--broker", metavar="URL", help="nats://, amqp://, kafka://; default: $ORTHANC_EVENTS_BROKER")
    parser.add_argument("--consumer", metavar="NAME", help="the name that the program is to take; default: a new one")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS", help="how long each step may take; default: 60"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document: a row for each rule")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the program and its arguments")


def _conformance(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise UsageError("which program is to be tested is not said", "write it behind --, with its arguments")
    if options.patience <= 0:
        raise UsageError(f"--patience {options.patience:g} is too short", "give it seconds, more than 0")
    from orthanc_events_bridge.consumers.configuration import BROKER_ENVIRONMENT

    url = options.broker or os.environ.get(BROKER_ENVIRONMENT)
    if not url:
        raise UsageError("at which broker is not said", "say --broker URL")
    return asyncio.run(_play(options, url, command))


async def _play(options: argparse.Namespace, url: str, command: list[str]) -> int:
    from orthanc_events_bridge import transports
    from orthanc_events_bridge.conformance.playing import Play
    from orthanc_events_bridge.consumers.broker import broker_options

    try:
        broker = broker_options(url).for_consumer()
    except BridgeError as error:
        raise UsageError(error.message, error.remedy) from error
    name = options.consumer or f"conformance-{uuid.uuid4().hex[:8]}"
    transport = transports.create(broker)
    try:
        await transport.connect()
        play = Play(
            *(transport, broker, url, name, command, options.patience),
            tell=lambda what: print(f"{what} …", file=sys.stderr, flush=True),
        )
        verdicts = await play.run()
    finally:
        await transport.close()
    _print(options, name, verdicts, play)
    return 0 if verdicts.met else 1


def _print(options: argparse.Namespace, name: str, verdicts: Verdicts, play: Play) -> None:
    rows = verdicts.rows()
    if options.json:
        print(json.dumps({"consumer": name, "met": verdicts.met, "rules": rows}, indent=2))
    else:
        for line, row in zip(table([[row["rule"], row["result"], row["text"]] for row in rows]), rows, strict=True):
            print(line)
            details = [*dict.fromkeys(row["details"])]
            for detail in details[:_SHOWN]:
                print(f"      {detail}")
            if len(details) > _SHOWN:
                print(f"      and {len(details) - _SHOWN} more: --json has all")
    if not verdicts.met and play.program.said:
        print(f"\nwhat the program has said last (its dead letters are those of {name}):", file=sys.stderr)
        for line in play.program.said:
            print(f"  {line}", file=sys.stderr)
