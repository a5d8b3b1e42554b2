"""What surrounds the rows of the outbox: the settings that apply to them, and the outbox's bounds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any, Final

from orthanc_events_bridge.changes.unordered import GRACE
from orthanc_events_bridge.errors import OutboxError, OutboxFullError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.logs import Repeats
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.plugin.host import Host
from orthanc_events_bridge.status import BridgeView

_RETAIN_EVERY: Final = 10.0
#: Rows that go in one look, so that it stays short.
_RETAIN: Final = 5000
#: What applies until the bridge has said otherwise (`orthanc_events_bridge.bridge.settings`).
_DEFAULTS: Final[dict[str, Any]] = {
    "start": "now",
    "infer_instances": False,
    "log": True,
    "grace": GRACE,
    "max_bytes": None,
    "on_full": "pause",
    "keep": 7 * 86400.0,
}


class Upkeep:
    """Used by capture's thread alone.

    :param folder: of the outbox.
    :param host: Orthanc's log.
    :param allow: is given the settings that shape events, when they change.
    :ivar settings: their number; 0 before any.
    :ivar options: what capture has to know of the configuration.
    :ivar limit: of the outbox, in bytes.
    """

    def __init__(self, folder: Folder, host: Host, allow: Callable[[str], None]) -> None:
        self._folder = folder
        self._host = host
        self._allow = allow
        self._bridge = BridgeView(folder.bridge)
        self._repeats = Repeats(time.monotonic)
        self._next_retain = 0.0
        self._default_limit = min(10 * 2**30, shutil.disk_usage(folder.path).free // 10)
        self.settings = 0
        self.options = dict(_DEFAULTS)
        self.limit = self._default_limit

    def take_settings(self, outbox: OutboxWriter) -> bool:
        """Use the newest settings that the bridge has numbered, or the last good ones.

        :return: whether there are any.
        """
        try:
            found = self._bridge.settings()
            options = self._bridge.note("capture")
            self._repeats.over("bridge.db")
        except OutboxError as error:  # it must not keep changes from being recorded
            self._say("bridge.db", f"{error}; the last good settings apply")
            found, options = None, {}
        if found is None and not self.settings:
            found = outbox.newest_settings()
        if found is not None and found[0] != self.settings:
            outbox.keep_settings(*found)
            self.settings = found[0]
            self._allow(found[1])
        if options:
            self.options = {**_DEFAULTS, **options}
            self.limit = self.options["max_bytes"] or self._default_limit
        return found is not None or bool(self.settings)

    def backfill(self) -> dict[str, Any]:
        """The backfill that was last asked for; empty where none was."""
        try:
            return self._bridge.note("backfill")
        except OutboxError:  # it is looked again soon
            return {}

    def acknowledged_seq(self) -> int | None:
        """The Seq up to which every transport has delivered, for an outbox that was lost; none before any has."""
        try:
            return self._bridge.acknowledged_seq()
        except OutboxError:
            return None

    def delivered(self, recorder: str | None) -> int:
        """The position up to which every transport has delivered; 0 where that is not known.

        :param recorder: of the outbox; none where it can't be read: then it is the one that all transports are in.
        """
        try:
            recorder = recorder or self._bridge.recorder()
            return self._bridge.delivered(recorder, self.options.get("transports")) if recorder else 0
        except OutboxError:
            return 0

    def highest(self, recorder: str) -> int:
        """The last position that any transport has had of an outbox."""
        try:
            return self._bridge.highest(recorder)
        except OutboxError:
            return 0

    def damage(self, outbox: OutboxWriter) -> str:
        """What the bridge has found wrong with the outbox; empty where it has nothing to say."""
        try:
            found = self._bridge.note("damage")
        except OutboxError:
            return ""
        return str(found["message"]) if found.get("file") == outbox.file else ""

    def _behind(self, outbox: OutboxWriter) -> str:
        """The transport that needs the oldest row, in brackets; empty where none is known."""
        try:
            name = self._bridge.behind(outbox.recorder)
        except OutboxError:
            name = None
        return f" ({name})" if name else ""

    def retain(self, outbox: OutboxWriter) -> None:
        """Now and then, delete what every transport has delivered and is old enough."""
        now = time.monotonic()
        if now >= self._next_retain:
            before = int((time.time() - self.options["keep"]) * 1000)
            gone = outbox.retain(self.delivered(outbox.recorder), before, _RETAIN)
            self._next_retain = now + (_RETAIN_EVERY if gone < _RETAIN else 0.0)

    def make_room(self, outbox: OutboxWriter) -> None:
        """Keep the outbox within its limit: first by what was delivered, then as `outbox.on_full` says.

        :raises OutboxFullError: nothing that may go is left.
        """
        if outbox.bytes_used() < self.limit:
            return
        delivered = self.delivered(outbox.recorder)
        while outbox.bytes_used() > self.limit * 0.95:
            if outbox.retain(delivered, 2**62, _RETAIN):
                continue
            if self.options["on_full"] == "pause":
                if outbox.bytes_used() < self.limit:
                    return
                raise OutboxFullError(
                    f"the outbox has reached its limit of {self.limit} bytes and every row is still needed",
                    f"bring back, resume or forget the transport that is behind{self._behind(outbox)}, or raise"
                    " outbox.max_bytes",
                )
            if not outbox.detach(delivered):
                return
            self._say("detach", "the outbox is full: its oldest rows go, and transports that needed them have a gap")

    def _say(self, key: str, message: str) -> None:
        line = self._repeats.line(key, message)
        if line:
            self._host.error(line)

    def close(self) -> None:
        self._bridge.close()
