"""Each protection of the AI dispatch switched off: its rows, or Orthanc's jobs, must then show the harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

from orthanc_events_bridge.testing.phantoms import Phantom
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.ring import Ring
from tests.faults.harm import harms
from tests.integration.commands import PATIENCE, wait_for
from tests.integration.dispatches import Dispatches, Sent
from tests.integration.routers import Receiver
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.mutant

#: Seconds in which what is never going to happen would have happened.
_ENOUGH = 20.0


def a_worker_dies_while_its_job_runs(folder: Path, without: Sequence[str]) -> int:
    """Jobs too many."""
    ring = Ring(folder, "nats", Receiver(folder / "pacs"))

    def jobs() -> int:
        return sum(one["Type"] == "DicomWebStowClient" for one in ring.gateway.get("/jobs?expand"))

    with ring.running(), Dispatches(folder / "dispatch", ring, without=without) as dispatch:
        ring.service.freeze()
        dispatch.start()
        phantom = Phantom()
        Sent(ring, phantom, phantom.ct(slices=4))
        wait_for(lambda: jobs() == 1, "a job")
        wait_until(lambda: dispatch.shown()[0]["job"], 1 if without else PATIENCE)
        dispatch.kill()
        dispatch.start()
        wait_for(lambda: jobs() > 1 or "was submitted already" in dispatch.log(), "a successor")
        ring.service.thaw()
        wait_for(lambda: dispatch.states() == {"done": 1}, "an end")
        return jobs() - 1


def a_worker_dies_behind_its_step(folder: Path, without: Sequence[str]) -> int:
    """Workflows that nobody goes on with."""
    ring = Ring(folder, "nats", Receiver(folder / "pacs"))
    with ring.running(), Dispatches(folder / "dispatch", ring, without=["dying", *without]) as dispatch:
        dispatch.start(2)
        phantom = Phantom()
        Sent(ring, phantom, phantom.ct(slices=4))
        wait_for(lambda: "anonymize was done before" in dispatch.log(), "a successor")
        Sent(ring, phantom, phantom.mr(slices=4))
        wait_for(lambda: dispatch.states()["done"], "the other one")
        wait_until(lambda: dispatch.states() == {"done": 2}, _ENOUGH if without else PATIENCE)
        return dispatch.states()["sending"]


#: What is switched off, and what happens.
CASES: list[Any] = [
    pytest.param("job", a_worker_dies_while_its_job_runs, id="job"),
    pytest.param("again", a_worker_dies_behind_its_step, id="again", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("without", "scenario"), CASES)
def test_the_dispatch_shows_what_a_protection_prevents(
    tmp_path: Path, without: str, scenario: Callable[[Path, Sequence[str]], int]
) -> None:
    broker_or_skip("nats")
    require("orthanc-dicomweb")
    whole, mutant = harms(scenario, tmp_path, without)
    assert whole == 0
    assert mutant > 0
