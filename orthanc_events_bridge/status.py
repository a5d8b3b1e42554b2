"""What the outbox's folder says about capture, bridge and transports, read without writing.

One reader for the plugin's REST route, the command line and capture, so that all say the same. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthanc_events_bridge import __version__
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import translated


class BridgeView:
    """``bridge.db`` as the others read it; everything is empty until the bridge has made it.

    :param path: of ``bridge.db``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def _read(self, query: str, arguments: Mapping[str, object] | None = None) -> list[Any]:
        """:raises OutboxError: the file is there and can't be read."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self.close()
            return []
        except OSError as error:
            raise OutboxError(f"{self._path} can't be opened: {error.strerror}", "be the user that owns it") from error
        if self._file != (found.st_dev, found.st_ino):  # it was lost, and the bridge has made another one
            self.close()
        if self._db is None:
            self._file = found.st_dev, found.st_ino
            with translated(self._path):
                self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
                self._db.execute("PRAGMA query_only = 1")
        try:
            with translated(self._path):
                return self._db.execute(query, arguments or {}).fetchall()
        except OutboxError as error:
            if "no such table" in str(error):  # it is being made
                return []
            raise

    def settings(self) -> tuple[int, str] | None:
        """The number and the text of the settings that shape events now."""
        rows = self._read(
            "SELECT number, document FROM settings WHERE number ="
            " (SELECT json_extract(document, '$.settings') FROM notes WHERE key = 'capture')"
        )
        return tuple(rows[0]) if rows else None

    def all_settings(self) -> dict[int, dict[str, Any]]:
        """All that were ever numbered."""
        return {number: json.loads(document) for number, document in self._read("SELECT * FROM settings")}

    def note(self, key: str) -> dict[str, Any]:
        """A document that the bridge keeps for the others."""
        rows = self._read("SELECT document FROM notes WHERE key = :key", {"key": key})
        return dict(json.loads(rows[0][0])) if rows else {}

    def configured(self) -> list[str] | None:
        """The names of the transports that the bridge has found in its configuration; none before it has read one."""
        names = self.note("capture").get("transports")
        return list(names) if names is not None else None

    def delivered(self, recorder: str, configured: Sequence[str] | None) -> int:
        """The position of an outbox up to which every transport has delivered; 0 where there is none.

        That is every one that was ever started and not forgotten, and every one that is about to start.

        :param configured: names of the configured ones.
        """
        rows = self._read(
            "SELECT min(position) FROM (SELECT iif(recorder = :recorder, position, 0) AS position FROM transports"
            " UNION ALL SELECT 0 FROM json_each(:names) WHERE value NOT IN (SELECT name FROM transports))",
            {"recorder": recorder, "names": json.dumps(list(configured or ()))},
        )
        return rows[0][0] or 0 if rows else 0

    def recorder(self) -> str | None:
        """The outbox that all transports are in; none where they are in several, or there is none."""
        rows = self._read("SELECT min(recorder) FROM transports HAVING min(recorder) = max(recorder)")
        return rows[0][0] if rows else None

    def highest(self, recorder: str) -> int:
        """The last position that any transport has had of an outbox; 0 where there is none."""
        rows = self._read("SELECT max(position) FROM transports WHERE recorder = :recorder", {"recorder": recorder})
        return rows[0][0] or 0 if rows else 0

    def behind(self, recorder: str) -> str | None:
        """The name of the transport that is furthest behind in an outbox; none where none is known."""
        rows = self._read(
            "SELECT name FROM transports ORDER BY iif(recorder = :recorder, position, 0), name LIMIT 1",
            {"recorder": recorder},
        )
        return rows[0][0] if rows else None

    def acknowledged_seq(self) -> int | None:
        """The Seq up to which every transport has delivered, whichever outbox it came from; none before any has."""
        rows = self._read("SELECT min(coalesce(seq, 0)) FROM transports HAVING max(seq) IS NOT NULL")
        return rows[0][0] if rows else None

    def transports(self) -> list[dict[str, Any]]:
        """Name, recorder, position, how many were published and the gap, if any, of each transport."""
        names = ("name", "recorder", "position", "published", "gap_from", "gap_through")
        rows = self._read(f"SELECT {', '.join(names)} FROM transports ORDER BY name")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def paused(self) -> dict[str, int]:
        """The transports that are paused, and since when, in milliseconds since the epoch."""
        return dict(self._read("SELECT name, since FROM paused"))

    def waiting(self) -> list[tuple[str, str]]:
        """What was asked for and isn't done yet: command and transport, oldest first."""
        return self._read("SELECT command, transport FROM commands ORDER BY number")

    def set_aside(self) -> list[dict[str, Any]]:
        """The events that a broker could never take."""
        names = ("transport", "position", "event", "type", "reason", "at")
        rows = self._read(f"SELECT {', '.join(names)} FROM set_aside ORDER BY transport, position")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def running(folder: Folder) -> bool:
    """Whether a bridge works on this outbox now: it holds the lock as long as it lives."""
    try:
        descriptor = os.open(folder.lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def read(folder: Folder) -> dict[str, Any]:
    """The status as one document; `docs/operating.md` explains every field.

    :raises OutboxError: there is no outbox, or it can't be read.
    """
    outbox, view = OutboxReader(folder.outbox), BridgeView(folder.bridge)
    try:
        meta = outbox.meta()
        oldest, oldest_at, last = outbox.extent()
        recorder = str(meta.get("recorder", ""))
        capture: dict[str, Any] = json.loads(meta.get("note.capture", "{}"))
        supervisor: dict[str, Any] = json.loads(meta.get("note.supervisor", "{}"))
        bridge = view.note("bridge")
        live: dict[str, Any] = bridge.pop("transports", {})
        is_running = running(folder)
        set_aside, paused, configured = view.set_aside(), view.paused(), view.configured() or []
        detached = int(meta.get("detached", 0))
        transports = []
        unknown = {"recorder": recorder, "position": 0, "published": 0, "gap_from": None, "gap_through": None}
        started = {stored["name"]: stored for stored in view.transports()}
        about_to_start = {name: {"name": name, **unknown} for name in configured}
        for _, stored in sorted({**about_to_start, **started}.items()):
            name = stored["name"]
            position = stored["position"] if stored["recorder"] == recorder else 0
            state, now = _state(name, live.get(name, {}), configured, paused, running=is_running)
            gap = (stored["gap_from"], stored["gap_through"]) if stored["gap_through"] else None
            if position < detached:  # given up, and nobody has come by to mark it
                gap = gap[0] if gap else position + 1, detached
            transports.append(
                {
                    "name": name,
                    **now,
                    "state": state,
                    "configured": name in configured,
                    "paused": iso(paused[name]) if name in paused else None,
                    "position": position,
                    "pending": outbox.count(position),
                    "published": stored["published"],
                    "set_aside": sum(entry["transport"] == name for entry in set_aside),
                    "gap": list(gap) if gap else None,
                }
            )
        return {
            "version": __version__,
            "capture": capture,
            "bridge": {**bridge, **supervisor, "running": is_running},
            "outbox": {
                "folder": str(folder.path),
                "recorder": recorder,
                "rows": outbox.count(0),
                "bytes": outbox.bytes_used(),
                "oldest": iso(oldest_at) if oldest else None,
                "last_position": last,
                "rescued": json.loads(meta.get("note.rescue", "null")),
            },
            "log": {"cursor": meta.get("cursor")},
            "transports": transports,
            "set_aside": set_aside,
        }
    finally:
        outbox.close()
        view.close()


def _state(
    name: str, live: dict[str, Any], configured: Sequence[str], paused: Mapping[str, int], *, running: bool
) -> tuple[str, dict[str, Any]]:
    """A transport's state, and what else the bridge has said of it: nothing of one that it has no more to do with."""
    if name not in configured:
        return "not configured", {}
    if name in paused:
        return "paused", {**live, "since": iso(paused[name])}
    return (live.get("state", "connecting") if running else "bridge not running"), live
