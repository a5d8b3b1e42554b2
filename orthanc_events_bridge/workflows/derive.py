"""Tells when studies are ready, and when more has come to them (docs/consumers/derived-events.md).

Whatever makes it look at a study (it was created, it has become stable), all that counts is what Orthanc has at that
moment; nothing is kept of earlier looks. What is not ready is looked at again when it can be, by `Retry`: the broker
keeps the time. The store notes what was told: of each study that it was ready, and of each content that it was told,
so that every event is told once, by whichever worker. Where a worker dies between telling and noting, the event comes
again with the same id.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Retry
from orthanc_events_bridge.consumers.settings import ConsumerName, ConsumerSettings
from orthanc_events_bridge.errors import BridgeError, GoneError
from orthanc_events_bridge.values import Duration, Options, Place, mistake
from orthanc_events_bridge.workflows.conditions import Keyword, Verdict, When, judge
from orthanc_events_bridge.workflows.destinations import Symbol
from orthanc_events_bridge.workflows.facts import Wanted, look
from orthanc_events_bridge.workflows.keywords import odd
from orthanc_events_bridge.workflows.program import Program
from orthanc_events_bridge.workflows.rules import Conditional, RuleName, named_twice, wanted_by
from orthanc_events_bridge.workflows.studies import Content, content_of, expected_of, quiet_for

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

#: Seconds between two questions to a modality that does not say how many instances a study has.
_ASK_AGAIN: Final = 60.0
#: Seconds behind which another worker tells what one that died was telling: that takes moments.
_LEASE: Final = 10.0


class Count(Options):
    """How it is known how many instances a study has: by a `tag`, or from a `modality`."""

    tag: Keyword | None = Field(
        default=None,
        description="A DICOM attribute's keyword, in the images, where a modality writes it: the largest value counts.",
        examples=["NumberOfStudyRelatedInstances"],
    )
    modality: Symbol | None = Field(
        default=None,
        description="A modality by its name in Orthanc's `DicomModalities`, which is asked by C-FIND: commonly the "
        "PACS that the study is moved from.",
        examples=["pacs"],
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Exactly one."""
        if len(given) != 1:
            yield (), mistake("it has to be known in one way", "write one of tag, modality")


class Rule(Conditional):
    """One rule: what it is for, and when that is ready."""

    name: RuleName = Field(description="For the event, for `--explain`, and for people.", examples=["mr-brain"])
    quiet: Annotated[float, Duration(minimum=1, maximum=86400)] = Field(
        default=60.0, description="For so long no instance must have come.", examples=["2m"]
    )
    series: dict[str, When] = Field(
        default_factory=dict,
        description="Series that must be there, by names of your own: of each the conditions that one series has to "
        "meet.",
        examples=[{"t1": {"tag": "SeriesDescription", "glob": "*T1*"}}],
    )
    instances: Count | None = Field(default=None, description="How it is known how many instances there must be.")
    deadline: Annotated[float, Duration(minimum=1, maximum=30 * 86400)] = Field(
        default=3600.0,
        description="So long after its first instance a study is told ready in any case, with what is missing.",
        examples=["1h"],
    )


