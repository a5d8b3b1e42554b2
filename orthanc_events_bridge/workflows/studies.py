"""What of a study's content is there now, since when, and how much there should be."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.workflows.asking import ask, moment, time_of
from orthanc_events_bridge.workflows.facts import Wanted, look

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Content:
    """A study's content.

    :ivar study: Orthanc's id.
    :ivar patient: Orthanc's id.
    :ivar uid: its Study Instance UID.
    :ivar instances: Orthanc's id of each instance → when it was stored, as Orthanc spells it.
    :ivar series: Orthanc's ids of the series that these are in.
    :ivar now: what Orthanc's clock says.
    """

    study: str
    patient: str
    uid: str
    instances: Mapping[str, str]
    series: frozenset[str]
    now: datetime

    @property
    def first(self) -> datetime:
        """When its first instance came."""
        return moment(min(self.instances.values()))

    @property
    def last(self) -> datetime:
        """When its last instance came."""
        return moment(max(self.instances.values()))

    @property
    def life(self) -> str:
        """The same for as long as the study is there: one that was deleted and has come again is another one."""
        return f"{self.study} {min(self.instances.values())}"

    @property
    def fingerprint(self) -> str:
        """The same for the same instances, each stored at the same time. It holds nothing of the patient."""
        return hashlib.sha256(json.dumps([self.study, sorted(self.instances.items())]).encode()).hexdigest()


async def content_of(orthanc: httpx.AsyncClient, study: str) -> Content:
    """Ask Orthanc for it.

    One question for all instances: 0.12 ms of Orthanc's time for each (1.10.1).

    :raises GoneError: there is no such study.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    itself: Mapping[str, Any] = (await ask(orthanc, f"/studies/{study}")).json()
    body = {"Resources": [study], "Level": "Instance", "Metadata": True}
    answer = await orthanc.post("/tools/bulk-content", json=body)
    found = [one for one in answer.raise_for_status().json() if one["Metadata"].get("ReceptionDate")]
    if not found:
        raise GoneError(f"Orthanc has no instance of /studies/{study} any more")
    now = await time_of(orthanc)
    return Content(
        study,
        str(itself["ParentPatient"]),
        str(itself["MainDicomTags"].get("StudyInstanceUID", "")),
        {str(one["ID"]): str(one["Metadata"]["ReceptionDate"]) for one in found},
        frozenset(str(one["ParentSeries"]) for one in found),
        now,
    )


def quiet_for(since: datetime, now: datetime) -> float:
    """Seconds that have certainly passed: both times are cut to whole seconds."""
    return max(0.0, (now - since).total_seconds() - 1.0)


async def expected_of(
    orthanc: httpx.AsyncClient, content: Content, *, tag: str | None, modality: str | None
) -> int | None:
    """How many instances the study should have: by a tag in its images, or by what a modality answers to C-FIND.

    :return: none where nothing says so now.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    if tag is not None:
        values = (await look(orthanc, "study", content.study, Wanted(frozenset({tag})))).values("tag", tag)
        return max((int(value) for value in values if re.fullmatch(r"\s*[0-9]+\s*", value)), default=None)
    counted = "NumberOfStudyRelatedInstances"
    query = {"Level": "Study", "Query": {"StudyInstanceUID": content.uid, counted: ""}}
    answer = await orthanc.post(f"/modalities/{modality}/query", json=query)
    if answer.status_code >= 400:
        log.warning("the modality %s can't be asked for its studies: Orthanc answers %d", modality, answer.status_code)
        return None
    rows = (await ask(orthanc, f"{answer.json()['Path']}/answers?expand&simplify")).json()
    return max((int(row[counted]) for row in rows if str(row.get(counted, "")).strip().isdecimal()), default=None)
