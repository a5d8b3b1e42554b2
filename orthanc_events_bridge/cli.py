"""``orthanc-events``: set the bridge up, check it, run it, and see how it is doing.

Exit codes: 0 done, 1 failed, 2 wrong configuration or arguments, 75 another bridge works on this outbox.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge import __version__, folder, status
from orthanc_events_bridge.errors import BridgeError

_EPILOG: Final = "documentation: README.md and docs/ in the project's repository"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    :return: the exit code.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options))
    except BridgeError as error:
        return _fail(error, supervised=getattr(options, "supervised", False))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        problem = BridgeError(f"{error.filename or 'the system'}: {error.strerror or error}")
        return _fail(problem, supervised=getattr(options, "supervised", False))


def _fail(error: BridgeError, *, supervised: bool) -> int:
    """One clear message, and the exit code that fits."""
    from orthanc_events_bridge.bridge import EXIT_BUSY, EXIT_CONFIGURATION, EXIT_FAILED, BusyError
    from orthanc_events_bridge.bridge.config import ConfigError

    for line in str(error).splitlines():
        print(f"E {line}" if supervised else f"orthanc-events: {line}", file=sys.stderr)
    if isinstance(error, ConfigError):
        return EXIT_CONFIGURATION
    return EXIT_BUSY if isinstance(error, BusyError) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthanc-events",
        description="Every change of an Orthanc as a CloudEvent on your broker.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"orthanc-events {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, summary: str, text: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {text}")
        sub.set_defaults(run=run)
        return sub

    init = command("init", _init, "write a commented configuration, and the shim that Orthanc loads")
    init.add_argument("folder", metavar="DIR", type=Path, help="where to write them; made when it isn't there")
    init.add_argument("--force", action="store_true", help="write over files that are there, kept as *.bak")
    init.add_argument("--shim", action="store_true", help="write the shim alone, after the package has moved, say")
    init.add_argument(
        "--script", type=Path, metavar="FILE", help="a Python script of yours that Orthanc shall load too"
    )

    check = command("check", _check, "check a configuration", "One line per mistake, and exit code 2.")
    check.add_argument("file", metavar="FILE", type=Path, nargs="?", help="default: $ORTHANC_EVENTS_CONFIG")
    check.add_argument("--connect", action="store_true", help="connect to every broker too, and say what was found")

    run = command("run", _run, "run the bridge beside Orthanc", "Orthanc's plugin does this by itself.")
    _outbox_options(run)
    run.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONFIG")
    run.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)

    show = command(
        "status", _status, "show how capture, bridge and transports are doing", "Works while Orthanc is down."
    )
    _outbox_options(show)
    show.add_argument(
        "--json", action="store_true", help="one JSON document, as Orthanc's /orthanc-events/status has it"
    )

    tail = command("tail", _tail, "print events live, as a subscriber of the broker receives them")
    tail.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONFIG")
    tail.add_argument("--transport", metavar="NAME", help="default: the first one")
    tail.add_argument("--oldest", action="store_true", help="begin with the oldest event that the broker keeps")
    tail.add_argument("--json", action="store_true", help="whole events, one per line")

    aside = command("set-aside", _set_aside, "list events that a broker can never take, and send them again")
    _outbox_options(aside)
    aside.add_argument("--resend", action="store_true", help="ask the running bridge to send them once more")
    aside.add_argument("--transport", metavar="NAME", help="only those of this transport")
    aside.add_argument("--json", action="store_true", help="one JSON document")

    command("schema", _schema, "print the JSON Schema of the configuration, for editors")
    return parser


def _outbox_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--outbox", type=Path, metavar="DIR", help=f"the outbox's folder; default: ${folder.ENVIRONMENT}"
    )
    parser.add_argument(
        "--orthanc-config", type=Path, metavar="FILE", help="find the folder from Orthanc's configuration"
    )


def _folder(options: argparse.Namespace) -> folder.Folder:
    if options.outbox:
        return folder.Folder(options.outbox.absolute())
    path = options.orthanc_config
    if path is None:
        return folder.find(None, Path(), os.environ)
    base = path if path.is_dir() else path.parent
    return folder.find(folder.read_orthanc_configuration(path), base.absolute(), {})


def _settings(path: Path | None) -> Any:
    from orthanc_events_bridge.bridge.config import find_config, load

    return load(path or find_config(None))


# -- commands ------------------------------------------------------------------------------------------------


def _init(options: argparse.Namespace) -> int:
    from orthanc_events_bridge import cli_init

    config, shim = cli_init.write(options.folder, force=options.force, only_shim=options.shim, script=options.script)
    print(f"{config}  the configuration: name your broker there, then `orthanc-events check {config} --connect`")
    print(f"{shim}  loads the bridge into Orthanc\n\nAdd to Orthanc's configuration, and start it again:\n")
    print(f'  "Plugins": [{json.dumps(_python_plugin())}],\n  "PythonScript": {json.dumps(str(shim))}')
    return 0


def _python_plugin() -> str:
    places = [
        Path("/usr/share/orthanc/plugins"),
        Path("/usr/lib/orthanc"),
        Path("/usr/local/share/orthanc/plugins"),
    ]
    found = [path for place in places for path in sorted(place.glob("libOrthancPython*"))]
    return str(found[0] if found else places[0] / "libOrthancPython.so")


def _check(options: argparse.Namespace) -> int:
    settings = _settings(options.file)
    names = ", ".join(f"{transport.name} ({transport.type})" for transport in settings.transports)
    print(f"the configuration is right: source {settings.source}, site {settings.site}, transports {names}")
    return asyncio.run(_check_brokers(settings)) if options.connect else 0


async def _check_brokers(settings: Any) -> int:
    from orthanc_events_bridge.transports import create

    failed = 0
    for options in settings.transports:
        transport = None
        try:
            transport = create(options)
            await transport.connect()
            for line in await transport.describe():
                print(f"{options.name}: {line}")
        except BridgeError as error:
            failed += 1
            print(f"{options.name}: {error}", file=sys.stderr)
        finally:
            if transport is not None:
                await transport.close()
    return 1 if failed else 0


class _Levels(logging.Formatter):
    """One letter for the level, which the supervisor turns into Orthanc's own."""

    def format(self, record: logging.LogRecord) -> str:
        letter = "E" if record.levelno >= logging.ERROR else "W" if record.levelno >= logging.WARNING else "I"
        return "\n".join(f"{letter} {line}" for line in super().format(record).splitlines())


