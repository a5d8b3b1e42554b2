"""What was made of DICOM files is put into Orthanc: remembered before that, and noted as done behind it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.workflows.memory import Kind, Memory

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

#: So many instances between two notes that they are in Orthanc.
_NOTE: Final = 50


class Above(NamedTuple):
    """Orthanc's ids of what an instance is in.

    :ivar study: of its study.
    :ivar patient: of its patient.
    """

    study: str
    patient: str


class Batch:
    """Puts what was made into Orthanc, remembered before, and noted as done behind it: the last only by `end`, when the
    audit has it.

    :ivar count: of what was put there.
    """

    def __init__(self, memory: Memory, orthanc: httpx.AsyncClient, kind: Kind, project: str) -> None:
        self._memory = memory
        self._orthanc = orthanc
        self._kind: Kind = kind
        self._project = project
        self._known: set[str] = set()
        self._there: list[str] = []
        self.count = 0
        self.series: dict[str, Above] = {}

    @property
    def studies(self) -> list[Above]:
        """What is above them, each once."""
        return list(dict.fromkeys(self.series.values()))

    async def put(self, study: str, uid: str, content: bytes, uids: Mapping[str, str]) -> None:
        """Put one there; one that is there already changes nothing.

        :param study: the UID of the pseudonymised study that it is of, or a result for.
        :param uid: its own.
        :param uids: originals by what stands for them in it.
        :raises OrthancError: Orthanc has not stored it.
        """
        if len(self._there) >= _NOTE:
            log.info("%d instances %s so far", self.count, self._kind)
            await self.end()
        new = {one: original for one, original in uids.items() if one not in self._known}
        await self._memory.begin(study, uid, self._kind, self._project, new)
        self._known.update(new)
        answer = await self._orthanc.post("/instances", content=content, headers={"Content-Type": "application/dicom"})
        stored = answer.json() if answer.status_code < 400 else {}
        if stored.get("Status") not in ("Success", "AlreadyStored"):
            raise OrthancError(
                f"Orthanc answers {answer.status_code} to what was made, and has not stored it", "see its log"
            )
        self.count += 1
        self.series[str(stored["ParentSeries"])] = Above(str(stored["ParentStudy"]), str(stored["ParentPatient"]))
        self._there.append(uid)

    async def end(self) -> None:
        """Note what is there."""
        there, self._there = self._there, []
        await self._memory.finish(there)
