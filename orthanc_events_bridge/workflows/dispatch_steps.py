"""The steps of the AI dispatch: what each does with a workflow, and what it then writes into its row.

Each does its work so that done twice it is done once: what is made follows from what is there; what is sent is noted in
the store, and so is the job that sends it, before it is waited for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Reject, Retry
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.workflows.asking import ask, instances_of
from orthanc_events_bridge.workflows.audit import Audit
from orthanc_events_bridge.workflows.conditions import judge
from orthanc_events_bridge.workflows.destinations import Sender
from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings
from orthanc_events_bridge.workflows.facts import Resource, Wanted, look
from orthanc_events_bridge.workflows.jobs import Left
from orthanc_events_bridge.workflows.memory import Memory, Remembered
from orthanc_events_bridge.workflows.pseudonymous import (
    Maker,
    UnreadableResultError,
    give_back_all,
    pseudonymise_all,
    tell_results,
    uids_in,
)
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from orthanc_events_bridge.workflows.service import Sending
from orthanc_events_bridge.workflows.transitions import arrived, delivered, done_with, noted, returned
from orthanc_events_bridge.workflows.workflow import STOPPED, Outcome, Workflow, Workflows

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

#: The element that says of an instance that it is de-identified.
MARK: Final = "PatientIdentityRemoved"


class Steps:
    """What is done with workflows.

    :param dry: nothing is.
    :raises BridgeError: that can't be.
    """

    def __init__(self, settings: DispatchSettings, *, dry: bool) -> None:
        self.settings, self._dry = settings, dry
        assert settings.memory is not None  # `contradictions` says so
        self.memory = Memory(settings.memory)
        self.workflows = Workflows(settings.memory, settings.name)
        self.audit = Audit(settings.audit)
        own = settings.anonymize
        self.maker = Maker(own.project, own.profile, Pseudonyms(own.project, own.secret(own.project)))
        self.service = Sending(settings.service)
        self.sender = Sender("results", settings.results.to)
        asked = [*(rule.when or () for rule in settings.rules), *settings.results.expect.values()]
        wanted = Wanted.by(condition for conditions in asked for condition in conditions)
        self.wanted = replace(wanted, tags=wanted.tags | {MARK})

    async def close(self) -> None:
        """Let go of everything."""
        await self.service.close()
        await self.sender.close()
        await self.memory.close()
        await self.workflows.close()

    # Results.

    async def came(
        self, event: Event, orthanc: httpx.AsyncClient, resource: Resource, study: Remembered
    ) -> Workflow | None:
        """A series in a pseudonymous study: what was not made here is a result.

        :return: the workflow that it is of, if it goes on by it.
        """
        results = await self._results(orthanc, resource.id, study)
        if not results or self._dry:
            log.info("%r: it was made here; %d results in it", event, len(results))
            return None
        told = {"level": "series", "id": resource.id, "event": event.id}
        found = await self.workflows.referred_to(await uids_in(orthanc, results.values()), study.uid)
        if found is None:
            self.audit.note("not given back", **told, why="it refers to nothing that was sent from here")
        elif resource.tag("PatientID") != study.patient:
            self.audit.note("not given back", **told, why="its PatientID is not the one that was given to the study")
        elif found.state in STOPPED:
            self.audit.note("not given back", **told, why=f"its workflow is {found.state}")
        else:
            log.info("%r: a result", event)  # not of which workflow: that would say which pseudonym is whose
            return await self.workflows.change(found.id, arrived(self._outcome(resource, results)))
        return None

    async def _results(self, orthanc: httpx.AsyncClient, series: str, study: Remembered) -> dict[str, str]:
        """Orthanc's ids of the instances that were not made here, by their UIDs."""
        made = await self.memory.made(study.uid, "pseudonymised")
        return {uid: one for uid, one in (await instances_of(orthanc, "series", series)).items() if uid not in made}

    def _outcome(self, resource: Resource, results: Mapping[str, str]) -> Outcome:
        expect = self.settings.results.expect
        meets = tuple(name for name, conditions in expect.items() if judge(conditions, resource).true)
        content = hashlib.sha256(json.dumps(sorted(results.values())).encode()).hexdigest()
        return Outcome(resource.id, content, meets=meets)

    # Steps. Each returns the workflow as it is then.

    async def anonymize(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        try:
            instances = await instances_of(orthanc, "series", one.series)
        except GoneError:
            raise Reject("the series was deleted before it was sent") from None
        if len(instances) > one.instances:  # it will be stable once more, and be another content
            return await self.workflows.change(one.id, done_with("anonymizing", lambda row: row.to("superseded")))
        made = await pseudonymise_all(self.memory, orthanc, self.maker, instances)
        if made.left_out or made.unreadable:  # a part of it is not what is to be looked at
            why = [f"{count} instances: {text}" for text, count in made.left_out.items()]
            why += [f"{len(made.unreadable)} instances can't be read as DICOM"] if made.unreadable else []
            raise Reject(f"it is not sent: {'; '.join(why)}")
        if made.batch.count < len(instances):
            raise GoneError(f"instances of /series/{one.series} were deleted meanwhile")
        await made.batch.end()
        ((series, _),) = made.batch.series.items()
        itself = (await ask(orthanc, f"/series/{series}")).json()["MainDicomTags"]["SeriesInstanceUID"]
        uids = [str(itself), *(self.maker.pseudonyms.uid(uid) for uid in instances)]
        await self.workflows.note_uids(one.id, uids)
        study = (await ask(orthanc, f"/series/{series}/study")).json()["MainDicomTags"]["StudyInstanceUID"]
        self.audit.note("pseudonymised", **told(one), instances=len(instances))
        known = {"study": str(study), "anonymized": series, "uids": len(uids)}
        return await self.workflows.change(one.id, done_with("anonymizing", lambda row: row.to("sending", **known)))

    async def send(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        async def note(job: str) -> None:
            await self.workflows.change(one.id, lambda row: replace(row, job=job))

        try:
            series = await look(orthanc, "series", one.anonymized, Wanted())
        except GoneError:  # it is made again, and is the same
            return await self.workflows.change(one.id, done_with("sending", lambda row: row.to("anonymizing")))
        async with app.once(event, "send", of=f"{one.id} {one.run}", lease=self.settings.ack_wait) as first:
            if first:
                # Before it leaves: whoever dies behind that, it is known what may have left.
                self.audit.note("sending", **told(one), destination=self.service.name, instances=len(series.instances))
                job = await self.service.send(orthanc, series, Left(one.job, note))
                self.audit.note("sent", **told(one), destination=self.service.name, job=job or None)
        due = time.time() + self.settings.service.deadline
        await self.workflows.change(one.id, done_with("sending", lambda row: row.to("waiting", due=due)))
        await self._left_alone(event, orthanc, one)
        return await self.workflows.change(one.id, lambda row: None)

    async def _left_alone(self, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> None:
        """Look at what came while nobody wanted it: nothing tells of it again."""
        others = await self.workflows.of_study(one.study)
        if not one.run and not any(other.state in STOPPED for other in others):
            return
        study = await self.memory.study(one.study)
        assert study is not None
        known = {one.anonymized, *(result.series for other in others for result in other.results)}
        for series in (await ask(orthanc, f"/series/{one.anonymized}/study")).json()["Series"]:
            if series not in known:
                await self.came(event, orthanc, await look(orthanc, "series", str(series), self.wanted), study)

    async def watch(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        if (left := one.due - time.time()) > 0:
            raise Retry(after=left)
        raise Reject(f"no result came within {self.settings.service.deadline:g} s; late, it still counts")

    async def give_back(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        study = await self.memory.study(one.study)
        assert study is not None
        for outcome in one.results:
            if outcome.given:
                continue
            try:
                results = await self._results(orthanc, outcome.series, study)
            except GoneError:
                raise Reject("a result was deleted before it was given back") from None
            try:
                batch = await give_back_all(self.memory, orthanc, study, self.maker.pseudonyms, results)
            except UnreadableResultError as error:  # not which: that would say which pseudonym is whose
                raise Reject(f"a result can't be given back: {error.message}") from error
            await tell_results(app, event, orthanc, batch, study.project)
            await batch.end()
            self.audit.note("given back", **told(one), instances=batch.count)
            back = replace(outcome, given=next(iter(batch.series)))
            one = await self.workflows.change(one.id, noted(outcome, back))
        return await self.workflows.change(one.id, done_with("returning", returned))

    async def deliver(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        began = datetime.fromtimestamp(one.begun, UTC)
        for outcome in one.results:
            if outcome.sent or not outcome.given:
                continue
            try:
                resource = await look(orthanc, "series", outcome.given, Wanted())
            except GoneError:  # it is given back again, and is the same
                back = noted(outcome, replace(outcome, given=""))
                await self.workflows.change(one.id, back)
                return await self.workflows.change(one.id, done_with("delivering", lambda row: row.to("returning")))
            of = f"{one.id} {one.run} {outcome.given} {outcome.content}"
            async with app.once(event, "deliver", of=of, lease=self.settings.ack_wait) as first:
                if first:
                    job = await self.sender.send(orthanc, resource, began)
                    count = len(resource.instances)
                    self.audit.note("delivered", **told(one), result=outcome.given, instances=count, job=job or None)
            one = await self.workflows.change(one.id, noted(outcome, replace(outcome, sent=True)))

        expected = self.settings.results.expect
        return await self.workflows.change(one.id, done_with("delivering", delivered(expected)))


def told(one: Workflow) -> dict[str, Any]:
    """What the audit file says of each."""
    return {"workflow": one.id, "rule": one.rule, "level": "series", "id": one.series, "event": one.origin.event}
