"""The servers that tests run start, stop, die and freeze for real, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orthanc_events_bridge.testing import programs
from orthanc_events_bridge.testing.dicom import make_study
from orthanc_events_bridge.testing.guard import marked_processes
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.servers import (
    NatsServer,
    NotAcknowledgedError,
    OrthancServer,
    ServerError,
    free_port,
    require,
    wait_until,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    require("nats-server")
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[OrthancServer]:
    require("orthanc")
    server = OrthancServer(tmp_path / "orthanc")
    server.start()
    try:
        yield server
    finally:
        server.close(kill=True)


def greets(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=0.3) as connection:
        try:
            return connection.recv(5) == b"INFO "
        except TimeoutError:
            return False


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"


# ------------------------------------------------------------------------------------------------------- NATS


def test_nats_dies_and_comes_back_on_its_port(nats: NatsServer) -> None:
    first, port = nats.pid, nats.port
    nats.kill()
    assert not nats.running and not alive(first)
    with pytest.raises(ConnectionRefusedError):
        greets(port)
    nats.start()
    assert nats.pid != first and greets(port)
    assert nats.stop() < 10
    nats.start()
    nats.restart()
    assert greets(port)


def test_nats_freezes(nats: NatsServer) -> None:
    nats.freeze()
    assert nats.running and not greets(nats.port)
    nats.thaw()
    assert greets(nats.port)
    nats.freeze()  # closing it now has to work too


def test_nats_configuration_is_appended(tmp_path: Path) -> None:
    require("nats-server")
    block = 'jetstream { store_dir: "%s", max_file_store: 1MB }\nmax_payload: 65536' % (tmp_path / "other")
    with NatsServer(tmp_path / "nats", config=block) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            assert b'"max_payload":65536' in connection.recv(4096)
        assert (tmp_path / "other").is_dir()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    require("nats-server")
    server = NatsServer(tmp_path / "nats", config="nonsense: {")
    with pytest.raises(ServerError, match=r"nats-server ended while it was starting(.|\n)*Parse error on line 4"):
        server.start()
    assert not server.running


def test_a_server_that_ended_by_itself_is_noticed(nats: NatsServer) -> None:
    os.kill(nats.pid, signal.SIGKILL)
    assert wait_until(lambda: not nats.running, 10)
    with pytest.raises(ServerError, match="had ended by itself, exit code -9"):
        nats.stop()


# ---------------------------------------------------------------------------------------------------- Orthanc


def test_orthanc_acknowledges(orthanc: OrthancServer) -> None:
    study = make_study(series=2, instances=2)
    for instance in study:
        answer = orthanc.upload(instance.data)
        assert answer["Status"] == "Success"
        assert answer["ID"] == instance.id
        assert answer["ParentSeries"] == instance.series
        assert answer["ParentStudy"] == instance.study
        assert answer["ParentPatient"] == instance.patient
    assert orthanc.upload(study.instances[0].data)["Status"] == "AlreadyStored"
    assert orthanc.existing() == {study.patient, study.id, *study.series, *(one.id for one in study)}
    assert orthanc.delete("studies", study.id)
    assert not orthanc.delete("studies", study.id)
    assert orthanc.existing() == set()
    with pytest.raises(httpx.HTTPStatusError):
        orthanc.upload(b"not DICOM")


def test_orthanc_takes_c_store(orthanc: OrthancServer, tmp_path: Path) -> None:
    require("storescu")
    bad = tmp_path / "bad.dcm"
    bad.write_bytes(b"not DICOM")
    for modality in ("CR", "CT", "DX", "MR", "NM", "OT", "PT", "US"):
        study = make_study(instances=2, modality=modality, rows=32)
        first, second = study.write(tmp_path / "dicom")
        assert orthanc.store_scu([first, bad, second]) == {first: True, bad: False, second: True}
        for instance in study:
            assert orthanc.get(f"/instances/{instance.id}/simplified-tags")["Modality"] == modality


def test_orthanc_that_is_down_acknowledges_nothing(orthanc: OrthancServer, tmp_path: Path) -> None:
    require("storescu")
    orthanc.kill()
    study = make_study()
    with pytest.raises(NotAcknowledgedError):
        orthanc.upload(study.instances[0].data)
    with pytest.raises(NotAcknowledgedError):
        orthanc.delete("studies", study.id)
    assert list(orthanc.store_scu(study.write(tmp_path / "dicom")).values()) == [False]


def test_orthanc_dies_and_comes_back_with_its_database(orthanc: OrthancServer) -> None:
    study = make_study()
    orthanc.upload(study.instances[0].data)
    first = orthanc.pid
    orthanc.kill()
    assert not alive(first)
    orthanc.start()
    assert orthanc.pid != first
    assert orthanc.get("/studies") == [study.id]
    assert 0 < orthanc.stop() < 60
    orthanc.start()
    assert orthanc.get("/studies") == [study.id]


def test_orthanc_resets_in_the_same_process(orthanc: OrthancServer) -> None:
    first = orthanc.pid
    orthanc.config["Name"] = "another name"
    orthanc.reset()
    assert orthanc.running and orthanc.pid == first
    assert orthanc.get("/system")["Name"] == "another name"


def test_orthanc_freezes(orthanc: OrthancServer) -> None:
    orthanc.freeze()
    with pytest.raises(httpx.TimeoutException):
        orthanc.client.get("/system", timeout=0.3)
    orthanc.thaw()
    assert orthanc.get("/system")["DicomAet"] == "ORTHANC"


def test_orthanc_runs_a_script_and_its_children_are_known(tmp_path: Path) -> None:
    require("orthanc", "orthanc-python")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, subprocess, orthanc
            orthanc.LogWarning("script sees " + os.environ["GREETING"])
            subprocess.Popen(["sleep", os.environ["SECONDS"]], start_new_session=True)
            """
        )
    )
    environment = {"GREETING": "hello", "SECONDS": "600"}
    server = OrthancServer(tmp_path / "orthanc", script=script, environment=environment)
    server.grace = 0.5
    server.start()
    try:
        server.wait_log("script sees hello")
        (child,) = server.children()
        assert alive(child)
    finally:
        with pytest.raises(ServerError, match=rf"left 1 processes behind for 0 s: {child} \(S: sleep 600\)"):
            server.close()
    assert not alive(child)


