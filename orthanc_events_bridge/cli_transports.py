"""``orthanc-events transports``: list them; pause, resume and forget one.

What is asked for goes through ``bridge.db``: the bridge looks once a second, and is waited for.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from orthanc_events_bridge import status
from orthanc_events_bridge.cli_asking import ask
from orthanc_events_bridge.cli_options import (
    EXIT_CODES,
    Commands,
    add_actions,
    add_command,
    outbox_folder,
    outbox_options,
)
from orthanc_events_bridge.cli_status import remarks, table
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.folder import Folder

_EPILOG: Final = f"""\
examples:
  orthanc-events transports                  the list
  orthanc-events transports pause research   send nothing to it for now
  orthanc-events transports resume research  go on where it was
  orthanc-events transports forget research  after it was taken out of the YAML

A transport is known from its first start on. The outbox holds every row that one of
them has not had: also of one that is paused, or was taken out of the configuration,
until that one is forgotten.

{EXIT_CODES}"""

_FORGET: Final = (
    "What the outbox holds for it alone can then go, and so do the events set aside for it. Take it out of the"
    " configuration first. A later transport of this name is a new one: see its option `start`."
)
_ACTIONS: Final = {
    "pause": (
        "send nothing to a transport until it is resumed",
        "It stays so whatever is started again. The outbox keeps what it has not had, so a long pause can fill it.",
    ),
    "resume": ("go on with a transport that is paused", "It begins where it was paused."),
    "forget": ("give up the place of a transport that is not configured any more", _FORGET),
}


def define(commands: Commands) -> None:
    """Add the command."""
    text = "Without an action, list them."
    summary = "list the transports; pause, resume or forget one"
    parser = add_command(commands, "transports", _list, summary, text, epilog=_EPILOG)
    outbox_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    for _, action in add_actions(parser, _ACTIONS, _act, epilog=EXIT_CODES):
        action.add_argument("name", metavar="NAME", help="of the transport")
        action.add_argument("--no-wait", action="store_true", help="don't wait until the bridge has done it")
        outbox_options(action, again=True)


def _list(options: argparse.Namespace) -> int:
    place = outbox_folder(options)
    transports, waiting = status.read(place)["transports"], _waiting(place)
    if options.json:
        keys = ("name", "type", "state", "since", "position", "pending", "paused", "configured")
        print(json.dumps([{key: transport.get(key) for key in keys} for transport in transports], indent=2))
        return 0
    print("\n".join([*table(_rows(transports)), *(line for transport in transports for line in remarks(transport))]))
    for action, name in waiting:
        print(f"{name}: to {action} it was asked for, and the bridge has not done it yet")
    return 0


def _rows(transports: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["TRANSPORT", "TYPE", "STATE", "POSITION", "PENDING", "PAUSED SINCE", "CONFIGURED"]]
    for one in transports:
        begin = [one["name"], one.get("type", "-"), one["state"], str(one["position"]), str(one["pending"])]
        rows.append([*begin, one["paused"] or "-", "yes" if one["configured"] else "no"])
    return rows


def _waiting(place: Folder) -> list[tuple[str, str]]:
    view = status.BridgeView(place.bridge)
    try:
        return [(action, name) for action, name in view.waiting() if action in _ACTIONS]
    finally:
        view.close()


def _act(options: argparse.Namespace) -> int:
    """Ask the bridge, and say what it says."""
    place, name = outbox_folder(options), options.name
    names = [transport["name"] for transport in status.read(place)["transports"]]
    if name not in names:
        known = f"there are: {', '.join(names)}" if names else "none was ever started on this outbox"
        raise BridgeError(f"there is no transport {name}", known)
    text = ask(place, options.action, name, wait=not options.no_wait)
    if text is not None:
        print(text)
    elif options.no_wait and status.running(place):
        print(f"the bridge is asked to {options.action} transport {name}")
    else:
        print(f"the bridge is not running: it is asked to {options.action} transport {name} when it starts")
    return 0
