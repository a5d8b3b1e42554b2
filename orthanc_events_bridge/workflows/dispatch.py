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

import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Reject
from orthanc_events_bridge.consumers.settings import RetrySettings
from orthanc_events_bridge.errors import BridgeError, GoneError, RefusedError
from orthanc_events_bridge.events.derived import STEP_ORDERED
from orthanc_events_bridge.events.mapping import NAMESPACE
from orthanc_events_bridge.workflows.conditions import Verdict
from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings, Rule
from orthanc_events_bridge.workflows.dispatch_steps import MARK, Steps, told
from orthanc_events_bridge.workflows.facts import Resource, check_labels, look
from orthanc_events_bridge.workflows.orders import Inboxes, Origin, order
from orthanc_events_bridge.workflows.program import Programs
from orthanc_events_bridge.workflows.pseudonymous import belongs_to, check_secret, without_results
from orthanc_events_bridge.workflows.transitions import begun_again, cancelled, given_up, mended
from orthanc_events_bridge.workflows.workflow import STEPS, Workflow

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

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
    verdicts: list[tuple[Rule, Verdict]]
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
        self.steps = Steps(settings, dry=dry)
        self._inboxes = Inboxes(settings.broker)
        # Health and metrics of all of them are told at one address.
        alone = configuration.with_settings(http=None)
        self.looking = Consumer.configured(alone)
        self.looking.on("series.stable")(self._look)
        always = RetrySettings(max_attempts=0, max_age=0)
        own, to = settings.anonymize, settings.results.to
        steps: dict[str, tuple[_Work, RetrySettings, int]] = {
            "anonymizing": (self.steps.anonymize, own.retry, own.concurrency),
            "sending": (self.steps.send, settings.service.retry, settings.service.concurrency),
            "waiting": (self.steps.watch, always, settings.concurrency),
            "returning": (self.steps.give_back, own.retry, own.concurrency),
            "delivering": (self.steps.deliver, to.retry, to.concurrency),
        }
        self._carrying_out = [] if dry else [self._step(alone, state, *how) for state, how in steps.items()]

    def _step(
        self, configuration: Configuration[DispatchSettings], state: str, work: _Work, retry: RetrySettings, many: int
    ) -> Consumer:
        step = STEPS[state]
        more = {"name": f"{self.settings.name}-{step}", "retry": retry, "concurrency": many, "prefetch": 0}
        app = Consumer.configured(configuration.with_settings(**more), inbox_only=True)

        async def carry_out(event: Event, orthanc: httpx.AsyncClient) -> None:
            identifier = str(event.data["workflow"])
            if event.operation == "redrive":  # somebody has mended what was wrong
                await self.steps.workflows.change(identifier, mended(state))
            found = await self.steps.workflows.find(identifier)
            if found is None:
                raise Reject("there is no such workflow in the store: was it exchanged?")
            if found.state == state:
                found = await work(app, event, orthanc, found)
                log.info("workflow %s: %s is done: %s", found.id, step, found.state)
            elif found.state in ("failed", "overdue") and found.step == step:
                raise Reject(found.reason)  # whoever gave it up may have died before there was a dead letter
            else:
                log.info("workflow %s: %s was done before: %s", found.id, step, found.state)
            # Also where it was done before: whoever did it may have died before this.
            await self._order(found)

        async def bury(event: Event, reason: str) -> None:
            found = await self._give_up(str(event.data["workflow"]), state, reason)
            if found is None:
                return
            if state in ("sending", "delivering") and found.state == "failed":
                place = self.steps.service.name if state == "sending" else self.steps.sender.name
                what = {"rule": found.rule, "destination": place, "reason": reason, "attempts": event.attempt}
                await app.publish("transfer.failed", what, cause=event)

        carry_out.__qualname__ = step  # in logs
        app.on(STEP_ORDERED, on_dead=bury)(carry_out)
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

    async def _give_up(self, identifier: str, state: str, reason: str) -> Workflow | None:
        """Write down that a step is given up, before its order is among the dead letters.

        :raises RefusedError: it can't be written down: the order is held until it can.
        """
        to = "overdue" if state == "waiting" else "failed"
        try:
            if await self.steps.workflows.find(identifier) is None:
                return None
            found = await self.steps.workflows.change(identifier, given_up(state, to, reason))
            if found.state == to:  # else somebody has cancelled it, or a result has come
                self.steps.audit.note(to, **told(found), step=STEPS[state], why=reason)
        except BridgeError as error:
            raise RefusedError(error.message, error.remedy) from error
        return found

    # Looking.

    async def _look(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        if event.series_id is None:
            return
        try:
            resource = await look(orthanc, "series", event.series_id, self.steps.wanted)
            pseudonymous, study = await belongs_to(self.steps.memory, orthanc, resource)
            if study is not None:
                if (found := await self.steps.came(event, orthanc, resource, study)) is not None:
                    await self._order(found)
            elif pseudonymous:
                log.info("%r: it is a pseudonym's, and refers to no study, or to several: nothing is done", event)
            else:
                await self._decide(event, orthanc, resource)
        except GoneError as error:
            log.info("%r: %s: nothing is done", event, error.message)

    async def _decide(self, event: Event, orthanc: httpx.AsyncClient, resource: Resource) -> None:
        resource, own = await without_results(self.steps.memory, orthanc, resource, self.steps.wanted)
        rule = self._rule(resource)
        if not own or rule is None or resource.tag(MARK) == "YES":
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
        await self._order(await self.steps.workflows.begin(new))

    def _rule(self, resource: Resource) -> str | None:
        return next((rule.name for rule in self.settings.rules if rule.judge(resource).true), None)

    # By a person's word.

    async def explain(self, orthanc: httpx.AsyncClient, identifier: str) -> Explained:
        """What would become of a series that is there now.

        :raises GoneError: there is none.
        """
        resource = await look(orthanc, "series", identifier, self.steps.wanted)
        verdicts = [(rule, rule.judge(resource)) for rule in self.settings.rules]
        rule = self._rule(resource)
        why = "" if rule else "no rule fits"
        pseudonymous, _ = await belongs_to(self.steps.memory, orthanc, resource)
        if pseudonymous:
            why = "it is pseudonymous: made here, or a result"
        elif not (await without_results(self.steps.memory, orthanc, resource, self.steps.wanted))[1]:
            why = "it is a result that was given back"
        elif resource.tag(MARK) == "YES":
            why = "it is de-identified already"
        return Explained(resource.id, len(resource.instances), verdicts, None if why else rule, why)

    async def again(self, one: Workflow) -> Workflow:
        """Go on with a workflow: from the step that was given up, or at which it was cancelled; one whose result is
        overdue is sent again; one that is under way is given a push.

        :raises BridgeError: there is nothing to be done.
        """
        changed = await self.steps.workflows.change(one.id, begun_again)
        try:
            await self._order(changed, uuid.uuid4().hex)
        finally:
            await self._inboxes.close()
        return changed

    async def cancel(self, one: Workflow) -> Workflow:
        """Stop a workflow: no further step is begun, and what comes for it is left where it is.

        :raises BridgeError: it has ended.
        """
        return await self.steps.workflows.change(one.id, cancelled)

    # Life.

    @property
    def consumers(self) -> list[Consumer]:
        """All of it."""
        return [self.looking, *self._carrying_out]

    def complete(self) -> None:
        """See `Programs.complete`."""
        self.steps.audit.check()
        self.steps.service.check()
        self.steps.sender.check()
        super().complete()

    async def ready(self) -> None:
        """See `Programs.ready`."""
        await check_secret(self.steps.memory, self.steps.maker)

    async def close(self) -> None:
        """See `Programs.close`."""
        await self._inboxes.close()
        await self.steps.close()

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
                if self.steps.wanted.labels:
                    await check_labels(orthanc)
                found += [await self.steps.service.describe(orthanc), await self.steps.sender.describe(orthanc)]
        finally:
            await self.close()
        return found
