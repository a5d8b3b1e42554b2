"""What is pseudonymised of Orthanc's resources and what is given back, with a memory: what the anonymizer and the AI
dispatch share.

All that is made follows from the file, the profile and the secret, and is remembered before it is put into Orthanc
(`orthanc_events_bridge.workflows.batch`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.workflows.asking import file_of, instances_of
from orthanc_events_bridge.workflows.batch import Batch
from orthanc_events_bridge.workflows.deidentify import LeftOutError, pseudonymise
from orthanc_events_bridge.workflows.dicom_files import UnreadableFileError
from orthanc_events_bridge.workflows.facts import Resource, Wanted, look
from orthanc_events_bridge.workflows.memory import Memory, Remembered
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from orthanc_events_bridge.workflows.reidentify import Result
from orthanc_events_bridge.workflows.telling import tell_received

if TYPE_CHECKING:
    import httpx

    from orthanc_events_bridge.consumers.app import Consumer
    from orthanc_events_bridge.consumers.event import Event


@dataclass(frozen=True, slots=True)
class Maker:
    """What a project's pseudonyms are made with.

    :ivar project: its name.
    """

    project: str
    profile: Profile
    pseudonyms: Pseudonyms


@dataclass(slots=True)
class Made:
    """What was pseudonymised.

    :ivar batch: what is in Orthanc, the last of it not yet noted (`Batch.end`).
    :ivar left_out: why → how many instances were left out.
    :ivar unreadable: Orthanc's ids of those that can't be read.
    """

    batch: Batch
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)


class UnreadableResultError(BridgeError):
    """A result can't be given back, and never will.

    :ivar instance: Orthanc's id of it.
    """

    def __init__(self, message: str, instance: str) -> None:
        super().__init__(message, "look at it")
        self.instance = instance


async def check_secret(memory: Memory, maker: Maker) -> None:
    """Is a project's secret the one that its pseudonyms were made with?

    :raises BridgeError: no.
    """
    if not await memory.project(maker.project, maker.pseudonyms.fingerprint):
        raise BridgeError(
            f"the secret of the project {maker.project} is another one than that which its pseudonyms were made with",
            "give the old one, or the project another name",
        )


# What a resource is.


async def belongs_to(memory: Memory, orthanc: httpx.AsyncClient, resource: Resource) -> tuple[bool, Remembered | None]:
    """Is it pseudonymous?

    :return: whether it is; and the study that it is of, or a result for, where that is remembered. A study of a
        pseudonym that was not made here is of results, if it refers to one that was.
    """
    study = await memory.study(resource.tag("StudyInstanceUID"))
    if study is not None:
        return True, study
    if not await memory.is_pseudonym(resource.tag("PatientID")):
        return False, None
    studies = await memory.studies_of(await uids_in(orthanc, resource.instances))
    return True, await memory.study(studies.pop()) if len(studies) == 1 else None


async def uids_in(orthanc: httpx.AsyncClient, instances: Collection[str]) -> set[str]:
    """All UIDs in some instances that may stand for others."""
    found: set[str] = set()
    for instance in instances:
        content = await file_of(orthanc, instance)
        if content is not None:
            with contextlib.suppress(UnreadableFileError):
                found |= (await asyncio.to_thread(Result.read, content)).uids
    return found


async def without_results(
    memory: Memory, orthanc: httpx.AsyncClient, resource: Resource, wanted: Wanted
) -> tuple[Resource, Mapping[str, str]]:
    """What there is beside results that were given back: they are nobody's to pseudonymise, nor do rules ask them.

    :return: also Orthanc's ids of the instances, by their UIDs.
    """
    results: set[str] = set()
    for one in await memory.studies(resource.tag("StudyInstanceUID")):
        results.update(await memory.made(one.uid, "result"))
    instances = await instances_of(orthanc, resource.level, resource.id)
    without = {instance for uid, instance in instances.items() if uid in results}
    if 0 < len(without) < len(instances):
        resource = await look(orthanc, resource.level, resource.id, wanted, without)
    return resource, {uid: one for uid, one in instances.items() if one not in without}


# There.


async def pseudonymise_all(
    memory: Memory,
    orthanc: httpx.AsyncClient,
    maker: Maker,
    instances: Mapping[str, str],
    made: Collection[str] = (),
) -> Made:
    """Pseudonymise instances of one study, and put them into Orthanc.

    :param instances: Orthanc's ids by their UIDs.
    :param made: what they are to become that is in Orthanc already, by UID: it is passed over.
    """
    pseudonyms, project = maker.pseudonyms, maker.project
    found = Made(Batch(memory, orthanc, "pseudonymised", project))
    for uid, instance in instances.items():
        if pseudonyms.uid(uid) in made:
            continue
        content = await file_of(orthanc, instance)
        if content is None:  # deleted meanwhile
            continue
        try:
            done = await asyncio.to_thread(pseudonymise, content, maker.profile, pseudonyms)
        except LeftOutError as error:
            found.left_out[error.why] += 1
            continue
        except UnreadableFileError:
            found.unreadable.append(instance)
            continue
        if not found.batch.count:
            who, original = done.identity.get("PatientID", ""), done.identity["StudyInstanceUID"]
            await memory.remember(Remembered(done.study, project, original, done.patient, who, done.identity))
        await found.batch.put(done.study, done.uid, done.content, done.uids)
    return found


# And back.


async def give_back_all(
    memory: Memory,
    orthanc: httpx.AsyncClient,
    study: Remembered,
    pseudonyms: Pseudonyms,
    results: Mapping[str, str],
    given: Collection[str] = (),
) -> Batch:
    """Give results the original's patient and study, and put them into Orthanc.

    :param results: Orthanc's ids by their UIDs.
    :param given: the UIDs of what was given back already: it is passed over.
    :return: of what is in Orthanc; the last of it is not yet noted (`Batch.end`).
    :raises UnreadableResultError: one can't be read, or not be written again.
    """
    batch = Batch(memory, orthanc, "result", study.project)
    for uid, instance in results.items():
        if pseudonyms.result(uid) in given:
            continue
        content = await file_of(orthanc, instance)
        if content is None:
            continue
        try:
            result = await asyncio.to_thread(Result.read, content)
            originals = await memory.originals(study.project, result.uids)
            back = await asyncio.to_thread(result.give_back, study.identity, study.patient, originals, pseudonyms)
        except UnreadableFileError as error:
            raise UnreadableResultError(error.message, instance) from error
        await batch.put(study.uid, pseudonyms.result(uid), back, {})
    return batch


async def tell_results(app: Consumer, event: Event, orthanc: httpx.AsyncClient, batch: Batch, project: str) -> None:
    """Tell of each series of results that it is there. Before it is noted as done: told again it is the same, and not
    told at all it would be lost."""
    for series, place in batch.series.items():
        await tell_received(
            app,
            event,
            level="series",
            identifier=series,
            parents={"study": place.study, "patient": place.patient},
            instances=list((await instances_of(orthanc, "series", series)).values()),
            rule=project,
        )
