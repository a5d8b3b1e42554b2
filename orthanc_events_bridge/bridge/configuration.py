"""The configuration file while the bridge is running: noticed when it changes, taken over when it is right."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from orthanc_events_bridge.bridge.config import ConfigError, load
from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.moments import iso

log = logging.getLogger(__name__)


class Configuration:
    """The settings that apply, and the file that they come from.

    :param path: of the file.
    :ivar settings: the last good ones.
    :ivar restless: whether the file has changed and was not read yet.
    :raises ConfigError: it has mistakes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = self._seen = self._look()  # before it is read: a change in between is noticed later
        self.settings = load(path)
        self._since = time.time()
        self._mistakes: list[str] = []

    @property
    def restless(self) -> bool:
        return self._seen != self._read

    def status(self) -> dict[str, Any]:
        """What the status shows of it."""
        return {"file": str(self._path), "since": iso(self._since * 1000), "mistakes": self._mistakes}

    def look(self, *, asked: bool = False) -> None:
        """Read the file again once it has changed and is quiet: the same in two looks in a row.

        :param asked: read it in any case.
        """
        look = self._look()
        quiet, self._seen = look == self._seen, look
        if not asked and not (quiet and self.restless):
            return
        self._read = look
        try:
            found = load(self._path)
        except ConfigError as error:
            mistakes = [str(problem) for problem in error.problems]
            if mistakes != self._mistakes:
                log.error("the configuration was changed and has mistakes; running on with the last good one")
                for mistake in mistakes:
                    log.error("%s", mistake)
            self._mistakes = mistakes
            return
        if self._mistakes:
            log.warning("the mistakes in the configuration are mended")
        self._mistakes, self._since = [], time.time()
        if found == self.settings:
            log.info("the configuration was read again and says the same as before")
            return
        self.settings = found

    def applied(self, before: Settings) -> None:
        """Say that the settings have taken effect, and what that means.

        :param before: those that applied until now.
        """
        log.warning("the changed configuration applies: %s", changes(before, self.settings))
        if self.settings.source != before.source:
            log.warning(
                "source is another one: what is recorded from now on has ids under it, and consumers take it for the"
                " events of another Orthanc"
            )
        if self.settings.capture.infer_instances != before.capture.infer_instances:
            log.warning("a changed capture.infer_instances takes effect when Orthanc starts")
        if self.settings.capture.start != before.capture.start:
            log.warning("a changed capture.start has no effect: it is about the very first start only")

    def _look(self) -> tuple[int, ...] | None:
        """What tells one state of the file from another; none where it isn't there."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def changes(old: Settings, new: Settings) -> str:
    """What differs, by its names; no value, which may be a secret."""
    said = [name for name in Settings.model_fields if name != "transports" and getattr(old, name) != getattr(new, name)]
    before = {options.name: options for options in old.transports}
    after = {options.name: options for options in new.transports}
    said += [f"transport {name} is gone" for name in before if name not in after]
    for name, options in after.items():
        if name not in before:
            said.append(f"transport {name} is new")
        elif options != before[name]:
            said.append(f"transport {name} is changed")
    return ", ".join(said) or "the order of the transports"
