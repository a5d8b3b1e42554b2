"""The names of the headers that we add to messages (docs/events.md, docs/consumers.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from orthanc_events_bridge.moments import iso, seconds_of

#: The event's id, where the broker's own key against duplicates is another.
EVENT_ID: Final = "orthanc-event-id"
#: The short name of the Orthanc, on brokers whose address doesn't hold it.
SITE: Final = "orthanc-site"
#: Why it is there again: ``retry``, ``redrive``, ``replay``.
OPERATION: Final = "orthanc-operation"
#: Whose inbox or dead letters it is in.
CONSUMER: Final = "orthanc-consumer"
#: Under which address everybody got it.
ADDRESS: Final = "orthanc-address"
#: How often the consumer was given it.
ATTEMPTS: Final = "orthanc-attempts"
#: When it is to be given again.
DUE: Final = "orthanc-due"
#: Why it is a dead letter, in one sentence.
REASON: Final = "orthanc-reason"
#: The type of what its handler raised.
EXCEPTION: Final = "orthanc-exception"
FIRST_FAILURE: Final = "orthanc-first-failure"
LAST_FAILURE: Final = "orthanc-last-failure"


def due_text(seconds: float) -> str:
    """When something is to be given again, for `DUE`: never earlier than that.

    :param seconds: of the epoch.
    """
    return iso(math.ceil(seconds * 1000))


def due_of(headers: Mapping[str, str]) -> float:
    """The reverse, in seconds of the epoch; 0, which is now, where nothing, or nothing of ours, is said."""
    text = headers.get(DUE)  # of each event it is asked, and few have it
    return (seconds_of(text) or 0.0) if text else 0.0


def attempts_before(headers: Mapping[str, str], consumer: str) -> int:
    """How often a consumer was given it before, as far as its copies say."""
    attempts = headers.get(ATTEMPTS, "") if headers.get(CONSUMER) == consumer else ""
    return int(attempts) if attempts.isdecimal() and len(attempts) < 10 else 0
