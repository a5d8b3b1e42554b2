"""``orthanc-events tail``: events live, as a subscriber of the broker receives them, or as the outbox has them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.cli_options import (
    EXIT_CODES,
    Commands,
    add_command,
    outbox_folder,
    outbox_options,
    settings_of,
)
from orthanc_events_bridge.errors import BridgeError, FolderError
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.folder import Folder

if TYPE_CHECKING:
    from orthanc_events_bridge.bridge.settings import Settings
    from orthanc_events_bridge.transports.base import Incoming, Transport
    from orthanc_events_bridge.transports.options import TransportOptions

#: Seconds between two looks into the outbox, and rows of one.
_LOOK: Final = 0.2
_ROWS: Final = 500

_EPILOG: Final = f"""\
Each line shows an event's time, type and subject, and never its data; --json prints
all of it, in CloudEvents' JSON format, whichever mode it was sent in. Nothing is
acknowledged, and consumers don't notice. Ctrl-C ends it.

What can't be read back from where it was sent to (a webhook) is read from the outbox
in place of it: everything that is recorded for the transport, delivered or not. That
needs the outbox's folder.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "print events live, as a subscriber of the broker receives them"
    tail = add_command(commands, "tail", _tail, summary, epilog=_EPILOG)
    tail.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONFIG")
    tail.add_argument("--transport", metavar="NAME", help="default: the first one")
    tail.add_argument("--oldest", action="store_true", help="begin with the oldest event that is kept")
    tail.add_argument("--json", action="store_true", help="whole events, one per line")
    outbox_options(tail)


def _tail(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.transports import create

    settings = settings_of(options.config)
    found = next((one for one in settings.transports if options.transport in (None, one.name)), None)
    if found is None:
        names = ", ".join(one.name for one in settings.transports)
        raise BridgeError(f"there is no transport {options.transport}", f"there are: {names}")
    show = _print_json if options.json else _print_line
    transport = create(found)
    if transport.capabilities.replayable:
        follow = _follow_broker(transport, show, oldest=options.oldest)
    else:
        place = _folder_for(options, found)
        print(f"{found.name}: events can't be read back from a {found.type}; these are the outbox's", file=sys.stderr)
        follow = _follow_outbox(place, settings, found, show, oldest=options.oldest)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(follow)
    return 0


def _folder_for(options: argparse.Namespace, transport: TransportOptions) -> Folder:
    try:
        return outbox_folder(options)
    except FolderError as error:
        wrong = f"transport {transport.name}: events can't be read back from a {transport.type}, and {error.message}"
        raise FolderError(wrong, error.remedy) from error


# -- where they come from ------------------------------------------------------------------------------------


async def _follow_broker(transport: Transport, show: Callable[[Incoming], None], *, oldest: bool) -> None:
    try:
        await transport.connect()
        async with contextlib.aclosing(transport.tail(oldest=oldest)) as messages:
            async for message in messages:
                show(message)
    finally:
        await transport.close()


async def _follow_outbox(
    place: Folder, settings: Settings, found: TransportOptions, show: Callable[[Incoming], None], *, oldest: bool
) -> None:
    async with contextlib.aclosing(_recorded(place, settings, found, oldest=oldest)) as messages:
        async for message in messages:
            show(message)


async def _recorded(
    place: Folder, settings: Settings, found: TransportOptions, *, oldest: bool
) -> AsyncGenerator[Incoming]:
    """The outbox's events for a transport, as they are recorded."""
    from orthanc_events_bridge.bridge.fleet import Source
    from orthanc_events_bridge.events.mapping import short_name, to_outgoing
    from orthanc_events_bridge.outbox_reader import OutboxReader
    from orthanc_events_bridge.status import BridgeView
    from orthanc_events_bridge.transports.base import Incoming

    reader, view = OutboxReader(place.outbox), BridgeView(place.bridge)
    try:
        position = 0 if oldest else int(reader.meta().get("position", 0))
        source = Source(reader, lambda: view.all_settings() or {0: settings.shape()})
        while True:
            rows = reader.rows(position, _ROWS)
            for row in rows:
                position = row.position
                name = short_name(row)
                if settings.events.accepts(name) and found.events.accepts(name):
                    event = to_outgoing(row, source.shape(row.settings), source.recorder)
                    headers = {"content-type": event.content_type}
                    yield Incoming("", event.body, headers, str(row.position))
            if not rows:
                await asyncio.sleep(_LOOK)
    finally:
        view.close()
        reader.close()


# -- what is shown -------------------------------------------------------------------------------------------


def event_line(message: Incoming) -> str:
    """Time, type, subject: what may be shown of an event."""
    event = event_of(message)
    if event is None or "type" not in event:
        return "a message that is no CloudEvent"
    time, kind, subject = (str(event.get(name, "")) for name in ("time", "type", "subject"))
    line = f"{time:<24}  {kind:<45}  {subject}".rstrip()
    return "".join(character if character.isprintable() else "?" for character in line)


def _print_line(message: Incoming) -> None:
    print(event_line(message), flush=True)


def _print_json(message: Incoming) -> None:
    event = event_of(message)
    if event is None:
        print(f"a message that is no CloudEvent, at {message.address} {message.position}".rstrip(), file=sys.stderr)
    else:
        print(json.dumps(event), flush=True)
