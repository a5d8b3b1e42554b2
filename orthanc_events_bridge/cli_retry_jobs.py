"""``orthanc-events retry-jobs``: failed jobs are resubmitted."""

from __future__ import annotations

import argparse
from typing import Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command
from orthanc_events_bridge.cli_workers import add_worker_options, configuration, several, work

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
    add_worker_options(parser)
    parser.add_argument("--check", action="store_true", help="connect everywhere, say what was found, and leave")


def _retry(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.workflows.job_retry import JobRetry, JobRetrySettings

    if (code := several(options, "retry-jobs", alone=options.check)) is not None:
        return code
    return work(options, JobRetry(configuration(options, JobRetrySettings)))
