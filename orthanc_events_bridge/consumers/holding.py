"""What a worker holds, and whether it is still its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.errors import NotConnectedError, TransportError

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.routes import Route
    from orthanc_events_bridge.transports.base import Delivery

#: The part of ``ack_wait`` behind which a delivery is extended, and behind which we count as frozen.
_EXTEND: Final = 1 / 3
_FROZEN: Final = 0.4
#: Seconds between two looks at the clock.
_TICK: Final = 0.05


class Held:
    """A delivery that is not settled yet.

    :ivar routes: of its handlers.
    :ivar at: the one that runs, or ran last.
    :ivar since: when it was received, or extended last.
    :ivar begun: its handlers have begun, or it is being settled.
    :ivar void: it is not ours any more.
    """

    __slots__ = ("at", "begun", "delivery", "event", "key", "routes", "since", "void")

    def __init__(self, delivery: Delivery, event: Event, routes: Sequence[Route], since: float) -> None:
        self.delivery = delivery
        self.event = event
        self.key = event.key
        self.routes = routes
        self.at: Route | None = None
        self.since = since
        self.begun = False
        self.void = False


class Holding:
    """All of one worker.

    A process that stood still for most of ``ack_wait`` has lost what it held: that is void then.

    :param clock: seconds, also those for which the machine slept.
    :ivar ack_wait: of its subscription, in seconds.
    :ivar ticked: when it last looked at the clock.
    :ivar broken: set when what was held is void, and it has to be subscribed again.
    """

    def __init__(self, clock: Callable[[], float], ack_wait: float) -> None:
        self._clock = clock
        self._held: dict[Held, None] = {}
        self.ack_wait = ack_wait
        self.ticked = clock()
        self.broken = asyncio.Event()

    @property
    def running(self) -> list[str]:
        """The names of the handlers that run, each with how often it does."""
        names = Counter(held.at.name for held in list(self._held) if held.begun and held.at is not None)
        return [name if count == 1 else f"{name} ({count} times)" for name, count in sorted(names.items())]

    def add(self, delivery: Delivery, event: Event, routes: Sequence[Route]) -> Held:
        """One more, that was received when the clock was last looked at."""
        held = Held(delivery, event, routes, self.ticked)
        self._held[held] = None
        return held

    def remove(self, held: Held) -> None:
        """It is settled, or lost."""
        self._held.pop(held, None)

    def look(self) -> None:
        """Did we stand still?"""
        now = self._clock()
        gap, self.ticked = now - self.ticked, now
        if gap > _FROZEN * self.ack_wait:
            self.fail()

    def fail(self) -> None:
        """It has to be subscribed again."""
        self.give_up()
        self.broken.set()

    def give_up(self) -> None:
        """What is held belongs to others now. What runs goes on to its end, and is not settled."""
        for held in self._held:
            held.void = True
        self._held.clear()

    def take_unbegun(self) -> list[Delivery]:
        """Those that have not begun, in their order: they never will."""
        found = [held for held in self._held if not held.begun]
        for held in found:
            held.void = True
            del self._held[held]
        return [held.delivery for held in found]

    def fault(self) -> NotConnectedError:
        """Why it is broken."""
        return NotConnectedError(
            f"this process stood still for longer than {_FROZEN * self.ack_wait:g} s, or could not go on",
            "what it held comes again; where an async handler blocks its event loop, make it a sync one",
        )

    async def tick(self) -> None:
        """Look, again and again."""
        while True:
            await asyncio.sleep(_TICK)
            self.look()

    async def beat(self) -> None:
        """Keep alive what is held."""
        every = self.ack_wait * _EXTEND
        while True:
            await asyncio.sleep(every / 4)
            now = self._clock()
            for held in [one for one in self._held if now - one.since >= every]:
                with contextlib.suppress(TransportError):  # receiving says it
                    if held in self._held:
                        held.since = now
                        await held.delivery.extend()
