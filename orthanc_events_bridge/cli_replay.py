"""``orthanc-events replay``: send kept events again, to one consumer or to everyone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.cli_options import (
    Commands,
    add_command,
    moment,
    outbox_folder,
    outbox_options,
    settings_of,
)
from orthanc_events_bridge.cli_status import table
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.status import BridgeView

if TYPE_CHECKING:
    from orthanc_events_bridge.bridge.replays import Kept, Run
    from orthanc_events_bridge.bridge.settings import Settings
    from orthanc_events_bridge.folder import Folder
    from orthanc_events_bridge.outbox_reader import OutboxReader
    from orthanc_events_bridge.transports.options import TransportOptions

_EPILOG: Final = """\
examples:
  orthanc-events replay --since 2h --to archive --dry-run
      how many events of the last two hours there are, by type
  orthanc-events replay --since 2026-11-23T21:36:00Z --type 'study.*' --to archive
      send those to the consumer archive alone
  orthanc-events replay --all --study df233dd3-d1261615-db834952-f98431ce-a9baca58 --to archive
      all that is kept about one study
  orthanc-events replay --from 79 --everyone --transport research
      from a position (an event's `sequence`) on, to all who listen there
  orthanc-events replay --resume
      go on with a replay that was interrupted

What is sent is what the transport was sent before: the same events under the same ids,
byte for byte, as far as its filters let them through and the outbox still keeps them
(outbox.keep). Each has the header `orthanc-operation: replay`. It goes to the inbox of
one consumer, which nobody else reads: NATS stream ORTHANC_EVENTS_INBOX, subject
orthanc.inbox.CONSUMER; a queue, or a topic, orthanc.inbox.CONSUMER at RabbitMQ and
Kafka. A webhook has no inboxes. With --everyone, all consumers get it a second time.

What is recorded meanwhile is sent by the bridge as ever, and not held up. Replayed
events stand outside of its order; among themselves they are in order.

The number of a replay is said when it begins. Interrupted by Ctrl-C, or because the
machine or the broker went down, it goes on with --resume where it was; a few events can
then come twice. While the broker can't be reached, it waits and tries again. Rows that
the outbox deletes meanwhile are counted, and an event that the broker can never take is
named; both don't end it.

An inbox is made where it is missing, so mind the name: a consumer that doesn't exist
gets its events all the same, when it comes.

exit codes: 0 done, 1 failed, 2 wrong configuration or arguments, 75 another process
works on this replay, 130 interrupted"""


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "send kept events again, to one consumer or to everyone"
    replay = add_command(commands, "replay", _replay, summary, epilog=_EPILOG)
    replay.add_argument("--transport", metavar="NAME", help="default: the only one that is configured")
    where = replay.add_mutually_exclusive_group()
    text = "what was recorded since then: a time, or how long ago (90m, 12h, 7d)"
    where.add_argument("--since", metavar="TIME", type=moment, help=text)
    where.add_argument("--from", dest="first", metavar="POSITION", type=_position, help="from this position on")
    where.add_argument("--all", action="store_true", help="everything that the outbox keeps")
    where.add_argument(
        "--resume", metavar="NUMBER", nargs="?", type=int, const=0, help="go on with this replay, or with the only one"
    )
    text = "only events whose short name matches, such as study.stable; can be given several times"
    replay.add_argument("--type", metavar="GLOB", action="append", default=[], help=text)
    replay.add_argument("--study", metavar="ID", default="", help="only events about this study, by Orthanc's id")
    to = replay.add_mutually_exclusive_group()
    to.add_argument("--to", metavar="CONSUMER", default="", help="to the inbox of this consumer, and nobody else")
    to.add_argument("--everyone", action="store_true", help="to where events go, once more; asks first")
    replay.add_argument("--yes", action="store_true", help="with --everyone: don't ask")
    replay.add_argument("--rate", metavar="N", type=_rate, default=0.0, help="so many events a second, at most")
    replay.add_argument("--dry-run", action="store_true", help="only count what would be sent, by type")
    replay.add_argument("--json", action="store_true", help="one JSON document")
    replay.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONFIG")
    outbox_options(replay)
    replay.set_defaults(wrong=replay.error)


def _position(text: str) -> int:
    if re.fullmatch(r"\d{1,20}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no position: write the digits of an event's sequence")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: write how many events may go in a second")
    return rate


def _replay(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.bridge.replay import Pace, Selected, count
    from orthanc_events_bridge.cli_sending import again, send
    from orthanc_events_bridge.outbox_reader import OutboxReader

    _check(options)
    settings, place = settings_of(options.config), outbox_folder(options)
    reader, view = OutboxReader(place.outbox), BridgeView(place.bridge)
    try:
        if options.resume is None and options.dry_run:
            transport = _transport(settings, options.transport)
            run = _plan(options, 0, transport, reader, view)
            found = count(Selected(reader, view.all_settings, run, _accepts(settings, transport, run)), run)
            _print(options, {"dry_run": True, **_document(run), "events": dict(sorted(found.items()))}, run, found)
            return 0
        kept = _kept(options, settings, place, reader, view)
        try:
            transport = _transport(settings, kept.run.transport)
            if kept.run.transport in view.paused():
                resume = f"`orthanc-events transports resume {kept.run.transport}` first"
                raise BridgeError(f"transport {kept.run.transport} is paused", resume)
            source = Selected(reader, view.all_settings, kept.run, _accepts(settings, transport, kept.run))
            number = send(transport, kept, source, Pace(options.rate))
            _print(options, {"done": not number, **_document(kept.run), **_outcome(kept.run)}, kept.run, kept.run.sent)
            if number:
                print(f"interrupted; {again(kept.run)}", file=sys.stderr)
            return 128 + number if number else 0
        finally:
            kept.close()
    finally:
        view.close()
        reader.close()


def _check(options: argparse.Namespace) -> None:
    """What argparse can't say."""
    if options.resume is not None:
        given = [
            name
            for name, value in (
                ("--transport", options.transport),
                ("--type", options.type),
                ("--study", options.study),
                ("--to", options.to),
                ("--everyone", options.everyone),
                ("--dry-run", options.dry_run),
            )
            if value
        ]
        if given:
            options.wrong(f"{given[0]} can't be given with --resume: the replay goes on as it was begun")
        return
    if options.since is None and options.first is None and not options.all:
        options.wrong("say from where on: --since TIME, --from POSITION or --all")
    if not options.to and not options.everyone and not options.dry_run:
        options.wrong("say to whom: --to CONSUMER or --everyone")
    if options.everyone and not options.yes and not options.dry_run and not sys.stdin.isatty():
        options.wrong("--everyone asks first, and there is nobody to ask: say --yes too")
    if options.type:
        from pydantic import ValidationError

        from orthanc_events_bridge.values import EventFilter

        try:
            EventFilter(include=tuple(options.type))
        except ValidationError as error:
            options.wrong(f"--type {error.errors()[0]['msg']}")


def _transport(settings: Settings, name: str | None) -> TransportOptions:
    names = ", ".join(one.name for one in settings.transports)
    if name is None:
        if len(settings.transports) == 1:
            return settings.transports[0]
        raise BridgeError("there are several transports", f"say --transport, one of: {names}")
    found = next((one for one in settings.transports if one.name == name), None)
    if found is None:
        raise BridgeError(f"there is no transport {name}", f"there are: {names}")
    return found


def _plan(
    options: argparse.Namespace, number: int, transport: TransportOptions, reader: OutboxReader, view: BridgeView
) -> Run:
    """What is to be sent: of what the transport had by now, since the rest is still to come to everyone."""
    from orthanc_events_bridge.bridge.replays import Run

    recorder = reader.recorder
    had = next((one for one in view.transports() if one["name"] == transport.name), None)
    if had is None or had["recorder"] != recorder:
        raise BridgeError(
            f"transport {transport.name} was sent nothing of this outbox yet", "let the bridge send it first"
        )
    oldest, oldest_at, _ = reader.extent()
    if options.since is not None and oldest > 1 and options.since < oldest_at:
        print(f"the outbox keeps what was recorded since {iso(oldest_at)}; older events are gone", file=sys.stderr)
    first = (options.first or 1) - 1 if options.first is not None else max(0, oldest - 1)
    return Run(
        number, transport.name, options.to, recorder, options.type, options.study, options.since or 0, first,
        through=had["position"],
    )  # fmt: skip


def _kept(
    options: argparse.Namespace, settings: Settings, place: Folder, reader: OutboxReader, view: BridgeView
) -> Kept:
    """The replay that is to be done: a new one, or one that was interrupted."""
    from orthanc_events_bridge.bridge.replays import Replays
    from orthanc_events_bridge.transports import create

    replays = Replays(place)
    unfinished = replays.unfinished()
    if options.resume is not None:
        if not options.resume and len(unfinished) != 1:
            known = f"say which: {', '.join(map(str, unfinished))}" if unfinished else "every replay is done"
            raise BridgeError(f"{len(unfinished) or 'no'} replays were interrupted", known)
        kept = replays.resume(options.resume or unfinished[0])
        if kept.run.recorder != reader.recorder:
            kept.close()
            raise BridgeError(f"replay {kept.run.number} was of another outbox", "begin it again")
        return kept
    transport = _transport(settings, options.transport)
    if options.to:
        create(transport).inbox(options.to)  # is there such a thing?
    elif not options.yes and not _agreed(transport.name):
        raise BridgeError("nothing was sent")
    return replays.begin(lambda number: _plan(options, number, transport, reader, view))


def _agreed(transport: str) -> bool:
    print(f"All consumers of transport {transport} get these events a second time. Go on? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _accepts(settings: Settings, transport: TransportOptions, run: Run) -> Callable[[str], bool]:
    from orthanc_events_bridge.values import EventFilter

    wanted = EventFilter(include=tuple(run.types)) if run.types else EventFilter()
    filters = (settings.events, transport.events, wanted)
    return lambda name: all(one.accepts(name) for one in filters)


# -- what is said of it --------------------------------------------------------------------------------------


def _document(run: Run) -> dict[str, Any]:
    to = run.consumer or None
    return {"replay": run.number or None, "transport": run.transport, "to": to, "through": run.through}


def _outcome(run: Run) -> dict[str, Any]:
    return {
        "position": run.position,
        "events": dict(sorted(run.sent.items())),
        "refused": run.refused,
        "refusals": run.refusals,
        "gone": run.gone,
    }


def _print(options: argparse.Namespace, document: dict[str, Any], run: Run, events: Mapping[str, int]) -> None:
    if options.json:
        print(json.dumps(document, indent=2))
        return
    total = str(sum(events.values()))
    rows = [["TYPE", "EVENTS"], *([name, str(number)] for name, number in sorted(events.items())), ["all", total]]
    print("\n".join(table(rows)))
    if options.dry_run:
        print(f"{total} events would be sent by transport {run.transport}")
        return
    print(f"{total} events were sent to {run.where} by transport {run.transport}")
    for one in run.refusals:
        print(f"refused: {one['position']}  {one['type']}  {one['event']}  {one['reason']}")
    if run.refused:
        print(f"{run.refused} events can't be taken by the broker; they were not sent")
    if run.gone:
        print(f"{run.gone} rows were deleted from the outbox before they could be looked at (outbox.keep)")