def _run(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.bridge import Bridge

    place = _folder(options)
    place.prepare()
    settings = _settings(options.config)
    handler = logging.StreamHandler()
    handler.setFormatter(
        _Levels() if options.supervised else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # with Orthanc killed nobody reads what we say
    for noisy in ("nats", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)

    async def bridge() -> int:
        return await Bridge(place, settings, supervised=options.supervised).run()

    return asyncio.run(bridge())


def _status(options: argparse.Namespace) -> int:
    document = status.read(_folder(options))
    print(json.dumps(document, indent=2) if options.json else _status_text(document))
    return 0


def _status_text(document: dict[str, Any]) -> str:
    capture, bridge, outbox = document["capture"], document["bridge"], document["outbox"]
    last_exit = bridge.get("last_exit")
    dropped, vanished = capture.get("dropped", 0), capture.get("vanished", 0)
    state, cursor = capture.get("state", "not seen yet"), document["log"]["cursor"]
    lines = [
        f"outbox      {outbox['folder']}",
        f"            {outbox['rows']} rows, {_bytes(outbox['bytes'])}, oldest {outbox['oldest'] or '-'}",
        f"capture     {state}, log cursor {cursor}, dropped {dropped}, vanished {vanished}",
    ]
    if capture.get("problem"):
        lines.append(f"            {capture['problem']['message']}")
    running = f"running since {bridge.get('since')}" if bridge["running"] else "NOT running"
    lines.append(f"bridge      {running}, restarts {bridge.get('restarts', 0)}")
    if last_exit:
        lines.append(f"            last exit {last_exit['at']}: {last_exit['reason']}")
    columns = ("name", "type", "state", "position", "pending", "published", "rate", "set_aside")
    rows = [["TRANSPORT", "TYPE", "STATE", "POSITION", "PENDING", "PUBLISHED", "RATE/S", "SET ASIDE"]]
    rows += [[str(transport.get(key, "-")) for key in columns] for transport in document["transports"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    for transport in document["transports"]:
        error = transport.get("last_error")
        if error:
            lines.append(f"{transport['name']}: last error {error['at']} ({error['count']} times): {error['message']}")
            if error["remedy"]:
                lines.append(f"{' ' * len(transport['name'])}  what to do: {error['remedy']}")
        if transport["gap"]:
            first, last = transport["gap"]
            lines.append(f"{transport['name']}: LOST its place: positions {first} to {last} were given up undelivered")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def _tail(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.transports import create

    settings = _settings(options.config)
    found = [o for o in settings.transports if options.transport in (None, o.name)]
    if not found:
        names = ", ".join(o.name for o in settings.transports)
        raise BridgeError(f"there is no transport {options.transport}", f"there are: {names}")

    async def follow() -> None:
        transport = create(found[0])
        await transport.connect()
        try:
            async with contextlib.aclosing(transport.tail(oldest=options.oldest)) as messages:
                async for message in messages:
                    print(message.body.decode() if options.json else _event_line(message.body), flush=True)
        finally:
            await transport.close()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(follow())
    return 0


def _event_line(body: bytes) -> str:
    """Time, type, subject: what may be shown of an event."""
    try:
        event = json.loads(body)
        return f"{event['time']:<24}  {event['type']:<45}  {event.get('subject', '')}".rstrip()
    except (ValueError, KeyError, TypeError):
        return "a message that is no CloudEvent in structured mode"


def _set_aside(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.bridge.state import State

    place = _folder(options)
    entries = [e for e in status.read(place)["set_aside"] if options.transport in (None, e["transport"])]
    if options.resend and entries:
        state = State(place.bridge)
        for entry in entries:
            state.ask("resend", entry["transport"], entry["position"])
        state.close()
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0
    for entry in entries:
        columns = [entry["transport"], entry["position"], status.iso(entry["at"])]
        print(*columns, entry["type"], entry["event"], entry["reason"], sep="  ")
    asked = "; the bridge was asked to send them again" if options.resend and entries else ""
    print(f"{len(entries)} set aside{asked}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    from importlib import resources

    text = resources.files("orthanc_events_bridge.bridge").joinpath("orthanc-events.schema.json")
    print(text.read_text(encoding="utf-8"), end="")
    return 0
