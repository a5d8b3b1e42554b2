"""How Orthanc is asked, and what it means that it doesn't give what it is asked for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orthanc_events_bridge.errors import GoneError, LogUnavailableError
from orthanc_events_bridge.events.mapping import SUBJECTS

if TYPE_CHECKING:
    import httpx


async def ask(orthanc: httpx.AsyncClient, path: str) -> httpx.Response:
    """The answer to a GET.

    :raises GoneError: there is no such thing.
    :raises LogUnavailableError: it can't be had now.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    answer = await orthanc.get(path)
    if answer.status_code == 404:
        raise GoneError(f"Orthanc has no {path}")
    if answer.status_code >= 400:
        raise LogUnavailableError(f"Orthanc answers {answer.status_code} to GET {path}")
    return answer


def moment(text: str) -> datetime:
    """A time as Orthanc spells it: UTC, whole seconds."""
    return datetime.strptime(text.strip()[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)


async def time_of(orthanc: httpx.AsyncClient) -> datetime:
    """What Orthanc's clock says, in whole seconds.

    :raises BridgeError: see `ask`.
    """
    return moment((await ask(orthanc, "/tools/now")).text)


async def file_of(orthanc: httpx.AsyncClient, instance: str) -> bytes | None:
    """An instance's file; none where it was deleted meanwhile."""
    try:
        return (await ask(orthanc, f"/instances/{instance}/file")).content
    except GoneError:
        return None


async def instances_of(orthanc: httpx.AsyncClient, level: str, identifier: str) -> dict[str, str]:
    """Orthanc's ids of the instances of a study or series, by their UIDs."""
    found = (await ask(orthanc, f"/{SUBJECTS[level]}/{identifier}/instances")).json()
    return {str(one["MainDicomTags"]["SOPInstanceUID"]): str(one["ID"]) for one in found}
