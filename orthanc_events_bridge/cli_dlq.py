"""``orthanc-events dlq``: the dead letters of a consumer: list, show, give to it again, throw away."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import textwrap
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, Meter, UsageError, add_actions, add_group
from orthanc_events_bridge.cli_status import table
from orthanc_events_bridge.errors import BridgeError

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.dead import Choice, Letter
    from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters, Transport

#: Dead letters that are shown, moved or removed in one go, so that an end in between leaves little to be done twice.
_BATCH: Final = 100
_TITLES: Final = ["FAILED LAST", "TYPE", "ID", "ATTEMPTS", "REASON"]

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
    parser = add_group(commands, "dlq", summary, epilog=_EPILOG)
    for name, action in add_actions(parser, _ACTIONS, _run, epilog=_EPILOG):
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
    group.add_argument(
        "--id", type=_text, action="append", metavar="ID", help="of the event; can be given several times"
    )
    group.add_argument(
        "--reason", type=_text, metavar="TEXT", help="a part of the reason, or a pattern (*, ?) for all of it"
    )
    group.add_argument("--type", type=_text, metavar="GLOB", help="such as study.stable or 'job.*'")
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


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: say which are meant, or leave it out")
    return text


def _run(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.consumers.dead import Choice
    from orthanc_events_bridge.values import format_duration

    choice = Choice(
        tuple(options.id or ()), options.reason or "", options.older, options.newer, options.type or "", options.all
    )
    if options.action in ("redrive", "discard") and not choice.chosen:
        raise UsageError(f"which dead letters to {options.action} is not said", "choose some, or say --all")
    if None not in (options.older, options.newer) and options.older > options.newer:
        wrong = f"no dead letter is older than {format_duration(options.older)} and newer than"
        raise UsageError(f"{wrong} {format_duration(options.newer)}", "give --newer the longer time")
    action = _ACTION[options.action]
    return asyncio.run(action(options, choice))


@asynccontextmanager
async def _dead_letters(options: argparse.Namespace) -> AsyncIterator[tuple[Transport, DeadLetters, str]]:
    """Connected; and the consumer's name."""
    from orthanc_events_bridge import transports
    from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
    from orthanc_events_bridge.consumers.settings import AnySettings

    given = {"name": options.consumer, "broker": options.broker}
    line = CommandLine(options.config, {name: value for name, value in given.items() if value is not None})
    if options.consumer is None and options.config is None and not _file_outside():
        raise UsageError("whose dead letters is not said", "say --consumer NAME, or --config FILE")
    settings = configure_as(AnySettings, {}, given=line).settings
    if settings.broker is None:
        raise UsageError("at which broker is not said", "say --broker URL, or name it in the file of --config")
    transport = transports.create(settings.broker)
    if not transport.capabilities.subscribable:
        wrong = f"consumers have no dead letters at a transport of type {settings.broker.type}"
        raise UsageError(wrong, "name the broker that they receive from")
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


async def _parts(letters: DeadLetters, choice: Choice, meter: Meter) -> AsyncGenerator[list[Letter]]:
    """Those that are meant, some at a time: there may be more than fit into memory."""
    from orthanc_events_bridge.consumers.dead import in_parts, select

    async with aclosing(in_parts(select(letters, choice, time.time(), meter.show), _BATCH)) as parts:
        async for part in parts:
            yield part


# -- looking -------------------------------------------------------------------------------------------------


async def _list(options: argparse.Namespace, choice: Choice) -> int:
    async with _dead_letters(options) as (_, letters, name):
        if options.json:
            await _print_json(letters, choice, lambda one: one.row())
        elif not await _print_rows(letters, choice):
            print(_none(name, choice))
    return 0


def _none(name: str, choice: Choice) -> str:
    from orthanc_events_bridge.consumers.routes import near

    meant = near(choice.type)
    hint = f" (did you mean --type {meant}?)" if meant else ""
    return f"consumer {name}: no dead letters{' that fit' if choice.chosen else ''}{hint}"


def _check_ids(name: str, choice: Choice, found: set[str]) -> None:
    """Were those there that are named?

    :raises BridgeError: no. What else was meant is done.
    """
    if missing := [one for one in choice.ids if one not in found]:
        raise BridgeError(
            f"consumer {name} has no dead letter that fits with the id {', '.join(missing)}",
            f"see orthanc-events dlq list --consumer {name}",
        )


