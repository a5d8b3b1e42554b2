"""An AI service as series are sent to it: by a job of Orthanc's DICOMweb plugin, or by a question that it answers."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from email.message import Message
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.retry import Reject
from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.orthanc_api import OrthancOptions
from orthanc_events_bridge.workflows.asking import file_of
from orthanc_events_bridge.workflows.destinations import Destination, Sender
from orthanc_events_bridge.workflows.facts import Resource

if TYPE_CHECKING:
    import httpx

    from orthanc_events_bridge.workflows.dispatch_settings import Service
    from orthanc_events_bridge.workflows.jobs import Left

#: What a service answers that may be otherwise another time, though it is no 5xx.
_LATER: Final = (401, 403, 404, 408, 425, 429)
_DICOM: Final = "application/dicom"


class Sending:
    """Sends series to a service.

    :raises BridgeError: that can't be.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._sender: Sender | None = None
        self._client: Clients | None = None
        if service.dicomweb is not None:
            self._sender = Sender("service", Destination(dicomweb=service.dicomweb, timeout=service.timeout))
        else:
            assert service.answers is not None
            options = OrthancOptions.find({}, {}, service.answers.given())
            self._url = options.url
            self._client = Clients(options)

    @property
    def name(self) -> str:
        """What it is called in events and in the audit file."""
        return self._service.dicomweb or "service"

    def check(self) -> None:
        """Can it be reached, as far as that can be known here?

        :raises BridgeError: no.
        """
        if self._client is not None:
            self._client.check()

    async def describe(self, orthanc: httpx.AsyncClient) -> str:
        """What it is, with what Orthanc knows of it.

        :raises BridgeError: Orthanc doesn't know it.
        """
        if self._sender is not None:
            return (await self._sender.describe(orthanc)).removeprefix("destination ")
        return f"service: its answers, from {self._url}"

    async def close(self) -> None:
        """End all connections of its own."""
        if self._client is not None:
            await self._client.close()

    async def send(self, orthanc: httpx.AsyncClient, series: Resource, left: Left) -> str:
        """Send a series. Results that are the answer are in Orthanc when this returns.

        :param left: what is known of jobs that were submitted for it before.
        :return: the job that did it; empty where it was none.
        :raises Reject: the service refuses it for good.
        :raises BridgeError: it could not be sent.
        :raises httpx.HTTPError: Orthanc, or the service, doesn't answer.
        """
        if self._sender is not None:
            return await self._sender.send(orthanc, series, None, left)
        async with asyncio.timeout(self._service.timeout):
            for content in await self._ask(orthanc, series):
                stored = await orthanc.post("/instances", content=content, headers={"Content-Type": _DICOM})
                if stored.status_code >= 400:
                    raise OrthancError(f"Orthanc answers {stored.status_code} to a result", "see its log")
        return ""

    async def _ask(self, orthanc: httpx.AsyncClient, series: Resource) -> list[bytes]:
        assert self._client is not None
        boundary = uuid.uuid4().hex
        kind = f'multipart/related; type="{_DICOM}"'
        answer = await self._client.for_async().post(
            self._url,
            content=_parts(orthanc, series, boundary),
            headers={"Content-Type": f"{kind}; boundary={boundary}", "Accept": kind},
            timeout=self._service.timeout,
        )
        status = answer.status_code
        if status >= 400:
            # Not what else it says, which can hold anything.
            said = f"the service answers {status}{_reasons(answer)}"
            if status < 500 and status not in _LATER:
                raise Reject(f"the service refuses it: {said.removeprefix('the service ')}")
            raise OrthancError(said, "see its log; check its URL and login")
        return list(split(answer.content, answer.headers.get("content-type", "")))


async def _parts(orthanc: httpx.AsyncClient, series: Resource, boundary: str) -> AsyncIterator[bytes]:
    """One instance at a time."""
    for instance in series.instances:
        content = await file_of(orthanc, instance)
        if content is not None:
            yield f"--{boundary}\r\nContent-Type: {_DICOM}\r\n\r\n".encode() + content + b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def split(body: bytes, content_type: str) -> Iterator[bytes]:
    """The contents of the parts of a body (RFC 2046, section 5.1).

    :raises OrthancError: it is none of ``multipart/related``.
    """
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/related" or not boundary:
        raise OrthancError("the service's answer is no multipart/related", "see its documentation for its URL")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    for piece in pieces[1:]:
        if piece.startswith(b"--"):
            return
        _, found, content = piece.partition(b"\r\n\r\n")
        if found:
            yield content
    raise OrthancError("the service's answer ends early", "see its log")


def _reasons(answer: httpx.Response) -> str:
    """The failure reasons of a DICOM JSON answer (PS3.18, annex I)."""
    try:
        items = answer.json()["00081198"]["Value"]
        found = sorted({f"{int(item['00081197']['Value'][0]):04X}" for item in items})
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError):
        return ""
    return f", failure reason {', '.join(found)}"
