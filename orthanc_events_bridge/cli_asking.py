"""How the command line asks the bridge for something: by ``bridge.db``, at which the bridge looks once a second."""

from __future__ import annotations

import time
from typing import Final

from orthanc_events_bridge import status
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.folder import Folder

#: Seconds that the bridge may take to answer: it lets a batch that is under way come to its end.
_WAIT: Final = 30.0
_POLL: Final = 0.1


def ask(place: Folder, command: str, transport: str = "", argument: object = None, *, wait: bool = True) -> str | None:
    """Ask for something, and wait for the answer.

    :return: what the bridge says; none where it isn't waited for, or isn't running: it does it when it starts.
    :raises BridgeError: it can't be done, or the bridge doesn't answer.
    """
    from orthanc_events_bridge.bridge.state import State

    state = State(place.bridge)
    try:
        number = state.ask(command, transport, argument)
        if not wait or not status.running(place):
            return None
        until = time.monotonic() + _WAIT
        while (answer := state.answer(number)) is None and time.monotonic() < until:
            time.sleep(_POLL)
    finally:
        state.close()
    if answer is None:
        raise BridgeError(
            f"the bridge has not answered within {_WAIT:.0f} s", "it does so when it can: see `orthanc-events status`"
        )
    done, text = answer
    if not done:
        raise BridgeError(text)
    return text
