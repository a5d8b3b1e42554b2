"""What repair and a backfill ask: Orthanc about what it has, and the registry about what was announced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from orthanc_events_bridge.changes.model import Resource
from orthanc_events_bridge.errors import PassedOverError


class Orthanc(Protocol):
    """What is asked of Orthanc (`orthanc_events_bridge.plugin.lookup.Lookup`).

    Each raises `LogUnavailableError`: Orthanc can't answer now; and what is about one resource, `PassedOverError`: it
    was asked about this often enough, and answers all else.
    """

    def tip(self) -> int: ...
    def resource(self, level: str, resource: str) -> Mapping[str, Any] | None: ...
    def studies(self, since: int, limit: int) -> Sequence[str]: ...
    def count_studies(self) -> int: ...
    def received(self, instance: str) -> str | None: ...


class Announced(Protocol):
    """What was announced (`orthanc_events_bridge.resources.Resources`)."""

    def find(self, resource: str) -> Resource | None: ...


def is_new(announced: Announced, resource: str) -> bool:
    """Whether nobody has said that it was created."""
    known = announced.find(resource)
    return known is None or known.born is None


def found_of(orthanc: Orthanc, level: str, resource: str) -> Mapping[str, Any] | None:
    """Orthanc's answer about a resource; none where it is gone, and where nobody can say.

    :raises LogUnavailableError: Orthanc can't answer now.
    """
    with suppress(PassedOverError):
        return orthanc.resource(level, resource)
    return None
