"""Jobs of real Orthancs that fail, on every broker: submitted again until they arrive, once for each failure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import find_dicomweb_plugin, find_python_plugin, require
from tests.integration.commands import Started, ran, wait_for
from tests.integration.routers import Receiver, Routers, gateway, ids, running
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")
#: Resubmissions in seconds in place of hours.
QUICK = "resubmit: {attempts: 50, initial: 1s, maximum: 2s}\n"


def retriers(folder: Path, line: Line, text: str = QUICK) -> Started:
    return Started(folder, line, "retry-jobs", f"name: job-retry\n{text}")


def uploaded(line: Line, *, instances: int = 2) -> Study:
    study = make_study(modality="CT", instances=instances)
    for instance in study:
        line.orthanc.upload(instance.data)
    return study


def submit(line: Line, path: str, study: Study, **more: Any) -> str:
    body = {"Resources": [study.id], "Asynchronous": True, "Synchronous": False, **more}
    return str(line.orthanc.post(path, body)["ID"])


def ended(line: Line, job: str) -> Any:
    """A job, once it has ended."""
    found: list[Any] = [None]

    def over() -> bool:
        found[0] = line.orthanc.get(f"/jobs/{job}")
        return found[0]["State"] in ("Success", "Failure")

    wait_for(over, "the job's end")
    return found[0]


def told(line: Line, kind: str) -> int:
    """How many events of a kind there are."""
    return sum(one.kind == kind for one in line.events())


def dead(retry: Started) -> list[dict[str, Any]]:
    """The dead letters, as the command says them."""
    done = dlq(retry, "list", "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def dlq(retry: Started, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ran([sys.executable, "-m", "orthanc_events_bridge", "dlq", *arguments, "--config", str(retry.path)])


def answered(log: str) -> Counter[str]:
    """How often something was submitted for each failure, by the id of its event."""
    lines = [one for one in log.splitlines() if ": resubmitted" in one or ": made again as job" in one]
    return Counter(one.partition("id='")[2].partition("'")[0] for one in lines)


def kill_behind_a_resubmission(line: Line, job: str, receiver: Receiver, retry: Started) -> None:
    """Kill Orthanc, so that it has forgotten, when it is there again, that its job was submitted again."""
    while True:  # it may have been written down in the moment before
        failure, before = ended(line, job)["CompletionTime"], answered(retry.log()).total()
        # Taken, and never answered: so the resubmission doesn't end.
        with socket.create_server(("127.0.0.1", receiver.dicom_port)):
            wait_for(lambda before=before: answered(retry.log()).total() > before, "the resubmission")
            line.orthanc.kill()
        line.orthanc.start()
        found = line.orthanc.get(f"/jobs/{job}")
        if found["State"] == "Failure" and found["CompletionTime"] == failure:
            return


def with_dicomweb(server: Receiver) -> dict[str, Any]:
    """An Orthanc's configuration that has the DICOMweb plugin beside ours, and knows a server."""
    plugins = [str(one) for one in (find_python_plugin(), find_dicomweb_plugin())]
    servers = {server.folder.name: [f"{server.url}/dicom-web/"]}
    return {"Plugins": plugins, "DicomWeb": {"Enable": True, "Servers": servers}}


