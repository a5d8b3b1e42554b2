"""Rules on labels, which Orthanc has from 1.12 on: with the one of `make test-newer`, and with one that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from orthanc_events_bridge.testing.dicom import make_study
from tests.integration.commands import wait_for
from tests.integration.routers import Routers, gateway
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration


def test_a_study_goes_where_its_label_says_and_that_there_are_none_is_said(tmp_path: Path) -> None:
    broker_or_skip("nats")
    goal = tmp_path / "goal"
    goal.mkdir()
    rules = f"""
destinations:
  goal: {{folder: "{goal}"}}
rules:
  - {{name: labelled, when: {{label: [research, teaching]}}, to: [goal]}}
"""
    with gateway(tmp_path / "line", "nats") as line, Routers(tmp_path / "routers", line, rules) as routers:
        orthanc = line.orthanc
        plain, labelled = [make_study(modality="CT", instances=2) for _ in range(2)]
        done = routers.run("--check")
        system = orthanc.get("/system")
        if not system.get("HasLabels"):
            assert [int(part) for part in system["Version"].split(".")] < [1, 12]
            assert done.returncode == 1 and "rules ask for labels, and Orthanc" in done.stderr, done.stderr
            assert "(labels need Orthanc 1.12" in done.stderr
            routers.start()
            orthanc.upload(plain.instances[0].data)
            wait_for(lambda: "OrthancError" in routers.log(), "what is not decided is said")
            assert routers.stop() == [0] and not list(goal.iterdir())
            return
        assert done.returncode == 0, done.stderr
        routers.start()
        for study in (plain, labelled):
            orthanc.upload(study.instances[0].data)
        for label in ("research", "other"):
            orthanc.client.put(f"/studies/{labelled.id}/labels/{label}").raise_for_status()
        for study in (plain, labelled):  # it becomes stable again, whenever it was before
            orthanc.upload(study.instances[1].data)
        wait_for(
            lambda: {path.stem for path in goal.rglob("*.dcm")} == {one.sop_uid for one in labelled}, "what has one"
        )
        wait_for(lambda: f"studies/{plain.id}" in routers.log(), "what has none is decided")
        done = routers.run("--explain", labelled.id)
        assert "yes label 'research' or 'teaching'; there is 'other', 'research'" in done.stdout
        done = routers.run("--explain", plain.id)
        assert done.stdout.endswith("it goes to nobody\n")
        assert routers.stop() == [0]
        assert {path.stem for path in goal.rglob("*.dcm")} == {one.sop_uid for one in labelled}
