"""``orthanc-events derive``: tells when studies are ready."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command
from orthanc_events_bridge.cli_rules import add_rule_options, answer_or_work, as_dict, orthanc_id, tree
from orthanc_events_bridge.cli_workers import add_worker_options, configuration

if TYPE_CHECKING:
    from orthanc_events_bridge.workflows.derive import Deriver, Finding

_EPILOG: Final = f"""\
examples:
  orthanc-events derive --config derive.yaml --check    look at rules, broker, Orthanc
  orthanc-events derive --config derive.yaml            tell, until Ctrl-C or SIGTERM
  orthanc-events derive --config derive.yaml --workers 2
  orthanc-events derive --config derive.yaml --dry-run  say what would be told, tell nothing
  orthanc-events derive --config derive.yaml --explain 1.2.840.113619.2.55.3

A file:

  broker: nats://127.0.0.1:4222
  orthanc: http://127.0.0.1:8042
  rules:
    - name: mr-brain
      when: {{tag: Modality, is: MR}}
      quiet: 2m
      series:
        t1: {{tag: SeriesDescription, glob: "*T1*"}}
        t2: {{tag: SeriesDescription, glob: "*T2*"}}
      instances: {{modality: pacs}}
      deadline: 1h
    - name: everything else
      quiet: 5m

A consumer in any language subscribes to study.ready and study.updated as to the bridge's own events:
on NATS to orthanc.events.*.study.ready.*.
docs/consumers/derived-events.md has all options and what is guaranteed.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "It publishes study.ready and study.updated. Started several times, here or elsewhere, they share the work."
    parser = add_command(commands, "derive", _derive, "tell when studies are complete", text, epilog=_EPILOG)
    add_worker_options(parser)
    add_rule_options(
        parser,
        "say what would be told from now on, and tell nothing",
        "say what is missing of a study that is there: its Orthanc id or UID",
    )


def _derive(options: argparse.Namespace) -> int:
    return answer_or_work(options, "derive", _deriver, explain=_explain)


def _deriver(options: argparse.Namespace) -> Deriver:
    from orthanc_events_bridge.workflows.derive import Deriver, DeriveSettings

    return Deriver(configuration(options, DeriveSettings), dry=options.dry_run)


async def _explain(deriver: Deriver, identifier: str, as_json: bool) -> int:
    async with deriver.app.asking() as orthanc:
        finding = await deriver.find(orthanc, await orthanc_id(orthanc, identifier, "study"))
    if as_json:
        rules = [
            {"rule": rule.name, "fits": verdict.true, "why": as_dict(verdict)} for rule, verdict in finding.verdicts
        ]
        data = finding.data() if finding.rule else {}
        print(json.dumps({"id": finding.content.study, "due": finding.due, "data": data, "rules": rules}, indent=2))
        return 0
    content = finding.content
    print(f"study {content.study}, {len(content.series)} series, {len(content.instances)} instances")
    print("\n".join(_lines(finding)))
    return 0


def _lines(finding: Finding) -> Iterator[str]:
    for rule, verdict in finding.verdicts:
        yield f"{'yes' if verdict.true else 'no ':3} rule {rule.name}"
        for part in verdict.parts:
            yield from tree(part, 1)
    if (rule_found := finding.rule) is None:
        yield "nothing is told of it"
        return
    missing = finding.missing
    if finding.wait:
        yield f"not quiet: it can be in {finding.wait:g} s, if nothing more comes"
    for name in rule_found.series:
        yield f"series {name}: {'missing' if name in missing.get('series', ()) else 'there'}"
    if rule_found.instances is not None:
        yield f"instances: {len(finding.content.instances)} of {finding.expected or 'an unknown number'}"
    if not missing:
        yield "it is complete"
    elif finding.left:
        yield f"it is told ready when nothing is missing, or in {finding.left:g} s at its deadline"
    else:
        yield "its deadline is over: it is told ready with what is missing"
