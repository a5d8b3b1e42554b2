"""What the outbox's folder says about capture, bridge and transports, read without writing.

One reader for the plugin's REST route, the command line and capture, so that all say the same. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orthanc_events_bridge import __version__
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxReader, translated


class BridgeView:
    """``bridge.db`` as the others read it; everything is empty until the bridge has made it.

    :param path: of ``bridge.db``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def _read(self, query: str, arguments: Mapping[str, object] | None = None) -> list[Any]:
        """:raises OutboxError: the file is there and can't be read."""
        if self._db is None:
            if not self._path.exists():
                return []
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

    def note(self, key: str) -> dict[str, Any]:
        """A document that the bridge keeps for the others."""
        rows = self._read("SELECT document FROM notes WHERE key = :key", {"key": key})
        return dict(json.loads(rows[0][0])) if rows else {}

    def delivered(self, recorder: str, names: Sequence[str] | None) -> int:
        """The position of an outbox up to which transports have delivered; 0 where there is none.

        :param names: of the configured ones: a transport that is gone must not hold the outbox for ever.
        """
        rows = self._read(
            "SELECT min(iif(recorder = :recorder, position, 0)) FROM transports"
            " WHERE :names IS NULL OR name IN (SELECT value FROM json_each(:names))",
            {"recorder": recorder, "names": None if names is None else json.dumps(names)},
        )
        return rows[0][0] or 0 if rows else 0

    def acknowledged_seq(self, names: Sequence[str] | None) -> int | None:
        """The Seq up to which transports have delivered, whichever outbox it came from; none before any has.

        :param names: of the configured ones.
        """
        rows = self._read(
            "SELECT min(coalesce(seq, 0)) FROM transports"
            " WHERE :names IS NULL OR name IN (SELECT value FROM json_each(:names)) HAVING max(seq) IS NOT NULL",
            {"names": None if names is None else json.dumps(names)},
        )
        return rows[0][0] if rows else None

    def transports(self) -> list[dict[str, Any]]:
        """Name, recorder, position, how many were published and the gap, if any, of each transport."""
        names = ("name", "recorder", "position", "published", "gap_from", "gap_through")
        rows = self._read(f"SELECT {', '.join(names)} FROM transports ORDER BY name")
        return [dict(zip(names, row, strict=True)) for row in rows]

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
        set_aside = view.set_aside()
        transports = []
        for stored in view.transports():
            name = stored["name"]
            position = stored["position"] if stored["recorder"] == recorder else 0
            seen = live.get(name, {"state": "not configured"})
            transports.append(
                {
                    "name": name,
                    **seen,
                    "state": seen["state"] if is_running or name not in live else "bridge not running",
                    "position": position,
                    "pending": outbox.count(position),
                    "published": stored["published"],
                    "set_aside": sum(entry["transport"] == name for entry in set_aside),
                    "gap": [stored["gap_from"], stored["gap_through"]] if stored["gap_through"] else None,
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
            },
            "log": {"cursor": meta.get("cursor")},
            "transports": transports,
            "set_aside": set_aside,
        }
    finally:
        outbox.close()
        view.close()


def iso(milliseconds: float) -> str:
    """Milliseconds since the epoch as RFC 3339, UTC."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