@pytest.mark.parametrize(
    ("studies", "kills"),
    [pytest.param(2, 1, id="2-studies"), pytest.param(30, 20, id="30-studies", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_took_arrives_once_when_somebody_does(tmp_path: Path, kind: str, studies: int, kills: int) -> None:
    """To a modality and a peer that are down, from an Orthanc that forgets half of it, while workers are killed; with
    many, Orthanc and the broker too."""
    broker_or_skip(kind)
    pacs, archive = Receiver(tmp_path / "pacs"), Receiver(tmp_path / "archive")
    with (
        gateway(tmp_path / "line", kind, modalities=[pacs], peers=[archive], JobsHistorySize=2 * studies - 1) as line,
        retriers(tmp_path / "retry", line) as retry,
    ):
        retry.start(1, "--workers", "2")
        everything: set[str] = set()
        for _ in range(studies):
            study = uploaded(line)
            everything |= ids(study.instances)
            ended(line, submit(line, "/modalities/pacs/store", study, LocalAet="OTHER"))
            ended(line, submit(line, "/peers/archive/store", study))
            line.settle()  # of many at once Orthanc forgets some before they are captured
        for kill in range(1, kills + 1):
            before = answered(retry.log()).total()
            wait_for(lambda before=before: answered(retry.log()).total() >= before + studies, "what failed, once more")
            assert retry.kill_a_worker()
            if kill % 5 == 0:
                for server in (line.orthanc, line.broker):
                    server.kill()
                    server.start()
        again = 2 * studies + answered(retry.log()).total()
        wait_for(lambda: answered(retry.log()).total() >= again, "and again")
        with running(pacs, archive):
            for receiver in (pacs, archive):
                wait_for(lambda receiver=receiver: receiver.has() == everything, receiver.folder.name)
            wait_for(lambda: all(job["State"] == "Success" for job in line.orthanc.get("/jobs?expand")), "all jobs")
            line.settle()
            time.sleep(3)  # what would come twice would come within its wait, of 2 s
            assert pacs.taken() == archive.taken() == len(everything)
        aets = {job["Content"].get("LocalAet", "OTHER") for job in line.orthanc.get("/jobs?expand")}
        assert aets == {"OTHER"}
        assert not dead(retry)
        assert retry.stop() == [0]
        assert "made again as job" in retry.log()
        if kills < 5:  # Orthanc was never killed: not twice for one failure
            assert answered(retry.log()).total() <= told(line, "job.failed")


def test_what_orthanc_forgets_of_a_submission_when_it_is_killed_is_submitted_again(tmp_path: Path) -> None:
    """It writes its jobs down every ten seconds: killed behind a resubmission it takes the job for failed. The broker
    is killed, too."""
    broker_or_skip("nats")
    pacs = Receiver(tmp_path / "pacs")
    rule = "resubmit: {attempts: 50, initial: 3s, maximum: 3s}\n"
    with (
        gateway(tmp_path / "line", "nats", modalities=[pacs]) as line,
        retriers(tmp_path / "retry", line, rule) as retry,
    ):
        retry.start(1, "--workers", "2")
        study = uploaded(line)
        job = submit(line, "/modalities/pacs/store", study)
        kill_behind_a_resubmission(line, job, pacs, retry)
        line.broker.kill()
        line.broker.start()
        with running(pacs):
            wait_for(lambda: pacs.has() == ids(study.instances), "what was forgotten")
            wait_for(lambda: told(line, "job.succeeded") == 1, "the success")
            assert pacs.taken() == len(study)
        assert "nothing has come of its submission; once more" in retry.log()
        assert retry.stop() == [0]


def test_a_plugins_job_is_submitted_again_for_as_long_as_orthanc_knows_it(tmp_path: Path) -> None:
    broker_or_skip("nats")
    require("orthanc-dicomweb")
    cloud = Receiver(tmp_path / "cloud", Plugins=[str(find_dicomweb_plugin())], DicomWeb={"Enable": True})
    with (
        gateway(tmp_path / "line", "nats", **with_dicomweb(cloud)) as line,
        retriers(tmp_path / "retry", line, "resubmit: {attempts: 50, initial: 2s, maximum: 4s}\n") as retry,
    ):
        retry.start(1, "--workers", "2")
        study = uploaded(line)
        job = submit(line, "/dicom-web/servers/cloud/stow", study)
        assert ended(line, job)["ErrorCode"] == 1
        wait_for(lambda: answered(retry.log()), "a resubmission")
        with running(cloud):
            wait_for(lambda: cloud.has() == ids(study.instances), "what nobody took")
            wait_for(lambda: told(line, "job.succeeded") == 1, "the success")
            assert cloud.taken() == len(study)
        # Orthanc can't keep jobs of that plugin over a restart.
        job = submit(line, "/dicom-web/servers/cloud/stow", uploaded(line))
        ended(line, job)
        line.settle()
        line.orthanc.kill()
        line.orthanc.start()
        assert line.orthanc.client.get(f"/jobs/{job}").status_code == 404
        wait_for(lambda: "goes among the dead letters" in retry.log(), "a dead letter")
        wait_for(lambda: dead(retry), "the dead letter, stored")
        (letter,) = dead(retry)
        assert "a job of type DicomWebStowClient does not say what it sent where" in letter["reason"]
        assert retry.stop() == [0]


def test_it_is_given_up_in_the_end_and_a_redrive_submits_it_at_once(tmp_path: Path) -> None:
    broker_or_skip("nats")
    pacs = Receiver(tmp_path / "pacs")
    elsewhere = {"TZ": "Pacific/Auckland"}  # all of Orthanc's times are UTC all the same
    with (
        gateway(tmp_path / "line", "nats", modalities=[pacs], environment=elsewhere) as line,
        retriers(tmp_path / "retry", line, "resubmit: {attempts: 2, initial: 2s, maximum: 1h}\n") as retry,
    ):
        retry.start(1, "--workers", "2")
        study = uploaded(line)
        submit(line, "/modalities/pacs/store", study)
        wait_for(lambda: "goes among the dead letters" in retry.log(), "a dead letter")
        wait_for(lambda: dead(retry), "the dead letter, stored")
        (letter,) = dead(retry)
        assert letter["reason"] == "given up behind 2 resubmissions: error 9, Error in the network protocol"
        line.settle()
        assert told(line, "job.failed") == 3
        with running(pacs):
            done = dlq(retry, "redrive", "--all")
            assert done.returncode == 0, done.stderr
            wait_for(lambda: pacs.has() == ids(study.instances), "what was given up")
            wait_for(lambda: told(line, "job.succeeded") == 1, "the success")
            assert pacs.taken() == len(study)
        assert not dead(retry)
        # It has succeeded: from now on it is counted from 1.
        submit(line, "/modalities/pacs/store", study)
        wait_for(lambda: sum(answered(retry.log()).values()) >= 4, "a new beginning")
        assert retry.stop() == [0]


def test_what_was_cancelled_stays_so(tmp_path: Path) -> None:
    """While it waits, which no event tells; and while it runs, which is told as a failure."""
    broker_or_skip("nats")
    pacs = Receiver(tmp_path / "pacs")
    with (
        gateway(tmp_path / "line", "nats", modalities=[pacs], ConcurrentJobs=1) as line,
        retriers(tmp_path / "retry", line) as retry,
    ):
        retry.start(1, "--workers", "2")
        study = uploaded(line, instances=200)
        with running(pacs):
            jobs = [submit(line, "/modalities/pacs/store", study) for _ in range(2)]
            wait_for(lambda: line.orthanc.get(f"/jobs/{jobs[0]}")["Progress"] > 0, "the first is on its way")
            for job in reversed(jobs):
                line.orthanc.post(f"/jobs/{job}/cancel", {})
            assert [ended(line, job)["ErrorCode"] for job in jobs] == [37, 37]
        wait_for(lambda: "it was cancelled, and stays so" in retry.log(), "the cancelled job")
        # What is submitted later comes and goes: nothing of before is waited for any more.
        job = submit(line, "/modalities/pacs/store", uploaded(line))
        wait_for(lambda: ": resubmitted" in retry.log(), "another job")
        line.settle()
        assert told(line, "job.failed") >= 2
        assert [line.orthanc.get(f"/jobs/{job}")["ErrorCode"] for job in jobs] == [37, 37]
        assert f"jobs/{job}" in next(text for text in retry.log().splitlines() if ": resubmitted" in text)
        assert retry.stop() == [0]


def test_what_the_router_repeats_itself_is_not_repeated_by_both(tmp_path: Path) -> None:
    broker_or_skip("nats")
    pacs = Receiver(tmp_path / "pacs")
    rules = """
destinations:
  pacs: {modality: pacs, retry: {max_attempts: 0, initial: 500ms, maximum: 1s}}
rules:
  - {name: all, to: [pacs]}
"""
    with (
        gateway(tmp_path / "line", "nats", modalities=[pacs], JobsHistorySize=2) as line,
        retriers(tmp_path / "retry", line, "resubmit: {attempts: 2, initial: 4s, maximum: 8s}\n") as retry,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        routers.start()
        retry.start(1, "--workers", "2")
        studies = [uploaded(line) for _ in range(3)]
        wait_for(lambda: retry.log().count("nothing to do") >= 6, "failures that the router has repeated itself")
        everything = {one for study in studies for one in ids(study.instances)}
        with running(pacs):
            wait_for(lambda: pacs.has() == everything, "what nobody took")
            wait_for(lambda: len(routers.audit()) == 3, "the router's own word")
            assert pacs.taken() == len(everything)
        assert not answered(retry.log())
        assert not dead(retry)
        assert retry.stop() == [0]
        assert routers.stop() == [0]


def test_it_checks_and_says_what_is_wrong(tmp_path: Path) -> None:
    broker_or_skip("nats")
    with gateway(tmp_path / "line", "nats") as line:
        retry = retriers(tmp_path / "retry", line, "")
        done = retry.run("--check")
        assert done.returncode == 0, done.stderr
        assert "15 times, 60 to 86400 s apart" in done.stdout and "store: it can be noted" in done.stdout
        assert f"orthanc: Orthanc at {line.orthanc.url} answers" in done.stdout
        whole = retry.path.read_text()
        for more, code, text in (
            ("resubmit: {initial: 1d, maximum: 1h}\n", 2, "retry-jobs.yaml:6: resubmit.maximum: maximum (line 6)"),
            ("store: sqlite:///nowhere/to/be/found.db\n", 1, "the store nowhere/to/be/found.db can't be used"),
        ):
            retry.path.write_text(whole + more)
            done = retry.run("--check")
            assert done.returncode == code and text in done.stderr
            assert "Traceback" not in done.stderr
