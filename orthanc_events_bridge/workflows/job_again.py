"""What a job of Orthanc's does, as far as it says so; what has become of that since; and how one that Orthanc has
forgotten is made again.

Jobs that send to a modality say its AET and what they send, those to a peer its URL and the same. A STOW-RS job of
the DICOMweb plugin says neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Reject
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.workflows.asking import ask
from orthanc_events_bridge.workflows.jobs import Submission, all_jobs

if TYPE_CHECKING:
    import httpx

MODALITY: Final = "DicomModalityStore"
PEER: Final = "OrthancPeerStore"
STOW: Final = "DicomWebStowClient"
_LEVELS: Final = ("studies", "series", "instances", "patients")


def does(job: Mapping[str, Any]) -> str | None:
    """What a job does: its type, destination and resources, for comparing; none where it doesn't say these."""
    place, resources = _place(job), job.get("parentResources")
    return json.dumps([job.get("type"), place, sorted(resources)]) if place and resources else None


async def names(orthanc: httpx.AsyncClient, job: Mapping[str, Any]) -> list[str]:
    """Orthanc's names of the modalities, or peers, that a job may have sent to. Several: it can't be known which.

    :raises BridgeError: Orthanc can't say.
    """
    place, kind = _place(job), _plural(job)
    known: Mapping[str, Mapping[str, Any]] = (await ask(orthanc, f"/{kind}?expand")).json()
    return sorted(name for name, one in known.items() if place == _place_of(kind, one))


class Since(NamedTuple):
    """What has become of a failure, by us or others.

    :ivar runs: it is being done, or will be.
    """

    text: str
    runs: bool


async def since_then(
    event: Event, job: Mapping[str, Any] | None, same: str | None, orthanc: httpx.AsyncClient
) -> Since | None:
    """Whether somebody has taken care of it: we, before we were killed; an operator; or who submitted it.

    Of two failures the later one counts, as in `job_progress`: so there is always one that nobody has.
    """
    created, ended = str(event.job.get("created", "")), str(event.job.get("completed", ""))
    if job is not None:
        if job.get("State") != "Failure":
            return Since(f"the job is {job.get('State')}", _runs(job))
        # An earlier time: Orthanc was killed, and knows of its last failure no more.
        if str(job.get("CompletionTime", "")) > ended:
            return Since("the job has failed again since, or was cancelled", runs=False)
    for other in () if same is None else await all_jobs(orthanc):
        later = str(other.get("CreationTime", "")) > created and (
            other.get("State") != "Failure" or str(other.get("CompletionTime", "")) > ended
        )
        if later and other.get("ID") != event.job_id and does(_snapshot(other)) == same:
            return Since(f"job {other.get('ID')} has taken its place", _runs(other))
    return None


async def again(orthanc: httpx.AsyncClient, event: Event) -> Submission:
    """The job as it is to be made again.

    :raises Reject: it doesn't say what it was, or Orthanc knows its destination or resources no more.
    :raises BridgeError: Orthanc can't say.
    """
    job = event.job
    if does(job) is None:
        raise Reject(
            f"Orthanc has forgotten the job, and a job of type {job.get('type')} does not say what it sent where: send"
            f" it again by hand, and raise JobsHistorySize there; error {job.get('errorCode', 'unknown')}"
        )
    kind, found = _plural(job), await names(orthanc, job)
    if len(found) != 1:
        known = f"knows {len(found)} of" if found else "has none of"
        raise Reject(f"Orthanc has forgotten the job, and {known} its {kind} at {_place(job)}: send it again by hand")
    resources = [str(one) for one in job["parentResources"]]
    gone = [one for one in resources if not await _exists(orthanc, one)]
    if gone:
        raise Reject(f"Orthanc has forgotten the job, and {len(gone)} of {len(resources)} that it sent are deleted")
    body: dict[str, Any] = {"Resources": resources}
    if kind == "modalities" and job.get("localAet"):
        body["LocalAet"] = job["localAet"]
    return Submission(f"/{kind}/{found[0]}/store", body, str(job["type"]))


def _snapshot(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a job as Orthanc describes it, what an event says of it."""
    from orthanc_events_bridge.plugin.lookup import job_snapshot

    return job_snapshot(job)


def _runs(job: Mapping[str, Any]) -> bool:
    return job.get("State") not in ("Success", "Failure")


def _plural(job: Mapping[str, Any]) -> str:
    return "modalities" if job.get("type") == MODALITY else "peers"


def _place(job: Mapping[str, Any]) -> str | None:
    if job.get("type") == MODALITY:
        return job.get("remoteAet")
    return str(job.get("peer") or "").rstrip("/") or None if job.get("type") == PEER else None


def _place_of(kind: str, one: Mapping[str, Any]) -> str:
    from orthanc_events_bridge.plugin.lookup import without_user

    return str(one.get("AET")) if kind == "modalities" else without_user(str(one.get("Url"))).rstrip("/")


async def _exists(orthanc: httpx.AsyncClient, resource: str) -> bool:
    """Whether there is something of this id, of whatever level.

    :raises BridgeError: Orthanc can't say.
    """
    for level in _LEVELS:
        try:
            await ask(orthanc, f"/{level}/{resource}")
        except GoneError:
            continue
        return True
    return False
