"""``orthanc-events retry-jobs``: failed jobs are resubmitted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command
from orthanc_events_bridge.cli_workers import again, check_count, supervise, work

_EPILOG: Final = f"""\
examples:
  orthanc-events retry-jobs --config job-retry.yaml --check   look at broker, store, Orthanc
  orthanc-events retry-jobs --config job-retry.yaml           until Ctrl-C or SIGTERM
  orthanc-events retry-jobs --config job-retry.yaml --workers 2
  orthanc-events dlq list --config job-retry.yaml             what was given up, and why
  orthanc-events dlq redrive --config job-retry.yaml --all    at once, and counted from 1

A file:

  name: job-retry
  broker: nats://127.0.0.1:4222
  orthanc: http://127.0.0.1:8042
  types: [DicomModalityStore, OrthancPeerStore]
  resubmit: {{attempts: 15, initial: 1m, maximum: 1d}}

What Orthanc has forgotten (it keeps ten jobs that are over, JobsHistorySize) is made again
where the job said what it sends where: to modalities and to peers. What was cancelled, and
what somebody else has submitted again, is left alone. docs/consumers/job-retry.md has all
options and what is guaranteed.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "Started several times, here or elsewhere, they share the work."
    parser = add_command(commands, "retry-jobs", _retry, "resubmit Orthanc's failed jobs", text, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONSUMER")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--broker", metavar="URL", help="default: $ORTHANC_EVENTS_BROKER, or what the file says")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")
    parser.add_argument("--check", action="store_true", help="connect everywhere, say what was found, and leave")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # its number, of one that is supervised
    parser.add_argument("--only-load", action="store_true", help=argparse.SUPPRESS)


def _retry(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
    from orthanc_events_bridge.consumers.leaving import logs
    from orthanc_events_bridge.workflows.job_retry import JobRetry, JobRetrySettings

    check_count(options.workers)
    if options.workers > 1 and not options.check:
        logs(options.log_level or "info")
        return supervise(["retry-jobs", *again(options, "config", "broker", "log_level")], options.workers)
    given: dict[str, Any] = {name: getattr(options, name) for name in ("broker", "log_level")}
    line = CommandLine(options.config, {name: value for name, value in given.items() if value is not None})
    retry = JobRetry(configure_as(JobRetrySettings, {}, given=line))
    return work(options, retry)
