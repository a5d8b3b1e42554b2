"""Each protection of the router switched off: what it writes down must then show the harm that it prevents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing.dicom import make_study
from orthanc_events_bridge.testing.line import Line
from tests.faults.harm import harms
from tests.integration.commands import wait_for
from tests.integration.routers import Receiver, Routers, gateway, in_a_circle, running
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.mutant


def looked_at(routers: Routers, destination: str, count: int) -> None:
    """Until so many orders to a destination were carried out, or found to be none."""
    wait_for(
        lambda: sum(len(routers.audit(what, destination=destination)) for what in ("sent", "not sent")) >= count,
        f"{count} orders to {destination}",
    )


def it_comes_again(folder: Path, without: Sequence[str]) -> int:
    """To itself: Orthanc takes it as new, and it is stable once more."""
    with in_a_circle(folder, without) as (routers, _, _):
        looked_at(routers, "itself", 2)
        return len(routers.audit(destination="itself")) - 1


def it_is_to_be_sent_back(folder: Path, without: Sequence[str]) -> int:
    with in_a_circle(folder, without) as (routers, _, _):
        looked_at(routers, "source", 1)
        return len(routers.audit(destination="source"))


def a_worker_dies_while_its_job_runs(folder: Path, without: Sequence[str]) -> int:
    goal = Receiver(folder / "goal")
    rules = "destinations:\n  goal: {modality: goal}\nrules:\n  - {name: all, to: [goal]}\n"
    with (
        running(goal),
        gateway(folder / "line", "nats", modalities=[goal]) as line,
        Routers(folder / "routers", line, rules, without) as routers,
    ):
        goal.freeze()
        routers.start()
        for instance in make_study(modality="CT"):
            line.orthanc.upload(instance.data)
        wait_for(lambda: jobs(line) == 1, "a job")
        routers.kill()
        routers.start()
        wait_for(lambda: jobs(line) > 1 or "was submitted already" in routers.log(), "a successor")
        goal.thaw()
        wait_for(lambda: routers.audit(destination="goal"), "an end")
        return jobs(line) - 1


def jobs(line: Line) -> int:
    return sum(one["Type"] == "DicomModalityStore" for one in line.orthanc.get("/jobs?expand"))


#: What is switched off, and what happens.
CASES: list[Any] = [
    pytest.param("sent", it_comes_again, id="sent"),
    pytest.param("left", a_worker_dies_while_its_job_runs, id="left", marks=pytest.mark.slow),
    pytest.param("source", it_is_to_be_sent_back, id="source", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("without", "scenario"), CASES)
def test_the_router_shows_what_a_protection_prevents(
    tmp_path: Path, without: str, scenario: Callable[[Path, Sequence[str]], int]
) -> None:
    broker_or_skip("nats")
    whole, mutant = harms(scenario, tmp_path, without)
    assert whole == 0
    assert mutant > 0
