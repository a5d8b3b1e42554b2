"""Webhooks for tests: a receiver, what its owner does to it, and what it has received."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.testing.brokers.base import Broker
from orthanc_events_bridge.testing.brokers.events import Event, decode
from orthanc_events_bridge.testing.brokers.webhook_receiver import CONTROL, RECEIVED
from orthanc_events_bridge.testing.processes import Server, free_port

#: The receiver's program, which needs the standard library only.
PROGRAM: Final = Path(__file__).parent / "webhook_receiver.py"
#: Where the brokers' events are posted.
PLACE: Final = "/events"


@dataclass(frozen=True, slots=True)
class Received:
    """A request that the receiver has stored.

    :param headers: names in lower case.
    """

    place: str
    headers: dict[str, str]
    body: bytes


class WebhookServer(Server):
    """A receiver of webhooks, what it has received in the folder.

    :param port: a free one by default.
    :param config: JSON for its `control`, from the beginning on; see `webhook_receiver`.
    """

    title = "the webhook's receiver"

    def __init__(self, folder: Path, *, port: int | None = None, config: str = "") -> None:
        super().__init__(folder)
        self.port = port or free_port()
        self._control: dict[str, Any] = {}
        if config:
            self.control(**json.loads(config))

    @property
    def url(self) -> str:
        """Where it is, without a path."""
        scheme = "https" if "certificate" in self._control else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def control(self, **what: Any) -> None:
        """Tell it what to do, beside what it was told before; None takes something back. It is obeyed at once."""
        self._control = {name: value for name, value in {**self._control, **what}.items() if value is not None}
        path = self.folder / CONTROL
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self._control, default=str), "utf-8")
        new.replace(path)

    def place(self, place: str, **limits: int | None) -> None:
        """Tell it about one path only: ``room`` and ``dropped``."""
        places = self._control.get("places", {})
        mine = {name: value for name, value in {**places.get(place, {}), **limits}.items() if value is not None}
        self.control(places={**places, place: mine})

    def received(self, place: str = PLACE) -> list[Received]:
        """What was stored at a path and not dropped since, in order."""
        found = []
        path = self.folder / RECEIVED
        for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:  # behind the last \n: not yet stored
            where, _, content = line.partition(b" ")
            if where.decode() == place:
                headers, body = json.loads(content)
                assert len(dict(headers)) == len(headers), "a header came twice"
                found.append(Received(place, dict(headers), body.encode("latin-1")))
        return found[self.dropped(place) :]

    def dropped(self, place: str) -> int:
        """How many of the oldest at a path were dropped."""
        return int(self._control.get("places", {}).get(place, {}).get("dropped", 0))

    def drop(self, place: str) -> None:
        """Forget what is stored at a path."""
        self.place(place, dropped=self.dropped(place) + len(self.received(place)))

    def _command(self) -> list[str]:
        # Isolated: the program's own folder must not become a place for imports.
        return [sys.executable, "-I", str(PROGRAM), str(self.folder), str(self.port)]

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False


class WebhookBroker(Broker):
    """One receiver; the place is a path."""

    kind = "webhook"
    title = "Webhook"
    impatient = ("timeout: 1s",)
    has_place = False
    full_words = ("503", "receiver")

    def __init__(self, server: WebhookServer) -> None:
        super().__init__(server)
        self.server: WebhookServer = server
        self._offset = self._lines = 0

    @property
    def url(self) -> str:
        return f"{self.server.url}{PLACE}"

    def options(self, *, port: int | None = None) -> list[str]:
        return [f"url: http://127.0.0.1:{port or self.port}{PLACE}"]

    def read(self) -> list[Event]:
        dropped = self.server.dropped(PLACE)
        return [
            decode(one.body, one.headers["orthanc-address"], position)
            for position, one in enumerate(self.server.received(), dropped + 1)
        ]

    def stored(self) -> int:
        path = self.server.folder / RECEIVED
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._offset)
                while chunk := file.read(2**20):
                    self._offset += len(chunk)
                    self._lines += chunk.count(b"\n")
        return self._lines

    def remove_place(self) -> None:
        self.server.drop(PLACE)

    def limit(self, events: int) -> None:
        self.server.place(PLACE, room=events)

    def make_room(self, through: int) -> None:
        self.server.place(PLACE, dropped=through)

    def demand(self, password: str) -> None:
        login = base64.b64encode(f"orthanc:{password}".encode()).decode()
        self.server.control(authorization=[f"Basic {login}"])

    def login(self, password_file: Path) -> list[str]:
        return ["user: orthanc", f"password_file: {password_file}"]

    @contextlib.contextmanager
    def small(self, size: int) -> Iterator[None]:
        self.server.control(largest=size)
        yield
        self.server.control(largest=None)
