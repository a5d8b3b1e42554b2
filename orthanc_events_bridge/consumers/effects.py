"""What handlers do that others notice: effects that are done once, events of their own, notes for the other workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.once import KEEP, LEASE, Once, Turns
from orthanc_events_bridge.consumers.publishing import Publisher, derive
from orthanc_events_bridge.errors import BridgeError


class Effects:
    """That part of `orthanc_events_bridge.consumers.Consumer`.

    :ivar name: of the consumer.
    :ivar meter: counts what it publishes, among other things.
    """

    name: str
    meter: Meter
    _turns: Turns
    _publisher: Publisher

    def once(
        self, event: Event, effect: str, *, of: str | None = None, lease: float = LEASE, keep: float = KEEP
    ) -> Once:
        """Do something once for an event, although events come at least once, to any worker of this name.

        ::

            async with app.once(event, "anonymize") as first:
                if first:
                    await orthanc.post(f"/studies/{event.study_id}/anonymize", json={})

        In handlers that are no coroutine functions it is ``with``. Where another worker is at it, `Retry` is raised
        until that one's lease is over or the effect is done. What is raised inside gives the effect free for the next
        attempt. What is promised, and what not: docs/once.md.

        :param effect: a name for it, letters, digits, ``_`` and ``-``. Several effects of one event have several.
        :param of: what it is done once for, where that is not the event: the content of a study, say, of which
            several events tell. Any text; it is stored as a hash.
        :param lease: seconds behind which another may begin it, once this worker gives no sign of life any more. It is
            renewed for as long as the effect takes.
        :param keep: seconds for which it is remembered that it is done; at least as long as the broker keeps events.
        :raises BridgeError: the consumer has no store, or a value makes no sense.
        :raises StoreError: on entering: the store can't be asked. Nothing is begun then.
        """
        return Once(self._turns, event, effect, lease, keep, of)

    async def publish(
        self,
        name: str,
        data: Mapping[str, Any] = MappingProxyType({}),
        *,
        cause: Event,
        of: str | None = None,
        linked: bool = True,
    ) -> str:
        """Publish an event that follows from another one, for everybody, beside those of the bridge.

        ::

            await app.publish("org.example.report.signed.v1", {"report": 7}, cause=event)

        Its id follows from its type, this consumer's name, and its cause: published again, as when a handler is called
        again, it is the same, and a duplicate as any other. It is of the cause's source and site, and about the same
        resource unless its data says otherwise by ``level``, ``id`` and ``parents``; it carries ``causationid`` and
        ``correlationid`` (docs/events.md). Its data must hold no patient data: everybody can read it.

        In handlers that are no coroutine functions it is `publish_and_wait`.

        :param name: one of the types that consumers publish, such as ``study.ready``; or a whole type of your own that
            begins with your domain.
        :param data: any JSON object; of a type of ours what its schema says.
        :param cause: the event that is being handled.
        :param of: what it is told once of, where that is not the cause: its id then follows from this text in place of
            it. Where one handler publishes several of a type, ``f"{event.id} {number}"``.
        :param linked: False: nothing in it leads back to its cause, so that nobody learns from it what belongs
            together. `of` must not lead there either.
        :return: its id, once the broker has confirmed it.
        :raises BridgeError: there can be no such event.
        :raises TransportError: it is not confirmed. When the handler lets that through, it is called again.
        """
        try:
            event = derive(name, data, cause, producer=self.name, now=time.time(), of=of, linked=linked)
            await self._publisher.send(event)
        except BridgeError:
            self.meter.count("publish_failed", name)
            raise
        self.meter.count("published", name)
        return event.id

    def publish_and_wait(self, name: str, data: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> str:
        """`publish`, for handlers that run in threads.

        :param name: the event's type.
        :param data: its data.
        :param more: what else `publish` takes.
        :raises BridgeError: as `publish`; or it is called elsewhere.
        """
        return self._turns.wait(self.publish(name, data, **more), "publish_and_wait", "await app.publish(…)")

    async def recall(self, name: str) -> str | None:
        """The text that is noted in the consumer's store under a name; none where none is. See `swap`.

        :raises BridgeError: the consumer has no store, or it can't be asked.
        """
        return await (await self._turns.store()).recall(self._turns.note(name))

    async def swap(self, name: str, old: str | None, new: str, keep: float = KEEP) -> bool:
        """Note a short text in the consumer's store, for all its workers, in place of another.

        :param name: any text; it is stored as a hash.
        :param old: what is noted there now; none: nothing.
        :param new: printable ASCII, at most 128 characters; no patient data.
        :param keep: seconds for which it is remembered.
        :return: whether it is noted. If not, another has noted something since (or the answer got lost): look again.
        :raises BridgeError: the consumer has no store, or it can't be asked.
        """
        return await (await self._turns.store()).swap(self._turns.note(name), old, new, keep)
