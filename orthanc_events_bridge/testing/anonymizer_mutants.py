"""Protections of the anonymizer, switched off on purpose, to show that the tests would notice.

Test-only: ``python -m orthanc_events_bridge.testing.anonymizer_mutants MUTANT anonymize --config …``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.testing.mutated import run
from orthanc_events_bridge.workflows import deidentify, dicom_files
from orthanc_events_bridge.workflows.batch import Batch
from orthanc_events_bridge.workflows.memory import Memory
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms

#: The variable that names the file by which workers know that one has died.
DIED: Final = "ANONYMIZER_DIED"


def _not_knowing_its_own() -> None:
    """What it has made it takes for any other study, and doesn't see its own marks."""

    async def nothing(*_: object) -> None:
        return None

    Memory.study = nothing  # type: ignore[method-assign, assignment]
    Memory.is_pseudonym = nothing  # type: ignore[method-assign, assignment]
    read = dicom_files.read

    def unmarked(content: bytes) -> Any:
        dataset = read(content)
        dataset.PatientIdentityRemoved = "NO"
        return dataset

    deidentify.read = unmarked  # type: ignore[attr-defined]


def _by_chance() -> None:
    """UIDs are new ones each time, as those of Orthanc's own anonymization are."""
    Pseudonyms.uid = lambda self, uid: f"2.25.{uuid.uuid4().int}"  # type: ignore[method-assign]


def _forgetting_results() -> None:
    """It is not remembered which instances are results that were given back."""
    made = Memory.made

    async def without(self: Memory, study: str, kind: Any) -> dict[str, bool]:
        return {} if kind == "result" else await made(self, study, kind)

    Memory.made = without  # type: ignore[method-assign]


def _die_once() -> None:
    mark = Path(os.environ[DIED])
    if not mark.exists():
        mark.touch()
        os._exit(9)


def _dying(*, remembered: bool) -> None:
    """The first of all workers dies as soon as Orthanc has an instance; see `DIED`.

    :param remembered: as it has to be; else it is remembered behind it, and not before.
    """
    put, begin = Batch.put, Memory.begin
    waiting: list[tuple[Any, ...]] = []

    async def later(self: Memory, *given: Any) -> None:
        waiting.append(given)

    async def dying(self: Batch, *given: Any) -> None:
        await put(self, *given)
        _die_once()
        for one in waiting:
            await begin(self._memory, *one)
        waiting.clear()

    Batch.put = dying  # type: ignore[method-assign, assignment]
    if not remembered:
        Memory.begin = later  # type: ignore[method-assign, assignment]


#: How each is switched off.
MUTANTS: Final[Mapping[str, Callable[[], None]]] = {
    "not knowing its own": _not_knowing_its_own,
    "by chance": _by_chance,
    "forgetting results": _forgetting_results,
    "remembering behind it": lambda: _dying(remembered=False),
    "only dying": lambda: _dying(remembered=True),
}

if __name__ == "__main__":
    run(MUTANTS)
