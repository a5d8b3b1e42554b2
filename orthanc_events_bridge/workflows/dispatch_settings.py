"""The AI dispatch's file: which series, how they are pseudonymised, where they go, and where their results go.

The tables in ``docs/consumers/ai-dispatch.md`` and ``orthanc-dispatch.schema.json`` are generated from here
(``tools/generate_docs.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.consumers.settings import ConsumerName, OrthancBlock, RetrySettings
from orthanc_events_bridge.values import Duration, FileName, Options, Place, mistake
from orthanc_events_bridge.workflows.anonymizer_settings import Remembering, Secret, check_project
from orthanc_events_bridge.workflows.conditions import When
from orthanc_events_bridge.workflows.destinations import Destination
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.rules import Conditional, named_twice


class Rule(Conditional):
    """Which series go to the service."""


class Pseudonymisation(Secret):
    """How a series is pseudonymised before it leaves."""

    project: str = Field(
        default="ai", description="The project whose pseudonyms they are; a patient's begin with its name."
    )
    profile: Profile = Field(
        default_factory=Profile,
        description="What is kept and what not, as in [profiles](anonymizer.md#profiles). Left out: DICOM's basic "
        "profile.",
    )
    concurrency: int = Field(default=2, ge=1, le=256, description="How many series one worker is at, at a time.")
    retry: RetrySettings = Field(default_factory=RetrySettings, description="What becomes of what fails.")


class Service(Options):
    """The AI service: a DICOMweb server (`dicomweb`), or one that answers with the results (`answers`)."""

    dicomweb: str | None = Field(
        default=None,
        description="A server by its name in the configuration of Orthanc's DICOMweb plugin: a series is sent by "
        "STOW-RS, as a job, and the results come back into this Orthanc by themselves, by STOW-RS or C-STORE.",
        examples=["ai"],
    )
    answers: OrthancBlock | None = Field(
        default=None,
        description="A URL, or a block with TLS and login as for `orthanc`: a series is posted there as "
        "`multipart/related`, and the answer is the results.",
        examples=["https://ai.example.org/results"],
    )
    deadline: Annotated[float, Duration(minimum=1, maximum=30 * 86400)] = Field(
        default=3600.0,
        description="For so long behind sending, results are waited for; then the workflow is overdue, and a dead "
        "letter of `{name}-watch` says so.",
        examples=["1h"],
    )
    concurrency: int = Field(default=2, ge=1, le=256, description="How many series one worker sends at a time.")
    timeout: Annotated[float, Duration(minimum=1)] = Field(
        default=600.0, description="How long sending one series may take; with `answers`, its results included."
    )
    retry: RetrySettings = Field(
        default_factory=RetrySettings,
        description="What becomes of what could not be sent: it is tried again; then the workflow has failed, and a "
        "dead letter of `{name}-send` says why.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Exactly one way."""
        if ("dicomweb" in given) == ("answers" in given):
            yield (), mistake("how it is reached has to be said in one way", "give one of dicomweb, answers")


class Delivery(Options):
    """Where results go."""

    to: Destination = Field(
        description="Where to, when they are given back their patient: as the router's.",
        examples=[{"modality": "pacs"}],
    )
    expect: dict[str, When] = Field(
        default_factory=dict,
        description="Series of results that have to come, by names of your own: of each the conditions that one has "
        "to meet. Left out: one, whichever it is. What comes beside them is sent on too.",
        examples=[{"report": {"tag": "Modality", "is": "SR"}}],
    )


class DispatchSettings(Remembering):
    """The AI dispatch's file: the options of every consumer, and these."""

    name: ConsumerName = Field(
        default="dispatch", description="Of the consumer; its steps are `{name}-send` and so on."
    )
    concurrency: int = Field(default=4, ge=1, le=256, description="How many series one worker looks at, at a time.")
    rules: tuple[Rule, ...] = Field(
        min_length=1, description="Which series go to the service: those that any rule fits."
    )
    anonymize: Pseudonymisation = Field(default_factory=Pseudonymisation, description="How they are pseudonymised.")
    service: Service = Field(description="Where they are sent.", examples=[{"dicomweb": "ai"}])
    results: Delivery = Field(description="Where their results go.", examples=[{"to": {"modality": "pacs"}}])
    audit: FileName | None = Field(
        default=None,
        description="A file to which a line of JSON is appended for all that is done: what, where to, when, by which "
        "rule. Orthanc's ids of originals, no patient data. The log has the same lines.",
        examples=["/var/log/dispatch-audit.jsonl"],
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Names that can't be; what can't wait."""
        yield from super().contradictions()
        yield from named_twice(self.rules)
        yield from check_project(self.anonymize.project, ("anonymize", "project"))
        if self.ordered:
            yield ("ordered",), mistake("would hold up all others while a result is waited for", "leave it out")
