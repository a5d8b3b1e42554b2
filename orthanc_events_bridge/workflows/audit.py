"""What left the house: a line of JSON for each, on a logger of its own, and in a file where one is given.

Orthanc's ids, names of destinations and rules, ids of events: no patient data.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Final

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.moments import iso

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
        self._append(b"")

    def note(self, what: str, **more: object) -> None:
        """Note that something was done.

        :raises BridgeError: the file can't be written: then it counts as not done.
        """
        text = json.dumps({"time": iso(time.time() * 1000), "what": what, **more})
        log.info("%s", text)
        self._append(text.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            # One write with O_APPEND: lines of several workers don't mix.
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise BridgeError(
                f"the audit file {self._path} can't be written: {error.strerror}", "make room, or let our user write it"
            ) from error
