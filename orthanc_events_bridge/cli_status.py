"""``orthanc-events status`` and ``set-aside``: how everything is doing, and what a broker can never take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from orthanc_events_bridge import status
from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, add_command, outbox_folder, outbox_options
from orthanc_events_bridge.moments import iso

#: The states in which something is wrong now.
_FAULTS: Final = ("not connected", "refused", "needs attention")

_STATUS: Final = f"""\
states of a transport:
  connecting          it has not had an answer yet
  connected           all is well
  not connected       the broker can't be reached; tried again by itself
  refused             the broker takes no events now (it is full, say); tried again
  needs attention     nothing gets through until a person changes something
  paused              by `orthanc-events transports pause`
  not configured      it was taken out of the configuration and keeps its place
  bridge not running  nobody sends; the outbox keeps everything

Below the table stands for each what is wrong, since when, and what to do.

{EXIT_CODES}, whatever is shown"""

_SET_ASIDE: Final = f"""\
An event that the broker can never take (too large, say) would hold up all others
for ever. It is set aside, and the rest goes on. Mend the cause, then --resend: the
running bridge sends them once more, behind what was sent since, and the list below
is empty when they were taken. Each must still be in the outbox (outbox.keep).

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the commands."""
    text = "Works from the outbox's folder alone, so also while Orthanc is down."
    show = add_command(
        commands, "status", _status, "show how capture, bridge and transports are doing", text, epilog=_STATUS
    )
    outbox_options(show)
    show.add_argument(
        "--json", action="store_true", help="one JSON document, as Orthanc's /orthanc-events/status has it"
    )
    summary = "list events that a broker can never take, and send them again"
    aside = add_command(commands, "set-aside", _set_aside, summary, epilog=_SET_ASIDE)
    outbox_options(aside)
    aside.add_argument("--resend", action="store_true", help="ask the running bridge to send them once more")
    aside.add_argument("--transport", metavar="NAME", help="only those of this transport")
    aside.add_argument("--json", action="store_true", help="one JSON document")


def _status(options: argparse.Namespace) -> int:
    document = status.read(outbox_folder(options))
    print(json.dumps(document, indent=2) if options.json else status_text(document))
    return 0


def status_text(document: dict[str, Any]) -> str:
    """The status for people."""
    capture, bridge, outbox = document["capture"], document["bridge"], document["outbox"]
    last_exit = bridge.get("last_exit")
    dropped, vanished = capture.get("dropped", 0), capture.get("vanished", 0)
    state, cursor = capture.get("state", "not seen yet"), document["log"]["cursor"]
    lines = [
        f"outbox      {outbox['folder']}",
        f"            {outbox['rows']} rows, {in_bytes(outbox['bytes'])}, oldest {outbox['oldest'] or '-'}",
        f"capture     {state}, log cursor {cursor}, dropped {dropped}, vanished {vanished}",
    ]
    if capture.get("orthanc"):
        lines.append(f"            of {capture['orthanc']}, followed over HTTP")
    if capture.get("problem"):
        lines.append(f"            {capture['problem']['message']}")
    backfill = capture.get("backfill") or {}
    if backfill.get("state") == "running":
        events = sum(backfill["announced"].values())
        lines.append(
            f"            backfill: looked at {backfill['looked']} of {backfill['studies']} studies, {events} events"
        )
    if rescued := outbox.get("rescued"):
        lines.append(f"            exchanged {rescued['at']}: {rescued['reason']}: {rescued['result']}")
    running = f"running since {bridge.get('since')}" if bridge["running"] else "NOT running"
    lines.append(f"bridge      {running}, restarts {bridge.get('restarts', 0)}")
    if last_exit:
        lines.append(f"            last exit {last_exit['at']}: {last_exit['reason']}")
    mistakes = bridge.get("configuration", {}).get("mistakes", [])
    if mistakes and bridge["running"]:
        lines.append("            the configuration was changed and has mistakes; running on with the last good one:")
        lines += [f"            {mistake}" for mistake in mistakes]
    columns = ("name", "type", "state", "position", "pending", "published", "rate", "set_aside")
    rows = [["TRANSPORT", "TYPE", "STATE", "POSITION", "PENDING", "PUBLISHED", "RATE/S", "SET ASIDE"]]
    rows += [[str(transport.get(key, "-")) for key in columns] for transport in document["transports"]]
    lines += ["", *table(rows)]
    for transport in document["transports"]:
        lines += remarks(transport)
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]], widths: list[int] | None = None) -> list[str]:
    """Lines with their columns under each other.

    :param widths: at least so many letters for each column; what is behind it there goes on. Becomes what they have.
    """
    widths = [0] * len(rows[0]) if widths is None else widths
    widths[:] = [max(width, *(len(row[column]) for row in rows)) for column, width in enumerate(widths)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def remarks(transport: dict[str, Any]) -> Iterator[str]:
    """What is to be said of a transport besides its numbers: what, since when, what to do."""
    name, state, error = transport["name"], transport["state"], transport.get("last_error")
    indent = " " * len(name)
    if state == "not configured":
        yield f"{name}: not configured any more; it keeps its place, and the outbox holds {transport['pending']} rows"
        yield f"{indent}  what to do: put it back, or `orthanc-events transports forget {name}`"
    elif state == "paused":
        yield f"{name}: paused since {transport['paused']}; the outbox holds {transport['pending']} rows"
        yield f"{indent}  what to do: `orthanc-events transports resume {name}`, when it shall go on"
    elif error and state in _FAULTS:
        yield f"{name}: {state} since {transport['since']}: {error['message']}"
        yield f"{indent}  tried: {error['count']} times like this, last at {error['at']}"
    elif error:
        yield f"{name}: last error {error['at']} ({error['count']} times): {error['message']}"
    if error and error["remedy"] and state != "connected":
        yield f"{indent}  what to do: {error['remedy']}"
    if transport["gap"]:
        first, last = transport["gap"]
        yield f"{name}: LOST its place: positions {first} to {last} were given up undelivered"
    if transport["set_aside"]:
        yield f"{name}: {transport['set_aside']} events are set aside: `orthanc-events set-aside` lists them"


def in_bytes(count: float) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def _set_aside(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.bridge.state import State

    place = outbox_folder(options)
    entries = [e for e in status.read(place)["set_aside"] if options.transport in (None, e["transport"])]
    if options.resend and entries:
        state = State(place.bridge)
        for entry in entries:
            state.ask("resend", entry["transport"], entry["position"])
        state.close()
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0
    for entry in entries:
        columns = [entry["transport"], entry["position"], iso(entry["at"])]
        print(*columns, entry["type"], entry["event"], entry["reason"], sep="  ")
    asked = "; the bridge was asked to send them again" if options.resend and entries else ""
    if asked and not status.running(place):
        asked += ", and does so when it is started"
    print(f"{len(entries)} set aside{asked}")
    return 0
