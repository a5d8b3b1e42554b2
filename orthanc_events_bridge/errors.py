"""The errors that this package raises. Each says what is wrong and what to do about it.

Loaded inside Orthanc's process too: standard library only.
"""

from __future__ import annotations


class BridgeError(Exception):
    """Something is wrong that a person can put right.

    :param message: what is wrong, in one sentence, without patient data and without secrets.
    :param remedy: what to do about it, in one sentence; empty where the message says it all.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class FolderError(BridgeError):
    """The outbox's folder can't be found or used."""


class OutboxError(BridgeError):
    """The outbox can't be opened, read or written."""


class OutboxFullError(OutboxError):
    """The outbox has reached ``outbox.max_bytes``, or its disk is full or read-only."""


class DamagedError(OutboxError):
    """A database is damaged. It heals by itself: the file is set aside, and a new one is made by whoever writes it."""


class LogUnavailableError(BridgeError):
    """Orthanc can't answer ``/changes`` at the moment: it is starting, or it is stopping."""


class NotAnsweredError(LogUnavailableError):
    """Orthanc answers other questions, and not this one: it is asked again, a few times."""


class PassedOverError(BridgeError):
    """Orthanc was asked often enough, and answers other questions: go on without its answer."""


class GoneError(BridgeError):
    """Orthanc knows no such resource (any more)."""


class OrthancError(BridgeError):
    """Orthanc can't be asked over HTTP until a person changes something: address, credentials, certificate, rights."""


class TransportError(BridgeError):
    """Base of what a transport raises. A broker's own exceptions never pass its transport."""


class NotConnectedError(TransportError):
    """The connection is gone or was never there. It *means*: close, connect again, send again."""


class RefusedError(TransportError):
    """The broker is there and doesn't take the event now (stream full, no acknowledgement in time).

    Sending it again later, over the same connection, can succeed.

    :param retry_after: how many seconds the broker asks to be left alone, where it says so.
    """

    def __init__(self, message: str, remedy: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, remedy)
        self.retry_after = retry_after


class EventRejectedError(TransportError):
    """The broker can never take this one event (too large, say). It is set aside; the rest goes on."""


class TransportConfigurationError(TransportError):
    """Nothing gets through until a person changes something: credentials, certificate, topology.

    The relay says so loudly and goes on trying, slowly: whatever is wrong may be mended at the broker's end.
    """
