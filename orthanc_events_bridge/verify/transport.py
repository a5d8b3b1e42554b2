"""What the outbox has recorded for a transport, against what can be read back from where it was sent to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.mapping import event_id, short_name, to_event
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.status import BridgeView
from orthanc_events_bridge.transports.base import Incoming, Transport
from orthanc_events_bridge.transports.headers import OPERATION
from orthanc_events_bridge.verify import EXTRA, MISSING, OUT_OF_ORDER, Difference, Findings, Show

_ROWS: Final = 1000
#: Seconds of silence that end the reading when everything was found.
_QUIET: Final = 2.0
_POLL: Final = 0.2
#: Messages that wait to be looked at.
_WAITING: Final = 1000

_TABLES: Final = """
CREATE TABLE expected (id TEXT PRIMARY KEY, position INTEGER, subject TEXT) WITHOUT ROWID;
CREATE TABLE seen (id TEXT PRIMARY KEY, position INTEGER, subject TEXT, ours INTEGER) WITHOUT ROWID;
CREATE TABLE keys (key TEXT PRIMARY KEY, position INTEGER) WITHOUT ROWID;
"""


class TransportCheck:
    """Compares once.

    :param transport: to be connected; it is closed at the end.
    :param name: of the transport.
    :param accepts: whether an event, by its short name, is for this transport.
    :param shape: the settings of a row, by their number.
    :param outbox: to be read; `view` says what the transport has had of it.
    :param findings: what is found goes there.
    :param show: how far it is.
    :param wait: seconds that the bridge may take to send what is recorded by now, and the broker to answer.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        accepts: Callable[[str], bool],
        shape: Callable[[int], Mapping[str, Any]],
        outbox: OutboxReader,
        view: BridgeView,
        findings: Findings,
        show: Show,
        *,
        wait: float,
    ) -> None:
        self._transport = transport
        self._name = name
        self._accepts = accepts
        self._shape = shape
        self._outbox = outbox
        self._view = view
        self._findings = findings
        self._show = show
        self._wait = wait
        self._db = findings.scratch
        self._db.executescript(_TABLES)
        self._recorder = outbox.recorder
        self._sources: set[str] = set()
        self._oldest_seen: int | None = None
        self._last = 0

    async def run(self) -> None:
        """Compare.

        :raises BridgeError: the broker or the outbox can't be read.
        """
        position = await self._settle()
        self._expect(position)
        try:
            await self._transport.connect()
            await self._read()
        finally:
            await self._transport.close()
        self._judge(position)

    # -- the outbox ----------------------------------------------------------------------------------------------

    async def _settle(self) -> int:
        """Wait until what is recorded by now is sent; up to where it is."""
        _, _, self._last = self._outbox.extent()
        until = time.monotonic() + self._wait
        while (position := self._position()) < self._last and time.monotonic() < until:
            if self._name in self._view.paused():
                break
            self._show("waiting for the bridge", position, self._last)
            await asyncio.sleep(_POLL)
        return position

    def _stored(self) -> dict[str, Any]:
        return next((one for one in self._view.transports() if one["name"] == self._name), {})

    def _position(self) -> int:
        stored = self._stored()
        return int(stored["position"]) if stored.get("recorder") == self._recorder else 0

    def _expect(self, position: int) -> None:
        """Write down which events the broker has to have; what it can't have yet, say at once."""
        aside = {entry["position"] for entry in self._view.set_aside() if entry["transport"] == self._name}
        unsent = "paused" if self._name in self._view.paused() else "not sent yet"
        after, filtered = 0, 0
        while rows := self._outbox.rows(after, _ROWS):
            for row in rows:
                after = row.position
                source = str(self._shape(row.settings)["source"])
                self._sources.add(source)
                if row.position > self._last:
                    break
                if not self._accepts(short_name(row)):
                    filtered += 1
                elif row.position > position:
                    self._miss(row, source, f"{unsent}: {self._name} is at {position} of {self._last}")
                elif row.position in aside:
                    self._miss(row, source, "set aside: see `orthanc-events set-aside`")
                else:
                    values = (event_id(row, source), row.position, _subject(row))
                    self._db.execute("INSERT OR REPLACE INTO expected VALUES (?,?,?)", values)
            self._show("rows of the outbox", after, self._last)
            if after > self._last:
                break
        self._findings.checked["expected"] = self._count("SELECT count(*) FROM expected")
        if filtered:
            self._findings.notes["events that the configuration filters out"] += filtered
        stored = self._stored()
        if stored.get("gap_through"):
            first, last = stored["gap_from"], stored["gap_through"]
            why = f"given up while the outbox was full: positions {first} to {last}"
            self._findings.add(Difference(MISSING, self._name, f"{last - first + 1} rows of the outbox", why))

    def _miss(self, row: OutboxRow, source: str, why: str) -> None:
        identifier = event_id(row, source)
        self._findings.add(Difference(MISSING, self._name, _subject(row), why, identifier, row.position))

    def _count(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])

    # -- the broker ----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Everything that the broker keeps, until nothing comes any more that could be from before now."""
        read, missing = 0, self._findings.checked["expected"]
        quiet_since = time.monotonic()
        async with _polled(self._transport) as following:
            while True:
                message = await following(_POLL)
                if message is not None:
                    read += 1
                    found, new = self._look_at(message)
                    missing -= found
                    if not new:  # what is sent while we read could come for ever
                        quiet_since = time.monotonic()
                    self._show(f"events from {self._name}", read, 0)
                if time.monotonic() - quiet_since > (self._wait if missing > 0 else _QUIET):
                    break
        self._findings.checked["read"] = read

    def _look_at(self, message: Incoming) -> tuple[int, bool]:
        """Whether it is one that was missing so far (1 or 0), and whether it is from behind what we compare."""
        notes, event = self._findings.notes, event_of(message)
        if event is None or "id" not in event:
            notes["messages that are no CloudEvents"] += 1
            return 0, False
        if event.get("source") not in self._sources:
            notes["events of another source"] += 1
            return 0, False
        if message.headers.get(OPERATION):
            notes["events that were sent again on purpose"] += 1
            return 0, False
        if "producer" in event:
            notes["events that consumers have published"] += 1
            return 0, False
        identifier, ours = str(event["id"]), event.get("recorder") == self._recorder
        position = int(event.get("sequence", 0))
        if ours and position > self._last:
            return 0, True
        values = (identifier, position, str(event.get("subject", "server")), ours)
        if not self._db.execute("INSERT OR IGNORE INTO seen VALUES (?,?,?,?)", values).rowcount:
            notes["events that the broker holds more than once"] += 1
            return 0, False
        if ours:
            self._oldest_seen = min(self._oldest_seen or position, position)
            self._check_order(str(event.get("partitionkey", "")), identifier, position, values[2])
        found = self._db.execute("SELECT 1 FROM expected WHERE id = ?", (identifier,)).fetchone()
        return (1 if found else 0), False

    def _check_order(self, key: str, identifier: str, position: int, subject: str) -> None:
        row = self._db.execute("SELECT position FROM keys WHERE key = ?", (key,)).fetchone()
        if row and position < row[0]:
            why = "it came behind a younger one of the same partition key"
            self._findings.add(Difference(OUT_OF_ORDER, self._name, subject, why, identifier, position))
            return
        self._db.execute("REPLACE INTO keys VALUES (?,?)", (key, position))

    # -- what follows --------------------------------------------------------------------------------------------

    def _judge(self, position: int) -> None:
        notes, (oldest, _, _) = self._findings.notes, self._outbox.extent()
        for identifier, at, subject in self._db.execute(
            "SELECT id, position, subject FROM expected WHERE id NOT IN (SELECT id FROM seen) ORDER BY position"
        ):
            if at < oldest:
                continue  # retention took it meanwhile
            if self._oldest_seen is not None and at < self._oldest_seen:
                notes["events from before the oldest that the broker keeps"] += 1
                continue
            why = "sent and confirmed, and not there any more: the broker lost it, or somebody deleted it"
            self._findings.add(Difference(MISSING, self._name, subject, why, identifier, at))
        after = ""
        while rows := self._db.execute(
            "SELECT id, position, subject, ours FROM seen WHERE id > ? AND id NOT IN (SELECT id FROM expected)"
            " ORDER BY id LIMIT ?",
            (after, _ROWS),
        ).fetchall():
            for after, at, subject, ours in rows:
                if not ours:
                    notes["events of an outbox that was here before"] += 1
                elif at < oldest:
                    notes["events that the outbox does not keep any more"] += 1
                elif at <= position and not self._has(at, after):
                    why = "the outbox has no such row"
                    self._findings.add(Difference(EXTRA, self._name, subject, why, after, at))

    def _has(self, position: int, identifier: str) -> bool:
        """Whether the outbox has it; it may be filtered out by now."""
        rows = self._outbox.rows(position - 1, 1)
        if not rows or rows[0].position != position:
            return False
        attributes = to_event(rows[0], self._shape(rows[0].settings), self._recorder).get_attributes()
        return bool(attributes["id"] == identifier)


def _subject(row: OutboxRow) -> str:
    return f"{row.level} {row.resource}" if row.resource else row.level


@contextlib.asynccontextmanager
async def _polled(transport: Transport) -> AsyncIterator[Callable[[float], Any]]:
    """A transport's tail from the oldest event on, as a function: the next one, or none within so many seconds."""
    queue: asyncio.Queue[Incoming] = asyncio.Queue(_WAITING)

    async def fill() -> None:
        async with contextlib.aclosing(transport.tail(oldest=True)) as messages:
            async for message in messages:
                await queue.put(message)

    filling = asyncio.create_task(fill())

    async def following(seconds: float) -> Incoming | None:
        if queue.empty() and filling.done():
            filling.result()
            raise BridgeError("the broker has ended the reading", "try again")
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(queue.get(), seconds)
        return None

    try:
        yield following
    finally:
        while not filling.done():  # a client may swallow a cancellation
            filling.cancel()
            await asyncio.wait([filling], timeout=0.5)
