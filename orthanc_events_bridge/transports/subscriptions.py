"""What the subscriptions of all transports share."""

from __future__ import annotations

import re
import time
from typing import Final

from orthanc_events_bridge.errors import TransportConfigurationError

#: Every broker takes it as part of a queue's or topic's name, with a prefix and a suffix of ours.
_LONGEST_NAME: Final = 128
#: Of the wire contract: by which events are shared in order. Fixed for good.
PARTITIONS: Final = 64


def check_name(transport: str, name: str) -> None:
    """May a consumer be called so?

    :param transport: its name, for the message.
    :raises TransportConfigurationError: no.
    """
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{_LONGEST_NAME}}}", name) is None:
        raise TransportConfigurationError(
            f"transport {transport}: {name[:_LONGEST_NAME]!r} can't be the name of a consumer at this broker",
            f"use letters, digits, _ and - only, at most {_LONGEST_NAME} of them",
        )


if hasattr(time, "CLOCK_BOOTTIME"):

    def boot_time() -> float:
        """Seconds on a clock that goes on while the process, or the whole machine, is suspended."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:
    boot_time = time.monotonic
