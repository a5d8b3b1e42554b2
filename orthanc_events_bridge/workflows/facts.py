"""What Orthanc knows of a resource, as conditions ask for it: asked for once, and no more than is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.events.mapping import SUBJECTS
from orthanc_events_bridge.workflows.asking import ask
from orthanc_events_bridge.workflows.conditions import Condition

if TYPE_CHECKING:
    import httpx

#: What to do where there are none.
_NO_LABELS: Final = "labels need Orthanc 1.12, and a database of it that knows them; else leave those conditions out"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What conditions ask for.

    :ivar tags: keywords, or paths into sequences.
    :ivar metadata: whether any is asked for.
    :ivar labels: whether they are asked for.
    """

    tags: frozenset[str] = frozenset()
    metadata: bool = False
    labels: bool = False

    @classmethod
    def by(cls, conditions: Iterable[Condition]) -> Wanted:
        """By these."""
        all_of_them = list(conditions)
        tags = frozenset(name for one in all_of_them for name in one.names("tag"))
        metadata = any(True for one in all_of_them for _ in one.names("metadata"))
        return cls(tags, metadata, any(one.asks_labels() for one in all_of_them))


@dataclass(slots=True)
class Resource:
    """A resource and what is known of it: `orthanc_events_bridge.workflows.conditions.Facts`.

    :ivar level: ``study``, ``series`` or ``instance``.
    :ivar id: Orthanc's.
    :ivar study: Orthanc's id of the study that it is, or belongs to.
    :ivar instances: Orthanc's ids of its instances, sorted.
    :ivar labels: its own.
    """

    level: str
    id: str
    study: str = ""
    instances: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    _main: list[Mapping[str, Any]] = field(default_factory=list)
    _whole: list[Mapping[str, Any]] = field(default_factory=list)
    _metadata: list[Mapping[str, str]] = field(default_factory=list)

    def values(self, kind: Literal["tag", "metadata"], name: str) -> Sequence[str]:
        """See `Facts`."""
        if kind == "metadata":
            return _once(str(one[name]) for one in self._metadata if name in one)
        found = [str(one[name]) for one in self._main if name in one]
        found = found or [value for one in self._whole for value in _inside(one, name.split("."))]
        # DICOM writes several values into one, with backslashes between (PS3.5, section 6.4).
        return _once([*found, *(part for value in found if "\\" in value for part in value.split("\\"))])

    def tag(self, keyword: str) -> str:
        """The value of a tag that has one; empty where it has none."""
        return next(iter(self.values("tag", keyword)), "")

    @property
    def fingerprint(self) -> str:
        """The same for the same instances with the same main tags, wherever they come from; another one when any were
        added, removed or corrected there. What is corrected in other tags under the same UIDs it doesn't see.
        """
        text = json.dumps([self.level, self.instances, self._main], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


async def check_labels(orthanc: httpx.AsyncClient) -> None:
    """Does Orthanc have labels?

    :raises OrthancError: no.
    """
    system = (await ask(orthanc, "/system")).json()
    if not system.get("HasLabels"):
        raise OrthancError(f"rules ask for labels, and Orthanc {system.get('Version')} has none", _NO_LABELS)


async def look(
    orthanc: httpx.AsyncClient, level: str, identifier: str, wanted: Wanted, without: Collection[str] = ()
) -> Resource:
    """Ask Orthanc about a resource.

    :param level: ``study``, ``series`` or ``instance``.
    :param without: instances that don't count, nor does a series of which none other is there.
    :raises GoneError: there is no such resource.
    :raises OrthancError: labels are wanted, and Orthanc knows none: what is decided without them would be wrong.
    :raises httpx.HTTPError: Orthanc doesn't answer.
    """
    found = Resource(level, identifier)
    itself = await _get(orthanc, level, identifier, "")
    series = [itself] if level == "series" else []
    if level == "study":
        series = await _get(orthanc, level, identifier, "/series")
        series.sort(key=lambda one: str(one["ID"]))
    if without:
        series = [{**one, "Instances": [each for each in one["Instances"] if each not in without]} for one in series]
        series = [one for one in series if one["Instances"]]
    above = [itself]
    if level == "instance":
        above.append(await _get(orthanc, "series", itself["ParentSeries"], ""))
    if level != "study":
        above.append(await _get(orthanc, "study", above[-1]["ParentStudy"], ""))
    found.study = str(above[-1]["ID"])
    for one in (*(series if level == "study" else ()), *above):
        found._main += [one.get("PatientMainDicomTags", {}), one.get("MainDicomTags", {})]
    instances = [str(one) for each in series for one in each["Instances"]] or [identifier]
    found.instances = tuple(sorted(instances))
    firsts = [min(each["Instances"]) for each in series if each["Instances"]] or [identifier]
    if not all(any(tag in main for main in found._main) for tag in wanted.tags):
        found._whole = await _each(orthanc, [("instance", one, "/tags?simplify") for one in firsts])
    if wanted.metadata:
        places = [(level, identifier, "/metadata?expand")]
        places += [("series", str(one["ID"]), "/metadata?expand") for one in series if level == "study"]
        places += [("instance", one, "/metadata?expand") for one in firsts if level != "instance"]
        found._metadata = await _each(orthanc, places)
    if wanted.labels:
        if "Labels" not in itself:
            raise OrthancError("rules ask for labels, and this Orthanc has none", _NO_LABELS)
        found.labels = tuple(str(one) for one in itself["Labels"])
    return found


async def _each(orthanc: httpx.AsyncClient, places: Sequence[tuple[str, str, str]]) -> list[Any]:
    return [await _get(orthanc, *place) for place in places]  # one behind the other: it has others to serve


async def _get(orthanc: httpx.AsyncClient, level: str, identifier: str, what: str) -> Any:
    return (await ask(orthanc, f"/{SUBJECTS[level]}/{identifier}{what}")).json()


def _once(values: Iterable[str]) -> Sequence[str]:
    return list(dict.fromkeys(values))


def _inside(tags: Mapping[str, Any], path: Sequence[str]) -> Iterable[str]:
    """The values at a path; of a sequence those of all its items."""
    value = tags.get(path[0])
    if len(path) == 1:
        if isinstance(value, str | int | float):
            yield str(value)
        return
    for item in value if isinstance(value, list) else ():
        yield from _inside(item, path[1:])
