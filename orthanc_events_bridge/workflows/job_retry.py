"""Job retry: Orthanc's jobs that have failed are resubmitted, with growing waits (docs/consumers/job-retry.md).

A failure is an event. Each waits at the broker until it is due, and is then carried out once: the job is resubmitted
where Orthanc still has it, else made again from what the event says of it. When that fails too, there is another event.
How many there were is noted by what the job does (`job_progress`), which a job that is made again shares.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Reject, Retry, RetryPolicy
from orthanc_events_bridge.consumers.settings import ConsumerName, ConsumerSettings, RetrySettings
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.values import Duration, Options, Place, mistake
from orthanc_events_bridge.workflows.asking import ask, time_of
from orthanc_events_bridge.workflows.job_again import MODALITY, PEER, STOW, again, does, names, since_then
from orthanc_events_bridge.workflows.job_progress import Notes
from orthanc_events_bridge.workflows.jobs import error_of, resubmit, submit
from orthanc_events_bridge.workflows.program import Program

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

#: Orthanc's ``ErrorCode_CanceledJob``: somebody has cancelled it.
CANCELLED: Final = 37
#: Seconds from a submission on behind which Orthanc has surely written it down: it writes its jobs every 10 s, and its
#: index to the disk every 10 s. Killed before that, it knows nothing of it (docs/decisions/0015).
WRITTEN: Final = 30.0
#: Seconds between two looks at what has been submitted and goes on for long, at most.
_SELDOM: Final = 900.0
#: Seconds between two times that Orthanc's clock can tell.
_TICK: Final = 1.0
#: Seconds for which failures are remembered behind the last wait that there can be.
_KEEP: Final = 30 * 86400.0


class Resubmission(Options):
    """When, and how often, a failed job is submitted again."""

    attempts: int = Field(default=15, ge=1, le=100, description="So often; behind that it is a dead letter.")
    initial: Annotated[float, Duration(minimum=1)] = Field(
        default=60.0, description="The first wait, from the failure on. Each further one is twice as long."
    )
    maximum: Annotated[float, Duration(minimum=1, maximum=3 * 86400)] = Field(
        default=86400.0, description="The longest wait.", examples=["1d"]
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """The longest wait is not shorter than the first."""
        if self.maximum < self.initial:
            options: tuple[Place, ...] = (("maximum",), ("initial",))
            yield ("maximum",), mistake("{0} is shorter than {1}", "give at least as long a time", options=options)

    def wait(self, number: int) -> float:
        """Seconds behind a job's n-th failure, from 1."""
        return RetryPolicy(initial=self.initial, maximum=self.maximum, jitter=0).delay(number, lambda: 0.0)


