"""What stands for what: the anonymizer's own memory, in a database that only it may read.

Nothing is forgotten: what is not remembered can't be given back its patient.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from orthanc_events_bridge.workflows.tables import CHUNK, Tables, in_parts

_CREATE: Final = (
    "CREATE TABLE IF NOT EXISTS orthanc_events_projects (project text PRIMARY KEY, fingerprint text NOT NULL)",
    # ``uid``: what stands for the study. ``identity``: what a result is given back, by keyword, as JSON.
    (
        "CREATE TABLE IF NOT EXISTS orthanc_events_studies (uid text PRIMARY KEY, project text NOT NULL,"
        " original text NOT NULL, patient text NOT NULL, patient_original text NOT NULL, identity text NOT NULL)"
    ),
    "CREATE INDEX IF NOT EXISTS orthanc_events_studies_original ON orthanc_events_studies (original)",
    "CREATE INDEX IF NOT EXISTS orthanc_events_studies_patient ON orthanc_events_studies (patient)",
    (
        "CREATE TABLE IF NOT EXISTS orthanc_events_uids"
        " (uid text PRIMARY KEY, project text NOT NULL, original text NOT NULL)"
    ),
    "CREATE INDEX IF NOT EXISTS orthanc_events_uids_original ON orthanc_events_uids (original)",
    # ``uid``: of an instance that is made here. ``kind``: pseudonymised, or a result that was given back its patient.
    (
        "CREATE TABLE IF NOT EXISTS orthanc_events_made"
        " (uid text PRIMARY KEY, study text NOT NULL, kind text NOT NULL, done boolean NOT NULL)"
    ),
    "CREATE INDEX IF NOT EXISTS orthanc_events_made_study ON orthanc_events_made (study)",
)
_STUDY: Final = (
    "INSERT INTO orthanc_events_studies (uid, project, original, patient, patient_original, identity)"
    " VALUES ({uid}, {project}, {original}, {patient}, {patient_original}, {identity}) ON CONFLICT (uid) DO NOTHING"
)
_COLUMNS: Final = "SELECT uid, project, original, patient, patient_original, identity FROM orthanc_events_studies"

Kind = Literal["pseudonymised", "result"]


@dataclass(frozen=True, slots=True)
class Remembered:
    """A pseudonymised study.

    :ivar uid: what stands for its StudyInstanceUID.
    :ivar project: whose pseudonyms they are.
    :ivar original: its StudyInstanceUID.
    :ivar patient: what stands for its PatientID.
    :ivar patient_original: its PatientID.
    :ivar identity: elements of the original's patient and study, by keyword.
    """

    uid: str
    project: str
    original: str
    patient: str
    patient_original: str
    identity: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Remembered({self.uid!r})"  # never what it stands for


class Memory(Tables):
    """See the module's text."""

    CREATE = _CREATE

    async def project(self, project: str, fingerprint: str) -> bool:
        """Is a project's secret the one that its pseudonyms were made with? The first one is noted."""
        note = "INSERT INTO orthanc_events_projects VALUES ({project}, {mark}) ON CONFLICT (project) DO NOTHING"
        look = "SELECT fingerprint FROM orthanc_events_projects WHERE project = {project}"
        rows = await self._run((note, {"project": project, "mark": fingerprint}), (look, {"project": project}))
        return bool(rows[0][0] == fingerprint)

    async def remember(self, study: Remembered) -> None:
        """Remember a study; one that is remembered stays as it is."""
        await self._run((_STUDY, {**_values(study), "identity": json.dumps(dict(study.identity))}))

    async def study(self, uid: str) -> Remembered | None:
        """The study that this UID stands for."""
        found = [_study(row) for row in await self._run((f"{_COLUMNS} WHERE uid = {{uid}}", {"uid": uid}))]
        return found[0] if found else None

    async def studies(self, identifier: str) -> list[Remembered]:
        """Those that an identifier is of: a PatientID or a StudyInstanceUID, the original or what stands for it."""
        wanted = ("uid", "original", "patient", "patient_original")
        where = " OR ".join(f"{column} = {{it}}" for column in wanted)
        return [_study(row) for row in await self._run((f"{_COLUMNS} WHERE {where} ORDER BY uid", {"it": identifier}))]

    async def is_pseudonym(self, patient: str) -> bool:
        """Whether that stands for a PatientID."""
        text = "SELECT 1 FROM orthanc_events_studies WHERE patient = {patient} LIMIT 1"
        return bool(await self._run((text, {"patient": patient})))

    async def begin(self, study: str, instance: str, kind: Kind, project: str, uids: Mapping[str, str]) -> None:
        """Remember an instance, before it is put into Orthanc, and what stands for which UID in it.

        :param study: what stands for its study's UID.
        :param instance: its own UID, as it is going to be.
        :param uids: originals by what stands for them.
        """
        made = "INSERT INTO orthanc_events_made VALUES ({uid}, {study}, {kind}, {done}) ON CONFLICT (uid) DO NOTHING"
        values = {"uid": instance, "study": study, "kind": kind, "done": False}
        await self._run(*_uid_steps(project, uids), (made, values))

    async def finish(self, instances: Sequence[str]) -> None:
        """These are in Orthanc."""
        for names, given in in_parts(instances):
            text = f"UPDATE orthanc_events_made SET done = {{done}} WHERE uid IN ({names})"
            await self._run((text, {"done": True, **given}))

    async def made(self, study: str, kind: Kind) -> dict[str, bool]:
        """The instances that were made of a study, and whether they are in Orthanc.

        :param study: what stands for its UID.
        """
        text = "SELECT uid, done FROM orthanc_events_made WHERE study = {study} AND kind = {kind}"
        return {uid: bool(done) for uid, done in await self._run((text, {"study": study, "kind": kind}))}

    async def studies_of(self, uids: Iterable[str]) -> set[str]:
        """The pseudonymised studies, by their UIDs, that any of these instances are of."""
        found: set[str] = set()
        for names, given in in_parts(sorted(uids)):
            where = f"kind = 'pseudonymised' AND uid IN ({names})"
            text = f"SELECT DISTINCT study FROM orthanc_events_made WHERE {where}"
            found.update(row[0] for row in await self._run((text, given)))
        return found

    async def originals(self, project: str, uids: Iterable[str]) -> dict[str, str]:
        """What UIDs stand for, of those that stand for anything."""
        found: dict[str, str] = {}
        for names, given in in_parts(sorted(uids)):
            where = f"project = {{project}} AND uid IN ({names})"
            text = f"SELECT uid, original FROM orthanc_events_uids WHERE {where}"
            rows = await self._run((text, {"project": project, **given}))
            found.update((uid, original) for uid, original in rows)
        return found

    async def who(self, uid: str) -> list[tuple[str, str, str]]:
        """Project, original, and what stands for it, of any UID; either may be given."""
        text = "SELECT project, original, uid FROM orthanc_events_uids WHERE uid = {it} OR original = {it} ORDER BY 1"
        return [(project, original, found) for project, original, found in await self._run((text, {"it": uid}))]


def _uid_steps(project: str, uids: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pairs = sorted(uids.items())  # in one order: two that insert the same don't wait for each other
    for start in range(0, len(pairs), CHUNK):
        given: dict[str, Any] = {"project": project}
        rows = []
        for number, (uid, original) in enumerate(pairs[start : start + CHUNK]):
            given |= {f"u{number}": uid, f"o{number}": original}
            rows.append(f"({{u{number}}}, {{project}}, {{o{number}}})")
        yield f"INSERT INTO orthanc_events_uids VALUES {', '.join(rows)} ON CONFLICT (uid) DO NOTHING", given


def _values(study: Remembered) -> dict[str, Any]:
    return {name: getattr(study, name) for name in ("uid", "project", "original", "patient", "patient_original")}


def _study(row: tuple[Any, ...]) -> Remembered:
    uid, project, original, patient, patient_original, identity = row
    return Remembered(uid, project, original, patient, patient_original, json.loads(identity))
