"""``orthanc-events anonymize``: the anonymizer."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command
from orthanc_events_bridge.cli_rules import add_rule_options, answer_or_work, orthanc_id, show
from orthanc_events_bridge.cli_workers import add_worker_options, configuration, needs_pydicom
from orthanc_events_bridge.errors import GoneError

if TYPE_CHECKING:
    from orthanc_events_bridge.workflows.anonymizer import Anonymizer

_EPILOG: Final = f"""\
examples:
  orthanc-events anonymize --config anonymizer.yaml --check    look at rules, secrets, broker, Orthanc
  orthanc-events anonymize --config anonymizer.yaml            work, until Ctrl-C or SIGTERM
  orthanc-events anonymize --config anonymizer.yaml --workers 4
  orthanc-events anonymize --config anonymizer.yaml --dry-run  say what would be done, do nothing
  orthanc-events anonymize --config anonymizer.yaml --explain 1.2.840.113619.2.55.3
  orthanc-events anonymize --config anonymizer.yaml --who trial-7-MFRGGZDFMZTWQ2LK

A file:

  broker: nats://127.0.0.1:4222
  orthanc: http://127.0.0.1:8042
  store: sqlite:////var/lib/orthanc-events/anonymizer.db
  projects:
    trial-7: {{secret_file: /etc/orthanc-events/trial-7.secret}}
  rules:
    - name: trial 7
      when: {{tag: StudyDescription, glob: "*TRIAL-7*"}}
      to: [trial-7]

Results that come back into a pseudonymised study (SR, SEG, secondary captures) are given back
the patient, and join the original study. docs/consumers/anonymizer.md has all options, what is
guaranteed, and what no program can see: text in pixels.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "Started several times, here or elsewhere, they share the work."
    parser = add_command(
        commands, "anonymize", _anonymize, "pseudonymise studies where rules say", text, epilog=_EPILOG
    )
    add_worker_options(parser)
    what = add_rule_options(parser, "decide for what comes from now on, and do nothing")
    what.add_argument(
        "--who", metavar="ID", help="say what a PatientID or UID stands for, or what stands for it: PATIENT DATA"
    )


def _anonymize(options: argparse.Namespace) -> int:
    return answer_or_work(options, "anonymize", _made, explain=_explain, who=_who)


def _made(options: argparse.Namespace) -> Anonymizer:
    with needs_pydicom():
        from orthanc_events_bridge.workflows.anonymizer import Anonymizer
        from orthanc_events_bridge.workflows.anonymizer_settings import AnonymizerSettings
    return Anonymizer(configuration(options, AnonymizerSettings), dry=options.dry_run)


async def _explain(anonymizer: Anonymizer, identifier: str, as_json: bool) -> int:
    try:
        async with anonymizer.app.asking() as orthanc:
            found = await orthanc_id(orthanc, identifier, anonymizer.level)
            resource, decision, state = await anonymizer.explain(orthanc, found)
    finally:
        await anonymizer.memory.close()
    show(resource, decision, as_json=as_json)
    if state and not as_json:
        print(f"it {state}" if state.startswith("is") else state)
    return 0


async def _who(anonymizer: Anonymizer, identifier: str, as_json: bool) -> int:
    try:
        studies = await anonymizer.memory.studies(identifier)
        uids = await anonymizer.memory.who(identifier)
    finally:
        await anonymizer.memory.close()
    if not studies and not uids:
        raise GoneError("nothing is remembered of this identifier", "give a PatientID or a UID, letter by letter")
    found = [(one.project, "PatientID", one.patient_original, one.patient) for one in studies]
    found += [(one.project, "PatientName", one.identity.get("PatientName", ""), one.patient) for one in studies]
    found += [(one.project, "StudyInstanceUID", one.original, one.uid) for one in studies]
    said = {one.uid for one in studies}
    found += [(project, "UID", original, uid) for project, original, uid in uids if uid not in said]
    rows = list(dict.fromkeys(found))
    if as_json:
        names = ("project", "what", "original", "pseudonym")
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
        return 0
    rows.insert(0, ("PROJECT", "WHAT", "ORIGINAL", "PSEUDONYM"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=True)), row[3]]))
    return 0
