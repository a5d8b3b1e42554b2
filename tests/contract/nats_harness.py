"""NATS for the contract suite."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from orthanc_events_bridge.transports.base import Transport
from orthanc_events_bridge.transports.nats import NatsTransport
from orthanc_events_bridge.transports.nats_options import NatsOptions
from tests.contract.harness import SECRET, Harness, Stored, server
from tests.contract.raw_nats import NatsRefusalError, ask, read_stream


class NatsHarness(Harness):
    title = "NATS"
    deadline = 0.8
    id_header = "nats-msg-id"
    takes_back = True
    login: ClassVar = {"user": "contract", "pass": SECRET}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        login = f'authorization {{ user: "contract", password: "{SECRET}" }}'
        self._server = server("nats", folder, config=f"{login}\nmax_payload: 65536")
        self._server.start()

    def tidy(self) -> None:
        super().tidy()
        self._server.thaw()
        if not self._server.running:
            self._server.start()
        for name in self._ask("STREAM.NAMES")["streams"] or []:
            self._ask(f"STREAM.DELETE.{name}")

    def _ask(self, what: str, **document: Any) -> dict[str, Any]:
        return ask(self._server.port, what, self.login, **document)

    def transport(
        self, *, declare: bool = True, room: int = 0, port: int | None = None, impatient: bool = False
    ) -> Transport:
        deadline = self.deadline if impatient else self.patience
        return NatsTransport(
            NatsOptions.model_validate(
                {
                    "servers": [f"nats://127.0.0.1:{port or self._server.port}"],
                    "stream": self.place,
                    "subject_prefix": f"orthanc.events.{self.place}",
                    "inbox_stream": f"{self.place}_INBOX",
                    "inbox_prefix": f"orthanc.inbox.{self.place}",
                    "inbox_max_bytes": 2**26,
                    "dead_stream": f"{self.place}_DEAD",
                    "dead_prefix": f"orthanc.dead.{self.place}",
                    "dead_max_bytes": 2**24,
                    "declare": declare,
                    "user": "contract",
                    "password": SECRET,
                    "connect_timeout": deadline,
                    "ack_timeout": deadline,
                    "limits": {"max_bytes": 2**27, "max_messages": room},
                }
            )
        )

    def read(self) -> list[Stored]:
        return self._read(self.place, f"orthanc.events.{self.place}.")

    def read_inbox(self, consumer: str) -> list[Stored]:
        try:
            found = self._read(f"{self.place}_INBOX", f"orthanc.inbox.{self.place}.")
        except NatsRefusalError:  # there is none
            return []
        return [one for one in found if one.address == consumer]

    def remove_inbox(self, consumer: str) -> None:
        self._ask(f"STREAM.DELETE.{self.place}_INBOX")

    def left_of(self, consumer: str) -> list[str]:
        names = self._ask(f"CONSUMER.NAMES.{self.place}")["consumers"]
        return [name for name in names if name.startswith(consumer)]

    def make_other_inbox(self, consumer: str) -> list[str]:
        name, subjects = f"{self.place}_INBOX", [f"orthanc.inbox.{self.place}.*"]
        self._ask(f"STREAM.CREATE.{name}", name=name, subjects=subjects, retention="limits", discard="new")
        return [name, "retention", "limits", "workqueue"]

    def _read(self, stream: str, prefix: str) -> list[Stored]:
        found = []
        for message in read_stream(self._server.port, stream, self.login):
            headers = {name.lower(): value for name, value in message.headers}
            assert len(headers) == len(message.headers)
            found.append(
                Stored(
                    message.subject.removeprefix(prefix),
                    message.body,
                    headers["content-type"],
                    headers["nats-msg-id"],
                    headers,
                )
            )
        return found

    def too_large(self) -> int:
        return 65536

    def make_room(self) -> None:
        self._ask(f"STREAM.PURGE.{self.place}")

    def kill(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server.start()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()

    def remove_place(self) -> None:
        self._ask(f"STREAM.DELETE.{self.place}")

    def make_place(self, **different: Any) -> list[str]:
        hours = 3600 * 1_000_000_000
        config = {
            "name": self.place,
            "subjects": [f"orthanc.events.{self.place}.>"],
            "retention": "limits",
            "discard": "new",
            "max_age": 30 * 24 * hours,
            "max_bytes": 2**27,
            "storage": "file",
            "num_replicas": 1,
            "duplicate_window": hours // 6,
        }
        self._ask(f"STREAM.CREATE.{self.place}", **(config | different))
        return [*different, *(str(value) for value in different.values() if isinstance(value, str | int))]

    def different(self) -> list[dict[str, Any]]:
        return [
            {"discard": "old"},
            {"max_bytes": 2**20},
            {"storage": "memory"},
            {"retention": "interest"},
            {"subjects": ["orthanc.elsewhere.>"]},
            {"no_ack": True},
        ]

    def settled(self, consumer: str) -> None:
        """The server stores what was settled within a tenth of a second; killed before that, it forgets."""
        time.sleep(0.5)

    def traces(self) -> int:
        return int(self._ask(f"STREAM.INFO.{self.place}")["state"]["consumer_count"])

    @property
    def port(self) -> int:
        return self._server.port

    def close(self) -> None:
        self._server.close()
