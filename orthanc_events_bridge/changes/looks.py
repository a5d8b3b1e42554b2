"""What was announced and isn't there any more, by a question or two about a resource of the registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from orthanc_events_bridge.changes.model import Resource
from orthanc_events_bridge.changes.questions import Announced, Orthanc
from orthanc_events_bridge.errors import PassedOverError


class Registry(Announced, Protocol):
    """What was announced (`orthanc_events_bridge.resources.Resources`)."""

    def below(self, resource: Resource) -> list[Resource]: ...
    def members(self, series: Resource) -> list[Resource]: ...
    def is_childless(self, resource: Resource) -> bool: ...
    def page(self, level: str, after: str, limit: int) -> list[Resource]: ...
    def growing(self) -> list[Resource]: ...
    def meet(self, resources: Iterable[Resource]) -> None: ...
    def forget(self, resources: Sequence[Resource]) -> None: ...


class Looks:
    """Looks for what is missing. Part of `orthanc_events_bridge.changes.repair.Repair`.

    What Orthanc can't describe is left open. Each of them raises `LogUnavailableError` where Orthanc can't answer now.

    :param orthanc: what Orthanc is asked by.
    :param instances: whether instances are looked for as well.
    :ivar registry: what was announced.
    """

    def __init__(self, registry: Registry, orthanc: Orthanc, instances: bool) -> None:
        self.registry = registry
        self._orthanc = orthanc
        self._instances = instances

    def is_gone(self, one: Resource) -> bool:
        """Whether Orthanc says so; what it can't describe is left open."""
        with suppress(PassedOverError):
            return self._orthanc.resource(one.level, one.id) is None
        return False

    def of_study(self, study: Resource) -> list[Resource]:
        """What is missing of it."""
        try:
            answer = self._orthanc.resource("study", study.id)
        except PassedOverError:
            return []
        below = self.registry.below(study)
        if answer is not None:
            there = set(answer.get("Series", ()))
            return self._with_members([one for one in below if one.id not in there])
        missing = [*self._with_members(below), study]
        patient = self.registry.find(study.parent) if study.parent else None
        if patient is not None and self.is_gone(patient):
            missing.append(patient)
        return missing

    def of_series(self, series: Resource) -> list[Resource]:
        """What is missing of it, where instances are looked for."""
        try:
            answer = self._orthanc.resource("series", series.id)
        except PassedOverError:
            return []
        members = self.registry.members(series)
        if answer is None:
            return [*members, series]
        there = set(answer.get("Instances", ()))
        return [one for one in members if one.id not in there]

    def _with_members(self, series: Sequence[Resource]) -> list[Resource]:
        if not self._instances:
            return list(series)
        return [one for parent in series for one in (*self.registry.members(parent), parent)]

    def is_loose(self, one: Resource) -> bool:
        """Whether the walk over the studies says nothing of it."""
        if one.level == "patient":
            return self.registry.is_childless(one)
        return one.parent is None or self.registry.find(one.parent) is None
