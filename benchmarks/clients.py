"""Clients that upload to Orthanc, each a process of its own, so that no interpreter lock slows the load.

They write prepared requests to plain sockets: what they do shall cost the machine as little as possible. The
parent speaks to them in lines of JSON; they end when it does. All times are `time.monotonic`, which is the same
clock in every process of a machine.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orthanc_events_bridge.testing import dicom

ROOT = Path(__file__).parent.parent
_LENGTH = re.compile(rb"content-length: *(\d+)\r", re.IGNORECASE)
#: Instances in a study.
STUDY = 50
#: Events of an instance (itself, and a child for its series, study and patient), and of each new study (study,
#: its series and its patient).
PER_INSTANCE, PER_STUDY = 4, 3


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients saw.

    :param seconds: from the first request to the last answer.
    :param answers: instance, when its request was begun, when its answer was there.
    :param refused: uploads that Orthanc did not answer with 200.
    :param cpu: seconds of all clients while they uploaded.
    """

    seconds: float
    answers: list[tuple[str, float, float]]
    refused: int
    cpu: float

    @property
    def rate(self) -> float:
        """Acknowledged instances per second."""
        return len(self.answers) / self.seconds


def events_of(instances: int, clients: int) -> int:
    """How many changes Orthanc tells when so many clients upload so many instances in all."""
    each = instances // clients
    studies = clients * -(-each // STUDY)
    return each * clients * PER_INSTANCE + studies * PER_STUDY


class Clients:
    """Processes that wait to be told what to upload; used as a context manager."""

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        for _ in range(self.count):
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.clients"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                )
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def upload(self, port: int, instances: int, *, clients: int | None = None, interval: float = 0.0) -> Load:
        """Upload new studies over one connection per client, and wait until all is answered.

        :param instances: in all.
        :param clients: how many take part; all by default.
        :param interval: seconds from the beginning of one request to that of the next; 0: as fast as it goes.
        """
        active = self._processes[: clients or self.count]
        for process in active:
            _write(process, {"port": port, "instances": instances // len(active), "interval": interval})
        for process in active:
            _read(process)  # its files are made, and it is connected
        for process in active:
            _write(process, "go")
        results = [_read(process) for process in active]
        answers = [(i, sent, answered) for result in results for i, sent, answered in result["answers"]]
        return Load(
            max(result["end"] for result in results) - min(result["begin"] for result in results),
            answers,
            sum(result["refused"] for result in results),
            sum(result["cpu"] for result in results),
        )


def _write(process: subprocess.Popen[str], document: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(document) + "\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a client ended by itself, exit code {process.wait()}")
    return json.loads(line)


# In the client's process.


def _files(instances: int) -> list[dicom.Instance]:
    made: list[dicom.Instance] = []
    while len(made) < instances:
        made += dicom.make_study(instances=min(STUDY, instances - len(made)))
    return made


def _request(port: int, body: bytes) -> bytes:
    head = f"POST /instances HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/dicom\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _answer(connection: socket.socket) -> int:
    """Read one answer, and return its status."""
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += _some(connection)
    length = _LENGTH.search(received, 0, end + 2)
    if length is None:
        raise RuntimeError(f"an answer without a length: {received[:200]!r}")
    left = end + 4 + int(length[1]) - len(received)
    while left > 0:
        left -= len(_some(connection))
    return int(received[9:12])


def _some(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionResetError("Orthanc closed the connection")
    return data


def _upload(port: int, files: Sequence[dicom.Instance], interval: float) -> dict[str, Any]:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    prepared = [(file.id, _request(port, file.data)) for file in files]
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    answers: list[tuple[str, float, float]] = []
    refused = 0
    cpu = time.process_time()
    begin = time.monotonic()
    for index, (identifier, request) in enumerate(prepared):
        if interval:
            time.sleep(max(0.0, begin + index * interval - time.monotonic()))
        sent = time.monotonic()
        connection.sendall(request)
        if _answer(connection) == 200:
            answers.append((identifier, sent, time.monotonic()))
        else:
            refused += 1
    end = time.monotonic()
    cpu = time.process_time() - cpu
    connection.close()
    return {"begin": begin, "end": end, "answers": answers, "refused": refused, "cpu": cpu}


def _main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        files = _files(task["instances"])
        print(json.dumps(_upload(task["port"], files, task["interval"])), flush=True)


if __name__ == "__main__":
    _main()