async def _print_rows(letters: DeadLetters, choice: Choice) -> int:
    """Print a table of them, as they come.

    :return: how many.
    """
    count, widths = 0, [0] * len(_TITLES)
    with Meter("dead letters read") as meter:
        async for part in _parts(letters, choice, meter):
            rows = [_row(one) for one in part]
            meter.clear()
            print("\n".join(table(rows if count else [_TITLES, *rows], widths)), flush=True)
            count += len(part)
    return count


def _row(letter: Letter) -> list[str]:
    why = f"{letter.reason} ({letter.exception})" if letter.exception else letter.reason
    cells = (letter.last or "-", letter.type or "-", letter.id, str(letter.attempts or "-"), why or "-")
    return [_plain(cell) for cell in cells]


async def _print_json(letters: DeadLetters, choice: Choice, shown: Callable[[Letter], dict[str, Any]]) -> set[str]:
    """Print one document, a list, as they come.

    :return: their ids.
    """
    begin, found = "[", set[str]()
    with Meter("dead letters read") as meter:
        async for part in _parts(letters, choice, meter):
            meter.clear()
            for one in part:
                print(begin, textwrap.indent(json.dumps(shown(one), indent=2), "  "), sep="\n", end="")
                begin = ","
            found |= {one.id for one in part}
            sys.stdout.flush()
    print("[]" if begin == "[" else "\n]")
    return found


def _plain(text: str) -> str:
    """What a terminal may be given: others can have written it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


async def _show(options: argparse.Namespace, choice: Choice) -> int:
    async with _dead_letters(options) as (_, letters, name):
        if options.json:
            _check_ids(name, choice, await _print_json(letters, choice, lambda one: _whole(one, data=options.data)))
            return 0
        found: set[str] = set()
        with Meter("dead letters read") as meter:
            async for part in _parts(letters, choice, meter):
                meter.clear()
                for one in part:
                    _print_whole(one, data=options.data)
                found |= {one.id for one in part}
        _check_ids(name, choice, found)
        if not found:
            print(_none(name, choice))
    return 0


def _print_whole(letter: Letter, *, data: bool) -> None:
    message = letter.letter.message
    print(f"{_plain(letter.type or 'no event')}  {_plain(letter.id)}")
    for header, value in sorted(message.headers.items()):
        print(f"  {_plain(header)}: {_plain(value)}")
    print(f"  {len(message.body)} bytes" + ("" if data else "; --data prints them: patient data, maybe"))
    if data:
        print(_plain(message.body.decode("utf-8", "backslashreplace")))


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
        if options.dry_run:
            print(f"{await _print_rows(letters, choice)} would be given to consumer {name} again")
            return 0
        inbox, done, found = transport.inbox(name), 0, set[str]()
        try:
            with Meter("dead letters given again") as meter:
                async for part in _parts(letters, choice, meter):
                    await inbox.connect()
                    await redrive(letters, inbox, part)
                    done += len(part)
                    found |= {one.id for one in part}
        finally:
            await inbox.close()
    print(f"{done} given to consumer {name} again")
    _check_ids(name, choice, found)
    return 0


async def _discard(options: argparse.Namespace, choice: Choice) -> int:
    from orthanc_events_bridge.consumers.dead import marked

    async with _dead_letters(options) as (_, letters, name):
        if options.dry_run:
            print(f"{await _print_rows(letters, choice)} of consumer {name} would be deleted")
            return 0
        chosen: list[DeadLetter] = []  # just those are deleted that were counted
        found: set[str] = set()
        with Meter("dead letters read") as meter:
            async for part in _parts(letters, choice, meter):
                chosen += [marked(one) for one in part]
                found |= {one.id for one in part}
        if chosen and not options.yes and not await asyncio.to_thread(_sure, len(chosen), name):
            print("nothing is deleted")
            return 1
        with Meter("dead letters deleted") as meter:
            for begin in range(0, len(chosen), _BATCH):
                await letters.remove(chosen[begin : begin + _BATCH])
                meter.show(begin, len(chosen))
    print(f"{len(chosen)} of consumer {name} deleted")
    _check_ids(name, choice, found)
    return 0


def _sure(count: int, name: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"{count} dead letters of consumer {name} would be deleted for good", "say --yes if so")
    print(f"delete {count} dead letters of consumer {name} for good? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


_ACTION: Final[dict[str, Callable[[argparse.Namespace, Choice], Coroutine[Any, Any, int]]]] = {
    "list": _list,
    "show": _show,
    "redrive": _redrive,
    "discard": _discard,
}
