"""What the runner does at the broker itself: it sends events, and looks at the dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.consumers.dead import Letter, letter_of, redrive
from orthanc_events_bridge.errors import NotConnectedError, RefusedError
from orthanc_events_bridge.transports.base import PublishError

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.base import Outgoing, Transport

#: Seconds between two attempts to send.
_PAUSE: Final = 0.3


async def send(transport: Transport, events: Sequence[Outgoing], patience: float) -> None:
    """Send events; again and again where the broker is not ready, as one is that has just made its topic.

    :param patience: for so many seconds.
    :raises TransportError: it takes them not, or not within that time.
    """
    end = asyncio.get_running_loop().time() + patience
    while events:
        try:
            await transport.publish(events)
        except PublishError as error:
            passing = isinstance(error.error, NotConnectedError | RefusedError)
            if not passing or asyncio.get_running_loop().time() > end:
                raise error.error from error
            events = events[error.confirmed :]
            await asyncio.sleep(_PAUSE)
            await transport.connect()
        else:
            return


async def letters(transport: Transport, name: str) -> list[Letter]:
    """A consumer's dead letters.

    :raises TransportConfigurationError: their place is not as it has to be.
    :raises TransportError: the broker doesn't answer.
    """
    dead = await transport.dead_letters(name)
    try:
        async with aclosing(dead.read()) as found:
            return [letter_of(one) async for one in found]
    finally:
        await dead.close()


async def give_again(transport: Transport, name: str, body: bytes) -> None:
    """Send a dead letter with this body to its consumer's inbox, as ``orthanc-events dlq redrive`` does.

    :raises TransportError: as `letters`.
    """
    dead, inbox = await transport.dead_letters(name), transport.inbox(name)
    try:
        await inbox.connect()
        async with aclosing(dead.read()) as found:
            some = [letter_of(one) async for one in found if one.message.body == body]
        await redrive(dead, inbox, some[:1])
    finally:
        await inbox.close()
        await dead.close()
