"""The brokers' servers in containers start, stop, die and freeze for real, and leave nothing behind.

Only with ``TEST_SERVERS=containers`` (``make test-containers``).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing import images
from orthanc_events_bridge.testing.brokers import BROKERS, make_server, way
from orthanc_events_bridge.testing.guard import LABEL, RUN
from orthanc_events_bridge.testing.images import OFFICIAL, own_image
from orthanc_events_bridge.testing.processes import Server, ServerError, wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

if way() != "containers":
    pytest.skip("TEST_SERVERS is not containers", allow_module_level=True)

from orthanc_events_bridge.testing import engine
from orthanc_events_bridge.testing.containers import ContainerServer, RabbitMQContainer

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def answering() -> None:
    """An engine that answers, with the images that setup has made."""
    try:
        engine.find_image("nats")
    except MissingComponentError as error:
        skip_or_fail(error)


def contained(server: Server) -> list[Any]:
    """What the engine has of this run, by its own account."""
    with engine.engine_client() as client:
        found = client.containers.list(all=True, filters={"label": f"{LABEL}={RUN}"})
        folder = str(server.folder)
        return [
            one.attrs for one in found if folder in [mount["Source"] for mount in one.attrs["HostConfig"]["Mounts"]]
        ]


@pytest.fixture(params=["nats", *(f"{kind}-published" for kind in sorted(BROKERS))])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ContainerServer]:
    """A server of each kind, not started yet; the contract suite has those that share this machine's network."""
    kind, _, published = request.param.partition("-")
    try:
        made = make_server(kind, tmp_path / kind)
    except MissingComponentError as error:
        skip_or_fail(error)
    assert isinstance(made, ContainerServer)
    made.published = made.published or bool(published)
    yield made
    made._kill_all()
    assert not contained(made)


def is_up(server: Server) -> bool:
    return server.running and server._is_ready()


