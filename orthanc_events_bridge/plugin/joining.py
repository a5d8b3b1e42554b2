"""Which merge turns this Orthanc's callbacks and log into facts: by its database, and by the settings."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from orthanc_events_bridge.changes.log import OrthancLog
from orthanc_events_bridge.changes.merge import Clock, Merge
from orthanc_events_bridge.changes.model import Callback
from orthanc_events_bridge.changes.unlogged import Unlogged
from orthanc_events_bridge.changes.unordered import Unordered

#: For Orthanc's own database, for any other, and for no log at all.
AnyMerge = Merge | Unordered | Unlogged


def join(
    log: OrthancLog,
    queue: deque[Callback],
    cursor: int | None,
    ahead: str,
    clock: Clock,
    options: Mapping[str, Any],
    *,
    began: float,
    counts: dict[str, int],
) -> AnyMerge:
    """The merge to go on with.

    :param cursor: none on a first start.
    :param ahead: what is recorded above it.
    :param options: what capture has to know of the configuration (`Upkeep.options`).
    :param began: when the queue began to be filled, seconds since the epoch.
    :param counts: of the status.
    """
    if not options["log"]:
        return Unlogged(log, queue, cursor, ahead=ahead)
    if not log.unordered:
        return Merge(log, queue, cursor or 0, clock)
    grace = options["grace"]
    return Unordered(log, queue, cursor or 0, clock, ahead=ahead, grace=grace, began=began, counts=counts)


def is_joined(merge: AnyMerge, options: Mapping[str, Any]) -> bool:
    """Whether a merge is still the one that the settings ask for."""
    if isinstance(merge, Unordered) and merge.grace != options["grace"]:
        return False
    return isinstance(merge, Unlogged) is not options["log"]
