"""The words for a change: its kind, its resource's level, and the fact that becomes a row of the outbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple


class ResourceLevel(IntEnum):
    """Numbers as the Python plugin gives them (``OrthancPluginResourceType``)."""

    PATIENT = 0
    STUDY = 1
    SERIES = 2
    INSTANCE = 3
    NONE = 4


class ChangeKind(IntEnum):
    """Numbers as the Python plugin gives them (``OrthancPluginChangeType``)."""

    COMPLETED_SERIES = 0
    DELETED = 1
    NEW_CHILD_INSTANCE = 2
    NEW_INSTANCE = 3
    NEW_PATIENT = 4
    NEW_SERIES = 5
    NEW_STUDY = 6
    STABLE_PATIENT = 7
    STABLE_SERIES = 8
    STABLE_STUDY = 9
    ORTHANC_STARTED = 10
    ORTHANC_STOPPED = 11
    UPDATED_ATTACHMENT = 12
    UPDATED_METADATA = 13
    UPDATED_PEERS = 14
    UPDATED_MODALITIES = 15
    JOB_SUBMITTED = 16
    JOB_SUCCESS = 17
    JOB_FAILURE = 18


#: Kinds that Orthanc writes to its change log, as well as calling back.
LOGGED: Final = frozenset(
    {
        ChangeKind.COMPLETED_SERIES,
        ChangeKind.NEW_INSTANCE,
        ChangeKind.NEW_PATIENT,
        ChangeKind.NEW_SERIES,
        ChangeKind.NEW_STUDY,
        ChangeKind.STABLE_PATIENT,
        ChangeKind.STABLE_SERIES,
        ChangeKind.STABLE_STUDY,
        ChangeKind.UPDATED_ATTACHMENT,
        ChangeKind.UPDATED_METADATA,
    }
)

#: The name of each kind, as ``/changes`` spells it.
NAMES: Final[Mapping[int, str]] = {kind.value: kind.name.title().replace("_", "") for kind in ChangeKind}

#: Names that only the logs of old databases hold; this Orthanc never calls back for them.
LEGACY_NAMES: Final = frozenset(
    f"{verb}{level}" for verb in ("Anonymized", "Modified") for level in ("Patient", "Study", "Series")
)

KNOWN_NAMES: Final = frozenset(NAMES.values()) | LEGACY_NAMES

LEVEL_NAMES: Final[Mapping[int, str]] = {0: "patient", 1: "study", 2: "series", 3: "instance"}

_JOB_KINDS: Final = frozenset({ChangeKind.JOB_SUBMITTED, ChangeKind.JOB_SUCCESS, ChangeKind.JOB_FAILURE})


class Callback(NamedTuple):
    """One call of Orthanc's OnChange.

    :param kind: the number of the change, perhaps one that this version doesn't know.
    :param level: the number of the resource's level.
    :param resource: Orthanc's id of the resource or job; empty for the server.
    :param at: when it came, seconds since the epoch.
    """

    kind: int
    level: int
    resource: str
    at: float

    @property
    def logged(self) -> bool:
        """Whether Orthanc gives this kind a row, and thus a Seq, in its change log."""
        return self.kind in LOGGED

    @property
    def change(self) -> str:
        """The name as ``/changes`` spells it; for an unknown kind the number as text."""
        return NAMES.get(self.kind) or str(self.kind)

    @property
    def level_name(self) -> str:
        if self.kind in _JOB_KINDS:
            return "job"
        return LEVEL_NAMES.get(self.level, "server")


@dataclass(slots=True)
class Fact:
    """What changed, and what was true then. One row of the outbox.

    :param change: the kind, as ``/changes`` spells it.
    :param level: ``patient``, ``study``, ``series``, ``instance``, ``job`` or ``server``.
    :param resource: Orthanc's id, or none for the server.
    :param at: the change's own time, milliseconds since the epoch: whole seconds if the log's.
    :param seq: its number in Orthanc's log, where it has one.
    :param date: the log's own spelling of its date; none where the row was not read, and then the event's id
        is minted.
    :param parents: level → Orthanc id of the parents; none until they have been looked up.
    :param extra: what else was captured: ``job``, ``tags``, ``metadata``, ``inferred``.
    :param foreign: whether it is for certain the work of another Orthanc on the same database, which tells what becomes
        of the resource.
    """

    change: str
    level: str
    resource: str | None
    at: int
    seq: int | None = None
    date: str | None = None
    parents: dict[str, str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    foreign: bool = False


class Resource(NamedTuple):
    """A resource that was heard of and, as far as anybody has said, not deleted since.

    :param parent: the id of the one right above, where that is known.
    :param born: the Seq of its creation; none where that was before our time.
    """

    level: str
    id: str
    parent: str | None
    born: int | None
