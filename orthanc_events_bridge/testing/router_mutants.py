"""Protections of the router, switched off on purpose, to show that the tests would notice.

Test-only: ``python -m orthanc_events_bridge.testing.router_mutants NAME,… route …`` is ``orthanc-events route …``
without what these names stand for.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from orthanc_events_bridge.consumers import Consumer
from orthanc_events_bridge.testing.mutated import run
from orthanc_events_bridge.workflows import jobs
from orthanc_events_bridge.workflows.destinations import Sender


def _without_memory() -> None:
    """What was sent is forgotten."""

    @contextlib.asynccontextmanager
    async def always(*_: object, **__: object) -> AsyncGenerator[bool]:
        yield True

    Consumer.once = always  # type: ignore[assignment, method-assign]


def _without_waiting() -> None:
    """A job that a worker has left behind is not known again: another one is submitted."""

    async def nothing(*_: object) -> None:
        """It is never the job that is looked for."""

    jobs._submitted = nothing  # type: ignore[assignment]


def _without_sources() -> None:
    """Where something has come from is not looked at."""

    async def never(*_: object) -> bool:
        return False

    Sender.is_source = never  # type: ignore[assignment]


#: Those of a router's process.
MUTANTS: Final[dict[str, Callable[[], Any]]] = {
    "sent": _without_memory,
    "left": _without_waiting,
    "source": _without_sources,
}

if __name__ == "__main__":
    run(MUTANTS)
