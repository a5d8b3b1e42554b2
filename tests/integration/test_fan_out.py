"""Several transports at once, of which some are down, slow or wrong: the others never notice, and each catches up."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import make_broker
from orthanc_events_bridge.testing.brokers.nats import read_nats
from orthanc_events_bridge.testing.line import Clients
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import NatsServer
from tests.contract.link import Link
from tests.integration.beside import HURRIED, Beside
from tests.integration.whole import broker_or_skip, started

pytestmark = pytest.mark.integration

SECRET = "CANARY-of-a-password"


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    with Beside(tmp_path / "beside") as made:
        yield made


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Starts servers: ``nats(name, **options of NatsServer)``."""
    require("nats-server")
    with contextlib.ExitStack() as stack:

        def start(name: str, **options: Any) -> NatsServer:
            server = NatsServer(tmp_path / f"nats-{name}", **options)
            stack.callback(server.close, kill=True)
            server.start()
            return server

        yield start


def transport(name: str, server: NatsServer | str, **options: Any) -> dict[str, Any]:
    """Options that lead to a stream of its own."""
    url = server if isinstance(server, str) else server.url
    place = {"stream": name.upper(), "subject_prefix": f"t.{name}", "limits": {"max_bytes": "64MiB"}}
    quick = {"ack_timeout": "1s", "connect_timeout": "1s"}
    return {"type": "nats", "name": name, "servers": [url], **place, **quick, **options}


def told(server: NatsServer, name: str, **login: Any) -> list[int]:
    """The ``sequence`` of all that a stream holds, in its order."""
    return [event.sequence for event in read_nats(server.url, stream=name.upper(), **login)]


class Mute:
    """Takes connections, and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._taken: list[socket.socket] = []
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._taken.append(self._socket.accept()[0])

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for one in self._taken:
            one.close()


@pytest.fixture
def mute() -> Iterator[Mute]:
    made = Mute()
    yield made
    made.close()


def seconds_of_work(pid: int) -> float:
    """What a process has used of a processor."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_state(beside: Beside, name: str, state: str) -> None:
    beside.wait(lambda: beside.transport(name)["state"] == state, f"{name}: {state}")


#: A bridge on whose machine httpx is not installed, nor anything that a webhook would need.
WITHOUT_HTTPX = f"import sys\nsys.modules['httpx'] = None\n{HURRIED}"


def test_what_is_down_frozen_or_wrong_holds_up_nobody_and_catches_up(
    beside: Beside, nats: Callable[..., NatsServer], mute: Mute, tmp_path: Path
) -> None:
    good, frozen, locked = nats("good"), nats("frozen"), nats("locked", config=_login(SECRET))
    down = NatsServer(tmp_path / "nats-down")  # not started
    password = tmp_path / "password"
    password.write_text("CANARY-of-a-wrong-one")
    authority = tmp_path / "authority.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    log_in = {"user": "bridge", "password_file": str(password)}
    both = [transport("good1", good), transport("good2", good, mode="binary")]
    broken = {
        "down": (transport("down", down), "not connected"),
        "frozen": (transport("frozen", frozen), "not connected"),
        "login": (transport("login", locked, **log_in), "needs attention"),
        "tls": (transport("tls", good, tls={"ca_file": str(authority)}), "needs attention"),
        "missing": (transport("missing", good, declare=False), "needs attention"),
        "mute": ({"type": "webhook", "name": "mute", "url": f"http://127.0.0.1:{mute.port}/"}, "needs attention"),
    }
    beside.configure(*both, *(options for options, _ in broken.values()))
    beside.start(WITHOUT_HTTPX)
    before = beside.record(20)
    beside.wait_delivered("good1", "good2", "frozen")
    assert "needs attention" in {beside.transport(name)["state"] for name in broken}
    frozen.freeze()

    everything = list(before)
    for _ in range(10):
        everything += beside.record(100)
        beside.wait_delivered("good1", "good2")  # again and again, whatever becomes of the others
    for name, (_, state) in broken.items():
        wait_state(beside, name, state)
    seen = {name: beside.transport(name) for name in broken}
    for name, one in seen.items():
        assert one["last_error"]["message"] and one["last_error"]["remedy"], one
        assert one["position"] == (before[-1] if name == "frozen" else 0), one
    assert 'pip install "orthanc-events-bridge[webhook]"' in seen["mute"]["last_error"]["remedy"]
    for name in ("good1", "good2"):
        assert beside.transport(name)["last_error"] is None
    text = beside.command("status").stdout
    for name, (_, state) in broken.items():
        assert f"\n{name}: {state} since {seen[name]['since']}: " in text
    assert "CANARY" not in text + beside.log()

    # None of them is tried without a pause.
    began, work = time.monotonic(), seconds_of_work(beside.pid)
    counts = {name: beside.transport(name)["last_error"]["count"] for name in broken}
    time.sleep(5)
    beside.wait(lambda: time.monotonic() > began + 5)
    work, passed = seconds_of_work(beside.pid) - work, time.monotonic() - began
    print(f"{work:.2f} s of work in {passed:.1f} s")
    assert work < passed / 3
    for name, count in counts.items():
        assert beside.transport(name)["last_error"]["count"] - count <= 2 * passed, name

    # Mended one after the other; each has missed nothing.
    down.start()
    try:
        beside.wait_delivered("down")
        assert told(down, "down") == everything
    finally:
        down.close(kill=True)
    frozen.thaw()
    beside.wait_delivered("frozen")
    assert told(frozen, "frozen") == everything
    password.write_text(SECRET)
    beside.wait_delivered("login")
    assert told(locked, "login", user="bridge", password=SECRET) == everything
    mended = [transport("tls", good), transport("missing", good)]
    beside.configure(*both, *mended)
    beside.wait_delivered("tls", "missing")
    everything += beside.record(100)
    beside.wait_delivered("good1", "good2", "tls", "missing")
    for name in ("good1", "tls", "missing"):
        assert told(good, name) == everything, name
    assert beside.transport("good1")["published"] == beside.transport("good2")["published"] == len(everything)


