"""The anonymizer: pseudonymises what rules say, and gives results their patients back (docs/consumers/anonymizer.md).

A study that has become stable is one of three things. One that is *remembered* as pseudonymised: what is in it and was
not made here is a result, and is given back its patient. Another one of a *pseudonym*: so is that, if it refers to one
that is remembered. Any other: the rules are asked.

All that is made follows from the file, the profile and the secret: made twice, it is the same, and Orthanc has it once.
It is remembered before it is put into Orthanc: whatever dies in between, nothing that was made here is ever taken for
somebody else's. So nothing goes round in circles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.leaving import logs, run_until_told
from orthanc_events_bridge.consumers.retry import Reject
from orthanc_events_bridge.errors import BridgeError, GoneError
from orthanc_events_bridge.events.mapping import SUBJECTS
from orthanc_events_bridge.workflows.anonymizer_settings import BASIC, AnonymizerSettings
from orthanc_events_bridge.workflows.asking import ask, file_of
from orthanc_events_bridge.workflows.audit import Audit
from orthanc_events_bridge.workflows.batch import Batch
from orthanc_events_bridge.workflows.deidentify import LeftOutError, pseudonymise
from orthanc_events_bridge.workflows.dicom_files import UnreadableFileError
from orthanc_events_bridge.workflows.facts import Resource, look
from orthanc_events_bridge.workflows.keywords import odd
from orthanc_events_bridge.workflows.memory import Memory, Remembered
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.program import Program
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from orthanc_events_bridge.workflows.reidentify import Result
from orthanc_events_bridge.workflows.rules import Decision, wanted_by
from orthanc_events_bridge.workflows.telling import tell_anonymized, tell_received

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
        self._pseudonyms = {name: Pseudonyms(name, one.secret(name)) for name, one in settings.projects.items()}
        profiles = {BASIC: Profile(), **settings.profiles}
        self._profiles = {name: profiles[one.profile] for name, one in settings.projects.items()}
        # What it remembers is no store of what is done once.
        self.app = Consumer.configured(configuration.with_settings(store=None, store_file=None))
        self.app.on(settings.event)(self._handle)

    async def _handle(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        if event.resource_id is None:
            return
        try:
            resource = await look(orthanc, event.level, event.resource_id, self._wanted)
            study = _one(resource, "StudyInstanceUID")
            remembered = await self.memory.study(study)
            if remembered is not None:
                await self._results(event, orthanc, resource, remembered)
            elif await self.memory.is_pseudonym(_one(resource, "PatientID")):
                await self._other_study(event, orthanc, resource)
            else:
                resource, own = await self._without_results(orthanc, resource, study)
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
        pseudonyms, profile = self._pseudonyms[project], self._profiles[project]
        study = _one(resource, "StudyInstanceUID")
        made = await self.memory.made(pseudonyms.uid(study), "pseudonymised")
        left_out: Counter[str] = Counter()
        unreadable: list[str] = []
        batch = Batch(self.memory, orthanc, "pseudonymised", project)
        for uid, instance in instances.items():
            if made.get(pseudonyms.uid(uid)):
                continue
            content = await file_of(orthanc, instance)
            if content is None:  # deleted meanwhile
                continue
            try:
                done = await asyncio.to_thread(pseudonymise, content, profile, pseudonyms)
            except LeftOutError as error:
                left_out[error.why] += 1
                continue
            except UnreadableFileError:
                unreadable.append(instance)
                continue
            if not batch.count:
                who = done.identity.get("PatientID", "")
                await self.memory.remember(Remembered(done.study, project, study, done.patient, who, done.identity))
            await batch.put(done.study, done.uid, done.content, done.uids)
        if batch.count or left_out or unreadable:
            more: dict[str, object] = {"left_out": dict(left_out)} if left_out else {}
            more |= {"unreadable": len(unreadable)} if unreadable else {}
            told = {"project": project, "rule": rule, "level": resource.level, "id": resource.id, "event": event.id}
            self._audit.note("pseudonymised", **told, instances=batch.count, **more)
        if batch.count:
            await self._tell_anonymized(event, orthanc, batch, pseudonyms.uid(study), rule)
        await batch.end()
        if unreadable:
            raise Reject(f"can't be read as DICOM, and was left out: instances {', '.join(unreadable[:10])}")

    async def _without_results(
        self, orthanc: httpx.AsyncClient, resource: Resource, study: str
    ) -> tuple[Resource, Mapping[str, str]]:
        """What there is beside results that were given back: they are nobody's to pseudonymise, nor do rules ask them.

        :return: also Orthanc's ids of the instances, by their UIDs.
        """
        results: set[str] = set()
        for one in await self.memory.studies(study):
            results.update(await self.memory.made(one.uid, "result"))
        instances = await _instances(orthanc, resource.level, resource.id)
        without = {instance for uid, instance in instances.items() if uid in results}
        if without:
            resource = await look(orthanc, resource.level, resource.id, self._wanted, without)
        return resource, {uid: one for uid, one in instances.items() if one not in without}

    # And back.

    async def _other_study(self, event: Event, orthanc: httpx.AsyncClient, resource: Resource) -> None:
        """A pseudonym's study that was not made here: of results, if it refers to one that was."""
        uids: set[str] = set()
        for instance in resource.instances:
            content = await file_of(orthanc, instance)
            if content is not None:
                with contextlib.suppress(UnreadableFileError):
                    uids |= (await asyncio.to_thread(Result.read, content)).uids
        studies = await self.memory.studies_of(uids)
        remembered = await self.memory.study(studies.pop()) if len(studies) == 1 else None
        if remembered is None:
            log.info("%r: it is a pseudonym's, and refers to no study, or to several: nothing is done", event)
            return
        await self._results(event, orthanc, resource, remembered)

    async def _results(self, event: Event, orthanc: httpx.AsyncClient, resource: Resource, study: Remembered) -> None:
        made = await self.memory.made(study.uid, "pseudonymised")
        results = {
            uid: one for uid, one in (await _instances(orthanc, resource.level, resource.id)).items() if uid not in made
        }
        told = {"project": study.project, "level": resource.level, "id": resource.id, "event": event.id}
        if not results or self._dry:
            log.info("%r: it was made here; %d results in it", event, len(results))
            return
        if _one(resource, "PatientID") != study.patient:
            self._audit.note("not given back", **told, why="its PatientID is not the one that was given to the study")
            return
        pseudonyms = self._pseudonyms.get(study.project)
        if pseudonyms is None:
            raise Reject(f"there is no project {study.project} any more: put it back, with its secret")
        given = await self.memory.made(study.uid, "result")
        batch = Batch(self.memory, orthanc, "result", study.project)
        for uid, instance in results.items():
            if given.get(pseudonyms.result(uid)):
                continue
            content = await file_of(orthanc, instance)
            if content is None:
                continue
            try:
                result = await asyncio.to_thread(Result.read, content)
                originals = await self.memory.originals(study.project, result.uids)
                back = await asyncio.to_thread(result.give_back, study.identity, study.patient, originals, pseudonyms)
            except UnreadableFileError as error:
                raise Reject(f"instance {instance}: {error.message}") from error
            await batch.put(study.uid, pseudonyms.result(uid), back, {})
        if batch.count:
            self._audit.note("given back", **told, instances=batch.count)
            await self._tell_received(event, orthanc, batch, study.project)
        await batch.end()

    # Telling. Before it is noted as done: told again it is the same, and not told at all it would be lost.

    async def _tell_anonymized(
        self, event: Event, orthanc: httpx.AsyncClient, batch: Batch, study: str, rule: str
    ) -> None:
        made = await self.memory.made(study, "pseudonymised")
        for place in batch.studies:
            there = await _instances(orthanc, "study", place.study)
            ours = [one for uid, one in there.items() if uid in made]
            await tell_anonymized(self.app, event, study=place.study, patient=place.patient, instances=ours, rule=rule)

    async def _tell_received(self, event: Event, orthanc: httpx.AsyncClient, batch: Batch, project: str) -> None:
        for series, place in batch.series.items():
            await tell_received(
                self.app,
                event,
                level="series",
                identifier=series,
                parents={"study": place.study, "patient": place.patient},
                instances=list((await _instances(orthanc, "series", series)).values()),
                rule=project,
            )

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

    async def _ready(self) -> None:
        self._audit.check()
        for name, pseudonyms in self._pseudonyms.items():
            if not await self.memory.project(name, pseudonyms.fingerprint):
                raise BridgeError(
                    f"the secret of the project {name} is another one than that which its pseudonyms were made with",
                    "give the old one, or the project another name",
                )

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
        study = _one(resource, "StudyInstanceUID")
        resource, _ = await self._without_results(orthanc, resource, study)
        known = await self.memory.studies(study)
        state = ["is pseudonymised already" for one in known if one.uid == study]
        for one in known:
            if one.original == study:
                made = sum((await self.memory.made(one.uid, "pseudonymised")).values())
                state.append(f"{made} of its study's instances are pseudonymised for {one.project}")
        return resource, Decision(self.settings.rules, self.settings.match, resource), "; ".join(state)


async def _instances(orthanc: httpx.AsyncClient, level: str, identifier: str) -> dict[str, str]:
    """Orthanc's ids of the instances of a study or series, by their UIDs."""
    found = (await ask(orthanc, f"/{SUBJECTS[level]}/{identifier}/instances")).json()
    return {str(one["MainDicomTags"]["SOPInstanceUID"]): str(one["ID"]) for one in found}


def _one(resource: Resource, keyword: str) -> str:
    return next(iter(resource.values("tag", keyword)), "")
