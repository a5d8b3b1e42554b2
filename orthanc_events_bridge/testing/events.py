"""Events for tests: made by the bridge's own mapping, so that a test gets what a broker brings."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from orthanc_events_bridge.consumers.event import Event, read
from orthanc_events_bridge.consumers.publishing import derive
from orthanc_events_bridge.events.samples import AT, RECORDER, SOURCE, message, orthanc_id
from orthanc_events_bridge.transports.base import Incoming, Outgoing

__all__ = ["AT", "RECORDER", "SOURCE", "derived", "event", "orthanc_id"]


def event(
    name: str,
    *,
    patient: str | None = None,
    study: str | None = None,
    series: str | None = None,
    instance: str | None = None,
    job_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    job: Mapping[str, Any] | None = None,
    parents: bool = True,
    inferred: bool = False,
    number: int = 1,
    at: datetime = AT,
    source: str = SOURCE,
) -> Event:
    """An event as a handler gets it. Equal arguments give equal events, their ids too.

    ::

        event("study.stable", study="study-1", tags={"Modality": "MR"})
        event("job.failed", job={"type": "DicomModalityStore", "remoteAet": "PACS"})

    :param name: the type without prefix and version (docs/events.md).
    :param patient: with `study`, `series` and `instance`: Orthanc's ids of what has changed and of what is above it;
        any text. Those that are left out are `orthanc_id` of their level:
        ``event("series.stable").study_id == orthanc_id("study")``.
    :param job_id: Orthanc's id of the job, where it is about one.
    :param tags: as if they were allow-listed.
    :param metadata: the same.
    :param job: what was captured of the job (docs/events.md), under the names that events have.
    :param parents: False: they are not known, as with the deletion of something that was never seen.
    :param inferred: Orthanc did not say so itself.
    :param number: its place in the outbox and in Orthanc's log. Events that differ in nothing else are two with two
        numbers.
    :param at: when it happened, with a time zone.
    :param source: which Orthanc it comes from.
    :raises BridgeError: there is no such type, or something is given that no event of that type has.
    """
    given = {"patient": patient, "study": study, "series": series, "instance": instance}
    sent = message(
        name,
        given,
        job_id=job_id,
        tags=tags,
        metadata=metadata,
        job=job,
        parents=parents,
        inferred=inferred,
        number=number,
        at=at,
        source=source,
    )
    return received(sent)


def derived(
    name: str,
    data: Mapping[str, Any],
    *,
    cause: Event,
    producer: str = "derive",
    of: str | None = None,
    linked: bool = True,
    at: datetime = AT,
) -> Event:
    """An event as `Consumer.publish` makes it, as a handler of another consumer gets it.

    ::

        ready = {"rule": "mr", "complete": True, "series": 2, "instances": 40}
        derived("study.ready", ready, cause=event("study.stable", study="study-1"))

    :param name: its type, as `Consumer.publish` takes it; so are `data`, `cause`, `of` and `linked`.
    :param producer: the name of the consumer that publishes it.
    :param at: when it is published, with a time zone.
    :raises BridgeError: there can be no such event.
    """
    sent = derive(name, data, cause, producer=producer, now=at.timestamp(), of=of, linked=linked)
    return received(sent)


def received(sent: Outgoing) -> Event:
    """What was sent, as a handler gets it."""
    return read(Incoming(sent.address, sent.body, {"content-type": sent.content_type}))
