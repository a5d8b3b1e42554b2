"""Each protection of the anonymizer switched off: what is in Orthanc must then show the harm that it prevents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.anonymizer_mutants import DIED
from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.workflows.deidentify import _Search, pseudonymise
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from tests.integration.anonymized import PATIENT_ID, ROOT, Anonymizers, files, full_of_canaries, results_of, tells
from tests.integration.commands import wait_for
from tests.integration.routers import gateway
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.mutant

RULES = "projects:\n  trial: {secret_file: secret}\nrules:\n  - {name: all, to: [trial]}\n"


class Mutants(Anonymizers):
    """Anonymizers with a protection switched off."""

    mutant = ""

    def command(self, *more: str) -> list[str]:
        module = "orthanc_events_bridge.testing.anonymizer_mutants"
        return [sys.executable, "-m", module, self.mutant, *super().command(*more)[3:]]


def others(line: Line, study: Study) -> list[str]:
    """The studies that were made of this one."""
    return sorted(set(line.orthanc.get("/studies")) - {study.id})


def what_it_made_is_stable(line: Line, study: Study) -> None:
    wait_for(lambda: len(others(line, study)) >= 3, "it goes round")


def a_late_image_comes(line: Line, study: Study) -> None:
    late = make_study(patient_id=study.patient_id, study_uid=study.study_uid)
    line.orthanc.upload(late.instances[0].data)
    wait_for(lambda: len(others(line, study)) >= 2, "several of one study")


def a_result_comes_back(line: Line, study: Study) -> None:
    (pseudonym,) = others(line, study)
    line.orthanc.upload(results_of(files(line.orthanc, pseudonym))[0])
    wait_for(lambda: len(files(line.orthanc, study.id)) == 2, "the result")
    wait_for(lambda: len(files(line.orthanc, pseudonym)) == 3, "the result is pseudonymised, and is there twice")


@pytest.mark.parametrize(
    ("mutant", "scenario"),
    [
        pytest.param("not knowing its own", what_it_made_is_stable, id="not-knowing-its-own"),
        pytest.param("by chance", a_late_image_comes, id="by-chance", marks=pytest.mark.slow),
        pytest.param("forgetting results", a_result_comes_back, id="forgetting-results", marks=pytest.mark.slow),
    ],
)
def test_the_anonymizer_shows_what_a_protection_prevents(
    tmp_path: Path, mutant: str, scenario: Callable[[Line, Study], None]
) -> None:
    broker_or_skip("nats")
    with gateway(tmp_path / "line", "nats") as line, Mutants(tmp_path / "a", line, RULES) as workers:
        workers.mutant = mutant
        workers.start()
        study = make_study(study_uid=f"{ROOT}.1", patient_id=PATIENT_ID)
        line.orthanc.upload(study.instances[0].data)
        wait_for(lambda: workers.audit("pseudonymised"), "pseudonymised")
        scenario(line, study)


@pytest.mark.parametrize(
    ("mutant", "harm"), [("only dying", False), ("remembering behind it", True)], ids=["remembered", "not-yet"]
)
def test_what_a_dead_worker_has_left_is_taken_for_a_result_only_where_it_was_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str, harm: bool
) -> None:
    broker_or_skip("nats")
    monkeypatch.setenv(DIED, str(tmp_path / "died"))
    with gateway(tmp_path / "line", "nats") as line, Mutants(tmp_path / "a", line, RULES) as workers:
        workers.mutant = mutant
        workers.start()
        study = make_study()
        line.orthanc.upload(study.instances[0].data)
        wait_for((tmp_path / "died").exists, "its death")
        (pseudonym,) = others(line, study)
        # What it has left is stable before its own event comes again.
        workers.start()
        if harm:
            wait_for(lambda: len(files(line.orthanc, study.id)) == 2, "it is given back")
            return
        wait_for(lambda: workers.audit("pseudonymised"), "pseudonymised")
        wait_for(lambda: f"subject='studies/{pseudonym}'): it was made here; 0 results" in workers.log(), "known")
        assert len(line.orthanc.get("/instances")) == 2


def test_without_a_search_names_are_left_where_none_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    content = full_of_canaries(make_study(study_uid=f"{ROOT}.1", patient_id=PATIENT_ID).instances[0].data)
    monkeypatch.setattr(_Search, "blank", lambda *_: None)
    assert tells(pseudonymise(content, Profile(), Pseudonyms("trial", b"0123456789abcdef")).content)
