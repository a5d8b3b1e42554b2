"""``orthanc-events dlq``: the dead letters of a consumer: list, show, give to it again, throw away."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, Meter, UsageError, add_command
from orthanc_events_bridge.cli_status import table

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.dead import Choice, Letter
    from orthanc_events_bridge.transports.base import DeadLetters, Transport

#: Dead letters that are moved or removed in one go.
_BATCH: Final = 100

_EPILOG: Final = f"""\
examples:
  orthanc-events dlq list --consumer router --broker nats://127.0.0.1:4222
  orthanc-events dlq list --config consumer.yaml --type 'study.*' --newer 2h --json
  orthanc-events dlq show --config consumer.yaml --id f40e8d8b-2eb5-58e0-8f28-a41f31cb3406
  orthanc-events dlq redrive --config consumer.yaml --reason 'ConnectionError' --dry-run
  orthanc-events dlq redrive --config consumer.yaml --all
  orthanc-events dlq discard --config consumer.yaml --older 30d

A dead letter is an event that a handler rejected, or failed at until its attempts were
over. redrive gives it to the consumer that failed it, and to no other, under the same id
and with all attempts before it; it then leaves the dead letters. discard deletes it.

{EXIT_CODES}"""

_ACTIONS: Final = {
    "list": ("print them, oldest first", "Nothing of their data is shown."),
    "show": ("print one or some with all headers", "Their bodies are printed with --data only."),
    "redrive": ("give them to their consumer again", "The attempts of each begin anew."),
    "discard": ("delete them", "Nobody gets them again."),
}


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "look at a consumer's dead letters, give them to it again, or throw them away"
    parser = add_command(commands, "dlq", _help, summary, epilog=_EPILOG)
    parser.set_defaults(parser=parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    for name, (says, more) in _ACTIONS.items():
        action = add_command(actions, name, _run, says, more, epilog=_EPILOG)
        action.set_defaults(action=name)
        action.add_argument("--consumer", metavar="NAME", help="whose; default: `name` in the file")
        action.add_argument(
            "--broker", metavar="URL", help="nats://, amqp://, kafka://; default: $ORTHANC_EVENTS_BROKER"
        )
        action.add_argument(
            "--config", type=Path, metavar="FILE", help="the consumer's file; default: $ORTHANC_EVENTS_CONSUMER"
        )
        _selection(action)
        if name in ("list", "show"):
            action.add_argument("--json", action="store_true", help="one JSON document")
        if name == "show":
            action.add_argument("--data", action="store_true", help="print bodies too: they may hold patient data")
        if name in ("redrive", "discard"):
            action.add_argument("--dry-run", action="store_true", help="only say which they would be")
        if name == "discard":
            action.add_argument("--yes", action="store_true", help="don't ask first")


def _selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which of them (those that fit all that is given)")
    group.add_argument("--id", action="append", metavar="ID", help="of the event; can be given several times")
    group.add_argument("--reason", metavar="TEXT", help="a part of the reason, or a pattern (*, ?) for all of it")
    group.add_argument("--type", metavar="GLOB", help="such as study.stable or 'job.*'")
    group.add_argument("--older", type=_duration, metavar="DURATION", help="failed last at least so long ago: 90m, 7d")
    group.add_argument("--newer", type=_duration, metavar="DURATION", help="failed last at most so long ago")
    group.add_argument("--all", action="store_true", help="all of them")


def _duration(text: str) -> float:
    from pydantic_core import PydanticCustomError

    from orthanc_events_bridge.values import Duration

    try:
        return Duration().parse(text) or 0.0
    except PydanticCustomError:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 90s, 12h or 7d") from None


def _help(options: argparse.Namespace) -> int:
    options.parser.print_help()
    return 2


def _run(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.consumers.dead import Choice

    choice = Choice(
        tuple(options.id or ()), options.reason or "", options.older, options.newer, options.type or "", options.all
    )
    if options.action in ("redrive", "discard") and not choice.chosen:
        raise UsageError(f"which dead letters to {options.action} is not said", "choose some, or say --all")
    action = _ACTION[options.action]
    return asyncio.run(action(options, choice))


@asynccontextmanager
async def _dead_letters(options: argparse.Namespace) -> AsyncIterator[tuple[Transport, DeadLetters, str]]:
    """Connected; and the consumer's name."""
    from orthanc_events_bridge import transports
    from orthanc_events_bridge.consumers.configuration import CommandLine, configure

    given = {"name": options.consumer, "broker": options.broker}
    line = CommandLine(options.config, {name: value for name, value in given.items() if value is not None})
    if options.consumer is None and options.config is None and not _file_outside():
        raise UsageError("whose dead letters is not said", "say --consumer NAME, or --config FILE")
    settings = configure({}, given=line).settings
    if settings.broker is None:
        raise UsageError("at which broker is not said", "say --broker URL, or name it in the file of --config")
    transport = transports.create(settings.broker)
    try:
        await transport.connect()
        letters = await transport.dead_letters(settings.name)
        try:
            yield transport, letters, settings.name
        finally:
            await letters.close()
    finally:
        await transport.close()


