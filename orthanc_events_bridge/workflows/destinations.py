"""Where resources are sent, and how: by Orthanc's own jobs where it has them, else file by file.

All are repeatable: what was sent already is recognised by its SOP instance UIDs where it arrives, and a job that runs
already is waited for (`orthanc_events_bridge.workflows.jobs`).
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.settings import OrthancBlock, RetrySettings
from orthanc_events_bridge.errors import BridgeError, GoneError, OrthancError
from orthanc_events_bridge.orthanc_api import OrthancOptions
from orthanc_events_bridge.values import Duration, FileName, Options, Place, mistake
from orthanc_events_bridge.workflows.asking import ask, file_of
from orthanc_events_bridge.workflows.facts import Resource
from orthanc_events_bridge.workflows.jobs import Left, Submission, run_job

if TYPE_CHECKING:
    import httpx


def _symbol(value: str) -> str:
    if re.fullmatch(r"[^\s/?#%]+", value) is None:
        raise mistake("can't be a name in Orthanc's configuration", "write it as it is there", shown=value)
    return value


#: An option that is a name in Orthanc's configuration; it becomes a part of a path.
Symbol = Annotated[str, AfterValidator(_symbol)]
_KINDS: Final = ("modality", "peer", "dicomweb", "orthanc", "folder")


class Destination(Options):
    """One place to send to: one of `modality`, `peer`, `dicomweb`, `orthanc` and `folder`, with its limits."""

    modality: Symbol | None = Field(
        default=None,
        description="A modality by its name in Orthanc's `DicomModalities`: C-STORE, as a job of Orthanc's.",
        examples=["pacs"],
    )
    peer: Symbol | None = Field(
        default=None, description="A peer by its name in Orthanc's `OrthancPeers`, as a job.", examples=["archive"]
    )
    dicomweb: Symbol | None = Field(
        default=None,
        description="A server by its name in the configuration of Orthanc's DICOMweb plugin: STOW-RS, as a job.",
        examples=["cloud"],
    )
    orthanc: OrthancBlock | None = Field(
        default=None,
        description="Another Orthanc, which Orthanc itself knows nothing of: by its URL or a block, file by file.",
        examples=["https://research.example.org/orthanc"],
    )
    folder: FileName | None = Field(
        default=None,
        description="A folder: `STUDY/SERIES/INSTANCE.dcm`, by their UIDs, each written whole or not at all.",
        examples=["/srv/export"],
    )
    concurrency: int = Field(
        default=2, ge=1, le=256, description="How many resources one worker sends there at a time."
    )
    timeout: Annotated[float, Duration(minimum=1)] = Field(
        default=3600.0, description="How long sending one resource may take.", examples=["1h"]
    )
    retry: RetrySettings = Field(
        default_factory=RetrySettings,
        description="What becomes of what could not be sent: it is tried again, and in the end goes among the dead "
        "letters of `{name}-{destination}`.",
    )
    back: bool = Field(
        default=False,
        description="Whether to send to a modality what has come from its AET.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Exactly one kind of place."""
        kinds = [kind for kind in _KINDS if kind in given]
        if len(kinds) != 1:
            wrong = f"it is {' and '.join(kinds)}" if kinds else "where it sends to is not said"
            yield (), mistake(wrong, f"give one of {', '.join(_KINDS)}")

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Another Orthanc of which not all is said; nothing of it comes from the environment."""
        if self.orthanc is None:
            return
        if self.orthanc.url is None:
            yield ("orthanc",), mistake("where it is is not said", "give its url: https://HOST/PATH, say")
            return
        try:
            OrthancOptions(**self.orthanc.given()).check()
        except OrthancError as error:
            yield ("orthanc",), mistake(error.message, error.remedy)

    @property
    def kind(self) -> str:
        """Which of the ways it is."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)


