"""The names of the headers that we add to messages (docs/events.md, docs/consumers.md)."""

from __future__ import annotations

from typing import Final

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
