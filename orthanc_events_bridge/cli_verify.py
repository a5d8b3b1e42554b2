"""``orthanc-events verify``: is everything recorded that Orthanc has, and everything sent that is recorded?"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.cli_options import (
    ORTHANC_ENVIRONMENT,
    Commands,
    Meter,
    UsageError,
    add_command,
    orthanc_of,
    orthanc_options,
    outbox_folder,
    outbox_options,
    settings_of,
)
from orthanc_events_bridge.cli_status import table
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.status import BridgeView

if TYPE_CHECKING:
    from orthanc_events_bridge.bridge.settings import Settings
    from orthanc_events_bridge.folder import Folder
    from orthanc_events_bridge.transports.options import TransportOptions
    from orthanc_events_bridge.verify import Findings, Show

_LIMIT: Final = 20
_WAIT: Final = 30.0

_EPILOG: Final = f"""\
examples:
  orthanc-events verify --orthanc http://127.0.0.1:8042 --orthanc-config /etc/orthanc
  orthanc-events verify --orthanc https://pacs.example.org/orthanc --orthanc-user bridge \\
      --orthanc-password-file /run/secrets/orthanc --outbox /var/lib/orthanc/orthanc-events \\
      --config /etc/orthanc-events/orthanc-events.yaml --transport nats --json

missing       Orthanc has it, or its log, and it was never recorded; or it is recorded,
              and not where it was to be sent to
extra         it was announced, is gone in Orthanc, and no deletion was recorded; or it
              is at the broker, and the outbox does not know it
out of order  it came behind a younger event of the same partition key

Patients, studies, series, and the rows of Orthanc's log are compared; with --transport
also every event that the outbox keeps and the broker has. What is still on its way is
waited for. What is older than recording, or not kept any more, is counted and no
difference. Nothing is changed anywhere. The bridge, and Orthanc, may be at work.

{ORTHANC_ENVIRONMENT}

exit codes: 0 all is right, 1 there are differences, or it could not be compared,
2 wrong arguments or configuration"""


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "compare Orthanc with what is recorded, and that with what was sent"
    parser = add_command(commands, "verify", _verify, summary, epilog=_EPILOG)
    outbox_options(parser)
    parser.add_argument("--transport", metavar="NAME", help="compare what was sent to this one as well")
    parser.add_argument("--config", type=Path, metavar="FILE", help="for --transport; default: $ORTHANC_EVENTS_CONFIG")
    parser.add_argument(
        "--wait", type=float, default=_WAIT, metavar="SECONDS", help="for what is on its way; default: 30"
    )
    parser.add_argument("--limit", type=int, default=_LIMIT, metavar="N", help="show so many differences; default: 20")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    orthanc_options(parser)


def _verify(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.orthanc_api import ENVIRONMENT
    from orthanc_events_bridge.verify import Findings

    if options.wait < 0 or options.limit < 0:
        raise UsageError("--wait and --limit can't be below 0")
    chosen = _transport(options) if options.transport else None
    place = outbox_folder(options)
    named = options.orthanc or os.environ.get(f"{ENVIRONMENT}URL")
    orthanc = orthanc_of(options) if named or chosen is None else None
    with closing(OutboxReader(place.outbox)) as outbox, Findings() as findings:
        with Meter("comparing") as meter:
            if orthanc is not None:
                from orthanc_events_bridge.orthanc_api import OrthancApi
                from orthanc_events_bridge.verify.orthanc import OrthancCheck

                with OrthancApi(orthanc) as api:
                    OrthancCheck(api, outbox, findings, meter.step, wait=options.wait).run()
            if chosen is not None:
                asyncio.run(_compare_transport(*chosen, place, outbox, findings, meter.step, options.wait))
        counts = findings.counts()
        if options.json:
            print(json.dumps(_document(findings, options.limit), indent=2))
        else:
            print("\n".join(_lines(findings, options.limit)))
    return 1 if any(counts.values()) else 0


def _transport(options: argparse.Namespace) -> tuple[Settings, TransportOptions]:
    settings = settings_of(options.config)
    found = next((one for one in settings.transports if one.name == options.transport), None)
    if found is None:
        names = ", ".join(one.name for one in settings.transports)
        raise UsageError(f"there is no transport {options.transport}", f"there are: {names}")
    return settings, found


async def _compare_transport(
    settings: Settings,
    chosen: TransportOptions,
    place: Folder,
    outbox: OutboxReader,
    findings: Findings,
    show: Show,
    wait: float,
) -> None:
    from orthanc_events_bridge.transports import create
    from orthanc_events_bridge.verify.transport import TransportCheck

    transport = create(chosen)
    if not transport.capabilities.replayable:
        raise UsageError(
            f"events can't be read back from {chosen.name} (a {chosen.type})", "leave --transport out, or name another"
        )
    with closing(BridgeView(place.bridge)) as view:
        known: dict[int, Mapping[str, Any]] = {**view.all_settings(), **outbox.settings()}

        def shape(number: int) -> Mapping[str, Any]:
            return known.get(number or min(known, default=0), settings.shape())

        def accepts(name: str) -> bool:
            return settings.events.accepts(name) and chosen.events.accepts(name)

        await TransportCheck(transport, chosen.name, accepts, shape, outbox, view, findings, show, wait=wait).run()


_CHECKED: Final = {
    "resources": "patients, studies and series of Orthanc",
    "announced": "that were announced and not deleted since",
    "log": "rows of Orthanc's log",
    "expected": "events that the broker has to have",
    "read": "events that were read from it",
}


def _document(findings: Findings, limit: int) -> dict[str, Any]:
    return {
        "differences": {kind.replace(" ", "_"): count for kind, count in findings.counts().items()},
        "reasons": [
            {"what": what.replace(" ", "_"), "where": where, "why": why, "count": count}
            for what, where, why, count in findings.reasons()
        ],
        "first": [{**one._asdict(), "what": one.what.replace(" ", "_")} for one in findings.first(limit)],
        "notes": dict(findings.notes),
        "checked": findings.checked,
    }


def _lines(findings: Findings, limit: int) -> list[str]:
    counts = findings.counts()
    lines = [f"{count:>10}  {_CHECKED[name]}" for name, count in findings.checked.items()]
    if findings.notes:
        lines += ["", "no difference, but to be known:"]
        lines += [f"{count:>10}  {note}" for note, count in findings.notes.items()]
    if any(counts.values()):
        rows = [["COUNT", "WHAT", "WHERE", "WHY"]]
        rows += [[str(count), what, where, why] for what, where, why, count in findings.reasons()]
        lines += ["", *table(rows), ""]
        rows = [["WHAT", "WHERE", "ABOUT", "EVENT", "NUMBER"]]
        for one in findings.first(limit):
            rows.append([one.what, one.where, one.subject, one.event or "-", str(one.sequence or "-")])
        lines += table(rows)
        if (more := sum(counts.values()) - limit) > 0:
            lines.append(f"and {more} more: --limit")
    lines += ["", ", ".join(f"{count} {what}" for what, count in counts.items())]
    return lines
