"""Protections switched off on purpose, to show that the tests would notice.

Test-only. A bridge with mutants is started in place of the real one: ``ORTHANC_EVENTS_PYTHON`` names a script that runs
this module (`wrapper`), and ``ORTHANC_EVENTS_MUTANTS`` says which. Those of Orthanc's process are put into a test's
shim (`in_orthanc`). Those of consumers: `orthanc_events_bridge.testing.consumer_mutants`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from orthanc_events_bridge.transports import REGISTERED
from orthanc_events_bridge.transports.base import Outgoing, Transport

VARIABLE: Final = "ORTHANC_EVENTS_MUTANTS"


def _transports() -> Iterator[type[Transport]]:
    """The class of every transport whose client is installed."""
    for registered in REGISTERED.values():
        module, _, name = registered.implementation.partition(":")
        with contextlib.suppress(ImportError):
            yield getattr(importlib.import_module(module), name)


def _without(protection: str) -> Callable[[], None]:
    """Leave a protection out of every transport that has it."""

    def leave_out() -> None:
        for transport in _transports():
            transport.without = frozenset({*getattr(transport, "without", ()), protection})  # type: ignore[attr-defined]

    return leave_out


def _without_replay() -> None:
    """What was not confirmed isn't sent again."""
    from orthanc_events_bridge.bridge.relay import Relay

    Relay.without = frozenset({*Relay.without, "replay"})


def _without_position() -> None:
    """The position isn't kept: every start begins with the oldest row."""
    from orthanc_events_bridge.bridge.state import State

    State.save = lambda self, name, progress: None  # type: ignore[method-assign]


def _without_identity() -> None:
    """A stream that was made again isn't noticed."""
    from orthanc_events_bridge.bridge.relay import Relay

    Relay._same_place = lambda self, identity: None  # type: ignore[method-assign]


def _minting() -> None:
    """Ids are made up when an event is sent, not derived from its row."""
    import uuid

    from orthanc_events_bridge.events import mapping

    mapping.event_id = lambda row, source: str(uuid.uuid4())


def _dropping_one() -> None:
    """One instance's event is confirmed and never sent: what `make demo DEMO_FAULT=drop` shows."""
    dropped: list[str] = []

    def drop_from(transport: type[Transport]) -> None:
        publish = transport.publish

        async def dropping(self: Transport, events: Sequence[Outgoing]) -> None:
            index = next((i for i, event in enumerate(events) if event.verb == "created"), None)
            if not dropped and index is not None:
                dropped.append(events[index].id)
                events = [*events[:index], *events[index + 1 :]]
            if events:
                await publish(self, events)

        transport.publish = dropping  # type: ignore[method-assign, assignment]

    for transport in _transports():
        drop_from(transport)


def _without_rounds() -> None:
    """Where nobody calls back, nobody looks for deletions."""
    from orthanc_events_bridge.changes.rounds import Rounds

    Rounds._round_due = Rounds._listing_due = False  # type: ignore[assignment,method-assign]


def _without_recognition() -> None:
    """Where nobody says that Orthanc was started again, nobody looks whether it has another log."""
    from orthanc_events_bridge.remote import RemoteCapture

    RemoteCapture._is_same_log = lambda self: True  # type: ignore[method-assign]
    RemoteCapture._recognise = lambda self, outbox: (outbox.cursor, None)  # type: ignore[method-assign]


#: Those of the bridge's process.
MUTANTS: Final[dict[str, Callable[[], None]]] = {
    # Events count as published once they are sent.
    "confirm": _without("confirm"),
    # The broker isn't told the events' ids (NATS).
    "dedupe": _without("dedupe"),
    # What comes a second time is stored again (Kafka).
    "idempotence": _without("idempotence"),
    "replay": _without_replay,
    "position": _without_position,
    "identity": _without_identity,
    "minting": _minting,
    "drop": _dropping_one,
    # Of an Orthanc without the plugin.
    "rounds": _without_rounds,
    "recognition": _without_recognition,
}

