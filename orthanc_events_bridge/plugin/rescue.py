"""A damaged outbox, one that was removed while it was open, and one that is older than what was told from it.

The file is set aside, what can be read of it that some transport has not had makes a new one, and capture goes on
with that: `orthanc_events_bridge.salvage` says what is taken over. Killed in between, the next start does it again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from orthanc_events_bridge.errors import DamagedError, OutboxError
from orthanc_events_bridge.folder import Folder, set_aside
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.plugin.upkeep import Upkeep
from orthanc_events_bridge.salvage import Salvage, salvage

#: Under which `OutboxWriter.note` keeps what became of the file before.
NOTE: Final = "rescue"


class Rescue:
    """Used by capture's thread alone.

    :param folder: of the outbox.
    :param host: Orthanc's log.
    :param upkeep: knows what the transports have.
    :param stopping: whether Orthanc stops: then it is left for the next start.
    """

    def __init__(self, folder: Folder, host: Host, upkeep: Upkeep, stopping: Callable[[], bool]) -> None:
        self._path = folder.outbox
        self._making = Path(f"{folder.outbox}.making")
        self._new = Path(f"{folder.outbox}.new")
        self._host = host
        self._upkeep = upkeep
        self._stopping = stopping
        self._repeats = Repeats(time.monotonic)

    def open(self) -> OutboxWriter:
        """Open the outbox, and look whether it is the one that it should be.

        :raises DamagedError: it is damaged.
        :raises OutboxError: it can't be opened.
        """
        if self._new.exists() and not self._path.exists():  # killed between the two renamings
            os.replace(self._new, self._path)  # noqa: PTH105 -- as in `exchange`
        outbox = OutboxWriter(self._path, time.time)
        try:
            for left in (self._new, self._making):  # by an exchange that did not come to its end
                left.unlink(missing_ok=True)
            self._recognise(outbox)
        except BaseException:
            outbox.abandon()
            raise
        return outbox

    def _recognise(self, outbox: OutboxWriter) -> None:
        """What was told already from a younger file must not be told under the same numbers."""
        told = self._upkeep.highest(outbox.recorder)
        if told > outbox.position:
            outbox.renew()
            self._host.error(
                f"outbox.db is older than what was told from it (up to position {told}, and it ends at"
                f" {outbox.position}): a copy was put back. Going on under another recorder; what Orthanc's log has"
                " since is read again, and consumers know it by its ids"
            )
        if outbox.cursor is None and self._upkeep.acknowledged_seq() is not None:
            self._host.error(
                "there was no outbox.db, although transports have had events from one: what was recorded and not"
                f" delivered yet is lost but for what Orthanc still logs, behind Seq {self._upkeep.acknowledged_seq()}"
            )

    def look(self, outbox: OutboxWriter) -> None:
        """Now and then: is the file still there, and has the bridge found it damaged?

        :raises DamagedError: it has to be exchanged.
        """
        if not outbox.unchanged():
            raise DamagedError(f"{self._path} was removed or replaced while it was in use")
        reported = self._upkeep.damage(outbox)
        if reported:
            raise DamagedError(reported)

    def save(self, outbox: OutboxWriter | None, error: DamagedError) -> Salvage:
        """Make a new outbox out of the damaged one, beside it.

        :param outbox: it, where it could be opened.
        :raises OutboxError: there is no room; everything is as it was.
        :raises StoppedError: Orthanc stops; everything is as it was.
        """
        line = self._repeats.line("damage", f"{error.message}: what can be read of it makes a new one")
        if line:  # without room for the new one, this comes again and again
            self._host.error(line)
        source = outbox.connection if outbox is not None else self._reading()
        acknowledged = self._upkeep.acknowledged_seq()
        try:
            found = salvage(source, self._making, self._upkeep.delivered, acknowledged, time.time(), self._stopping)
            os.replace(self._making, self._new)  # noqa: PTH105 -- no SQLite has it open
        except OSError as failure:
            raise OutboxError(f"{self._new} can't be made: {failure.strerror}", "see to its folder") from failure
        finally:
            if outbox is None and source is not None:
                _close(source)
        return found

    def exchange(self, outbox: OutboxWriter | None, found: Salvage, error: DamagedError) -> None:
        """Put the new one in the damaged one's place, which is closed and set aside.

        :raises OutboxError: the files can't be renamed.
        """
        if outbox is not None:
            # Before another file has the name: SQLite would take that one's write-ahead log for this one's.
            _close(outbox.connection)
        try:
            aside = set_aside(self._path)
            os.replace(self._new, self._path)  # noqa: PTH105 -- as above
        except OSError as failure:
            raise OutboxError(f"{self._path} can't be renamed: {failure.strerror}", "see to its folder") from failure
        self._repeats.over("damage")
        said = _said(found, aside)
        self._host.error(said)
        made = OutboxWriter(self._path, time.time)
        note = {"at": iso(time.time() * 1000), "reason": error.message, "aside": str(aside or ""), "result": said}
        made.note(NOTE, note)
        if not found.all_resources:
            made.note("repair", {"place": "", "remembered": 0})
        made.close()
        self._upkeep.settings = 0  # the new one has to be told which they are

    def _reading(self) -> sqlite3.Connection | None:
        if not self._path.exists():
            return None
        db = sqlite3.connect(self._path, isolation_level=None)
        with contextlib.suppress(sqlite3.Error):
            db.execute("PRAGMA query_only = 1")
        return db


def _close(db: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):  # of a damaged one, anything may fail
        db.close()


def _said(found: Salvage, aside: Path | None) -> str:
    """What became of it, for the log and the status."""
    parts = [f"a new outbox.db was made; the old one is kept as {aside.name}" if aside else "a new outbox.db was made"]
    parts.append(f"{found.rows} changes that some transport has not had were taken over")
    if not found.whole:
        parts.append(
            "LOST is what could not be read and Orthanc does not log (deletions, jobs); its log is read again behind"
            f" Seq {found.cursor} ({found.settled} where it has no order), and what transports have had of that comes"
            " twice, with the same ids"
        )
    if not found.all_resources:
        parts.append(
            "which resources were announced is known of some only: deletions that nobody saw, and stable events that a"
            " stop swallowed, can't be inferred of the others. What Orthanc has is remembered from now on"
        )
    return "; ".join(parts)
