"""What the callbacks of one transaction say together, where several transactions call back at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from orthanc_events_bridge.changes.model import Callback, ChangeKind, ResourceLevel


def running(runs: int, callback: Callback) -> int:
    """How many new instances wait for the last of their NewChildInstance, behind one more callback."""
    if callback.kind == ChangeKind.NEW_INSTANCE:
        return runs + 1
    if callback.kind == ChangeKind.NEW_CHILD_INSTANCE and callback.level == ResourceLevel.PATIENT:
        return max(0, runs - 1)
    return runs


def parents_of(batch: Sequence[Callback], runs: int) -> tuple[dict[str, dict[str, str]], int]:
    """Id → parents, as far as the runs of callbacks that new instances begin name them.

    A run counts only where no other transaction's cuts into it.

    :param runs: how many were not complete when the batch began.
    :return: and how many are not when it ends.
    """
    found: dict[str, dict[str, str]] = {}
    instance = ""
    above: dict[str, str] | None = None
    for callback in batch:
        before, runs = runs, running(runs, callback)
        if callback.kind == ChangeKind.NEW_INSTANCE:
            instance, above = callback.resource, {} if before == 0 else None
        elif callback.kind == ChangeKind.NEW_CHILD_INSTANCE and above is not None:
            above[callback.level_name] = callback.resource
            if callback.level == ResourceLevel.PATIENT:
                if len(above) == 3:
                    found[instance] = above
                    found[above["series"]] = {"study": above["study"], "patient": above["patient"]}
                    found[above["study"]] = {"patient": above["patient"]}
                above = None
    return found, runs


def children_first(batch: Sequence[Callback]) -> list[Callback]:
    """Put deletions that follow each other into the order in which SQLite tells them: instances, series, studies,
    patients. PostgreSQL tells the study first.
    """
    ordered: list[Callback] = []
    for deleted, group in groupby(batch, lambda callback: callback.kind == ChangeKind.DELETED):
        run = list(group)
        ordered += sorted(run, key=lambda callback: -callback.level) if deleted else run
    return ordered