class DeriveSettings(ConsumerSettings):
    """The file of `derive`: the options of every consumer, and these."""

    name: ConsumerName = Field(default="derive", description="Of the consumer.")
    rules: tuple[Rule, ...] = Field(
        min_length=1, description="When studies are ready, from the top: the first rule that fits a study counts."
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Names that are there twice; what can't wait."""
        yield from super().contradictions()
        yield from self.without_store("what has been told")
        yield from named_twice(self.rules)
        for number, rule in enumerate(self.rules):
            if rule.quiet > rule.deadline:
                options: tuple[Place, ...] = (("rules", number, "quiet"), ("rules", number, "deadline"))
                yield (
                    ("rules", number, "deadline"),
                    mistake("{1} is shorter than {0}", "give a longer deadline", options=options),
                )
        if self.ordered:
            yield ("ordered",), mistake("would hold up all others while a study is waited for", "leave it out")


class Finding:
    """What a rule says of a study as it is now.

    :ivar content: what is there.
    :ivar rule: the first that fits; none where none does.
    :ivar verdicts: of each rule that was asked.
    :ivar missing: as the event says it.
    :ivar expected: instances, where that is known.
    :ivar wait: seconds until it can be quiet; 0: it is.
    :ivar left: seconds until the deadline is over; 0: it is.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self.rule: Rule | None = None
        self.verdicts: list[tuple[Rule, Verdict]] = []
        self.missing: dict[str, Any] = {}
        self.expected: int | None = None
        self.wait = 0.0
        self.left = 0.0

    @property
    def due(self) -> float:
        """Seconds until it is worth another look; 0: it is to be told now."""
        if not self.missing or not self.left:
            return 0.0
        if self.wait:
            return min(self.wait, self.left)
        return min(_ASK_AGAIN, self.left) if self._asks else self.left

    @property
    def _asks(self) -> bool:
        """Whether the answer can be another one though no image comes."""
        return self.rule is not None and self.rule.instances is not None and self.rule.instances.modality is not None

    def data(self) -> dict[str, Any]:
        """What the event says."""
        assert self.rule is not None
        found: dict[str, Any] = {
            "level": "study",
            "id": self.content.study,
            "parents": {"patient": self.content.patient},
            "rule": self.rule.name,
            "complete": not self.missing,
            "series": len(self.content.series),
            "instances": len(self.content.instances),
        }
        found |= {"missing": self.missing} if self.missing else {}
        return found | ({"expected": self.expected} if self.expected is not None else {})


class Deriver(Program):
    """The consumer of one configuration.

    :param configuration: of which the settings are `DeriveSettings`.
    :param dry: it says what it would tell, and tells nothing.
    :raises BridgeError: it can't be.
    """

    def __init__(self, configuration: Configuration[DeriveSettings], *, dry: bool = False) -> None:
        settings = configuration.settings
        self.rules, self._dry = settings.rules, dry
        if dry:
            configuration = configuration.for_dry_run()
        # Waiting is an attempt like any other, and a study can be waited for until its deadline.
        longest = max(rule.deadline for rule in self.rules)
        age = settings.retry.max_age + longest if settings.retry.max_age else 0.0
        retry = settings.retry.model_copy(update={"max_attempts": 0, "max_age": age})
        self.app = Consumer.configured(configuration.with_settings(retry=retry))
        self._wanted = wanted_by(self.rules)
        self._of_series = Wanted.by(
            condition for rule in self.rules for conditions in rule.series.values() for condition in conditions
        )
        self.app.on("study.created", "study.stable")(self._look)

    async def _look(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        if event.study_id is None:
            return
        try:
            finding = await self.find(orthanc, event.study_id, event.time)
        except GoneError as error:
            log.info("%r: %s: nothing is told", event, error.message)
            return
        if finding.rule is None:
            log.info("%r: no rule fits", event)
            return
        if self._dry:
            if finding.due:
                raise Retry(after=finding.due)
            log.info("%r: it would be told, by rule %s: %s", event, finding.rule.name, finding.missing or "complete")
            return
        await self._tell(event, finding)

    async def _tell(self, event: Event, finding: Finding) -> None:
        life, content = finding.content.life, finding.content.fingerprint
        async with self.app.once(event, "ready", of=life, lease=_LEASE) as first:
            if first:
                if finding.due:
                    raise Retry(after=finding.due)
                identifier = await self.app.publish("study.ready", finding.data(), cause=event, of=content)
                # Noted before `ready` is: who dies in between tells the same once more, and not that it was updated.
                async with self.app.once(event, "told", of=content, lease=_LEASE):
                    log.info("%r: told ready by rule %s, event %s", event, _name(finding), identifier)
                return
        if finding.wait:
            raise Retry(after=finding.wait)
        async with self.app.once(event, "told", of=content, lease=_LEASE) as new:
            if new:
                identifier = await self.app.publish("study.updated", finding.data(), cause=event, of=content)
                log.info("%r: told updated by rule %s, event %s", event, _name(finding), identifier)

    async def find(self, orthanc: httpx.AsyncClient, study: str, since: datetime | None = None) -> Finding:
        """Look at a study as it is now.

        :param since: when what happened makes us look: to what comes late to an old study, its deadline is no reason
            not to wait until it is quiet.
        :raises GoneError: there is none.
        :raises httpx.HTTPError: Orthanc doesn't answer.
        """
        resource = await look(orthanc, "study", study, self._wanted)
        finding = Finding(await content_of(orthanc, study))
        for rule in self.rules:
            verdict = rule.judge(resource)
            finding.verdicts.append((rule, verdict))
            if verdict.true:
                finding.rule = rule
                break
        if (rule_found := finding.rule) is None:
            return finding
        finding.wait = max(0.0, rule_found.quiet - quiet_for(finding.content.last, finding.content.now))
        begun = finding.content.first
        if finding.wait and since is not None:
            begun = max(begun, since)
        finding.left = max(0.0, rule_found.deadline - quiet_for(begun, finding.content.now))
        finding.missing |= {"quiet": True} if finding.wait else {}
        await self._series(orthanc, rule_found, finding)
        await self._count(orthanc, rule_found, finding)
        return finding

    async def _series(self, orthanc: httpx.AsyncClient, rule: Rule, finding: Finding) -> None:
        left = dict(rule.series)
        for identifier in sorted(finding.content.series) if left else ():
            try:
                one = await look(orthanc, "series", identifier, self._of_series)
            except GoneError:  # meanwhile
                continue
            for name in [name for name, conditions in left.items() if judge(conditions, one).true]:
                del left[name]
        finding.missing |= {"series": list(left)} if left else {}

    async def _count(self, orthanc: httpx.AsyncClient, rule: Rule, finding: Finding) -> None:
        if rule.instances is None:
            return
        finding.expected = await expected_of(
            orthanc, finding.content, tag=rule.instances.tag, modality=rule.instances.modality
        )
        if finding.expected is None:
            finding.missing["count"] = True
        elif finding.expected > len(finding.content.instances):
            finding.missing["instances"] = finding.expected - len(finding.content.instances)

    # What the command uses.

    async def check(self) -> list[str]:
        """Look at everything, and leave again.

        :return: what was found, in a few lines.
        :raises BridgeError: something can't be used.
        """
        found = await self.app.check(store=True)
        wanted = {rule.instances.modality for rule in self.rules if rule.instances and rule.instances.modality}
        async with self.app.asking() as orthanc:
            known = (await orthanc.get("/modalities")).raise_for_status().json() if wanted else []
        for modality in sorted(wanted - set(known)):
            raise BridgeError(
                f"Orthanc knows no modality {modality}", f"add the modality {modality} to Orthanc's DicomModalities"
            )
        counts = {rule.instances.tag for rule in self.rules if rule.instances and rule.instances.tag}
        found += odd(self._wanted.tags | self._of_series.tags | counts)
        return [*found, *(f"modality {modality}: known to Orthanc" for modality in sorted(wanted))]


def _name(finding: Finding) -> str:
    return finding.rule.name if finding.rule is not None else ""
