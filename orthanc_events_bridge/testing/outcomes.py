"""What a test sees of a consumer: which handlers were called, and what became of each delivery."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.routes import Handler, Route
from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery, Subscription
from orthanc_events_bridge.transports.headers import REASON


@dataclass(frozen=True)
class Call:
    """A handler was called.

    :ivar handler: its name.
    :ivar event: what with.
    :ivar result: what it returned.
    :ivar error: what it raised, or none.
    """

    handler: str
    event: Event
    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a delivery.

    :ivar kind: ``handled``: its handlers have returned, or did not want it; ``ignored``: there are none for its type;
        ``retried``; ``dead``: it is among the dead letters.
    :ivar event: what was delivered; none where it could not be read.
    :ivar at: seconds since the kit began.
    :ivar attempt: which delivery of the event it was, from 1.
    :ivar delay: with ``retried``: seconds until the next.
    :ivar reason: with ``dead``: why.
    :ivar calls: of its handlers, in order.
    :ivar headers: what the dead letter says beside its reason.
    """

    kind: Literal["handled", "ignored", "retried", "dead"]
    event: Event | None
    at: float
    attempt: int
    delay: float | None = None
    reason: str = ""
    calls: tuple[Call, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def error(self) -> BaseException | None:
        """What its handler raised."""
        return next((call.error for call in self.calls if call.error is not None), None)

    def __repr__(self) -> str:
        event = "a message that is no event" if self.event is None else spell(self.event)
        text = f"{timedelta(seconds=round(self.at))} {event}, attempt {self.attempt}: {self.kind}"
        if self.calls:
            text += f" by {', '.join(call.handler for call in self.calls)}"
        if self.delay is not None:
            text += f", again in {self.delay:g} s"
        if self.reason:
            text += f", {self.reason}"
        if self.error is not None:
            words = str(self.error).splitlines() or [""]
            text += f" ({type(self.error).__name__}: {words[0]})"
        return text


class Settling(Delivery):
    """A delivery that tells how it is settled."""

    def __init__(self, delivery: Delivery, tell: Callable[..., None]) -> None:
        super().__init__(delivery.message, delivery.attempt)
        self._delivery = delivery
        self._tell = tell

    async def ack(self) -> None:
        await self._delivery.ack()
        self._tell(self, "handled")

    async def nack(self, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        await self._delivery.nack(delay, headers)
        self._tell(self, "retried", delay=delay)

    async def reject(self, headers: Mapping[str, str]) -> None:
        await self._delivery.reject(headers)
        self._tell(self, "dead", reason=headers.get(REASON, ""), headers=dict(headers))

    async def extend(self) -> None:
        await self._delivery.extend()


class Told(Subscription):
    """A subscription whose deliveries tell how they are settled."""

    def __init__(self, subscription: Subscription, tell: Callable[..., None]) -> None:
        self._subscription = subscription
        self._tell = tell

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        return [Settling(one, self._tell) for one in await self._subscription.receive(limit, wait)]

    async def close(self) -> None:
        await self._subscription.close()


class Outcomes:
    """Everything of the kit that is only looked at.

    :ivar outcomes: what became of each delivery, in the order of their ends.
    """

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    @property
    def waiting(self) -> float | None:
        """Seconds until the next retry is due; none where none waits."""
        raise NotImplementedError

    @property
    def calls(self) -> list[Call]:
        """Every call of a handler, in the order of the outcomes."""
        return [call for one in self.outcomes for call in one.calls]

    @property
    def results(self) -> list[Any]:
        """What handlers returned, where they returned."""
        return [call.result for call in self.calls if call.error is None]

    @property
    def handled(self) -> list[Outcome]:
        """Deliveries whose handlers have returned."""
        return self._of("handled")

    @property
    def ignored(self) -> list[Outcome]:
        """Deliveries of types that no handler is for."""
        return self._of("ignored")

    @property
    def retried(self) -> list[Outcome]:
        """Deliveries that were given back; each one's ``delay`` says for how long."""
        return self._of("retried")

    @property
    def dead(self) -> list[Outcome]:
        """Deliveries that are among the dead letters; each one's ``reason`` says why."""
        return self._of("dead")

    @property
    def story(self) -> str:
        """All that happened, a line for each delivery: what a failing assertion shows."""
        lines = [f"  {one!r}" for one in self.outcomes] or ["  nothing was delivered"]
        if self.waiting is not None:
            lines.append(f"  and the next retry is due in {self.waiting:g} s")
        return "\n".join(lines)

    def assert_handled(self, *events: Event) -> None:
        """Each of these was handled; without any: every event that was sent was, or was ignored.

        :param events: as they were sent.
        :raises AssertionError: no, with the story.
        """
        __tracebackhide__ = True
        done = {one.event.id for one in (*self.handled, *self.ignored) if one.event is not None}
        if events:
            self._check([one for one in events if one.id not in done], "was not handled")
            return
        self._check([one.event for one in (*self.retried, *self.dead) if id_of(one) not in done], "was not handled")
        self._check([] if self.outcomes else [None], "was handled, for nothing was sent")

    def assert_retried(self, event: Event, *delays: float) -> None:
        """It was given back, with these delays where any are given.

        :param event: as it was sent.
        :param delays: seconds, of each time that it was given back.
        :raises AssertionError: no, with the story.
        """
        __tracebackhide__ = True
        found = [one.delay for one in self.retried if id_of(one) == event.id]
        self._check([] if found else [event], "was not given back")
        if delays:
            self._check(
                [] if found == list(delays) else [event], f"was given back for {found}, not for {list(delays)} s"
            )

    def assert_dead(self, event: Event, reason: str = "") -> None:
        """It is among the dead letters, with a reason that holds this.

        :param event: as it was sent.
        :param reason: a part of it.
        :raises AssertionError: no, with the story.
        """
        __tracebackhide__ = True
        found = [one.reason for one in self.dead if id_of(one) == event.id]
        self._check([] if found else [event], "is not among the dead letters")
        self._check([] if any(reason in one for one in found) else [event], f"is there because {found}, not {reason!r}")

    def _check(self, wrong: Iterable[Event | None], what: str) -> None:
        __tracebackhide__ = True
        for event in wrong:
            subject = "nothing" if event is None else spell(event)
            raise AssertionError(f"{subject} {what}. What happened:\n{self.story}")

    def _of(self, kind: str) -> list[Outcome]:
        return [one for one in self.outcomes if one.kind == kind]


def watch(route: Route, note: Callable[..., None]) -> Handler:
    """The handler, with what it does written down: ``note(event, result)`` or ``note(event, error=…)``."""
    handler: Any = route.handler
    if route.is_async:

        @functools.wraps(handler)
        async def awaited(event: Event, *rest: Any) -> Any:
            try:
                result = await handler(event, *rest)
            except BaseException as error:
                note(event, error=error)
                raise
            note(event, result)
            return result

        return awaited

    @functools.wraps(handler)
    def plain(event: Event, *rest: Any) -> Any:
        try:
            result = handler(event, *rest)
        except BaseException as error:
            note(event, error=error)
            raise
        note(event, result)
        return result

    return plain


def spell(event: Event) -> str:
    """What it is, for a person."""
    subject = event.attributes.get("subject", "")
    return f"{event.name} {subject}".rstrip()


def id_of(outcome: Outcome) -> str:
    """Of its event; empty where it had none."""
    return "" if outcome.event is None else outcome.event.id
