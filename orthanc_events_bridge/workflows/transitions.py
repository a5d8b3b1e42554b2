"""What becomes of a workflow by what happens to it; none where that changes nothing. Pure, for `Workflows.change`.

Each may be asked again of the row as others have left it, and so looks at the state that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.workflows.workflow import STEPS, STOPPED, Outcome, Workflow

Change = Callable[[Workflow], Workflow | None]

_BACK: Final = {step: state for state, step in STEPS.items()}


def done_with(state: str, then: Change) -> Change:
    """A step is done, of what is still in its state: somebody may have cancelled it, or a result have come."""
    return lambda row: then(row) if row.state == state else None


def given_up(state: str, to: str, reason: str) -> Change:
    """A step is given up."""
    return done_with(state, lambda row: row.to(to, step=STEPS[state], reason=reason))


def mended(state: str) -> Change:
    """A step that was given up is ordered again by who has mended what was wrong."""
    return lambda row: row.to(state, reason="", step="") if (row.state, row.step) == ("failed", STEPS[state]) else None


def arrived(outcome: Outcome) -> Change:
    """A result has come; it counts however late, and whatever was given up."""

    def change(row: Workflow) -> Workflow | None:
        known = row.result(outcome.series)
        if row.state in STOPPED or (known is not None and known.content == outcome.content):
            return None
        return row.with_result(outcome).to("returning", reason="", step="")

    return change


def noted(before: Outcome, after: Outcome) -> Change:
    """Something was done with a result, unless more of it has come meanwhile."""
    return lambda row: row.with_result(after) if row.result(before.series) == before else None


def returned(row: Workflow) -> Workflow | None:
    """All results were given back their patient."""
    return row.to("delivering") if all(each.given for each in row.results) else None


def delivered(expected: Collection[str]) -> Change:
    """All results were sent on.

    :param expected: names of what has to come.
    """

    def change(row: Workflow) -> Workflow | None:
        if not all(each.sent for each in row.results):
            return None
        met = {name for each in row.results for name in each.meets}
        return row.to("done" if met.issuperset(expected) else "waiting")

    return change


def begun_again(row: Workflow) -> Workflow | None:
    """A person wants it to go on: from the step that was given up, or at which it was cancelled; one whose result has
    not come is sent again. One that is under way stays as it is.

    :raises BridgeError: it has ended.
    """
    _check_ended(row, "done again")
    if row.state not in ("failed", "cancelled", "overdue"):
        return None
    state = _BACK.get(row.step, "anonymizing")
    # Sent again, what has come meanwhile is found too.
    state = "sending" if state == "waiting" else state
    return row.to(state, run=row.run + 1, job="", reason="", step="")


def cancelled(row: Workflow) -> Workflow | None:
    """A person wants it to stop.

    :raises BridgeError: it has ended.
    """
    _check_ended(row, "cancelled")
    step = STEPS.get(row.state) or row.step
    return row.to("cancelled", step=step) if row.state != "cancelled" else None


def _check_ended(row: Workflow, what: str) -> None:
    if row.state in ("done", "superseded"):
        raise BridgeError(f"workflow {row.id} is {row.state}: there is nothing to be {what}")
