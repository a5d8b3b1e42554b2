"""``orthanc-events dispatch``: the AI dispatch."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command
from orthanc_events_bridge.cli_rules import add_rule_options, answer_or_work, as_dict, orthanc_id, tree
from orthanc_events_bridge.cli_workers import add_worker_options, configuration, needs_pydicom

if TYPE_CHECKING:
    from orthanc_events_bridge.workflows.dispatch import Dispatcher

_EPILOG: Final = f"""\
examples:
  orthanc-events dispatch --config dispatch.yaml --check    look at rules, secret, broker, Orthanc, service
  orthanc-events dispatch --config dispatch.yaml            work, until Ctrl-C or SIGTERM
  orthanc-events dispatch --config dispatch.yaml --workers 4
  orthanc-events dispatch --config dispatch.yaml --dry-run  say what would be sent, send nothing
  orthanc-events dispatch --config dispatch.yaml --explain 1.2.840.113619.2.55.3
  orthanc-events workflow list --config dispatch.yaml       how far each series is

A file:

  broker: nats://127.0.0.1:4222
  orthanc: http://127.0.0.1:8042
  store: sqlite:////var/lib/orthanc-events/dispatch.db
  rules:
    - name: mr-of-the-pacs
      when:
        - {{tag: Modality, is: MR}}
        - {{metadata: RemoteAET, is: PACS}}
  anonymize: {{secret_file: /etc/orthanc-events/ai.secret}}
  service: {{dicomweb: ai, deadline: 1h}}
  results:
    to: {{modality: pacs}}

A series that fits is pseudonymised and sent; the results, when they have come back into Orthanc,
are given back the patient and sent on. What is given up is among the dead letters of NAME-STEP:
orthanc-events dlq list --broker URL --consumer dispatch-send.
docs/consumers/ai-dispatch.md has all options and what is guaranteed.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "Started several times, here or elsewhere, they share the work."
    summary = "send series to an AI service, pseudonymised, and its results on"
    parser = add_command(commands, "dispatch", _dispatch, summary, text, epilog=_EPILOG)
    add_worker_options(parser)
    add_rule_options(parser, "decide for what comes from now on, and do nothing")


def _dispatch(options: argparse.Namespace) -> int:
    return answer_or_work(options, "dispatch", _made, explain=_explain)


def _made(options: argparse.Namespace) -> Dispatcher:
    with needs_pydicom():
        from orthanc_events_bridge.workflows.dispatch import Dispatcher
        from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings
    return Dispatcher(configuration(options, DispatchSettings), dry=options.dry_run)


async def _explain(dispatcher: Dispatcher, identifier: str, as_json: bool) -> int:
    try:
        async with dispatcher.looking.asking() as orthanc:
            found = await dispatcher.explain(orthanc, await orthanc_id(orthanc, identifier, "series"))
        workflows = await dispatcher.steps.workflows.matching(found.series)
    finally:
        await dispatcher.close()
    if as_json:
        rules = [{"rule": rule.name, "fits": verdict.true, "why": as_dict(verdict)} for rule, verdict in found.verdicts]
        known = [one.shown() for one in workflows]
        print(
            json.dumps(
                {"series": found.series, "sent": found.rule, "why": found.why, "rules": rules} | {"workflows": known},
                indent=2,
            )
        )
        return 0
    print(f"series {found.series}, {found.instances} instances")
    for rule, verdict in found.verdicts:
        print(f"{'yes' if verdict.true else 'no ':3} rule {rule.name}")
        for part in verdict.parts:
            print("\n".join(tree(part, 1)))
    print(f"it goes to the service, by {found.rule}" if found.rule else f"it stays here: {found.why}")
    for one in workflows:
        print(f"workflow {one.id} is {one.state}")
    return 0
