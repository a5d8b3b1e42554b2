"""What left the house: a line of JSON for each, on a logger of its own, and in a file where one is given.

Orthanc's ids, names of destinations and rules, ids of events: no patient data.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from orthanc_events_bridge.errors import BridgeError

log: Final = logging.getLogger("orthanc_events_bridge.audit")


class Audit:
    """Appends lines, whole ones, also with several workers on one file.

    :param path: of the file; none: the log alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def check(self) -> None:
        """Can it be written?

        :raises BridgeError: no.
        """
        if self._path is not None:
            try:
                with self._path.open("ab"):
                    pass
            except OSError as error:
                raise BridgeError(
                    f"the audit file {self._path} can't be written: {error.strerror}", "let our user write it"
                ) from error

    def note(self, what: str, **more: object) -> None:
        """Note that something was done.

        :raises BridgeError: the file can't be written: then it counts as not done.
        """
        text = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": what, **more})
        log.info("%s", text)
        if self._path is None:
            return
        try:
            # One write with O_APPEND: lines of several workers don't mix.
            with self._path.open("ab", buffering=0) as file:
                file.write(text.encode() + b"\n")
        except OSError as error:
            raise BridgeError(
                f"the audit file {self._path} can't be written: {error.strerror}", "make room, or let our user write it"
            ) from error
