"""Waiting for events in integration tests, as a subscriber of the broker receives them."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Final

from orthanc_events_bridge.consumers.broker import broker_options
from orthanc_events_bridge.consumers.event import Event, UnreadableError, read
from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports import create

#: How many events a message shows.
_SHOWN: Final = 30


def events_until(
    broker: Mapping[str, Any],
    name: str,
    counts: Callable[[Event], bool],
    where: Callable[[Event], bool],
    timeout: float,
) -> list[Event]:
    """Read what a broker has kept and what comes, from the oldest on, until one event is there.

    Nothing is acknowledged, and consumers don't notice. It is read anew where the connection is lost.

    :param broker: a transport's options.
    :param name: of the one, without prefix and version, or a pattern of names; or its whole type.
    :param counts: whether an event is of what is asked for, the one too.
    :param where: a condition that the one has to meet as well.
    :param timeout: seconds.
    :return: those that count in the order in which they came, the one at the end.
    :raises TimeoutError: it did not come; the message says what did.
    :raises BridgeError: the broker is none, or does not permit it.
    """
    found: list[Event] = []

    def last(event: Event) -> bool:
        called = fnmatch.fnmatchcase(event.name, name) or event.type == name
        return called and counts(event) and where(event)

    try:
        asyncio.run(asyncio.wait_for(_follow(broker, last, found), timeout))
    except TimeoutError:
        counting = [event for event in found if counts(event)]
        shown = counting[-_SHOWN:]
        came = (
            "".join(f"    {event.name}  {event.attributes.get('subject', '')}\n" for event in shown) or "    nothing\n"
        )
        end = "" if len(shown) == len(counting) else f" (the last {_SHOWN})"
        raise TimeoutError(
            f"{name} as it is asked for did not come within {timeout:g} s. {len(found)} events came; of what is "
            f"asked for these{end}:\n{came}"
        ) from None
    return [event for event in found if counts(event)]


async def _follow(broker: Mapping[str, Any], last: Callable[[Event], bool], found: list[Event]) -> None:
    while True:
        transport = create(broker_options(broker))
        found.clear()
        try:
            await transport.connect()
            async with contextlib.aclosing(transport.tail(oldest=True)) as messages:
                async for message in messages:
                    with contextlib.suppress(UnreadableError):  # somebody else's
                        found.append(read(message))
                        if last(found[-1]):
                            return
        except NotConnectedError:
            await asyncio.sleep(0.2)
        finally:
            await transport.close()