def _file_outside() -> bool:
    from orthanc_events_bridge.consumers.configuration import ENVIRONMENT

    return bool(os.environ.get(ENVIRONMENT))


async def _selected(letters: DeadLetters, choice: Choice) -> list[Letter]:
    from orthanc_events_bridge.consumers.dead import select

    with Meter("dead letters read") as meter:
        found: list[Letter] = []
        async for one in select(letters, choice, time.time()):
            found.append(one)
            meter.show(len(found))
        return found


# -- looking -------------------------------------------------------------------------------------------------


async def _list(options: argparse.Namespace, choice: Choice) -> int:
    async with _dead_letters(options) as (_, letters, name):
        found = await _selected(letters, choice)
    if options.json:
        print(json.dumps([one.row() for one in found], indent=2))
    elif not found:
        print(f"consumer {name}: no dead letters{' that fit' if choice.chosen else ''}")
    else:
        print("\n".join(_rows(found)))
    return 0


def _rows(found: list[Letter]) -> list[str]:
    rows = [["FAILED LAST", "TYPE", "ID", "ATTEMPTS", "REASON"]]
    for one in found:
        why = f"{one.reason} ({one.exception})" if one.exception else one.reason
        rows.append([one.last or "-", one.type or "-", one.id, str(one.attempts or "-"), why or "-"])
    return table([[_plain(cell) for cell in row] for row in rows])


def _plain(text: str) -> str:
    """What a terminal may be given: others can have written it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


async def _show(options: argparse.Namespace, choice: Choice) -> int:
    async with _dead_letters(options) as (_, letters, name):
        found = await _selected(letters, choice)
    if options.json:
        print(json.dumps([_whole(one, data=options.data) for one in found], indent=2))
        return 0
    if not found:
        print(f"consumer {name}: no dead letters{' that fit' if choice.chosen else ''}")
    for one in found:
        message = one.letter.message
        print(f"{_plain(one.type or 'no event')}  {_plain(one.id)}")
        for header, value in sorted(message.headers.items()):
            print(f"  {_plain(header)}: {_plain(value)}")
        print(f"  {len(message.body)} bytes" + ("" if options.data else "; --data prints them: patient data, maybe"))
        if options.data:
            print(_plain(message.body.decode("utf-8", "backslashreplace")))
    return 0


def _whole(letter: Letter, *, data: bool) -> dict[str, Any]:
    message = letter.letter.message
    found = letter.row() | {"headers": dict(message.headers), "bytes": len(message.body)}
    if data:
        found["body_base64"] = b64encode(message.body).decode()
    return found


# -- clearing away -------------------------------------------------------------------------------------------


async def _redrive(options: argparse.Namespace, choice: Choice) -> int:
    from orthanc_events_bridge.consumers.dead import redrive

    async with _dead_letters(options) as (transport, letters, name):
        found = await _selected(letters, choice)
        if options.dry_run:
            return _say(found, f"would be given to consumer {name} again")
        inbox = transport.inbox(name)
        try:
            if found:
                await inbox.connect()
            done = await _steps(found, "given again", lambda part: redrive(letters, inbox, part))
        finally:
            await inbox.close()
    print(f"{done} given to consumer {name} again")
    return 0


async def _discard(options: argparse.Namespace, choice: Choice) -> int:
    from orthanc_events_bridge.consumers.dead import discard

    async with _dead_letters(options) as (_, letters, name):
        found = await _selected(letters, choice)
        if options.dry_run:
            return _say(found, f"of consumer {name} would be deleted")
        if found and not options.yes and not await asyncio.to_thread(_sure, len(found), name):
            print("nothing is deleted")
            return 1
        done = await _steps(found, "deleted", lambda part: discard(letters, part))
    print(f"{done} of consumer {name} deleted")
    return 0


def _say(found: list[Letter], what: str) -> int:
    if found:
        print("\n".join(_rows(found)))
    print(f"{len(found)} {what}")
    return 0


def _sure(count: int, name: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"{count} dead letters of consumer {name} would be deleted for good", "say --yes if so")
    print(f"delete {count} dead letters of consumer {name} for good? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


async def _steps(found: list[Letter], what: str, work: Callable[[list[Letter]], Awaitable[None]]) -> int:
    """Some at a time, so that an end in between leaves little to be done twice."""
    with Meter(f"dead letters {what}") as meter:
        for begin in range(0, len(found), _BATCH):
            await work(found[begin : begin + _BATCH])
            meter.show(min(begin + _BATCH, len(found)), len(found))
    return len(found)


_ACTION: Final[dict[str, Callable[[argparse.Namespace, Choice], Coroutine[Any, Any, int]]]] = {
    "list": _list,
    "show": _show,
    "redrive": _redrive,
    "discard": _discard,
}