class Sender:
    """Sends to one destination.

    :param name: of the destination.
    :raises BridgeError: it can't be.
    """

    def __init__(self, name: str, destination: Destination) -> None:
        self.name = name
        self.destination = destination
        self._other: Clients | None = None
        if destination.orthanc is not None:
            self._other = Clients(OrthancOptions.find({}, {}, destination.orthanc.given()))

    def check(self) -> None:
        """Can it send, as far as that can be known here?

        :raises BridgeError: no.
        """
        if self._other is not None:
            self._other.check()
        folder = self.destination.folder
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            raise BridgeError(f"the folder {folder} of the destination {self.name} can't be written", "make it, for us")

    async def describe(self, orthanc: httpx.AsyncClient) -> str:
        """What it is, with what Orthanc knows of it.

        :raises BridgeError: Orthanc doesn't know it.
        """
        kind = self.destination.kind
        text = f"destination {self.name}: {kind} "
        if kind == "modality":
            found = await self._configuration(orthanc)
            return f"{text}{self.destination.modality}, {found.get('AET')} at {found.get('Host')}:{found.get('Port')}"
        if kind == "peer":
            return f"{text}{self.destination.peer}, {(await self._configuration(orthanc)).get('Url')}"
        if kind == "dicomweb":
            servers = await _answer(orthanc, "/dicom-web/servers", "the DICOMweb plugin has to be loaded")
            if self.destination.dicomweb not in servers:
                raise OrthancError(f"Orthanc knows no DICOMweb server {self.destination.dicomweb}", "add it there")
            return f"{text}{self.destination.dicomweb}"
        if kind == "orthanc":
            assert self._other is not None
            system = await _answer(self._other.for_async(), "/system", "check its URL and login")
            return f"{text}{self.destination.orthanc.url}, version {system.get('Version')}"  # type: ignore[union-attr]
        return f"{text}{self.destination.folder}"

    async def is_source(self, orthanc: httpx.AsyncClient, resource: Resource) -> bool:
        """Whether it has come from there: from the modality's AET. Of other kinds of places nobody can tell."""
        if self.destination.modality is None or self.destination.back:
            return False
        aet = (await self._configuration(orthanc)).get("AET")
        return aet in resource.values("metadata", "RemoteAET")

    async def send(
        self, orthanc: httpx.AsyncClient, resource: Resource, since: datetime | None, left: Left | None = None
    ) -> str:
        """Send a resource, and return when it is there.

        :param since: what was sent before doesn't count.
        :param left: what is known of jobs that were submitted for this before.
        :return: the job that did it; empty where it was none.
        :raises BridgeError: it could not be sent.
        :raises httpx.HTTPError: Orthanc, or the other one, doesn't answer.
        """
        kind = self.destination.kind
        if kind == "orthanc":
            async with asyncio.timeout(self.destination.timeout):
                await self._upload(orthanc, resource)
            return ""
        if kind == "folder":
            async with asyncio.timeout(self.destination.timeout):
                await self._write(orthanc, resource)
            return ""
        submission = await self._submission(orthanc, resource, since)
        return str((await run_job(orthanc, submission, self.destination.timeout, left))["ID"])

    async def close(self) -> None:
        """End all connections of its own."""
        if self._other is not None:
            await self._other.close()

    # By jobs.

    async def _submission(self, orthanc: httpx.AsyncClient, resource: Resource, since: datetime | None) -> Submission:
        body: dict[str, Any] = {"Resources": [resource.id]}
        known = {"ParentResources": [resource.id], "InstancesCount": len(resource.instances)}
        kind = self.destination.kind
        if kind == "modality":
            found = await self._configuration(orthanc)
            path = f"/modalities/{self.destination.modality}/store"
            return Submission(path, body, "DicomModalityStore", {**known, "RemoteAet": found.get("AET")}, since)
        if kind == "peer":
            found = await self._configuration(orthanc)
            peer = [found.get("Url"), *filter(None, (found.get("Username"),))]
            path = f"/peers/{self.destination.peer}/store"
            return Submission(path, body, "OrthancPeerStore", {**known, "Peer": peer}, since)
        # A STOW job says neither what it sends nor where to: it can't be known again.
        return Submission(f"/dicom-web/servers/{self.destination.dicomweb}/stow", body, "DicomWebStowClient")

    async def _configuration(self, orthanc: httpx.AsyncClient) -> Mapping[str, Any]:
        kind, name = self.destination.kind, self.destination.modality or self.destination.peer
        plural = "modalities" if kind == "modality" else "peers"
        option = "DicomModalities" if kind == "modality" else "OrthancPeers"
        found: Mapping[str, Any] = await _answer(
            orthanc, f"/{plural}/{name}/configuration", f"add the {kind} {name} to Orthanc's {option}"
        )
        return found

    # File by file.

    async def _upload(self, orthanc: httpx.AsyncClient, resource: Resource) -> None:
        assert self._other is not None
        other = self._other.for_async()
        for instance in resource.instances:
            content = await file_of(orthanc, instance)
            if content is None:  # deleted meanwhile
                continue
            answer = await other.post("/instances", content=content, headers={"Content-Type": "application/dicom"})
            if answer.status_code >= 400:
                raise OrthancError(
                    f"destination {self.name} answers {answer.status_code} to instance {instance}",
                    "see its log; check its login, and what it takes",
                )

    async def _write(self, orthanc: httpx.AsyncClient, resource: Resource) -> None:
        assert self.destination.folder is not None
        for instance in resource.instances:
            uids = await self._uids(orthanc, instance)
            if uids is None:
                continue
            content = await file_of(orthanc, instance)
            if content is None:
                continue
            study, series, itself = uids
            path = self.destination.folder / study / series / f"{itself}.dcm"
            await asyncio.to_thread(_write_whole, path, content)

    async def _uids(self, orthanc: httpx.AsyncClient, instance: str) -> tuple[str, str, str] | None:
        try:
            tags = (await ask(orthanc, f"/instances/{instance}/tags?short")).json()
        except GoneError:
            return None
        found = [str(tags.get(tag, "")).strip("\0 ") for tag in ("0020,000d", "0020,000e", "0008,0018")]
        # They become names of files: what is no UID must not lead elsewhere (PS3.5, section 9.1).
        if not all(uid and set(uid) <= set("0123456789.") and uid.strip(".") for uid in found):
            raise BridgeError(f"instance {instance} has UIDs that are none", "correct it in Orthanc")
        return found[0], found[1], found[2]


def _write_whole(path: Path, content: bytes) -> None:
    """So that nobody ever sees a part of it, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o640)
        part.replace(path)
    except BaseException:
        part.unlink()
        raise


async def _answer(orthanc: httpx.AsyncClient, path: str, remedy: str) -> Any:
    try:
        return (await ask(orthanc, path)).json()
    except GoneError:
        raise OrthancError(f"Orthanc knows no {path}", remedy) from None
