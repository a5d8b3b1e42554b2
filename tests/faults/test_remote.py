"""An Orthanc without the plugin, followed over HTTP: ended, cut off, lied to, and the ledger."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.ledger import Event
from orthanc_events_bridge.testing.line import Clients
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError, require, skip_or_fail
from orthanc_events_bridge.testing.remote import RemoteLine
from tests.contract.link import Link

pytestmark = pytest.mark.fault

MakeLine = Callable[..., RemoteLine]


@pytest.fixture
def make_remote(tmp_path: Path) -> Iterator[MakeLine]:
    require("orthanc")
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> RemoteLine:
            try:
                return stack.enter_context(RemoteLine(tmp_path / "line", **options))
            except MissingComponentError as error:
                skip_or_fail(error)
                raise

        yield make


def delete(line: RemoteLine, level: str, resource: str) -> None:
    assert line.orthanc.delete(level, resource)
    line.ledger.deleted(level, resource)


def wait_for(line: RemoteLine, kind: str, wanted: set[str]) -> Counter[str]:
    """How often each resource was told to be of a kind, once each was, and a while after."""

    def told() -> list[Event]:
        return [event for event in line.events() if event.kind == kind]

    assert wait_until(lambda: wanted <= {event.resource for event in told()}, 60, every=0.5), kind
    time.sleep(2)
    return Counter(event.resource for event in told() if event.resource in wanted)


@pytest.mark.parametrize("broker", ["nats", "kafka"])
def test_nothing_is_lost_over_ingest_with_deletions(make_remote: MakeLine, broker: str) -> None:
    """Deletions at every level beside uploads, and what was deleted stored again."""
    line = make_remote(broker=broker, options=["--compare-instances"])
    studies = [dicom.make_study(series=2, instances=4) for _ in range(9)]
    with Clients(line, adders=2, pause=0.1):
        for study in studies:
            line.store(study)
        tip = line.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"]
        line.wait(lambda document: document["log"]["cursor"] >= tip)
        for number, study in enumerate(studies):
            first = study.instances[0]
            level, resource = (("instances", first.id), ("series", first.series), ("studies", study.id))[number % 3]
            delete(line, level, resource)
    line.settle()
    for study in studies[2::3]:  # back again: each needs its deletion in front
        line.store(study)
    report = line.report()
    print(report)
    report.assert_clean()
    assert report.lost == 0 and line.status()["capture"]["inferred"]["Deleted"] > 9 * 2


def test_nothing_is_lost_on_postgresql_with_several_writers(make_remote: MakeLine, tmp_path: Path) -> None:
    require("postgres", "orthanc-postgresql", "orthanc-python")
    with PostgresServer(tmp_path / "postgres") as server:
        line = make_remote(orthanc=server.orthanc(), settings="capture:\n  grace: 3s\n")
        line.ledger.allow("instance.deleted")
        gone = [dicom.make_study() for _ in range(5)]
        with Clients(line, adders=6, pause=0.2):
            for study in gone:
                line.store(study)
            tip = line.orthanc.get("/changes?last")["Last"]
            line.wait(lambda document: document["log"]["cursor"] >= tip)
            for study in gone:
                delete(line, "studies", study.id)
            time.sleep(2)
            line.bridge.kill()
            line.bridge.start()
            time.sleep(2)
        report = line.report()
        print(report)
        report.assert_clean()
        line.__exit__(None, None, None)


def test_nothing_is_lost_when_orthanc_and_the_bridge_are_killed_in_turn(make_remote: MakeLine) -> None:
    line = make_remote()
    line.ledger.allow("instance.deleted")
    with Clients(line, adders=2, loopers=1, pause=0.1):
        for _ in range(3):
            time.sleep(1)
            line.bridge.kill()
            time.sleep(0.5)
            line.bridge.start()
            time.sleep(1)
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(1)
        line.bridge.restart()
    report = line.report(kills=4)
    print(report)
    report.assert_clean()
    assert line.status()["capture"]["discontinuities"] == 0


def test_nothing_is_lost_when_the_link_is_cut_and_swallows(make_remote: MakeLine) -> None:
    links: list[Link] = []

    def through_link(port: int) -> str:
        links.append(Link(port, latency=0.002))
        return f"http://127.0.0.1:{links[0].port}"

    try:
        line = make_remote(url=through_link, options=["--orthanc-timeout", "1"])
        link = links[0]
        with Clients(line, adders=2, pause=0.1):
            for _ in range(5):
                time.sleep(0.3)
                link.cut()
            link.swallows = True
            line.wait(lambda document: document["capture"]["state"] == "not connected")
            link.cut()
            time.sleep(1)
            link.swallows = False
        line.report().assert_clean()
        assert "is well again after" in line.bridge.log_text()
    finally:
        for link in links:
            link.close()


def test_a_stopped_bridge_has_sent_what_it_recorded_and_goes_on(make_remote: MakeLine) -> None:
    line = make_remote()
    with Clients(line, adders=2, pause=0.1):
        for _ in range(3):
            time.sleep(1)
            line.bridge.stop()
            document = line.status()
            assert document["capture"]["state"] == "stopped"
            assert document["transports"][0]["position"] == document["outbox"]["last_position"]
            line.bridge.start()
    line.report().assert_clean()
    assert max(event.sequence for event in line.events()) < 1_000_000, "each stop was a clean one"
    line.orthanc.freeze()
    line.bridge.stop()  # it waits for no answer
    line.orthanc.thaw()
    line.bridge.start()
    line.store(dicom.make_study())
    line.report().assert_clean()


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_stable_events_are_told_once_although_orthanc_swallows_them(make_remote: MakeLine, how: str) -> None:
    line = make_remote(stable_age=3, options=["--stable-age", "2"])
    studies = [dicom.make_study() for _ in range(10)]
    for study in studies[:5]:
        line.store(study)
    line.settle()
    line.orthanc.kill() if how == "kill" else line.orthanc.stop()
    line.orthanc.start()
    for study in studies[5:]:
        line.store(study)
    for kind, level in (("series.stable", "series"), ("study.stable", "study"), ("patient.stable", "patient")):
        wanted = {getattr(study.instances[0], level) for study in studies}
        assert wait_for(line, kind, wanted) == dict.fromkeys(wanted, 1)
    line.report(kills=1).assert_clean()


def test_a_log_that_is_emptied_and_an_older_database_are_noticed_while_running(make_remote: MakeLine) -> None:
    line = make_remote()
    line.ledger.allow("instance.*", "*.instance-added")
    kept, gone, back = (dicom.make_study(series=2) for _ in range(3))
    line.store(kept)
    line.store(back)
    line.settle()
    line.orthanc.stop()
    shutil.copytree(line.orthanc.database, line.root / "older")
    line.orthanc.start()
    line.store(gone)
    delete(line, "studies", back.id)
    line.settle()
    line.orthanc.kill()
    shutil.rmtree(line.orthanc.database)
    shutil.copytree(line.root / "older", line.orthanc.database)
    line.ledger.deleted("studies", gone.id)
    for instance in back:
        line.ledger.stored_ids(instance.id, instance.series, instance.study, instance.patient)
    line.orthanc.start()
    line.wait(lambda document: document["capture"]["discontinuities"] == 1)
    line.report(kills=1).assert_clean()
    line.orthanc.client.delete("/changes").raise_for_status()
    line.wait(lambda document: document["capture"]["discontinuities"] == 2)
    line.store(dicom.make_study())
    line.report(kills=1).assert_clean()
    assert sum(event.kind == "server.log-discontinuity" for event in line.events()) == 2


def test_jobs_are_told_once_over_restarts(make_remote: MakeLine) -> None:
    line = make_remote()
    study = dicom.make_study()
    line.store(study)
    away = {"AET": "AWAY", "Host": "127.0.0.1", "Port": 1}
    line.orthanc.client.put("/modalities/away", json=away).raise_for_status()

    def run_job(path: str, body: dict[str, Any], until: str) -> str:
        job = str(line.orthanc.post(path, {**body, "Asynchronous": True})["ID"])
        assert wait_until(lambda: line.orthanc.get(f"/jobs/{job}")["State"] == until, 60)
        return job

    archive = run_job(f"/studies/{study.id}/archive", {}, "Success")
    line.wait(lambda document: document["outbox"]["last_position"] >= 6)
    line.bridge.kill()
    store = run_job("/modalities/away/store", {"Resources": [study.id]}, "Failure")
    line.bridge.start()
    line.orthanc.post(f"/jobs/{store}/resubmit")
    line.settle()
    line.bridge.restart()
    line.settle()
    told = Counter((event.kind, event.resource) for event in line.events() if event.kind.startswith("job."))
    again = told.pop(("job.failed", store))
    assert told == {
        ("job.submitted", archive): 1,
        ("job.succeeded", archive): 1,
        ("job.submitted", store): 1,
    }
    assert again in (1, 2)  # resubmitted, it fails again, perhaps before the bridge has looked
    assert line.status()["capture"]["jobs_problem"] is None
    line.report(kills=1).assert_clean()
