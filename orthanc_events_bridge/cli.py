"""``orthanc-events``: set the bridge up, check it, run it, and see how it is doing.

Exit codes: 0 done, 1 failed, 2 wrong configuration or arguments, 75 another bridge works on this outbox.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge import (
    __version__,
    cli_anonymize,
    cli_backfill,
    cli_backup,
    cli_conformance,
    cli_consume,
    cli_derive,
    cli_dispatch,
    cli_dlq,
    cli_orthanc,
    cli_replay,
    cli_retry_jobs,
    cli_route,
    cli_schema,
    cli_status,
    cli_tail,
    cli_transports,
    cli_verify,
    cli_workflow,
)
from orthanc_events_bridge.cli_options import (
    UsageError,
    add_command,
    orthanc_options,
    outbox_folder,
    outbox_options,
    settings_of,
)
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.logs import quiet_clients

#: What has a schema beside the bridge's file: where it lies, and what it is of.
_SCHEMAS: Final = {
    "consumer": ("consumers", "of a consumer's configuration"),
    "router": ("workflows", "of that of `route`"),
    "anonymizer": ("workflows", "of that of `anonymize`"),
    "dispatch": ("workflows", "of that of `dispatch`"),
    "derive": ("workflows", "of that of `derive`"),
    "job-retry": ("workflows", "of that of `retry-jobs`"),
}
_EPILOG: Final = "documentation: README.md and docs/ in the project's repository"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    :return: the exit code.
    """
    try:
        try:
            return _command(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no error
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(arguments: Sequence[str] | None) -> int:
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
    except BrokenPipeError:
        raise
    except OSError as error:
        problem = BridgeError(f"{error.filename or 'the system'}: {error.strerror or error}")
        return _fail(problem, supervised=getattr(options, "supervised", False))


def _fail(error: BridgeError, *, supervised: bool) -> int:
    """One clear message, and the exit code that fits."""
    from orthanc_events_bridge.bridge import EXIT_BUSY, EXIT_CONFIGURATION, EXIT_FAILED, BusyError
    from orthanc_events_bridge.loading import ConfigError

    for line in str(error).splitlines():
        print(f"E {line}" if supervised else f"orthanc-events: {line}", file=sys.stderr)
    if isinstance(error, ConfigError | UsageError):
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

    summary = "write a commented configuration, and the shim that Orthanc loads"
    init = add_command(commands, "init", _init, summary)
    init.add_argument("folder", metavar="DIR", type=Path, help="where to write them; made when it isn't there")
    init.add_argument("--force", action="store_true", help="write over files that are there, kept as *.bak")
    init.add_argument("--shim", action="store_true", help="write the shim alone, after the package has moved, say")
    init.add_argument(
        "--script", type=Path, metavar="FILE", help="a Python script of yours that Orthanc shall load too"
    )

    text = "One line per mistake, and exit code 2."
    check = add_command(commands, "check", _check, "check a configuration", text, epilog=cli_orthanc.CHECK)
    check.add_argument("file", metavar="FILE", type=Path, nargs="?", help="default: $ORTHANC_EVENTS_CONFIG")
    check.add_argument("--connect", action="store_true", help="connect to every broker too, and say what was found")
    orthanc_options(check, "with --connect, ask this Orthanc too, as `run --orthanc` would")

    summary = "run the bridge, beside Orthanc or far from it"
    run = add_command(commands, "run", _run, summary, "Orthanc's plugin does this by itself.", epilog=cli_orthanc.RUN)
    outbox_options(run)
    run.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONFIG")
    run.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    cli_orthanc.run_options(run)

    for module in (
        cli_status,
        cli_transports,
        cli_tail,
        cli_replay,
        cli_anonymize,
        cli_backfill,
        cli_verify,
        cli_backup,
        cli_conformance,
        cli_consume,
        cli_derive,
        cli_dispatch,
        cli_dlq,
        cli_retry_jobs,
        cli_route,
        cli_workflow,
    ):
        module.define(commands)
    summary = "print the JSON Schema of the configuration, for editors, or of events"
    schema = add_command(commands, "schema", _schema, summary, epilog=cli_schema.EPILOG)
    of = schema.add_mutually_exclusive_group()
    cli_schema.options(of)
    for name, (_, meaning) in _SCHEMAS.items():
        of.add_argument(f"--{name}", dest="of", action="store_const", const=name, help=meaning)
    return parser


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
    failed = 0
    if options.connect and cli_orthanc.is_named(options):
        failed = _check_orthanc(options)
        if options.file is None and not os.environ.get("ORTHANC_EVENTS_CONFIG"):
            return failed
    settings = settings_of(options.file)
    names = ", ".join(f"{transport.name} ({transport.type})" for transport in settings.transports)
    print(f"the configuration is right: source {settings.source}, site {settings.site}, transports {names}")
    return (asyncio.run(_check_brokers(settings)) or failed) if options.connect else 0


def _check_orthanc(options: argparse.Namespace) -> int:
    try:
        for line in cli_orthanc.check(options):
            print(f"orthanc: {line}")
    except BridgeError as error:
        print(f"orthanc: {error}", file=sys.stderr)
        return 1
    return 0


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
    from orthanc_events_bridge.bridge.config import find_config
    from orthanc_events_bridge.bridge.configuration import Configuration

    place = outbox_folder(options)
    place.prepare()
    remote = not options.supervised and cli_orthanc.is_named(options)
    recorder = cli_orthanc.recorder(options, place) if remote else None
    configuration = Configuration(options.config or find_config(None))
    handler = logging.StreamHandler()
    handler.setFormatter(
        _Levels() if options.supervised else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=configuration.settings.log_level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # with Orthanc killed nobody reads what we say
    quiet_clients()

    async def bridge() -> int:
        return await Bridge(place, configuration, supervised=options.supervised, recorder=recorder).run()

    return asyncio.run(bridge())


def _schema(options: argparse.Namespace) -> int:
    from importlib import resources

    if cli_schema.is_named(options):
        return cli_schema.run(options)

    package, name = "bridge", "orthanc-events"
    if options.of is not None:
        package, name = _SCHEMAS[options.of][0], f"orthanc-{options.of}"
    text = resources.files(f"orthanc_events_bridge.{package}").joinpath(f"{name}.schema.json")
    print(text.read_text(encoding="utf-8"), end="")
    return 0
