"""``orthanc-events route``: the router."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command
from orthanc_events_bridge.cli_rules import add_rule_options, answer_or_work, orthanc_id, show
from orthanc_events_bridge.cli_workers import add_worker_options, configuration

if TYPE_CHECKING:
    from orthanc_events_bridge.workflows.router import Router

_EPILOG: Final = f"""\
examples:
  orthanc-events route --config router.yaml --check    look at rules, broker, destinations
  orthanc-events route --config router.yaml            route, until Ctrl-C or SIGTERM
  orthanc-events route --config router.yaml --workers 4
  orthanc-events route --config router.yaml --dry-run  say what would be sent, send nothing
  orthanc-events route --config router.yaml --explain 1.2.840.113619.2.55.3

A file:

  broker: nats://127.0.0.1:4222
  orthanc: http://127.0.0.1:8042
  destinations:
    pacs: {{modality: pacs}}
    research: {{orthanc: "https://research.example.org/orthanc"}}
  rules:
    - name: everything
      to: [pacs]
    - name: knees
      when:
        - {{tag: Modality, is: MR}}
        - {{tag: BodyPartExamined, glob: "KNEE*"}}
      to: [research]

What can't be sent is tried again by itself, and is in the end among the dead letters of
NAME-DESTINATION: orthanc-events dlq list --broker URL --consumer router-pacs.
docs/consumers/router.md has all options and what is guaranteed.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "Started several times, here or elsewhere, they share the work."
    parser = add_command(commands, "route", _route, "send studies where rules say", text, epilog=_EPILOG)
    add_worker_options(parser)
    add_rule_options(parser, "decide for what comes from now on, and send nothing")


def _route(options: argparse.Namespace) -> int:
    return answer_or_work(options, "route", _router, explain=_explain)


def _router(options: argparse.Namespace) -> Router:
    from orthanc_events_bridge.workflows.router import Router
    from orthanc_events_bridge.workflows.router_settings import RouterSettings

    return Router(configuration(options, RouterSettings), dry=options.dry_run)


async def _explain(router: Router, identifier: str, as_json: bool) -> int:
    async with router.deciding.asking() as orthanc:
        resource, decision = await router.explain(orthanc, await orthanc_id(orthanc, identifier, router.level))
    show(resource, decision, as_json=as_json)
    return 0