# ------------------------------------------------------------------------------------- nothing is left behind


STARTER = """
import subprocess, sys, time
from pathlib import Path
from orthanc_events_bridge.testing.guard import RUN, scratch_folder
from orthanc_events_bridge.testing.servers import NatsServer, OrthancServer

with scratch_folder() as folder:
    nats = NatsServer(folder / "nats")
    nats.start()
    nats.freeze()
    other = NatsServer(folder / "other")
    other.start()
    print(RUN, folder, nats.pid, other.pid, flush=True)
    END
"""


@pytest.mark.parametrize("end", ["time.sleep(600)", "raise SystemExit(3)", "import os; os._exit(4)"])
def test_nothing_outlives_the_starter(end: str) -> None:
    require("nats-server")
    with subprocess.Popen(
        [sys.executable, "-c", STARTER.replace("END", end)], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        run, folder, *pids = starter.stdout.readline().split()
        if "sleep" in end:
            assert len(marked_processes(run)) == 2
            starter.kill()
        starter.wait(10)
    assert wait_until(lambda: not any(alive(int(pid)) for pid in pids), 10)
    assert wait_until(lambda: not Path(folder).exists(), 10)


# ------------------------------------------------------------------------------------------------ what is had


def test_a_missing_component_is_skipped_and_in_ci_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHANC_BINARY", "/nowhere/Orthanc")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="ORTHANC_BINARY names /nowhere/Orthanc"):
        require("orthanc")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="must not be skipped"):
        require("orthanc")
    monkeypatch.delenv("ORTHANC_BINARY")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(programs.MissingComponentError, match="apt-get install dcmtk"):
        programs.find_storescu()


def test_free_ports_are_free_and_differ() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) == 50
    for port in ports:
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=1):
            pass


def test_dicom_is_made_fast() -> None:
    began = time.process_time()
    study = make_study(series=4, instances=500)
    assert len(study) == 2000
    assert all(len(one.data) < 1100 for one in study)
    assert time.process_time() - began < 2  # measured: 0.04 s


# ------------------------------------------------------------------------------------------------- PostgreSQL


def test_postgres_keeps_its_data_over_a_kill_and_leaves_nothing_behind(tmp_path: Path) -> None:
    require("postgres")
    with PostgresServer(tmp_path / "postgres") as server:
        server.query("CREATE TABLE kept (number INTEGER); INSERT INTO kept VALUES (7)")
        data = server.data
        assert data.stat().st_uid != 0
        server.kill()
        server.start()
        assert server.query("SELECT * FROM kept").strip() == "7"
        server.stop()
        assert data.exists()
        server.start()
    assert not data.parent.exists()


def test_orthanc_keeps_its_index_in_postgres(tmp_path: Path) -> None:
    require("postgres", "orthanc-postgresql", "orthanc-python", "orthanc")
    with PostgresServer(tmp_path / "postgres") as postgres:
        config = postgres.orthanc(connections=6)
        with OrthancServer(tmp_path / "orthanc", config=config) as orthanc:
            assert "PostgreSQL" in orthanc.get("/system")["DatabaseBackendPlugin"]
            orthanc.upload(make_study().instances[0].data)
        assert postgres.query("SELECT count(*) FROM resources").strip() == "4"