class JobRetrySettings(ConsumerSettings):
    """The file of `orthanc-events retry-jobs`: the options of every consumer, and these."""

    name: ConsumerName = Field(default="job-retry", description="Of the consumer.")
    types: tuple[str, ...] = Field(
        default=(MODALITY, PEER, STOW),
        min_length=1,
        description="Orthanc's types of the jobs that are resubmitted.",
        examples=[[MODALITY]],
    )
    source: str | None = Field(
        default=None,
        min_length=1,
        description="Only what comes from the Orthanc that has this `source` in its bridge's configuration. Needed "
        "where several share the broker. Left out: from any.",
        examples=["https://pacs.example.org/orthanc/main"],
    )
    resubmit: Resubmission = Field(default_factory=Resubmission, description="When and how often.")
    # However long Orthanc is down, a failure is not given up for that within its age.
    retry: RetrySettings = Field(
        default_factory=lambda: RetrySettings(max_attempts=0),
        description="What becomes of a failure that could not be looked at, because Orthanc or the store is down. "
        "Left out: no limit of attempts, 7 days.",
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """No order: a failure waits for up to a day. It may not be given up for that; and it needs a store."""
        yield from super().contradictions()
        if 0 < self.retry.max_age <= self.resubmit.maximum:
            options: tuple[Place, ...] = (("retry", "max_age"), ("resubmit", "maximum"))
            yield ("retry", "max_age"), mistake("{0} is shorter than {1}", "give a longer time", options=options)
        if self.ordered:
            yield ("ordered",), mistake("would hold up all other jobs", "leave it out")
        yield from self.without_store("how often something has failed")


class JobRetry(Program):
    """The consumer of one configuration.

    :raises BridgeError: it can't be.
    """

    def __init__(self, configuration: Configuration[JobRetrySettings]) -> None:
        self.settings = configuration.settings
        self._rule = self.settings.resubmit
        waits = sum(self._rule.wait(number) for number in range(1, self._rule.attempts + 1))
        self.app = Consumer.configured(configuration)
        self._notes = Notes(self.app, waits + _KEEP)
        self.app.on("job.failed", where=self._concerns)(self.failed)
        self.app.on("job.succeeded", where=self._concerns)(self.succeeded)

    def _concerns(self, event: Event) -> bool:
        """One that Orthanc had forgotten before its data could be captured may be one of them."""
        ours = self.settings.source in (None, event.source)
        return ours and (not event.job or event.job.get("type") in self.settings.types)

    async def succeeded(self, event: Event) -> None:
        """What was counted for this is over, and so is what still waits for it."""
        what = does(event.job)
        names = [_name(event, what), _name(event, None)] if event.job else [await self._notes.submitted_for(event)]
        for name in names:
            if name is not None:
                await self._notes.over(name, event, only_counted=name != names[0])

    async def failed(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        """Wait until it is due, then submit it again; and look once more whether Orthanc still knows of that.

        :raises Retry: it is not due yet, or to be looked at once more.
        :raises Reject: it can't be submitted again, or not any more.
        """
        if not event.job:
            if not await self._notes.is_followed(event):
                raise Reject("Orthanc had forgotten the job before its data could be captured: raise JobsHistorySize")
            log.info("%r: forgotten by Orthanc, but for what it was submitted is known, and goes on", event)
            return
        same = await self._same(event, orthanc)
        name = _name(event, same)
        if event.job.get("errorCode") == CANCELLED:
            log.info("%r: it was cancelled, and stays so", event)
            await self._notes.over(name, event)
            return
        if event.operation == "redrive":  # somebody has mended what was wrong
            await self._notes.begin_anew(name, event)
        progress = await self._notes.failed(name, event)
        if progress.compare(event) > 0:
            outcome = "has failed" if progress.failures else "has succeeded, or was cancelled"
            log.info("%r: what it was to do %s since: nothing to do", event, outcome)
            return
        spent = progress.submitted >= self._rule.attempts and not progress.answered
        if not (spent or progress.answered or event.operation == "redrive"):
            await self._wait(event, progress.failures, orthanc)
        job = await _job(orthanc, event)
        since = await since_then(event, job, same, orthanc)
        if since is not None and progress.answered and since.runs:
            raise Retry(after=min(WRITTEN * event.attempt, _SELDOM))  # it may fail, and be forgotten untold
        if since is not None:
            log.info("%r: %s: nothing to do", event, since.text)
            return
        if progress.answered:
            log.warning("%r: nothing has come of its submission; once more", event)
            if job is None:  # it may have failed, untold
                progress = await self._notes.came_to_nothing(name, event)
                spent = progress.submitted >= self._rule.attempts
                if not spent:
                    await self._wait(event, progress.failures, orthanc)
        if spent:
            raise Reject(f"given up behind {self._rule.attempts} resubmissions: {_error(event, job)}")
        await self._submit(event, job, name, orthanc)
        raise Retry(after=WRITTEN)

    async def _same(self, event: Event, orthanc: httpx.AsyncClient) -> str | None:
        """What the job does, where Orthanc leaves no doubt about that: two modalities may have one AET."""
        if event.job.get("type") == MODALITY and len(await names(orthanc, event.job)) > 1:
            return None
        return does(event.job)

    async def _wait(self, event: Event, number: int, orthanc: httpx.AsyncClient) -> None:
        """By Orthanc's own clock, which the event's time is of.

        :raises Retry: it is not due yet.
        """
        if event.time is None:
            return
        now = await time_of(orthanc)
        wait = self._rule.wait(number)
        left = min(wait, wait - (now - event.time).total_seconds())  # and no longer, where that clock was set back
        if left > 0:
            log.info("%r: failure %d in a row, to be submitted again in %.0f s", event, number, left)
            raise Retry(after=max(left, _TICK))

    async def _submit(self, event: Event, job: Mapping[str, Any] | None, name: str, orthanc: httpx.AsyncClient) -> None:
        """Counted first: when its failure is told, that must be known."""
        if job is not None:
            await self._notes.answer(name, event)
            await self._notes.submitted(event, str(event.job_id), name)
            await resubmit(orthanc, str(event.job_id))
            log.info("%r: resubmitted", event)
            return
        if self.settings.source is None:
            await _check_recorder(orthanc, event)
        submission = await again(orthanc, event)
        await self._notes.answer(name, event)
        identifier = await submit(orthanc, submission)
        await self._notes.submitted(event, identifier, name)
        log.info("%r: made again as job %s", event, identifier)

    async def check(self) -> list[str]:
        """See `Consumer.check`."""
        rule, source = self._rule, self.settings.source
        text = f"{', '.join(self.settings.types)}: {rule.attempts} times, {rule.initial:g} to {rule.maximum:g} s apart"
        text += "" if source is None else f", of {source} alone"
        return [*await self.app.check(store=True), f"resubmits {text}"]


def _name(event: Event, same: str | None) -> str:
    """What it is counted under."""
    return hashlib.sha256(f"{event.source}\n{same or f'job {event.job_id}'}".encode()).hexdigest()


async def _job(orthanc: httpx.AsyncClient, event: Event) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = (await ask(orthanc, f"/jobs/{event.job_id}")).json()
    except GoneError:
        return None
    return found


async def _check_recorder(orthanc: httpx.AsyncClient, event: Event) -> None:
    """Is what Orthanc doesn't know its own? Its plugin says which outbox it records into.

    :raises Reject: no.
    """
    answer = await orthanc.get("/orthanc-events/status")
    if answer.status_code != 200:  # there is no plugin
        return
    recorder = answer.json().get("outbox", {}).get("recorder")
    if recorder not in (None, event.attributes.get("recorder")):
        raise Reject(
            f"the job is of another Orthanc ({event.source}), or of an outbox that was lost, and is not made again:"
            f" give each Orthanc a consumer of its own, with its `source`; then redrive"
        )


def _error(event: Event, job: Mapping[str, Any] | None) -> str:
    code, text = error_of(job or {})
    code = event.job.get("errorCode", "unknown") if code is None else code
    return f"error {code}, {text or 'which Orthanc has forgotten'}"
