"""What the anonymizer does where something fails, by the kit: no broker, and an Orthanc that is recorded."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from pydantic import SecretStr

from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.testing import event
from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.workflows.anonymizer import Anonymizer
from orthanc_events_bridge.workflows.anonymizer_settings import AnonymizerSettings
from orthanc_events_bridge.workflows.orders import Origin
from orthanc_events_bridge.workflows.workflow import Workflow, Workflows

STUDY = make_study(patient_id="P-4711", instances=2)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "secret").write_text("0123456789abcdef", "utf-8")
    return {
        "broker": {"type": "memory"},
        "store": f"sqlite:///{tmp_path}/memory.db",
        "audit": str(tmp_path / "audit.jsonl"),
        "projects": {"trial": {"secret_file": str(tmp_path / "secret")}},
        "rules": [{"name": "all", "to": ["trial"]}],
    }


def made(settings: dict[str, Any]) -> Anonymizer:
    return Anonymizer(configure_as(AnonymizerSettings, settings, None, {}, CommandLine()))


def audit(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text("utf-8").splitlines()]


class Recorded:
    """An Orthanc with a study, as respx records it.

    :ivar stored: what was put there.
    """

    def __init__(self, orthanc: Any, study: Study, refuse: int = 0) -> None:
        self.stored: list[bytes] = []
        self._refuse = refuse
        ids = [one.id for one in study]
        series = {"ID": study.series[0], "MainDicomTags": {"Modality": "CT"}, "Instances": ids}
        itself = {
            "ID": study.id,
            "MainDicomTags": {"StudyInstanceUID": study.study_uid},
            "PatientMainDicomTags": {"PatientID": study.patient_id},
        }
        instances = [{"ID": one.id, "MainDicomTags": {"SOPInstanceUID": one.sop_uid}} for one in study]
        orthanc.get(f"/studies/{study.id}").respond(json=itself)
        orthanc.get(f"/studies/{study.id}/series").respond(json=[series])
        orthanc.get(f"/studies/{study.id}/instances").respond(json=instances)
        for one in study:
            orthanc.get(f"/instances/{one.id}/file").respond(content=one.data)
        orthanc.post("/instances").mock(side_effect=self._store)
        for place in ("studies/its-study", "series/its-series"):
            orthanc.get(f"/{place}/instances").mock(side_effect=self._there)

    def _store(self, request: httpx.Request) -> httpx.Response:
        if self._refuse and len(self.stored) >= self._refuse:
            self._refuse = 0
            return httpx.Response(507)
        status = "AlreadyStored" if request.content in self.stored else "Success"
        self.stored.append(request.content)
        above = {"ParentSeries": "its-series", "ParentStudy": "its-study", "ParentPatient": "its-patient"}
        return httpx.Response(200, json={"Status": status, "ID": "x", **above})

    def _there(self, request: httpx.Request) -> httpx.Response:
        uids = {str(pydicom.dcmread(io.BytesIO(one)).SOPInstanceUID) for one in self.stored}
        return httpx.Response(200, json=[{"ID": f"id-{one}", "MainDicomTags": {"SOPInstanceUID": one}} for one in uids])


def test_what_orthanc_refuses_is_put_there_again_and_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    with made(settings).app.test() as kit:
        orthanc = Recorded(kit.orthanc, STUDY, refuse=1)
        kit.send(event("study.stable", study=STUDY.id))
        kit.finish()
        assert len(kit.retried) == 1 and len(kit.handled) == 1
        # The first one is known as begun, not as done: it came again, and was there.
        assert len(orthanc.stored) == 3 and len(set(orthanc.stored)) == 2
        kit.send(event("study.stable", study=STUDY.id))
        kit.finish()
        assert len(orthanc.stored) == 3
        # Told once, of both, by the ids of what was made.
        (told,) = kit.published
        assert (told.name, told.study_id, told.data["rule"], told.data["instances"]) == (
            "study.anonymized",
            "its-study",
            "all",
            2,
        )
    assert [one["instances"] for one in audit(tmp_path)] == [2]


def test_what_cannot_be_read_is_named_and_the_rest_is_pseudonymised(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with made(settings).app.test() as kit:
        orthanc = Recorded(kit.orthanc, STUDY)
        broken = STUDY.instances[0].id
        kit.orthanc.get(f"/instances/{broken}/file").respond(content=b"P-4711, and no DICOM")
        kit.send(event("study.stable", study=STUDY.id))
        kit.finish()
        (dead,) = kit.dead
        assert broken in str(dead.reason) and "P-4711" not in str(dead.reason)
        assert len(orthanc.stored) == 1
    assert [(one["instances"], one["unreadable"]) for one in audit(tmp_path)] == [(1, 1)]
    assert "P-4711" not in caplog.text


def test_a_result_whose_project_is_gone_waits_among_the_dead_letters(settings: dict[str, Any]) -> None:
    first = made(settings)
    with first.app.test() as kit:
        Recorded(kit.orthanc, STUDY)
        kit.send(event("study.stable", study=STUDY.id))
        kit.finish()
        kit.assert_handled()
    pseudonyms = first._makers["trial"].pseudonyms
    result = make_study(
        patient_id=pseudonyms.patient("P-4711"), study_uid=pseudonyms.uid(STUDY.study_uid), modality="SR"
    )
    more = {"projects": {"other": settings["projects"]["trial"]}, "rules": [{"name": "all", "to": ["other"]}]}
    with made({**settings, **more}).app.test() as kit:
        orthanc = Recorded(kit.orthanc, result)
        kit.send(event("study.stable", study=result.id))
        kit.finish()
        assert "there is no project trial any more" in str(kit.dead[0].reason)
        assert not orthanc.stored
    with made(settings).app.test() as kit:
        orthanc = Recorded(kit.orthanc, result)
        kit.send(event("study.stable", study=result.id), event("study.stable", study=result.id))
        kit.finish()
        kit.assert_handled()
        assert len(orthanc.stored) == 1 and b"P-4711" in orthanc.stored[0]
        (told,) = kit.published
        assert (told.name, told.series_id, told.study_id) == ("result.received", "its-series", "its-study")
        assert (told.data["rule"], told.data["instances"]) == ("trial", 1)


def test_a_result_of_a_dispatch_with_the_same_store_is_left_to_it(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    first = made(settings)
    with first.app.test() as kit:
        Recorded(kit.orthanc, STUDY)
        kit.send(event("study.stable", study=STUDY.id))
        kit.finish()
    pseudonyms = first._makers["trial"].pseudonyms
    study_uid = pseudonyms.uid(STUDY.study_uid)
    result = make_study(patient_id=pseudonyms.patient("P-4711"), study_uid=study_uid, modality="SR")

    async def dispatched() -> None:
        rows = Workflows(SecretStr(settings["store"]), "dispatch")
        origin = Origin.of(event("series.stable", study=STUDY.id), STUDY.id)
        await rows.begin(Workflow("w", "dispatch", "series", origin, STUDY.id, "all", 2, study=study_uid))
        await rows.close()

    asyncio.run(dispatched())
    more = {"projects": {"other": settings["projects"]["trial"]}, "rules": [{"name": "all", "to": ["other"]}]}
    with caplog.at_level("INFO"), made({**settings, **more}).app.test() as kit:
        orthanc = Recorded(kit.orthanc, result)
        kit.send(event("study.stable", study=result.id))
        kit.finish()
        kit.assert_handled()
        assert not orthanc.stored
    assert "a result of what an AI dispatch has sent, which gives it back" in caplog.text


def test_what_the_audit_file_does_not_have_is_not_done(tmp_path: Path, settings: dict[str, Any]) -> None:
    study = make_study(instances=51)
    file = tmp_path / "audit.jsonl"
    file.mkdir()
    with made(settings).app.test() as kit:
        orthanc = Recorded(kit.orthanc, study)
        kit.send(event("study.stable", study=study.id))
        kit.settle()
        assert len(kit.retried) == 1 and len(orthanc.stored) == 51
        file.rmdir()
        kit.finish()
        kit.assert_handled()
        # All but the last, which are noted as done a few at a time, are not put there again.
        assert len(set(orthanc.stored)) == 51 and 51 < len(orthanc.stored) < 102
    assert [one["id"] for one in audit(tmp_path)] == [study.id]


@pytest.mark.parametrize("option", ["store", "store_file"])
def test_a_memory_that_others_may_read_is_refused(tmp_path: Path, settings: dict[str, Any], option: str) -> None:
    (tmp_path / "memory.db").touch(mode=0o644)
    (tmp_path / "url").write_text(settings.pop("store"), "utf-8")
    settings[option] = f"sqlite:///{tmp_path}/memory.db" if option == "store" else str(tmp_path / "url")
    with pytest.raises(BridgeError, match="can be read by others") as caught:
        asyncio.run(made(settings).memory.studies("anybody"))
    assert caught.value.remedy == f"chmod 600 {tmp_path}/memory.db"


@pytest.mark.parametrize("store", ["broker", "nats://127.0.0.1:4222", "memory.db"])
def test_a_memory_is_a_database(settings: dict[str, Any], store: str) -> None:
    with pytest.raises(BridgeError):
        made({**settings, "store": store})


def test_a_missing_pydicom_is_named() -> None:
    code = "import sys; sys.modules['pydicom'] = None; from orthanc_events_bridge.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code.replace("main()", "main(['anonymize', '--check'])")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'orthanc-events: pydicom is not installed (pip install "orthanc-events-bridge[anonymizer]")\n'
    )
