"""``orthanc-events run --orthanc`` and ``check --orthanc``: an Orthanc that is asked over HTTP, without any plugin."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import ORTHANC_ENVIRONMENT, orthanc_of, orthanc_options
from orthanc_events_bridge.errors import GoneError, OrthancError

if TYPE_CHECKING:
    from orthanc_events_bridge.folder import Folder
    from orthanc_events_bridge.orthanc_api import OrthancApi
    from orthanc_events_bridge.remote import RemoteCapture

RUN: Final = f"""\
examples:
  orthanc-events run --outbox DIR --config FILE
      beside an Orthanc with the plugin, which does this by itself
  orthanc-events run --outbox DIR --config FILE --orthanc https://pacs.example.org/orthanc \\
      --orthanc-user bridge --orthanc-password-file /run/secrets/orthanc
      an Orthanc without the plugin, which nobody has to touch: its change log is followed
      over HTTP, and recorded in the outbox, which is ours alone then

Without the plugin, deletions are found by comparison, some time after they happened, and
jobs by looking at Orthanc's list of them. `instance-added`, and what happens to the server
itself, is not seen.

{ORTHANC_ENVIRONMENT}

exit codes: 0 ended as told, 1 failed, 2 wrong configuration or arguments, 75 another bridge works on this outbox"""

CHECK: Final = f"""\
examples:
  orthanc-events check orthanc-events.yaml
  orthanc-events check orthanc-events.yaml --connect
  orthanc-events check --connect --orthanc https://pacs.example.org/orthanc \\
      --orthanc-token-file /run/secrets/orthanc

{ORTHANC_ENVIRONMENT}

exit codes: 0 done, 1 failed, 2 wrong configuration or arguments"""


def run_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``run`` that are about an Orthanc without the plugin."""
    orthanc_options(parser, "follow this Orthanc, which has no plugin, over HTTP")
    group = parser.add_argument_group("how often an Orthanc without the plugin is asked")
    group.add_argument(
        "--poll", type=_seconds, metavar="SECONDS", default=1.0, help="for new changes and jobs; default: %(default)g"
    )
    group.add_argument(
        "--compare-every",
        type=_seconds_or_never,
        metavar="SECONDS",
        default=600.0,
        help="from the end of one look for deletions to the next, in a tenth of the time at most: of studies by"
        " Orthanc's list of them, of series by a question for each study; 0: only after a start, and where something"
        " may have been missed; default: %(default)g",
    )
    group.add_argument(
        "--compare-instances",
        action="store_true",
        help="look for deletions of single instances too: a question for each series",
    )
    group.add_argument(
        "--stable-age",
        type=_seconds,
        metavar="SECONDS",
        default=60.0,
        help="Orthanc's StableAge; what is growing for longer is asked for; default: %(default)g",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.01 to 86400")
    return seconds


def _seconds_or_never(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


def is_named(options: argparse.Namespace) -> bool:
    """Whether an Orthanc to be asked over HTTP is named, by option or in the environment."""
    return bool(options.orthanc or os.environ.get("ORTHANC_EVENTS_ORTHANC_URL"))


def recorder(options: argparse.Namespace, folder: Folder) -> RemoteCapture:
    """What records the changes of the Orthanc that the options name.

    :raises ConfigError: they are wrong, or httpx is not installed.
    """
    from orthanc_events_bridge.loading import ConfigError, Problem
    from orthanc_events_bridge.orthanc_api import OrthancApi
    from orthanc_events_bridge.remote import Pace, RemoteCapture

    try:
        found = orthanc_of(options)
        OrthancApi(found).close()  # what is wrong whatever Orthanc answers is said at once
    except OrthancError as error:
        raise ConfigError([Problem("", None, "", error.message, error.remedy)]) from error
    pace = Pace(options.poll, options.compare_every, options.compare_instances, options.stable_age)
    return RemoteCapture(folder, found, pace)


def check(options: argparse.Namespace) -> Iterator[str]:
    """Ask an Orthanc for what following it needs; a line for each thing that was found.

    :raises BridgeError: it can't be asked, or not be followed.
    """
    from orthanc_events_bridge.orthanc_api import OrthancApi

    found = orthanc_of(options)
    with OrthancApi(found) as api:
        try:
            system = api.json("/system")
            backend = dict(system).get("DatabaseBackendPlugin")
            yield f"{found.place}: version {system['Version']}, its index in {backend or 'SQLite'}"
            yield _changes(api)
        except (LookupError, TypeError, ValueError) as error:
            raise OrthancError(f"{found.place} does not answer as an Orthanc does", "check the URL") from error
        yield _statistics(api)
        yield _jobs(api)


def _changes(api: OrthancApi) -> str:
    counter = api.json("/changes?since=9000000000000000000&limit=1")["Last"]
    oldest = api.json("/changes?since=0&limit=1")["Changes"]
    if not oldest:
        return f"its log is empty, and has numbered {counter} changes"
    return f"its log holds changes from number {oldest[0]['Seq']} on, the last one is {counter}"


def _statistics(api: OrthancApi) -> str:
    try:
        counts = api.json("/statistics")
        studies, instances = counts["CountStudies"], counts["CountInstances"]
    except (OrthancError, GoneError, LookupError, TypeError):
        return "how much it holds is not said (/statistics)"
    return (
        f"it holds {studies} studies, {instances} instances: a look for deletions is about {studies} questions,"
        f" with --compare-instances {studies + instances}"
    )


def _jobs(api: OrthancApi) -> str:
    try:
        return f"its jobs can be seen ({len(api.json('/jobs'))} now)"
    except (OrthancError, GoneError) as error:
        return f"its jobs can't be seen: {error}"
