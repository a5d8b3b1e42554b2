"""The router: sends studies, series or instances where rules say (docs/consumers/router.md).

Two steps, each with retries of its own. *Deciding*: the consumer ``{name}`` looks at what has become stable, asks the
rules once, and puts an order into the inbox of each destination that they name. *Sending*: the consumer
``{name}-{destination}`` carries the orders out. So a destination that is down holds up only itself, what was decided
holds however long it waits, and each destination has dead letters of its own.

An order's id follows from the event's and the destination's: decided twice, it is the same. What has been sent is
remembered by its content, so that nothing is sent twice, and nothing goes round in circles.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import Configuration
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.events.derived import ORDERED
from orthanc_events_bridge.workflows.audit import Audit
from orthanc_events_bridge.workflows.destinations import Sender
from orthanc_events_bridge.workflows.facts import Resource, Wanted, check_labels, look
from orthanc_events_bridge.workflows.keywords import odd
from orthanc_events_bridge.workflows.orders import Inboxes, Origin, order
from orthanc_events_bridge.workflows.program import Programs
from orthanc_events_bridge.workflows.router_settings import RouterSettings
from orthanc_events_bridge.workflows.rules import Decision, wanted_by

if TYPE_CHECKING:
    import httpx

    from orthanc_events_bridge.transports.base import Outgoing

log = logging.getLogger(__name__)


class Router(Programs):
    """The consumers of one configuration: the one that decides, and one for each destination.

    :param configuration: of which the settings are `RouterSettings`.
    :param dry: it decides, and sends nothing.
    :raises BridgeError: it can't be.
    """

    def __init__(self, configuration: Configuration[RouterSettings], *, dry: bool = False) -> None:
        if dry:
            configuration = configuration.for_dry_run()
        self.settings: RouterSettings = configuration.settings
        settings = self.settings
        self._dry = dry
        self._audit = Audit(settings.audit)
        self._wanted = wanted_by(settings.rules)
        self._senders = {name: Sender(name, one) for name, one in settings.destinations.items()}
        self._inboxes = Inboxes(settings.broker)
        # Health and metrics of all of them are told at one address.
        alone = configuration.with_settings(http=None)
        self.deciding = Consumer.configured(alone)
        self.deciding.on(settings.event)(self._decide)
        self.sending = {} if dry else {name: self._sending(alone, name) for name in self._senders}

    def _sending(self, configuration: Configuration[RouterSettings], name: str) -> Consumer:
        sender = self._senders[name]
        retry, concurrency = sender.destination.retry, sender.destination.concurrency
        more = {"name": f"{self.settings.name}-{name}", "retry": retry, "concurrency": concurrency, "prefetch": 0}
        app = Consumer.configured(configuration.with_settings(**more, ordered=False), inbox_only=True)

        async def send(event: Event, orthanc: httpx.AsyncClient) -> None:
            await self._send(app, sender, event, orthanc)

        async def failed(event: Event, reason: str) -> None:
            told = {"rule": str(event.data.get("rule", "")), "destination": name}
            await app.publish("transfer.failed", {**told, "reason": reason, "attempts": event.attempt}, cause=event)

        app.on(ORDERED, on_dead=failed)(send)
        return app

    # Deciding.

    async def _decide(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        identifier = event.resource_id
        if identifier is None:
            return
        try:
            resource = await look(orthanc, event.level, identifier, self._wanted)
        except GoneError as error:
            log.info("%r: %s: nothing is sent", event, error.message)
            return
        decision = Decision(self.settings.rules, self.settings.match, resource)
        log.info("%r: %s", event, ", ".join(f"{to} by {rule}" for to, rule in decision.rules.items()) or "to nobody")
        if not self._dry:
            for name, rule in decision.rules.items():
                await self._inboxes.put(f"{self.settings.name}-{name}", _order(event, resource, name, rule))

    # Sending.

    async def _send(self, app: Consumer, sender: Sender, event: Event, orthanc: httpx.AsyncClient) -> None:
        rule, cause = str(event.data.get("rule", "")), str(event.data.get("cause", ""))
        told = {"destination": sender.name, "rule": rule, "level": event.level, "id": event.resource_id, "event": cause}
        try:
            resource = await look(orthanc, event.level, str(event.resource_id), Wanted(metadata=True))
        except GoneError:
            self._audit.note("not sent", **told, why="it was deleted")
            return
        if await sender.is_source(orthanc, resource):
            self._audit.note("not sent", **told, why="it has come from there")
            return
        data: dict[str, Any] = {"rule": rule, "destination": sender.name, "instances": len(resource.instances)}
        # By its content, and not by the event: what comes round, or is said twice, is sent once.
        # Who gives no sign of life for so long loses the order too: another has the turn as soon as it has that.
        lease = self.settings.ack_wait
        async with app.once(event, "send", of=resource.fingerprint, lease=lease) as first:
            if first:
                job = await sender.send(orthanc, resource, event.time)
                self._audit.note("sent", **told, instances=len(resource.instances), job=job or None)
                data |= {"job": job} if job else {}
            else:
                self._audit.note("not sent", **told, why="it was sent already")
        # Apart: where only telling fails, nothing is sent again.
        async with app.once(event, "tell", of=resource.fingerprint) as untold:
            if untold:
                await app.publish(f"{resource.level}.routed", data, cause=event)

    # Life.

    def complete(self) -> None:
        """See `Programs.complete`."""
        self._audit.check()
        for sender in self._senders.values():
            sender.check()
        super().complete()

    async def close(self) -> None:
        """See `Programs.close`."""
        await self._inboxes.close()
        for sender in self._senders.values():
            await sender.close()

    @property
    def level(self) -> str:
        """``study``, ``series`` or ``instance``: of what it sends."""
        return self.settings.event.partition(".")[0]

    @property
    def consumers(self) -> list[Consumer]:
        """All of it."""
        return [self.deciding, *self.sending.values()]

    async def check(self) -> list[str]:
        """Look at everything, and leave again.

        :return: what was found, in a few lines.
        :raises BridgeError: something can't be used.
        """
        self.complete()
        found = await self.deciding.check(store=True)
        async with self.deciding.asking() as orthanc:
            if self._wanted.labels:
                await check_labels(orthanc)
            for sender in self._senders.values():
                found.append(await sender.describe(orthanc))
        return [*found, *odd(self._wanted.tags)]

    async def explain(self, orthanc: httpx.AsyncClient, identifier: str) -> tuple[Resource, Decision]:
        """What the rules say of a resource that is there now.

        :raises GoneError: there is none.
        """
        resource = await look(orthanc, self.level, identifier, self._wanted)
        return resource, Decision(self.settings.rules, self.settings.match, resource)


def _order(event: Event, resource: Resource, destination: str, rule: str) -> Outgoing:
    """The order to send a resource somewhere; its id follows from the event's and the destination's."""
    above = {} if resource.level == "study" else {"study": resource.study}
    data = {
        "level": resource.level,
        "id": resource.id,
        "parents": {**event.data.get("parents", {}), **above},
        "destination": destination,
        "rule": rule,
        "cause": event.id,
    }
    return order(ORDERED, f"{event.id}\n{destination}", Origin.of(event, resource.study), data)