def _login(password: str) -> str:
    return f'authorization {{ user: "bridge", password: "{password}" }}'


def test_a_slow_one_goes_at_its_own_pace(beside: Beside, nats: Callable[..., NatsServer]) -> None:
    good, far = nats("good"), nats("far")
    link = Link(far.port, latency=0.1, bandwidth=200_000)
    try:
        slow = transport("slow", f"nats://127.0.0.1:{link.port}", ack_timeout="30s", connect_timeout="30s", batch=20)
        beside.configure(transport("good", good), slow)
        beside.start()
        everything = []
        for _ in range(5):
            everything += beside.record(80)
            beside.wait_delivered("good")
        assert beside.transport("slow")["pending"] > 0, "it would not be slow"
        beside.wait_delivered("slow")
        assert told(good, "good") == told(far, "slow") == everything
        assert beside.transport("good")["last_error"] is beside.transport("slow")["last_error"] is None
    finally:
        link.close()


def test_a_receiver_that_never_answers_holds_up_only_itself(
    beside: Beside, nats: Callable[..., NatsServer], mute: Mute
) -> None:
    good = nats("good")
    refused = {"type": "webhook", "name": "refused", "url": f"http://127.0.0.1:{free_port()}/", "timeout": "1s"}
    silent = {"type": "webhook", "name": "silent", "url": f"http://127.0.0.1:{mute.port}/", "timeout": "1s"}
    beside.configure(transport("good", good), refused, silent, {"type": "memory", "name": "memory"})
    beside.start()
    everything = []
    for _ in range(5):
        everything += beside.record(100)
        beside.wait_delivered("good", "memory")
    assert told(good, "good") == everything
    for name in ("refused", "silent"):
        wait_state(beside, name, "not connected")
        assert beside.transport(name)["position"] == 0
        assert beside.transport(name)["last_error"]["remedy"]


def test_a_whole_line_to_three_brokers_of_which_two_fail_in_turn(tmp_path: Path) -> None:
    for kind in ("rabbitmq", "webhook"):
        broker_or_skip(kind)
    second, third = (make_broker(kind, tmp_path / kind) for kind in ("rabbitmq", "webhook"))
    with contextlib.ExitStack() as stack:
        for broker in (second, third):
            stack.callback(broker.server.close, kill=True)
            broker.start()
        lines = [[f"type: {one.kind}", *one.options(), *one.impatient] for one in (second, third)]
        more = "".join("  - " + "\n    ".join(options) + "\n" for options in lines)
        line = stack.enter_context(started(tmp_path / "line", settings=more, stable_age=1))
        line.ledger.allow("*.stable")
        line.ledger.allow("server.*")
        line.wait(lambda document: set(states(document).values()) == {"connected"})
        second.settle()
        with Clients(line, adders=1, loopers=1):
            time.sleep(0.5)
            second.kill()
            line.wait(lambda document: states(document)["rabbitmq"] == "not connected")
            third.freeze()
            line.wait(lambda document: states(document)["webhook"] == "not connected")
            time.sleep(1)
        line.settle()
        document = line.status()
        first, *others = document["transports"]
        assert first["name"] == "nats"
        assert (first["pending"], first["last_error"]) == (0, None), "it has noticed nothing"
        assert all(one["pending"] > 0 for one in others)
        second.start()
        third.thaw()
        line.ledger.stored(line.orthanc.upload(dicom.make_study().instances[0].data))
        line.wait(lambda document: not any(one["pending"] for one in document["transports"]))
        line.settle()
        existing, log = line.orthanc.existing(), line.orthanc.changes()
        for broker in (line.broker, second, third):
            report = line.ledger.compare(broker.read(), kills=0, existing=existing, log=log)
            print(report)
            report.assert_clean()
            assert report.duplicated == 0 or not broker.deduplicates


def states(document: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["state"] for one in document["transports"]}
