"""``orthanc-events workflow``: how far each series is that the AI dispatch is at; go on with one, or stop it."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, UsageError, add_actions, add_group
from orthanc_events_bridge.cli_status import table
from orthanc_events_bridge.cli_workers import needs_pydicom
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.moments import iso

if TYPE_CHECKING:
    from orthanc_events_bridge.workflows.dispatch import Dispatcher
    from orthanc_events_bridge.workflows.workflow import Workflow

_TITLES: Final = ["ID", "STATE", "SINCE", "RULE", "SERIES", "RESULTS", "REASON"]

_EPILOG: Final = f"""\
examples:
  orthanc-events workflow list --config dispatch.yaml
  orthanc-events workflow list --config dispatch.yaml --state failed --state overdue
  orthanc-events workflow list --config dispatch.yaml --json
  orthanc-events workflow show --config dispatch.yaml 6f1c1d0e
  orthanc-events workflow retry --config dispatch.yaml 6f1c1d0e
  orthanc-events workflow cancel --config dispatch.yaml 6f1c1d0e

A workflow is named by its id, or how that begins; or by Orthanc's id of its series or study.

states: anonymizing, sending, waiting, returning, delivering: that is due, or under way;
done; overdue: no result came before its deadline, and a late one still counts; failed: a step
was given up; cancelled; superseded: more images came, and another workflow has all of them.

{EXIT_CODES}"""

_ACTIONS: Final = {
    "list": ("print them, the oldest first", "Orthanc's ids, states and reasons: no patient data."),
    "show": ("print all that is known of one", "Orthanc's ids, pseudonymous UIDs and reasons: no patient data."),
    "retry": (
        "go on with one that has failed, is overdue, or was cancelled",
        "It begins with the step that was given up; an overdue one is sent again. One under way is given a push.",
    ),
    "cancel": (
        "stop one",
        "No further step is begun. What the service sends for it stays in Orthanc, pseudonymous, and goes nowhere.",
    ),
}


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "see how far an AI dispatch is with each series; go on with one, or stop it"
    parser = add_group(commands, "workflow", summary, epilog=_EPILOG)
    for name, action in add_actions(parser, _ACTIONS, _run, epilog=_EPILOG):
        action.add_argument(
            "--config", type=Path, metavar="FILE", help="of the AI dispatch; default: $ORTHANC_EVENTS_CONSUMER"
        )
        if name == "list":
            action.add_argument(
                "--state", action="append", metavar="STATE", help="only these; can be given several times"
            )
        else:
            action.add_argument("id", metavar="ID", help="its id, or how that begins; or of its series or study")
        if name in ("list", "show"):
            action.add_argument("--json", action="store_true", help="one JSON document")


def _run(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as

    with needs_pydicom():
        from orthanc_events_bridge.workflows.dispatch import Dispatcher
        from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings
    dispatcher = Dispatcher(configure_as(DispatchSettings, {}, given=CommandLine(options.config)))
    return asyncio.run(_closing(dispatcher, _ACTION[options.action](dispatcher, options)))


async def _closing(dispatcher: Dispatcher, action: Coroutine[Any, Any, int]) -> int:
    try:
        return await action
    finally:
        await dispatcher.close()


async def _list(dispatcher: Dispatcher, options: argparse.Namespace) -> int:
    from orthanc_events_bridge.workflows.workflow import STATES

    states = options.state or ()
    if unknown := [one for one in states if one not in STATES]:
        raise UsageError(f"there is no state {unknown[0]}", f"the states are: {', '.join(STATES)}")
    found = await dispatcher.steps.workflows.all(states)
    if options.json:
        print(json.dumps([one.shown() for one in found], indent=2))
    elif found:
        print("\n".join(table([_TITLES, *map(_row, found)], [0] * len(_TITLES))))
    else:
        print(f"consumer {dispatcher.settings.name}: no workflows{' that fit' if states else ''}")
    return 0


def _row(one: Workflow) -> list[str]:
    sent = f"{sum(each.sent for each in one.results)} of {len(one.results)}" if one.results else "-"
    return [one.id, one.state, iso(one.since * 1000), one.rule, one.series, sent, one.reason or "-"]


async def _show(dispatcher: Dispatcher, options: argparse.Namespace) -> int:
    one = await _one(dispatcher, options.id)
    if options.json:
        print(json.dumps(one.shown(), indent=2))
        return 0
    from orthanc_events_bridge.workflows.workflow import STATES

    print(f"workflow {one.id}: {one.state}, {STATES[one.state]}")
    for name, value in one.shown().items():
        if value not in ("", None, 0) and name not in ("id", "state", "history", "results"):
            print(f"  {name}: {value}")
    for each in one.results:
        becomes = f"given back as series {each.given}" if each.given else "not given back yet"
        print(f"  result: series {each.series}, {becomes}{', sent on' if each.sent else ''}")
    for entry in one.shown()["history"]:
        print(f"  {entry['time']}  {entry['state']}")
    return 0


async def _retry(dispatcher: Dispatcher, options: argparse.Namespace) -> int:
    found = await dispatcher.again(await _one(dispatcher, options.id))
    print(f"workflow {found.id} is {found.state} again")
    return 0


async def _cancel(dispatcher: Dispatcher, options: argparse.Namespace) -> int:
    found = await dispatcher.cancel(await _one(dispatcher, options.id))
    print(f"workflow {found.id} is cancelled")
    return 0


async def _one(dispatcher: Dispatcher, identifier: str) -> Workflow:
    found = await dispatcher.steps.workflows.matching(identifier)
    if not found:
        raise GoneError(f"there is no workflow {identifier}", "see orthanc-events workflow list")
    if len(found) > 1:
        raise UsageError(
            f"{identifier} can be {len(found)} workflows", f"say which: {', '.join(one.id for one in found)}"
        )
    return found[0]


_ACTION: Final[dict[str, Callable[[Dispatcher, argparse.Namespace], Coroutine[Any, Any, int]]]] = {
    "list": _list,
    "show": _show,
    "retry": _retry,
    "cancel": _cancel,
}