#: Those of Orthanc's process: Python for the shim, behind the package's import.
IN_ORTHANC: Final[dict[str, str]] = {
    # The anchor is what the log's counter says, without looking at the callbacks.
    "anchor": "from orthanc_events_bridge.changes.merge import Merge, Anchor\n"
    "Merge.anchor = lambda self: Anchor(max(self.cursor, self._log.tip()), 'naive')\n",
    # Rules a to c of the anchor are left out: only the guess is left.
    "rules": "from orthanc_events_bridge.changes.merge import Merge\n"
    "Merge.without_rules = frozenset({'proof', 'content', 'quiet'})\n",
    # The callbacks alone: what they didn't show is never read from the log.
    "log": "from orthanc_events_bridge.changes.merge import Merge\n"
    "def backlog(self, through):\n    self.cursor = max(self.cursor, through)\n    return iter(())\n"
    "Merge.backlog = backlog\n",
    # The log cursor isn't kept with the rows.
    "cursor": "from orthanc_events_bridge.outbox import OutboxWriter\n"
    "original = OutboxWriter.append\n"
    "def append(self, facts, cursor, settings, look_up, **more):\n"
    "    original(self, facts, self.cursor or 0, settings, look_up, **more)\n    self.cursor = cursor\n"
    "OutboxWriter.append = append\n",
    # A number without a row is passed at once, and never looked at again.
    "grace": "from orthanc_events_bridge.changes.unordered import Unordered\n"
    "from orthanc_events_bridge.plugin.upkeep import Upkeep\n"
    "Unordered._late = lambda self, now: []\n"
    "original = Upkeep.take_settings\n"
    "def take_settings(self, outbox):\n"
    "    found = original(self, outbox)\n    self.options = {**self.options, 'grace': 0.0}\n    return found\n"
    "Upkeep.take_settings = take_settings\n",
    # What Orthanc forgot while nobody listened is not looked for.
    "repair": "from orthanc_events_bridge.changes.repair import Repair\nRepair.begin = lambda self: None\n",
    # What was growing when Orthanc ended is not looked at.
    "stable": "from orthanc_events_bridge.resources import Resources\nResources.growing = lambda self: []\n",
    # What a look has shown is told at once, although Orthanc's own word may be on its way.
    "doubt": "from orthanc_events_bridge.changes.walk import Doubts\n"
    "Doubts.settled = lambda self, cursor, calm: [(one, seen, tip) for one, (seen, tip, _) in self._seen.items()]\n",
    # What Orthanc says very late is told once more.
    "late": "from orthanc_events_bridge.changes.repair import Repair\nRepair.news = lambda self, facts: list(facts)\n",
    # That the log is another one is not noticed.
    "continuity": "from orthanc_events_bridge.plugin.continuity import Continuity\n"
    "Continuity.recognise = lambda self, tail, cursor: None\n",
    # What was never announced is not looked for.
    "strangers": "from orthanc_events_bridge.changes.strangers import Strangers\nStrangers.begin = lambda self: None\n",
    # What is inferred behind another log has the ids of what was inferred before.
    "other-logs": "from orthanc_events_bridge.outbox import OutboxWriter\n"
    "OutboxWriter._other_logs = property(lambda self: -1, lambda self, count: None)\n",
    # What the outbox lost and reads again proves deletions once more.
    "published": "from orthanc_events_bridge.outbox import OutboxWriter\n"
    "OutboxWriter.published = property(lambda self: 0, lambda self, seq: None)\n",
    # After a power cut, numbers are given again.
    "jump": "import orthanc_events_bridge.outbox as outbox\noutbox.JUMP = 0\n",
    # Any number of processes records into one outbox.
    "outbox-lock": "import os\nfrom orthanc_events_bridge.folder import Folder\n"
    "Folder.hold_outbox = lambda self: os.open(os.devnull, os.O_RDONLY)\n",
    # Nobody looks whether the outbox is still there.
    "look": "from orthanc_events_bridge.plugin.rescue import Rescue\nRescue.look = lambda self, outbox: None\n",
    # Nothing of an outbox that is exchanged is taken over.
    "salvage": "from orthanc_events_bridge import salvage\nsalvage._Source.rows = lambda self, delivered: iter(())\n",
    # An older copy of the outbox goes on as if it were the newest.
    "renew": "from orthanc_events_bridge.outbox import OutboxWriter\nOutboxWriter._renew = lambda self: None\n",
    # A creation of what is there proves nothing.
    "rebirth": "from orthanc_events_bridge.resources import Resources\n"
    "Resources.lost_deletions = lambda self, facts, index: []\n",
    # A backfill doesn't look at what was announced.
    "announced": "import orthanc_events_bridge.changes.backfill as backfill\n"
    "backfill.is_new = lambda announced, resource: True\n",
}


def wrapper(folder: Path) -> Path:
    """A program to name in ``ORTHANC_EVENTS_PYTHON``: Python, with mutants in the bridge."""
    path = folder / "python-with-mutants"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m {__name__} "$@"\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def in_orthanc(shim: str, mutants: Iterable[str]) -> str:
    """A shim with mutants of Orthanc's process in it."""
    marker = "    from orthanc_events_bridge.plugin import start\n"
    assert marker in shim
    code = "".join(IN_ORTHANC[name] for name in mutants)
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    return shim.replace(marker, marker + indented)


def main() -> int:
    """What `wrapper` runs: the command line behind ``-m orthanc_events_bridge``, with mutants."""
    from orthanc_events_bridge.cli import main as run

    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        MUTANTS[name]()
    return run(sys.argv[sys.argv.index("orthanc_events_bridge") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
