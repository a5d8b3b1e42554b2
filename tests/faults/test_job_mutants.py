"""Each protection of the job retry switched off: Orthanc, or who receives, must then show the harm that it prevents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from tests.faults.harm import harms
from tests.integration.commands import PATIENCE, Started, wait_for
from tests.integration.routers import Receiver, gateway, ids, running
from tests.integration.test_job_retry import dead, ended, kill_behind_a_resubmission, submit, told, uploaded
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.mutant

_ATTEMPTS = 3


@contextmanager
def retrying(folder: Path, pacs: Receiver, resubmit: str, without: Sequence[str]) -> Iterator[tuple[Line, Started]]:
    """A gateway to a PACS, and the job retry without a protection, or whole; not started yet."""
    text = f"name: job-retry\nresubmit: {resubmit}\n"
    program = ["orthanc_events_bridge.testing.job_mutants", ",".join(without)] if without else ["orthanc_events_bridge"]
    with (
        gateway(folder / "line", "nats", modalities=[pacs]) as line,
        Started(folder / "retry", line, "retry-jobs", text, program) as retry,
    ):
        yield line, retry


def somebody_else_sends_it(folder: Path, without: Sequence[str]) -> int:
    """How often too often it arrives."""
    pacs = Receiver(folder / "pacs")
    resubmit = "{attempts: 3, initial: 5s, maximum: 5s}"
    with retrying(folder, pacs, resubmit, without) as (line, retry):
        retry.start()
        study = uploaded(line)
        ended(line, submit(line, "/modalities/pacs/store", study))
        with running(pacs):
            ended(line, submit(line, "/modalities/pacs/store", study))
            assert pacs.has() == ids(study.instances)
            wait_for(lambda: "nothing to do" in retry.log() or ": resubmitted" in retry.log(), "the failure")
            line.settle()
            for job in line.orthanc.get("/jobs"):
                ended(line, job)
            return pacs.taken() - len(study)


def workers_are_killed_between_failures(folder: Path, without: Sequence[str]) -> int:
    """How often too often it is submitted again."""
    most, lives = 2, 6
    pacs = Receiver(folder / "pacs")
    resubmit = f"{{attempts: {most}, initial: 2s, maximum: 2s}}"
    with retrying(folder, pacs, resubmit, without) as (line, retry):
        submit(line, "/modalities/pacs/store", uploaded(line))
        for life in range(1, lives):
            wait_for(lambda life=life: told(line, "job.failed") >= life, "a failure")
            retry.start()
            end = time.monotonic() + PATIENCE
            while told(line, "job.failed") == life and not dead(retry):
                assert time.monotonic() < end
                time.sleep(0.2)
            retry.kill()
            if dead(retry):
                break
        return told(line, "job.failed") - 1 - most


def orthanc_is_killed_behind_a_resubmission(folder: Path, without: Sequence[str]) -> int:
    """How much never arrives."""
    pacs = Receiver(folder / "pacs")
    resubmit = "{attempts: 50, initial: 3s, maximum: 3s}"
    with retrying(folder, pacs, resubmit, without) as (line, retry):
        retry.start()
        study = uploaded(line)
        job = submit(line, "/modalities/pacs/store", study)
        kill_behind_a_resubmission(line, job, pacs, retry)
        with running(pacs):
            wait_until(lambda: pacs.has() == ids(study.instances), PATIENCE, every=0.2)
            return len(study) - len(pacs.has())


CASES = [
    pytest.param("later", somebody_else_sends_it, id="later"),
    pytest.param("counts", workers_are_killed_between_failures, id="counts", marks=pytest.mark.slow),
    pytest.param("again", orthanc_is_killed_behind_a_resubmission, id="again", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("without", "scenario"), CASES)
def test_they_show_what_a_protection_prevents(
    tmp_path: Path, without: str, scenario: Callable[[Path, Sequence[str]], int]
) -> None:
    """With it nothing, and without it some harm; where that takes luck, in more than one attempt."""
    broker_or_skip("nats")
    for attempt in range(_ATTEMPTS):
        whole, mutant = harms(scenario, tmp_path / str(attempt), without)
        assert whole == 0
        if mutant:
            return
    pytest.fail("nobody noticed")
