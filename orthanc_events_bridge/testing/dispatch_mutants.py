"""Protections of the AI dispatch, switched off on purpose, to show that the tests would notice.

Test-only: ``python -m orthanc_events_bridge.testing.dispatch_mutants NAME,… dispatch --config …`` is ``orthanc-events
dispatch …`` without what these names stand for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.testing.mutated import run
from orthanc_events_bridge.workflows import dispatch_steps, jobs
from orthanc_events_bridge.workflows.dispatch import Dispatcher
from orthanc_events_bridge.workflows.workflow import Workflow, Workflows


def _without_noting_jobs() -> None:
    """The job that sends a series is not noted."""

    async def nothing(_: str) -> None:
        """It is forgotten."""

    dispatch_steps.Left = lambda *_: jobs.Left("", nothing)  # type: ignore[assignment, attr-defined]


def _without_ordering_again() -> None:
    """An order that finds its step done orders nothing: who did it will have ordered the next."""
    done: set[tuple[str, str]] = set()
    change, order = Workflows.change, Dispatcher._order

    async def noting(self: Workflows, *given: Any) -> Workflow:
        found = await change(self, *given)
        done.add((found.id, found.state))
        return found

    async def only_own(self: Dispatcher, workflow: Workflow, more: str = "") -> None:
        if workflow.state == "anonymizing" or (workflow.id, workflow.state) in done:
            await order(self, workflow, more)

    Workflows.change = noting  # type: ignore[assignment, method-assign]
    Dispatcher._order = only_own  # type: ignore[method-assign]


def _dying() -> None:
    """No protection is off, but the first of all workers dies as soon as a row says that its series is to be sent."""
    mark = Path(sys.argv[sys.argv.index("--config") + 1]).with_name("died")
    change = Workflows.change

    async def dying(self: Workflows, *given: Any) -> Workflow:
        found = await change(self, *given)
        if found.state == "sending" and not mark.exists():
            mark.touch()
            os._exit(9)
        return found

    Workflows.change = dying  # type: ignore[assignment, method-assign]


#: Those of a dispatch's process.
MUTANTS: Final[dict[str, Callable[[], Any]]] = {
    "job": _without_noting_jobs,
    "again": _without_ordering_again,
    "dying": _dying,
}

if __name__ == "__main__":
    run(MUTANTS)
