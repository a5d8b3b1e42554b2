"""A plain client of NATS, on a socket: what tests read back and change at the broker is no library's view."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a stream, with its headers as they were sent."""

    sequence: int
    subject: str
    headers: list[tuple[str, str]]
    body: bytes


class NatsRefusalError(Exception):
    """NATS answered with an error."""


class RawNats:
    """Speaks NATS' text protocol. One request after another, or several at once with `requests`.

    :param port: of 127.0.0.1.
    :param login: fields of CONNECT.
    """

    def __init__(self, port: int, login: dict[str, str] | None = None, timeout: float = 10.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._file = self._socket.makefile("rb")
        self._sid = 0
        assert self._file.readline().startswith(b"INFO ")
        options = {"verbose": False, "headers": True, "no_responders": True, **(login or {})}
        self._socket.sendall(b"CONNECT " + json.dumps(options).encode() + b"\r\n")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def requests(self, questions: list[tuple[str, bytes]]) -> list[bytes]:
        """Ask everything at once, and return the answers in the order of the questions."""
        self._sid += 1
        inbox = f"_INBOX.raw{id(self)}.{self._sid}"
        lines = [f"SUB {inbox}.* {self._sid}\r\n".encode()]
        for number, (subject, payload) in enumerate(questions):
            lines.append(f"PUB {subject} {inbox}.{number} {len(payload)}\r\n".encode() + payload + b"\r\n")
        self._socket.sendall(b"".join(lines))
        answers: dict[int, bytes] = {}
        for subject, payload in self._messages():
            answers[int(subject.rpartition(".")[2])] = payload
            if len(answers) == len(questions):
                break
        self._socket.sendall(f"UNSUB {self._sid}\r\n".encode())
        return [answers[number] for number in range(len(questions))]

    def _messages(self) -> Iterator[tuple[str, bytes]]:
        while line := self._file.readline():
            words = line.decode().split()
            if words[0] == "PING":
                self._socket.sendall(b"PONG\r\n")
            elif words[0] == "-ERR":
                raise NatsRefusalError(line.decode().strip())
            elif words[0] == "MSG":
                yield words[1], self._file.read(int(words[-1]) + 2)[:-2]
            elif words[0] == "HMSG":
                headers, total = int(words[-2]), int(words[-1])
                yield words[1], self._file.read(total + 2)[headers:-2]
        raise ConnectionError("NATS closed the connection")

    def api(self, what: str, **document: Any) -> dict[str, Any]:
        """Ask JetStream's API.

        :raises NatsRefusalError: it refuses.
        """
        for _ in range(10):
            (answer,) = self.requests([(f"$JS.API.{what}", json.dumps(document).encode() if document else b"")])
            if not answer:
                raise NatsRefusalError(f"{what}: nobody answers")
            decoded: dict[str, Any] = json.loads(answer)
            if "error" not in decoded:
                return decoded
            if decoded["error"]["err_code"] != 10049:  # else a deleted stream's store is being cleared away
                break
            time.sleep(0.2)
        raise NatsRefusalError(f"{what}: {decoded['error']}")

    def read(self, stream: str) -> list[StoredMessage]:
        """Everything that a stream holds, in its order."""
        state = self.api(f"STREAM.INFO.{stream}")["state"]
        if not state["messages"]:
            return []
        numbers = range(state["first_seq"], state["last_seq"] + 1)
        found = []
        for first in range(0, len(numbers), 1000):
            asked = [
                (f"$JS.API.STREAM.MSG.GET.{stream}", json.dumps({"seq": number}).encode())
                for number in numbers[first : first + 1000]
            ]
            for answer in map(json.loads, self.requests(asked)):
                if "message" in answer:  # else it was deleted
                    found.append(_stored(answer["message"]))
        return found


def _stored(message: dict[str, Any]) -> StoredMessage:
    lines = base64.b64decode(message.get("hdrs", "")).decode().split("\r\n")[1:]
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines if line)]
    return StoredMessage(message["seq"], message["subject"], headers, base64.b64decode(message.get("data", "")))


def ask(port: int, what: str, login: dict[str, str] | None = None, **document: Any) -> dict[str, Any]:
    """One request to JetStream's API, over a connection of its own."""
    with closing(RawNats(port, login)) as client:
        return client.api(what, **document)


def read_stream(port: int, stream: str, login: dict[str, str] | None = None) -> list[StoredMessage]:
    """Everything that a stream holds, over a connection of its own."""
    with closing(RawNats(port, login)) as client:
        return client.read(stream)
