"""Orthanc's jobs, submitted and waited for. What a worker that died had submitted is waited for by the next.

Orthanc keeps jobs over its restarts, those that are over only as many as ``JobsHistorySize`` says (10).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.errors import BridgeError, GoneError
from orthanc_events_bridge.workflows.asking import ask

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

#: Seconds between two looks at a job: the first, and the most.
_SOON: Final = 0.1
_LATE: Final = 5.0


class JobError(BridgeError):
    """A job has failed, or can't be followed."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as it is to be submitted.

    :ivar path: where.
    :ivar body: what; that it is not to be waited for there is added.
    :ivar kind: Orthanc's ``Type`` of such a job.
    :ivar content: what such a job has in its ``Content``, by which it is known again; empty: it can't be.
    :ivar since: no earlier one counts; none: all do.
    """

    path: str
    body: Mapping[str, Any]
    kind: str
    content: Mapping[str, Any] = field(default_factory=dict)
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """By what a job is known again that can't be by its content.

    :ivar job: the id of one that was submitted for this before; empty: none was.
    :ivar note: keeps the id of one as soon as it is submitted.
    """

    job: str
    note: Callable[[str], Awaitable[None]]


async def run_job(
    orthanc: httpx.AsyncClient, submission: Submission, deadline: float, left: Left | None = None
) -> Mapping[str, Any]:
    """Have a job done, once: one that somebody has submitted already, and that has not failed, is waited for.

    :param deadline: seconds that it may take.
    :param left: what is known of earlier ones.
    :return: the job, as Orthanc describes it.
    :raises JobError: it has failed, or has taken too long.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    job = await _submitted(orthanc, submission) or (await _known(orthanc, left.job) if left else None)
    if job is None:
        identifier = await submit(orthanc, submission)
        if left is not None:
            await left.note(identifier)
    else:
        identifier = str(job["ID"])
        log.info("job %s was submitted already: it is waited for", identifier)
    try:
        async with asyncio.timeout(deadline):
            return await _end(orthanc, identifier)
    except TimeoutError:
        raise JobError(
            f"job {identifier} of type {submission.kind} has not ended in {deadline:g} s",
            "look at it in Orthanc: it goes on there; raise `timeout` where it needs longer",
        ) from None


async def submit(orthanc: httpx.AsyncClient, submission: Submission) -> str:
    """Submit a job, and don't wait for it.

    :return: its id.
    :raises BridgeError: Orthanc refuses it.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    body = {**submission.body, "Asynchronous": True, "Synchronous": False}
    answer = await orthanc.post(submission.path, json=body)
    if answer.status_code >= 400:
        raise _refused(submission, answer)
    return str(answer.json()["ID"])


async def resubmit(orthanc: httpx.AsyncClient, identifier: str) -> None:
    """Submit a failed job again, under its id.

    :raises JobError: Orthanc refuses it: it has not failed, or is forgotten.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    path = f"/jobs/{identifier}/resubmit"
    answer = await orthanc.post(path, content="{}")
    if answer.status_code >= 400:
        raise JobError(f"Orthanc answers {answer.status_code} to POST {path}", "look at the job there, and at its log")


async def all_jobs(orthanc: httpx.AsyncClient) -> list[Mapping[str, Any]]:
    """All jobs that Orthanc still knows.

    :raises BridgeError: it can't say.
    """
    return list((await ask(orthanc, "/jobs?expand")).json())


def error_of(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """The code and the text of a failed job's error; none where Orthanc says none. Of a plugin's job they are in its
    content. Not the details: what a remote says can hold anything."""
    content = job.get("Content") or {}
    code = content.get("FunctionErrorCode", job.get("ErrorCode"))
    return code, content.get("FunctionErrorDescription", job.get("ErrorDescription"))


async def _submitted(orthanc: httpx.AsyncClient, submission: Submission) -> Mapping[str, Any] | None:
    if not submission.content:
        return None
    for job in await all_jobs(orthanc):
        content = job.get("Content", {})
        if (
            job.get("Type") == submission.kind
            and job.get("State") != "Failure"
            and all(content.get(name) == value for name, value in submission.content.items())
            and (submission.since is None or _created(job) >= submission.since.replace(microsecond=0))
        ):
            return dict(job)
    return None


async def _known(orthanc: httpx.AsyncClient, identifier: str) -> Mapping[str, Any] | None:
    """A job that has not failed, and that Orthanc has not forgotten."""
    if not identifier:
        return None
    try:
        job: Mapping[str, Any] = (await ask(orthanc, f"/jobs/{identifier}")).json()
    except GoneError:
        return None
    return None if job.get("State") == "Failure" else job


def _created(job: Mapping[str, Any]) -> datetime:
    try:
        return datetime.strptime(str(job.get("CreationTime", "")), "%Y%m%dT%H%M%S.%f").replace(tzinfo=UTC)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


async def _end(orthanc: httpx.AsyncClient, identifier: str) -> Mapping[str, Any]:
    wait = _SOON
    while True:
        job: Mapping[str, Any] = (await ask(orthanc, f"/jobs/{identifier}")).json()
        if job.get("State") == "Success":
            return job
        if job.get("State") == "Failure":
            code, text = error_of(job)
            raise JobError(
                f"job {identifier} has failed: {text or 'no reason given'} ({code or '?'})", "see Orthanc's log"
            )
        await asyncio.sleep(wait)
        wait = min(wait * 1.5, _LATE)


def _refused(submission: Submission, answer: httpx.Response) -> BridgeError:
    if answer.status_code == 404:
        return GoneError(f"Orthanc answers 404 to POST {submission.path}: the resource is gone, or the name is unknown")
    return JobError(
        f"Orthanc answers {answer.status_code} to POST {submission.path}", "see its log; check the name and its rights"
    )
