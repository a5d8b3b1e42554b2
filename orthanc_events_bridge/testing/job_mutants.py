"""Protections of the job retry, switched off on purpose, to show that the tests would notice.

Test-only. ``python -m orthanc_events_bridge.testing.job_mutants NAME retry-jobs …`` is the command without one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.effects import Effects
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Retry
from orthanc_events_bridge.testing.mutated import run
from orthanc_events_bridge.workflows import job_again, job_retry
from orthanc_events_bridge.workflows.job_progress import Progress

if TYPE_CHECKING:
    import httpx


def _looking_at_nothing_else() -> None:
    """A failure is answered whatever has come of the same thing since."""
    compare = Progress.compare
    Progress.compare = lambda self, event: min(0, compare(self, event))  # type: ignore[method-assign]

    async def none(orthanc: httpx.AsyncClient) -> list[Mapping[str, Any]]:
        return []

    job_again.all_jobs = none  # type: ignore[attr-defined]


def _counting_in_memory() -> None:
    """Each worker counts the failures that it has seen itself."""
    noted: dict[str, str] = {}

    async def recall(self: Effects, name: str) -> str | None:
        return noted.get(name)

    async def swap(self: Effects, name: str, old: str | None, new: str, keep: float = 0) -> bool:
        noted[name] = new
        return True

    Effects.recall = recall  # type: ignore[method-assign]
    Effects.swap = swap  # type: ignore[method-assign]


def _not_looking_again() -> None:
    """What was submitted again is done with at once."""
    failed = job_retry.JobRetry.failed

    async def failed_and_done(self: job_retry.JobRetry, event: Event, orthanc: httpx.AsyncClient) -> None:
        try:
            await failed(self, event, orthanc)
        except Retry as retry:
            if retry.after != job_retry.WRITTEN:
                raise

    job_retry.JobRetry.failed = failed_and_done  # type: ignore[method-assign]


#: Those of the command.
MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "later": _looking_at_nothing_else,
    "counts": _counting_in_memory,
    "again": _not_looking_again,
}


if __name__ == "__main__":
    run(MUTANTS)
