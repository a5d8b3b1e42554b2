"""The AI dispatch: series to a service and its results back, pseudonymised in between (docs/consumers/ai-dispatch.md).

One consumer per step, each with retries, limits and dead letters of its own. *Looking*, the consumer ``{name}``: a
series that has become stable is asked about by the rules, or is a result. *Steps*, the consumers ``{name}-anonymize``,
``-send``, ``-watch``, ``-return`` and ``-deliver``: they get orders and nothing else, each of which names a workflow.

How far a workflow is stands in a row of its own (`workflow`). A step does its work, which done twice is done once; then
the row says so; then the next step is ordered. An order that comes again finds the row ahead of it, and orders the next
step again: so whoever dies, and wherever, somebody goes on. A step whose order is given up, and a result that does not
come, are written into the row too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Reject, Retry
from orthanc_events_bridge.consumers.settings import RetrySettings
from orthanc_events_bridge.errors import BridgeError, GoneError, RefusedError
from orthanc_events_bridge.events.derived import STEP_ORDERED
from orthanc_events_bridge.events.mapping import NAMESPACE
from orthanc_events_bridge.workflows.asking import ask, instances_of
from orthanc_events_bridge.workflows.audit import Audit
from orthanc_events_bridge.workflows.conditions import Verdict, judge
from orthanc_events_bridge.workflows.destinations import Sender
from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings
from orthanc_events_bridge.workflows.facts import Resource, Wanted, check_labels, look
from orthanc_events_bridge.workflows.jobs import Left
from orthanc_events_bridge.workflows.memory import Memory, Remembered
from orthanc_events_bridge.workflows.orders import Inboxes, Origin, order
from orthanc_events_bridge.workflows.program import Programs
from orthanc_events_bridge.workflows.pseudonymous import (
    Maker,
    belongs_to,
    check_secret,
    give_back_all,
    pseudonymise_all,
    tell_results,
    uids_in,
    without_results,
)
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from orthanc_events_bridge.workflows.rules import Conditional
from orthanc_events_bridge.workflows.service import Sending
from orthanc_events_bridge.workflows.workflow import STEPS, STOPPED, Outcome, Workflow, Workflows

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

_MARK: Final = "PatientIdentityRemoved"
#: Does a step, and says so in the row.
_Work = Callable[[Consumer, Event, "httpx.AsyncClient", Workflow], Awaitable[Workflow]]


@dataclass(frozen=True, slots=True)
class Explained:
    """What would become of a series.

    :ivar series: Orthanc's id of it.
    :ivar verdicts: of each rule.
    :ivar rule: by which it would be sent; none: it would not.
    :ivar why: not.
    """

    series: str
    instances: int
    verdicts: list[tuple[Conditional, Verdict]]
    rule: str | None
    why: str


class Dispatcher(Programs):
    """The consumers of one configuration.

    :param configuration: of which the settings are `DispatchSettings`.
    :param dry: it decides, and does nothing.
    :raises BridgeError: it can't be.
    """

    def __init__(self, configuration: Configuration[DispatchSettings], *, dry: bool = False) -> None:
        if dry:
            configuration = configuration.for_dry_run()
        self.settings: DispatchSettings = configuration.settings
        settings, self._dry = self.settings, dry
        assert settings.memory is not None  # `contradictions` says so
        self.memory = Memory(settings.memory)
        self.workflows = Workflows(settings.memory, settings.name)
        self._audit = Audit(settings.audit)
        project = settings.anonymize.project
        self._maker = Maker(
            project, settings.anonymize.profile, Pseudonyms(project, settings.anonymize.secret(project))
        )
        self._service = Sending(settings.service)
        self._sender = Sender("results", settings.results.to)
        self._inboxes = Inboxes(settings.broker)
        asked = [*(rule.when or () for rule in settings.rules), *settings.results.expect.values()]
        wanted = Wanted.by(condition for conditions in asked for condition in conditions)
        self._wanted = replace(wanted, tags=wanted.tags | {_MARK})
        # Health and metrics of all of them are told at one address.
        alone = configuration.with_settings(http=None)
        self.looking = Consumer.configured(alone)
        self.looking.on("series.stable")(self._look)
        always = RetrySettings(max_attempts=0, max_age=0)
        own, to = settings.anonymize, settings.results.to
        steps: dict[str, tuple[_Work, RetrySettings, int]] = {
            "anonymizing": (self._anonymize, own.retry, own.concurrency),
            "sending": (self._send, settings.service.retry, settings.service.concurrency),
            "waiting": (self._watch, always, settings.concurrency),
            "returning": (self._return, own.retry, own.concurrency),
            "delivering": (self._deliver, to.retry, to.concurrency),
        }
        self._steps = [] if dry else [self._step(alone, state, *how) for state, how in steps.items()]

    def _step(
        self, configuration: Configuration[DispatchSettings], state: str, work: _Work, retry: RetrySettings, many: int
    ) -> Consumer:
        step = STEPS[state]
        more = {"name": f"{self.settings.name}-{step}", "retry": retry, "concurrency": many, "prefetch": 0}
        app = Consumer.configured(configuration.with_settings(**more), inbox_only=True)

        async def carry_out(event: Event, orthanc: httpx.AsyncClient) -> None:
            identifier = str(event.data["workflow"])
            if event.operation == "redrive":  # somebody has mended what was wrong
                await self.workflows.change(
                    identifier, lambda one: one.to(state) if (one.state, one.step) == ("failed", step) else None
                )
            found = await self.workflows.find(identifier)
            if found is None:
                raise Reject("there is no such workflow in the store: was it exchanged?")
            if found.state == state:
                found = await work(app, event, orthanc, found)
                log.info("workflow %s: %s is done: %s", found.id, step, found.state)
            # Also where it was done before: whoever did it may have died before this.
            await self._order(found)

        async def given_up(event: Event, reason: str) -> None:
            identifier, late = str(event.data["workflow"]), state == "waiting"
            found = await self._give_up(identifier, state, "overdue" if late else "failed", step, reason)
            if state in ("sending", "delivering") and found.state == "failed":
                place = self._service.name if state == "sending" else self._sender.name
                told = {"rule": found.rule, "destination": place, "reason": reason, "attempts": event.attempt}
                await app.publish("transfer.failed", told, cause=event)

        app.on(STEP_ORDERED, on_dead=given_up)(carry_out)
        return app

    async def _order(self, workflow: Workflow, more: str = "") -> None:
        """Order the step that is due; ordered twice, it is the same.

        :param more: makes it another one.
        """
        step = STEPS.get(workflow.state)
        if step is None:
            return
        data = {
            "level": "series",
            "id": workflow.series,
            "parents": {"study": workflow.original},
            "workflow": workflow.id,
        }
        spelt = f"{workflow.id}\n{step}\n{workflow.since}\n{more}"
        await self._inboxes.put(f"{self.settings.name}-{step}", order(STEP_ORDERED, spelt, workflow.origin, data))

    async def _give_up(self, identifier: str, state: str, to: str, step: str, reason: str) -> Workflow:
        """Write down that a step has failed, before its order is among the dead letters.

        :raises RefusedError: it can't be written down: the order is held until it can.
        """
        try:
            found = await self.workflows.change(
                identifier, lambda one: one.to(to, step=step, reason=reason) if one.state == state else None
            )
            self._audit.note(to, **_told(found), step=step, why=reason)
        except BridgeError as error:
            raise RefusedError(error.message, error.remedy) from error
        return found

    # Looking.

    async def _look(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        if event.series_id is None:
            return
        try:
            resource = await look(orthanc, "series", event.series_id, self._wanted)
            pseudonymous, study = await belongs_to(self.memory, orthanc, resource)
            if study is not None:
                await self._came(event, orthanc, resource, study)
            elif pseudonymous:
                log.info("%r: it is a pseudonym's, and refers to no study, or to several: nothing is done", event)
            else:
                await self._decide(event, orthanc, resource)
        except GoneError as error:
            log.info("%r: %s: nothing is done", event, error.message)

    async def _decide(self, event: Event, orthanc: httpx.AsyncClient, resource: Resource) -> None:
        resource, own = await without_results(self.memory, orthanc, resource, self._wanted)
        rule = self._rule(resource)
        if not own or rule is None or resource.tag(_MARK) == "YES":
            log.info(
                "%r: %s: nothing is done", event, "it is a result or marked as de-identified" if rule else "no rule"
            )
            return
        log.info("%r: to the service, by %s", event, rule)
        if self._dry:
            return
        spelt = [self.settings.name, event.source, resource.id, *sorted(own.values())]
        identifier = str(uuid.uuid5(NAMESPACE, "workflow\n" + "\n".join(spelt)))
        origin = Origin.of(event, resource.study)
        new = Workflow(identifier, self.settings.name, resource.id, origin, resource.study, rule, len(own))
        await self._order(await self.workflows.begin(new))

    def _rule(self, resource: Resource) -> str | None:
        return next((rule.name for rule in self.settings.rules if rule.judge(resource).true), None)

    async def _came(self, event: Event, orthanc: httpx.AsyncClient, resource: Resource, study: Remembered) -> None:
        """A series in a pseudonymous study: what was not made here is a result."""
        results = await self._results(orthanc, resource.id, study)
        if not results or self._dry:
            log.info("%r: it was made here; %d results in it", event, len(results))
            return
        told = {"level": "series", "id": resource.id, "event": event.id}
        found = await self.workflows.referred_to(await uids_in(orthanc, results.values()), study.uid)
        if found is None:
            self._audit.note("not given back", **told, why="it refers to nothing that was sent from here")
        elif resource.tag("PatientID") != study.patient:
            self._audit.note("not given back", **told, why="its PatientID is not the one that was given to the study")
        elif found.state in STOPPED:
            self._audit.note("not given back", **told, why=f"its workflow is {found.state}")
        else:
            await self._order(await self.workflows.change(found.id, _arrived(self._outcome(resource, results))))

    async def _results(self, orthanc: httpx.AsyncClient, series: str, study: Remembered) -> dict[str, str]:
        """Orthanc's ids of the instances that were not made here, by their UIDs."""
        made = await self.memory.made(study.uid, "pseudonymised")
        return {uid: one for uid, one in (await instances_of(orthanc, "series", series)).items() if uid not in made}

    def _outcome(self, resource: Resource, results: Mapping[str, str]) -> Outcome:
        expect = self.settings.results.expect
        meets = tuple(name for name, conditions in expect.items() if judge(conditions, resource).true)
        content = hashlib.sha256(json.dumps(sorted(results.values())).encode()).hexdigest()
        return Outcome(resource.id, content, meets=meets)

    # Steps.

    async def _anonymize(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        try:
            instances = await instances_of(orthanc, "series", one.series)
        except GoneError:
            raise Reject("the series was deleted before it was sent") from None
        if len(instances) > one.instances:  # it will be stable once more, and be another content
            return await self.workflows.change(one.id, _from("anonymizing", lambda row: row.to("superseded")))
        made = await pseudonymise_all(self.memory, orthanc, self._maker, instances)
        if made.left_out or made.unreadable:  # a part of it is not what is to be looked at
            why = [f"{count} instances: {text}" for text, count in made.left_out.items()]
            why += [f"{len(made.unreadable)} instances can't be read as DICOM"] if made.unreadable else []
            raise Reject(f"it is not sent: {'; '.join(why)}")
        await made.batch.end()
        ((series, _),) = made.batch.series.items()
        itself = (await ask(orthanc, f"/series/{series}")).json()["MainDicomTags"]["SeriesInstanceUID"]
        uids = [str(itself), *(self._maker.pseudonyms.uid(uid) for uid in instances)]
        await self.workflows.note_uids(one.id, uids)
        study = (await ask(orthanc, f"/series/{series}/study")).json()["MainDicomTags"]["StudyInstanceUID"]
        self._audit.note("pseudonymised", **_told(one), instances=len(instances))
        known = {"study": str(study), "anonymized": series, "uids": len(uids)}
        return await self.workflows.change(one.id, _from("anonymizing", lambda row: row.to("sending", **known)))

    async def _send(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        async def note(job: str) -> None:
            await self.workflows.change(one.id, lambda row: replace(row, job=job))

        async with app.once(event, "send", of=f"{one.id} {one.run}", lease=self.settings.ack_wait) as first:
            if first:
                series = await look(orthanc, "series", one.anonymized, Wanted())
                job = await self._service.send(orthanc, series, Left(one.job, note))
                self._audit.note("sent", **_told(one), destination=self._service.name, job=job or None)
        due = time.time() + self.settings.service.deadline
        await self.workflows.change(one.id, _from("sending", lambda row: row.to("waiting", due=due)))
        # What is there already, from another time, nothing tells again.
        study = await self.memory.study(one.study)
        assert study is not None
        siblings = (await ask(orthanc, f"/series/{one.anonymized}/study")).json()["Series"]
        known = {each.series for other in await self.workflows.of_study(one.study) for each in other.results}
        for series_id in siblings if one.run or known else ():
            if series_id != one.anonymized:
                resource = await look(orthanc, "series", str(series_id), self._wanted)
                await self._came(event, orthanc, resource, study)
        return await self.workflows.change(one.id, lambda row: None)

    async def _watch(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        if (left := one.due - time.time()) > 0:
            raise Retry(after=left)
        raise Reject(f"no result came within {self.settings.service.deadline:g} s; late, it still counts")

    async def _return(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        study = await self.memory.study(one.study)
        assert study is not None
        for outcome in one.results:
            if outcome.given:
                continue
            try:
                results = await self._results(orthanc, outcome.series, study)
            except GoneError:
                raise Reject(f"the result, series {outcome.series}, was deleted before it was given back") from None
            batch = await give_back_all(self.memory, orthanc, study, self._maker.pseudonyms, results)
            await tell_results(app, event, orthanc, batch, study.project)
            await batch.end()
            self._audit.note("given back", **_told(one), instances=batch.count)
            back = replace(outcome, given=next(iter(batch.series)))
            one = await self.workflows.change(one.id, _noted(outcome, back))
        return await self.workflows.change(
            one.id,
            _from("returning", lambda row: row.to("delivering") if all(each.given for each in row.results) else None),
        )

    async def _deliver(self, app: Consumer, event: Event, orthanc: httpx.AsyncClient, one: Workflow) -> Workflow:
        began = datetime.fromtimestamp(one.begun, UTC)
        for outcome in one.results:
            if outcome.sent or not outcome.given:
                continue
            of = f"{one.id} {one.run} {outcome.given} {outcome.content}"
            async with app.once(event, "deliver", of=of, lease=self.settings.ack_wait) as first:
                if first:
                    resource = await look(orthanc, "series", outcome.given, Wanted())
                    job = await self._sender.send(orthanc, resource, began)
                    count = len(resource.instances)
                    self._audit.note("delivered", **_told(one), result=outcome.given, instances=count, job=job or None)
            one = await self.workflows.change(one.id, _noted(outcome, replace(outcome, sent=True)))

        def ended(row: Workflow) -> Workflow | None:
            if not all(each.sent for each in row.results):
                return None
            met = {name for each in row.results for name in each.meets}
            return row.to("done" if met >= self.settings.results.expect.keys() else "waiting")

        return await self.workflows.change(one.id, _from("delivering", ended))

    # By a person's word.

    async def explain(self, orthanc: httpx.AsyncClient, identifier: str) -> Explained:
        """What would become of a series that is there now.

        :raises GoneError: there is none.
        """
        resource = await look(orthanc, "series", identifier, self._wanted)
        verdicts = [(rule, rule.judge(resource)) for rule in self.settings.rules]
        rule = self._rule(resource)
        why = "" if rule else "no rule fits"
        pseudonymous, _ = await belongs_to(self.memory, orthanc, resource)
        if pseudonymous:
            why = "it is pseudonymous: made here, or a result"
        elif not (await without_results(self.memory, orthanc, resource, self._wanted))[1]:
            why = "it is a result that was given back"
        elif resource.tag(_MARK) == "YES":
            why = "it is de-identified already"
        return Explained(resource.id, len(resource.instances), verdicts, None if why else rule, why)

    async def again(self, one: Workflow) -> Workflow:
        """Go on with a workflow: from the step that was given up, or at which it was cancelled; one whose result is
        overdue is sent again; one that is under way is given a push.

        :raises BridgeError: there is nothing to be done.
        """
        back = {step: state for state, step in STEPS.items()}

        def begin(row: Workflow) -> Workflow | None:
            if row.state in ("done", "superseded"):
                raise BridgeError(f"workflow {row.id} is {row.state}: there is nothing to be done again")
            if row.state not in ("failed", "cancelled", "overdue"):
                return None
            state = "sending" if row.state == "overdue" else back[row.step]
            return row.to(state, run=row.run + 1, job="", reason="", step="")

        changed = await self.workflows.change(one.id, begin)
        try:
            await self._order(changed, uuid.uuid4().hex)
        finally:
            await self._inboxes.close()
        return changed

    async def cancel(self, one: Workflow) -> Workflow:
        """Stop a workflow: no further step is begun, and what comes for it is left where it is.

        :raises BridgeError: it has ended.
        """

        def stop(row: Workflow) -> Workflow | None:
            if row.state in ("done", "superseded"):
                raise BridgeError(f"workflow {row.id} is {row.state}: there is nothing to be cancelled")
            return row.to("cancelled", step=STEPS.get(row.state) or row.step) if row.state != "cancelled" else None

        return await self.workflows.change(one.id, stop)

    # Life.

    @property
    def consumers(self) -> list[Consumer]:
        """All of it."""
        return [self.looking, *self._steps]

    def complete(self) -> None:
        """See `Programs.complete`."""
        self._audit.check()
        self._service.check()
        self._sender.check()
        super().complete()

    async def ready(self) -> None:
        """See `Programs.ready`."""
        await check_secret(self.memory, self._maker)

    async def close(self) -> None:
        """See `Programs.close`."""
        await self._inboxes.close()
        await self._service.close()
        await self._sender.close()
        await self.memory.close()
        await self.workflows.close()

    async def check(self) -> list[str]:
        """Look at everything, and leave again.

        :return: what was found, in a few lines.
        :raises BridgeError: something can't be used.
        """
        self.complete()
        try:
            await self.ready()
            found = await self.looking.check(store=True)
            async with self.looking.asking() as orthanc:
                if self._wanted.labels:
                    await check_labels(orthanc)
                found += [await self._service.describe(orthanc), await self._sender.describe(orthanc)]
        finally:
            await self.close()
        return found


def _from(state: str, new: Callable[[Workflow], Workflow | None]) -> Callable[[Workflow], Workflow | None]:
    """A change of what is in that state, and of nothing else: somebody may have cancelled it, or a result have come."""
    return lambda row: new(row) if row.state == state else None


def _arrived(outcome: Outcome) -> Callable[[Workflow], Workflow | None]:
    def arrived(row: Workflow) -> Workflow | None:
        known = row.result(outcome.series)
        if row.state in STOPPED or (known is not None and known.content == outcome.content):
            return None
        return row.with_result(outcome).to("returning", reason="", step="")

    return arrived


def _noted(before: Outcome, after: Outcome) -> Callable[[Workflow], Workflow | None]:
    """Of a result, unless more of it has come meanwhile."""
    return lambda row: row.with_result(after) if row.result(before.series) == before else None


def _told(one: Workflow) -> dict[str, Any]:
    """What the audit file says of each."""
    return {"workflow": one.id, "rule": one.rule, "level": "series", "id": one.series, "event": one.origin.event}
