"""Webhooks for the contract suite."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from orthanc_events_bridge.testing.brokers.webhook import WebhookServer
from orthanc_events_bridge.transports.base import Transport
from orthanc_events_bridge.transports.webhook import WebhookTransport
from orthanc_events_bridge.transports.webhook_options import WebhookOptions
from tests.contract.harness import SECRET, Harness, Stored, server

#: The most bytes that the receiver takes.
LARGEST: Final = 65536


class WebhookHarness(Harness):
    title = "webhook"
    deadline = 0.8

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = server("webhook", folder)
        assert isinstance(made, WebhookServer)
        self._server = made
        self._server.control(largest=LARGEST, authorization=[f"Bearer {SECRET}"])
        self._server.start()

    def tidy(self) -> None:
        super().tidy()
        self._server.thaw()
        if not self._server.running:
            self._server.start()

    @property
    def _path(self) -> str:
        return f"/{self.place}"

    @property
    def port(self) -> int:
        return self._server.port

    def transport(
        self, *, declare: bool = True, room: int = 0, port: int | None = None, impatient: bool = False
    ) -> Transport:
        if room:
            self._server.place(self._path, room=room)
        return WebhookTransport(
            WebhookOptions.model_validate(
                {
                    "url": f"http://127.0.0.1:{port or self.port}{self._path}?key={SECRET}",
                    "token": SECRET,
                    "timeout": self.deadline if impatient else self.patience,
                }
            )
        )

    def read(self) -> list[Stored]:
        return [
            Stored(
                one.headers["orthanc-address"],
                one.body,
                one.headers["content-type"],
                one.headers["orthanc-event-id"],
                one.headers,
            )
            for one in self._server.received(self._path)
        ]

    def too_large(self) -> int:
        return LARGEST + 1

    def make_room(self) -> None:
        self._server.drop(self._path)

    def remove_place(self) -> None:
        self._server.drop(self._path)

    def kill(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server.start()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()

    def close(self) -> None:
        self._server.close()
