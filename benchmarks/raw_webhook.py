"""The plain client of webhooks: httpx."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import ClassVar

import httpx

from benchmarks.raw import Confirmed, Raw, Way
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.webhook_options import WebhookOptions

#: Body, headers.
_Message = tuple[bytes, dict[str, str]]


class RawWebhook(Raw[_Message]):
    """To the receiver, one request after the other, so that it gets events in order."""

    ways: ClassVar = {"httpx": Way("httpx", held=False)}
    how = "httpx, one `AsyncClient.post` after the other over one connection that is kept"
    options: WebhookOptions

    def __init__(self, options: WebhookOptions) -> None:
        super().__init__(options)
        # Nothing here is encrypted; each client would otherwise read the system's certificates, for 10 ms.
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def prepare(self, event: Outgoing) -> _Message:
        return event.body, {
            "Content-Type": event.content_type,
            "orthanc-event-id": event.id,
            "orthanc-address": f"{event.site}.{event.level}.{event.verb}.{event.partition}",
        }

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=self.options.timeout)

    async def send(self, way: str, messages: Sequence[_Message], confirmed: Confirmed) -> None:
        async with self._client() as client:
            for sent, (body, headers) in enumerate(messages, 1):
                (await client.post(self.options.url, content=body, headers=headers)).raise_for_status()
                confirmed(sent)

    async def send_one(self, message: _Message) -> None:
        body, headers = message
        async with self._client() as client:
            (await client.post(self.options.url, content=body, headers=headers)).raise_for_status()
