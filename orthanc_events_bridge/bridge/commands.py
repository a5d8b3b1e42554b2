"""What the operator asks for on the command line, done one by one. Each may be done twice: a bridge may be killed."""

from __future__ import annotations

import logging

from orthanc_events_bridge.bridge.fleet import Fleet
from orthanc_events_bridge.bridge.state import Command, State
from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.transports import create

log = logging.getLogger(__name__)


class CannotError(Exception):
    """It can't be done; the text is for the one who asked."""


async def obey(command: Command, fleet: Fleet, state: State, *, running: bool = True) -> None:
    """Do what was asked, and leave an answer.

    :param running: whether what is asked takes effect at once; otherwise with the fleet's first `settle`.
    :raises OutboxError: ``bridge.db`` can't be written, or the outbox not be read; the command stays.
    """
    name = command.transport
    if command.command == "backfill":  # it is capture's work, which reads it here
        state.note("backfill", dict(command.argument))
        state.done(command, "Orthanc's process is asked")
        return
    try:
        if fleet.options(name) is None and name not in state.known() and not fleet.paused(name):
            raise CannotError(f"there is no transport {name}")
        match command.command:
            case "pause":
                text = await _pause(name, fleet, running=running)
            case "resume":
                text = await _resume(name, fleet, running=running)
            case "forget":
                text = _forget(name, fleet)
            case "resend":
                text = await _resend(name, int(command.argument), fleet, state)
            case other:
                raise CannotError(f"this version of the bridge can't {other}")
    except CannotError as error:
        log.error("what was asked of transport %s can't be done: %s", name, error)
        state.done(command, str(error), failed=True)
    else:
        log.warning("%s, as was asked", text)
        state.done(command, text)


async def _pause(name: str, fleet: Fleet, *, running: bool) -> str:
    if fleet.options(name) is None:
        raise CannotError(f"transport {name} is not configured: nothing is sent to it")
    fleet.pause(name)
    if running:
        await fleet.settle()
    return f"transport {name} is paused, and the outbox keeps what it has not had ({fleet.pending(name)} rows)"


async def _resume(name: str, fleet: Fleet, *, running: bool) -> str:
    if not fleet.paused(name):
        raise CannotError(f"transport {name} is not paused")
    fleet.resume(name)
    if running:
        await fleet.settle()
    return f"transport {name} goes on from its position ({fleet.pending(name)} rows)"


def _forget(name: str, fleet: Fleet) -> str:
    if fleet.options(name) is not None:
        raise CannotError(f"transport {name} is still configured: remove it from the configuration first")
    held = fleet.pending(name)
    fleet.forget(name)
    return f"transport {name} is forgotten, and the outbox holds nothing for it any more ({held} rows it has not had)"


async def _resend(name: str, position: int, fleet: Fleet, state: State) -> str:
    """Send an event that was set aside once more, over a connection of its own."""
    options = fleet.options(name)
    if options is None:
        raise CannotError(f"transport {name} is not configured")
    if fleet.paused(name):
        raise CannotError(f"transport {name} is paused; resume it first")
    rows = fleet.source.rows(position - 1, 1)
    if not rows or rows[0].position != position:
        raise CannotError(f"the event at {position} is no longer kept")
    row = rows[0]
    event = to_outgoing(row, fleet.source.shape(row.settings), fleet.source.recorder, binary=options.mode == "binary")
    if state.aside(name, position) not in (None, event.id):  # of an outbox that was here before
        raise CannotError(f"the event that was set aside at {position} is no longer kept")
    try:
        transport = create(options)
        try:
            await transport.connect()
            await transport.publish([event])
        finally:
            await transport.close()
    except TransportError as error:
        raise CannotError(f"the event at {position} was not taken again: {error}") from error
    except Exception as error:  # a defect must not end the bridge: the command would be there at its next start
        defect = f"{type(error).__name__}: {error}; please report this"
        raise CannotError(f"the event at {position} was not taken again: {defect}") from error
    state.taken_back(name, position)
    return f"transport {name}: the event at {position} was sent again"
