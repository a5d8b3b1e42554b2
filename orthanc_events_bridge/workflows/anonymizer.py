"""The anonymizer: pseudonymises what rules say, and gives results their patients back (docs/consumers/anonymizer.md).

A study that has become stable is one of three things. One that is *remembered* as pseudonymised: what is in it and was
not made here is a result, and is given back its patient. Another one of a *pseudonym*: so is that, if it refers to one
that is remembered. Any other: the rules are asked.

All that is made follows from the file, the profile and the secret: made twice, it is the same, and Orthanc has it once.
It is remembered before it is put into Orthanc: whatever dies in between, nothing that was made here is ever taken for
somebody else's. So nothing goes round in circles.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.leaving import logs, run_until_told
from orthanc_events_bridge.consumers.retry import Reject
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.workflows.anonymizer_settings import BASIC, AnonymizerSettings
from orthanc_events_bridge.workflows.asking import instances_of
from orthanc_events_bridge.workflows.audit import Audit
from orthanc_events_bridge.workflows.batch import Batch
from orthanc_events_bridge.workflows.facts import Resource, look
from orthanc_events_bridge.workflows.keywords import odd
from orthanc_events_bridge.workflows.memory import Memory, Remembered
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.program import Program
from orthanc_events_bridge.workflows.pseudonymous import (
    Maker,
    UnreadableResultError,
    belongs_to,
    check_secret,
    give_back_all,
    pseudonymise_all,
    tell_results,
    without_results,
)
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from orthanc_events_bridge.workflows.rules import Decision, wanted_by
from orthanc_events_bridge.workflows.telling import tell_anonymized
from orthanc_events_bridge.workflows.workflow import Workflows

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)


class Anonymizer(Program):
    """The consumer of one configuration.

    :param configuration: of which the settings are `AnonymizerSettings`.
    :param dry: it decides, and does nothing.
    :raises BridgeError: it can't be.
    """

    def __init__(self, configuration: Configuration[AnonymizerSettings], *, dry: bool = False) -> None:
        if dry:
            configuration = configuration.for_dry_run()
        self.settings = settings = configuration.settings
        self._dry = dry
        self._audit = Audit(settings.audit)
        self._wanted = wanted_by(settings.rules)
        assert settings.memory is not None  # `contradictions` says so
        self.memory = Memory(settings.memory)
        #: What an AI dispatch has in the same store.
        self._workflows = Workflows(settings.memory, settings.name)
        profiles = {BASIC: Profile(), **settings.profiles}
        self._makers = {
            name: Maker(name, profiles[one.profile], Pseudonyms(name, one.secret(name)))
            for name, one in settings.projects.items()
        }
        # What it remembers is no store of what is done once.
        self.app = Consumer.configured(configuration.with_settings(store=None, store_file=None))
        self.app.on(settings.event)(self._handle)

    async def _handle(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        if event.resource_id is None:
            return
        try:
            resource = await look(orthanc, event.level, event.resource_id, self._wanted)
            pseudonymous, study = await belongs_to(self.memory, orthanc, resource)
            if study is not None:
                await self._results(event, orthanc, resource, study)
            elif pseudonymous:
                log.info("%r: it is a pseudonym's, and refers to no study, or to several: nothing is done", event)
            else:
                resource, own = await without_results(self.memory, orthanc, resource, self._wanted)
                decision = Decision(self.settings.rules, self.settings.match, resource)
                chosen = ", ".join(f"{project} by {rule}" for project, rule in decision.rules.items())
                log.info("%r: %s", event, chosen or "for nobody")
                for project, rule in decision.rules.items():
                    if own and not self._dry:
                        await self._project(event, orthanc, resource, own, project, rule)
        except GoneError as error:
            log.info("%r: %s: nothing is done", event, error.message)

    # There.

    async def _project(
        self,
        event: Event,
        orthanc: httpx.AsyncClient,
        resource: Resource,
        instances: Mapping[str, str],
        project: str,
        rule: str,
    ) -> None:
        maker = self._makers[project]
        study = maker.pseudonyms.uid(resource.tag("StudyInstanceUID"))
        there = await self.memory.made(study, "pseudonymised")
        made = await pseudonymise_all(
            self.memory, orthanc, maker, instances, {uid for uid, done in there.items() if done}
        )
        batch, left_out, unreadable = made.batch, made.left_out, made.unreadable
        if batch.count or left_out or unreadable:
            more: dict[str, object] = {"left_out": dict(left_out)} if left_out else {}
            more |= {"unreadable": len(unreadable)} if unreadable else {}
            told = {"project": project, "rule": rule, "level": resource.level, "id": resource.id, "event": event.id}
            self._audit.note("pseudonymised", **told, instances=batch.count, **more)
        if batch.count:
            await self._tell_anonymized(event, orthanc, batch, study, rule)
        await batch.end()
        if unreadable:
            raise Reject(f"can't be read as DICOM, and was left out: instances {', '.join(unreadable[:10])}")

    # And back.

    async def _results(self, event: Event, orthanc: httpx.AsyncClient, resource: Resource, study: Remembered) -> None:
        made = await self.memory.made(study.uid, "pseudonymised")
        results = {
            uid: one
            for uid, one in (await instances_of(orthanc, resource.level, resource.id)).items()
            if uid not in made
        }
        told = {"project": study.project, "level": resource.level, "id": resource.id, "event": event.id}
        if not results or self._dry:
            log.info("%r: it was made here; %d results in it", event, len(results))
            return
        if resource.tag("PatientID") != study.patient:
            self._audit.note("not given back", **told, why="its PatientID is not the one that was given to the study")
            return
        maker = self._makers.get(study.project)
        if maker is None:
            if await self._workflows.has_study(study.uid):
                log.info("%r: a result of what an AI dispatch has sent, which gives it back", event)
                return
            raise Reject(f"there is no project {study.project} any more: put it back, with its secret")
        given = {uid for uid, done in (await self.memory.made(study.uid, "result")).items() if done}
        try:
            batch = await give_back_all(self.memory, orthanc, study, maker.pseudonyms, results, given)
        except UnreadableResultError as error:
            raise Reject(f"instance {error.instance}: {error.message}") from error
        if batch.count:
            self._audit.note("given back", **told, instances=batch.count)
            await tell_results(self.app, event, orthanc, batch, study.project)
        await batch.end()

    # Telling. Before it is noted as done: told again it is the same, and not told at all it would be lost.

    async def _tell_anonymized(
        self, event: Event, orthanc: httpx.AsyncClient, batch: Batch, study: str, rule: str
    ) -> None:
        made = await self.memory.made(study, "pseudonymised")
        for place in batch.studies:
            there = await instances_of(orthanc, "study", place.study)
            ours = [one for uid, one in there.items() if uid in made]
            await tell_anonymized(self.app, event, study=place.study, patient=place.patient, instances=ours, rule=rule)

    # Life.

    @property
    def level(self) -> str:
        """``study`` or ``series``: of what is looked at."""
        return self.settings.event.partition(".")[0]

    def complete(self) -> None:
        """See `Program.complete`."""
        self._audit.check()
        super().complete()

    def run(self) -> None:
        """Work until SIGTERM or SIGINT. See `Consumer.run`.

        :raises BridgeError: it can't begin.
        """
        logs(self.settings.log_level)
        run_until_told(self.settings.name, self.serve, self.app.stop, self.settings.drain, lambda: self.app.running)

    async def serve(self) -> None:
        """Work until the consumer is stopped.

        :raises BridgeError: it can't begin.
        """
        try:
            await self._ready()
            await self.app.serve()
        finally:
            await self.memory.close()
            await self._workflows.close()

    async def _ready(self) -> None:
        self._audit.check()
        for maker in self._makers.values():
            await check_secret(self.memory, maker)

    async def check(self) -> list[str]:
        """Look at everything, and leave again.

        :return: what was found, in a few lines.
        :raises BridgeError: something can't be used.
        """
        try:
            await self._ready()
        finally:
            await self.memory.close()
        found = [*await self.app.check(), *odd(self._wanted.tags)]
        return found + [f"project {name}: profile {one.profile}" for name, one in self.settings.projects.items()]

    async def explain(self, orthanc: httpx.AsyncClient, identifier: str) -> tuple[Resource, Decision, str]:
        """What the rules say of a resource that is there now, and what is remembered of it.

        :raises GoneError: there is none.
        """
        resource = await look(orthanc, self.level, identifier, self._wanted)
        study = resource.tag("StudyInstanceUID")
        resource, _ = await without_results(self.memory, orthanc, resource, self._wanted)
        known = await self.memory.studies(study)
        state = ["is pseudonymised already" for one in known if one.uid == study]
        for one in known:
            if one.original == study:
                made = sum((await self.memory.made(one.uid, "pseudonymised")).values())
                state.append(f"{made} of its study's instances are pseudonymised for {one.project}")
        return resource, Decision(self.settings.rules, self.settings.match, resource), "; ".join(state)
