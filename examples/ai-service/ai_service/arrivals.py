"""What comes in by STOW-RS (PS3.18, section 10.5): the instances of a request, and what is answered about each."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydicom import dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import CTImageStorage, MRImageStorage

from ai_service.multipart import TooLargeError, parts
from ai_service.store import is_uid, write

# Reasons of failures: PS3.18, table I.2-2; PS3.4, table B.2-1; PS3.7, annex C.
PROCESSING_FAILURE: Final = 0x0110
NOT_AUTHORIZED: Final = 0x0124
CLASS_NOT_SUPPORTED: Final = 0x0122
SYNTAX_NOT_SUPPORTED: Final = 0xC122
OUT_OF_RESOURCES: Final = 0xA700
CANNOT_UNDERSTAND: Final = 0xC000

MEGABYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance of a request."""

    sop_class: str
    sop: str
    series: str
    study: str
    #: Where its file is, until the request has ended.
    path: Path


@dataclass(slots=True)
class Arrivals:
    """What came in by one request."""

    accepted: list[Instance] = field(default_factory=list)
    #: With the reason of each.
    failed: list[tuple[Instance, int]] = field(default_factory=list)
    #: Reasons of the failures of parts that are nothing that has a UID.
    others: list[int] = field(default_factory=list)

    def series(self) -> dict[str, list[Instance]]:
        """Return the accepted ones by series."""
        found: dict[str, list[Instance]] = {}
        for one in self.accepted:
            found.setdefault(one.series, []).append(one)
        return found

    def fail(self, instances: list[Instance], reason: int) -> None:
        """Don't accept these after all."""
        self.accepted = [one for one in self.accepted if one not in instances]
        self.failed += [(one, reason) for one in instances]

    @property
    def status(self) -> int:
        """The status of the answer (PS3.18, table 10.5.3-1)."""
        if not self.failed and not self.others:
            return 200
        if self.accepted:
            return 202
        return 409 if self.failed else 400

    def report(self) -> dict[str, Any]:
        """Return the Store Instances Response Module (PS3.18, table I.2-1) as DICOM JSON."""
        # RetrieveURL may be empty: nothing can be retrieved here.
        module: dict[str, Any] = {"00081190": {"vr": "UR"}}
        if self.failed:
            items = [{**_reference(one), "00081197": _reason(reason)} for one, reason in self.failed]
            module["00081198"] = {"vr": "SQ", "Value": items}
        if self.others:
            module["0008119A"] = {"vr": "SQ", "Value": [{"00081197": _reason(reason)} for reason in self.others]}
        if self.accepted:
            stored = [{**_reference(one), "00081190": {"vr": "UR"}} for one in self.accepted]
            module["00081199"] = {"vr": "SQ", "Value": stored}
        return module


@dataclass(frozen=True, slots=True)
class Limits:
    """The most bytes of a body and of an instance, and the most instances."""

    body: int
    instance: int
    instances: int


async def receive(
    body: AsyncIterable[bytes], boundary: bytes, folder: Path, limits: Limits, study: str | None
) -> Arrivals:
    """Read a request's body into files.

    :param study: the Study Instance UID that all have to be of.
    :raises MultipartError: it is none, or larger than the limits.
    """
    found = Arrivals()
    number = 0
    async for content in parts(_limited(body, limits.body), boundary, limits.instance):
        number += 1
        if number > limits.instances:
            raise TooLargeError(f"there are more than {limits.instances} instances")
        path = folder / str(number)
        instance, reason = await asyncio.to_thread(_read, content, path)
        if instance is None:
            found.others.append(reason)
        elif reason or study not in (None, instance.study):
            found.failed.append((instance, reason or CANNOT_UNDERSTAND))
        else:
            await asyncio.to_thread(write, path, content)
            found.accepted.append(instance)
    return found


async def _limited(body: AsyncIterable[bytes], most: int) -> AsyncIterator[bytes]:
    count = 0
    async for chunk in body:
        count += len(chunk)
        if count > most:
            raise TooLargeError(f"the body has more than {most} bytes")
        yield chunk


def _read(content: bytes, path: Path) -> tuple[Instance | None, int]:
    """Return an instance, and the reason why it is not taken, or 0. Without UIDs it is none."""
    try:
        image = dcmread(io.BytesIO(content), stop_before_pixels=True)
        names = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
        sop_class, sop, series, study = (str(image.get(name, "")) for name in names)
        syntax = image.file_meta.TransferSyntaxUID
    except Exception:  # pydicom raises whatever its parts do
        return None, CANNOT_UNDERSTAND
    if not all(map(is_uid, (sop_class, sop, series, study))):
        return None, CANNOT_UNDERSTAND
    instance = Instance(sop_class, sop, series, study, path)
    if instance.sop_class not in (CTImageStorage, MRImageStorage):
        return instance, CLASS_NOT_SUPPORTED
    try:
        readable = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        readable = False
    return instance, 0 if readable else SYNTAX_NOT_SUPPORTED


def _reference(one: Instance) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [one.sop_class]},
        "00081155": {"vr": "UI", "Value": [one.sop]},
    }


def _reason(code: int) -> dict[str, Any]:
    return {"vr": "US", "Value": [code]}
