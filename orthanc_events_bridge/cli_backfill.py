"""``orthanc-events backfill``: announce what Orthanc had before the bridge was there.

Only capture writes the outbox, in Orthanc's process: it is asked through the bridge, and says how far it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Final

from orthanc_events_bridge import status
from orthanc_events_bridge.changes.backfill import LEVELS
from orthanc_events_bridge.cli_asking import ask
from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command, moment, outbox_folder, outbox_options
from orthanc_events_bridge.cli_status import table
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox_reader import OutboxReader

#: Seconds between two looks at how far it is; and between two lines of progress where there is no terminal.
_LOOK: Final = 0.5
_ELSEWHERE: Final = 10.0

_EPILOG: Final = f"""\
examples:
  orthanc-events backfill --dry-run          how many events that would be, by type
  orthanc-events backfill                    patients and studies
  orthanc-events backfill --level instance   all of it
  orthanc-events backfill --since 30d        what got something in the last 30 days
  orthanc-events backfill --stop             end it; what is announced, stays so

What was in Orthanc before the bridge was, and was never announced, is: from the patients
down to --level. These are the events, each of them once:

  patient   patient.created and patient.stable
  study     those, and study.created and study.stable
  series    those, and series.created and series.stable
  instance  those, and instance.created

`stable` only comes for what Orthanc calls stable now; for the rest Orthanc itself will
say so. All of them have `"inferred": true` in their data. Their `time` is that of the
resource's last change (of an instance: when it was stored). There is no
`instance-added`, and nothing of what happened to a resource before.

They go the way of all events, to all transports, behind what was recorded until then.
Orthanc looks for them in a tenth of the time of one thread, and less where it is busy or
the outbox is half full; it goes on after a restart. Done again, it announces nothing
twice. This command shows how far it is; Ctrl-C ends the command alone.

{EXIT_CODES}, 130 interrupted"""


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "announce what Orthanc had before the bridge was there"
    backfill = add_command(commands, "backfill", _backfill, summary, epilog=_EPILOG)
    backfill.add_argument("--level", choices=LEVELS, default="study", help="down to which level; default: study")
    text = "only what got something since: a time, or how long ago (90m, 12h, 7d)"
    backfill.add_argument("--since", metavar="TIME", type=moment, default=0, help=text)
    backfill.add_argument("--dry-run", action="store_true", help="only count what would be announced, by type")
    backfill.add_argument("--stop", action="store_true", help="end the one that is under way")
    backfill.add_argument("--no-wait", action="store_true", help="don't wait until it is done")
    backfill.add_argument("--json", action="store_true", help="one JSON document")
    outbox_options(backfill)


def _backfill(options: argparse.Namespace) -> int:
    place = outbox_folder(options)
    number = time.time_ns() // 1_000_000
    request = {"level": options.level, "since": options.since, "dry_run": options.dry_run, "stop": options.stop}
    argument = {"number": number, "recorder": status.read(place)["outbox"]["recorder"], **request}
    if ask(place, "backfill", argument=argument, wait=not options.no_wait) is None:
        running = status.running(place)
        print("Orthanc is asked" if running else "the bridge is not running: Orthanc is asked when it starts")
        return 0
    try:
        found = _follow(place, number)
    except KeyboardInterrupt:
        print("\nit goes on; `orthanc-events backfill --stop` ends it", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({**found, "announced": _by_type(found)}, indent=2))
    else:
        print("\n".join(_text(found)))
    return 0


def _follow(place: Folder, number: int) -> dict[str, Any]:
    """Wait until it is over, and show how far it is."""
    terminal = sys.stderr.isatty()
    reader = OutboxReader(place.outbox)
    next_line = time.monotonic() + (0.0 if terminal else _ELSEWHERE)
    try:
        while True:
            meta = reader.meta()
            found: dict[str, Any] = json.loads(meta.get("note.backfill", "{}"))
            if found.get("number", 0) > number:
                raise BridgeError("another backfill was asked for meanwhile", "that one is done in place of this")
            if found.get("number") == number and found["state"] != "running":
                return found
            if time.monotonic() >= next_line:
                line = _progress(found, json.loads(meta.get("note.capture", "{}")), number)
                print(f"\r{line:<79}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
                next_line += _LOOK if terminal else _ELSEWHERE
            time.sleep(_LOOK)
    finally:
        reader.close()
        if terminal:
            print(file=sys.stderr)


def _progress(found: dict[str, Any], capture: dict[str, Any], number: int) -> str:
    if found.get("number") != number:
        return f"Orthanc has not begun; capture is {capture.get('state', 'not seen yet')}"
    looked, studies, events = found["looked"], found["studies"], sum(found["announced"].values())
    return f"looked at {looked} of {studies if studies is not None else '?'} studies, {events} events"


def _by_type(found: dict[str, Any]) -> dict[str, int]:
    from orthanc_events_bridge.events.catalog import verb

    changes = {
        change: f"{level}.{verb(change)}"
        for level in LEVELS
        for change in (f"New{level.capitalize()}", f"Stable{level.capitalize()}")
    }
    return {name: found["announced"][change] for change, name in changes.items() if change in found["announced"]}


def _text(found: dict[str, Any]) -> list[str]:
    events = _by_type(found)
    total = str(sum(events.values()))
    rows = [["TYPE", "EVENTS"], *([name, str(number)] for name, number in events.items()), ["all", total]]
    says = "would be announced" if found["dry_run"] else "were announced"
    end = "; it was stopped" if found["state"] == "stopped" else ""
    return [*table(rows), f"{total} events {says}, of {found['looked']} studies{end}"]
