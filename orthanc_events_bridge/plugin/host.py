"""Orthanc's own log, which everything in its process writes to."""

from __future__ import annotations

from typing import Any, Final, Protocol

#: In front of every line of ours.
PREFIX: Final = "orthanc-events: "


class Host(Protocol):
    """Where messages go."""

    def info(self, message: str) -> None: ...
    def warning(self, message: str) -> None: ...
    def error(self, message: str) -> None: ...


class OrthancHost:
    """Orthanc's own log, behind our prefix.

    :param orthanc: Orthanc's module.
    """

    def __init__(self, orthanc: Any) -> None:
        self._orthanc = orthanc

    def info(self, message: str) -> None:
        self._orthanc.LogInfo(PREFIX + message)

    def warning(self, message: str) -> None:
        self._orthanc.LogWarning(PREFIX + message)

    def error(self, message: str) -> None:
        self._orthanc.LogError(PREFIX + message)