def refuses(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((address, port)) != 0


def own_addresses() -> list[str]:
    """The addresses under which other machines reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return []
        return [probe.getsockname()[0]]


def test_it_dies_freezes_and_comes_back_on_its_port(server: ContainerServer) -> None:
    port = server.port
    server.start()
    assert is_up(server) and not refuses(port)
    (one,) = contained(server)
    assert one["Config"]["Image"] in (own_image(server.kind), OFFICIAL[server.kind])
    if server.published:
        bound = [binding for bindings in one["NetworkSettings"]["Ports"].values() for binding in bindings or []]
        assert {binding["HostIp"] for binding in bound} == {"127.0.0.1"}
        assert str(port) in {binding["HostPort"] for binding in bound}
    else:
        assert one["HostConfig"]["NetworkMode"] == "host"
    for address in own_addresses():
        assert refuses(port, address), f"it can be reached at {address}"
    first = server.pid
    with pytest.raises(ServerError, match="was started already"):
        server.start()

    server.freeze()
    with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as connection:
        assert server.running
        connection.settimeout(0.3)
        connection.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(1)
        server.thaw()
        connection.settimeout(30)
        connection.recv(1)  # an answer or a refusal
    assert wait_until(lambda: is_up(server), 30)
    server.freeze()
    server.kill()
    assert not is_up(server) and refuses(port) and not contained(server)
    with pytest.raises(ServerError, match="is not running"):
        server.kill()

    server.start()
    assert server.port == port and server.pid != first and is_up(server)
    assert server.stop() < server.deadline
    assert server.stop() == 0
    assert refuses(port)


@pytest.mark.parametrize("server", ["nats"], indirect=True)
def test_one_that_ended_by_itself_is_noticed(server: Server) -> None:
    server.start()
    (one,) = contained(server)
    with engine.engine_client() as client:
        client.containers.get(one["Id"]).kill()
    assert wait_until(lambda: not server.running, 30)
    with pytest.raises(ServerError, match="had ended by itself, exit code -9"):
        server.stop()
    server.start()
    with engine.engine_client() as client:
        client.containers.get(contained(server)[0]["Id"]).remove(force=True)
    assert not server.running
    with pytest.raises(ServerError, match="had ended by itself"):
        server.kill()


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("nats", "nonsense: {", "Parse error on line"),
        ("rabbitmq", "nonsense = 1", "nonsense"),
        ("kafka", "num.partitions=none", "num.partitions"),
    ],
)
def test_one_that_does_not_start_says_why(tmp_path: Path, kind: str, config: str, reason: str) -> None:
    server = make_server(kind, tmp_path, config=config)
    with pytest.raises(ServerError) as raised:
        server.start()
    assert reason in str(raised.value)
    assert not server.running and not contained(server)


def test_an_administrator_is_heard(tmp_path: Path) -> None:
    server = make_server("rabbitmq", tmp_path)
    assert isinstance(server, RabbitMQContainer)
    with pytest.raises(ServerError, match="is not running"):
        server.ctl("version")
    with server:
        assert server.ctl("version").startswith("4.0.")
        assert server.ctl("eval", "node().").strip() == f"'{server.node}'"
        with pytest.raises(ServerError, match="rabbitmqctl nonsense failed"):
            server.ctl("nonsense")
        with pytest.raises(ServerError, match="rabbitmqctl eval took longer than 3 s"):
            server.ctl("eval", "timer:sleep(60000).", timeout=3)


# ------------------------------------------------------------------------------------- nothing is left behind


STARTER = """
import sys, time
from pathlib import Path
from orthanc_events_bridge.testing.brokers import make_server
from orthanc_events_bridge.testing.guard import RUN, guard, scratch_folder

with scratch_folder() as folder:
    server = make_server("nats", folder / "nats")
    server.start()
    server.freeze()
    other = make_server("nats", folder / "other")
    other.published = True  # in the network of the run
    other.start()
    print(RUN, folder, flush=True)
    END
"""


def of_run(run: str) -> list[Any]:
    """Its containers and its network."""
    ours = {"label": f"{LABEL}={run}"}
    with engine.engine_client() as client:
        networks = client.networks.list(filters=ours)
        return [*client.containers.list(all=True, filters=ours, ignore_removed=True), *networks]


@pytest.mark.parametrize("end", ["time.sleep(600)", "raise SystemExit(3)", "import os; os._exit(4)"])
def test_nothing_outlives_the_starter(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER.replace("END", end)], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        run, folder = starter.stdout.readline().split()
        if "sleep" in end:
            assert len(of_run(run)) == 3
            starter.kill()
        starter.wait(60)
    assert wait_until(lambda: not of_run(run), 60, every=0.2)
    assert wait_until(lambda: not Path(folder).exists(), 60)


def test_what_the_guard_could_not_remove_goes_with_the_next_run(tmp_path: Path) -> None:
    mine = make_server("nats", tmp_path / "mine")
    assert isinstance(mine, ContainerServer)
    end = "guard._process.kill(); guard._process.wait(); import os; os._exit(0)"
    with mine:
        done = subprocess.run(
            [sys.executable, "-c", STARTER.replace("END", end)], stdout=subprocess.PIPE, text=True, check=True
        )
        run, folder = done.stdout.split()
        try:
            assert len(of_run(run)) == 3
            with engine.engine_client() as client:
                engine.remove_leftovers(client)
            assert not of_run(run)
        finally:
            shutil.rmtree(folder)
        assert mine.running and mine._is_ready()


# ------------------------------------------------------------------------------------------------ what is had


def test_no_engine_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nowhere")
    with pytest.raises(MissingComponentError, match="no container engine answers"):
        engine.find_engine.__wrapped__()


def test_no_image_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFICIAL, "nats", "127.0.0.1:1/nats:0")
    monkeypatch.setattr(images, "RECIPES", Path("/nowhere"))
    with pytest.raises(MissingComponentError, match=r"127\.0\.0\.1:1/nats:0 can't be pulled(.|\n)*images\.sh nats"):
        engine.find_image.__wrapped__("nats")


def test_the_tag_stands_for_what_an_image_is_built_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {kind: own_image(kind) for kind in BROKERS}
    assert None not in before.values()
    recipes = shutil.copytree(images.RECIPES, tmp_path / "docker")
    monkeypatch.setattr(images, "RECIPES", recipes)
    assert before == {kind: own_image(kind) for kind in BROKERS}
    with (recipes / "kafka" / "Dockerfile").open("a") as recipe:
        recipe.write("# other\n")
    assert [kind for kind in BROKERS if own_image(kind) != before[kind]] == ["kafka"]
    with (recipes / "base" / "build.sh").open("a") as recipe:
        recipe.write("# other\n")
    assert [kind for kind in BROKERS if own_image(kind) == before[kind]] == []
