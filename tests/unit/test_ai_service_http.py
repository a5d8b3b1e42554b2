"""examples/ai-service as a whole, without a server: what it answers and sends, and how it misbehaves when told to."""

from __future__ import annotations

import asyncio
import email.policy
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

import highdicom as hd
import httpx
import numpy as np
from ai_service import worker as worker_module
from ai_service.__main__ import quieten
from ai_service.faults import EXIT_CODE, Faults
from ai_service.service import Service
from ai_service.settings import PREFIX, Settings, SettingsError, explain, read
from ai_service.store import Store
from ai_service.worker import Worker
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML

from orthanc_events_bridge.testing.phantoms import Phantom, file_of

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ai-service"


class Died(BaseException):
    """The process would have ended here."""


class Receiver:
    """An archive behind HTTP: what it has, by SOP Instance UID."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.files: dict[str, bytes] = {}
        #: What it answers first, each once: a status, an answer as DICOM JSON, or an error on the way.
        self.troubles: list[int | dict[str, Any] | httpx.HTTPError] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.troubles:
            trouble = self.troubles.pop(0)
            if isinstance(trouble, httpx.HTTPError):
                raise trouble
            if isinstance(trouble, int):
                return httpx.Response(trouble, text="^CANARY")
            return httpx.Response(200, json=trouble)
        for content in unpack(request.headers["content-type"], request.content):
            self.files[str(dcmread(io.BytesIO(content)).SOPInstanceUID)] = content
        return httpx.Response(200, json={})

    def read(self) -> dict[str, Dataset]:
        """What it has, by modality."""
        found = [dcmread(io.BytesIO(one)) for one in self.files.values()]
        assert len({one.Modality for one in found}) == len(found)
        return {one.Modality: one for one in found}


class Bench:
    """The service, with a clock that stands still and a receiver that is no server."""

    def __init__(self, folder: Path, receiver: Receiver, **options: Any) -> None:
        options = {"results_url": "http://pacs.example/dicom-web", "quiet_seconds": 5.0, **options}
        self.settings = Settings(folder=folder, **options)
        self.now, self.slept = 1000.0, list[float]()
        self.store = Store(folder, lambda: self.now)
        client = httpx.AsyncClient(transport=httpx.MockTransport(receiver))
        faults = Faults(self.settings, folder, self._die)
        self.worker = Worker(self.settings, self.store, faults, client, lambda: self.now)
        self._app = Service(self.settings, self.store, faults, self.worker, self._sleep).app()
        self._runner = asyncio.Runner()

    @staticmethod
    def _die(code: int) -> None:
        assert code == EXIT_CODE
        raise Died

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def close(self) -> None:
        self._runner.close()
        self.store.close()

    def ask(self, method: str, path: str, content: bytes = b"", **headers: str) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://ai.example") as client:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, content=content, headers=named)

        return self._runner.run(run())

    def post(self, path: str, files: list[bytes], **headers: str) -> httpx.Response:
        kind = 'multipart/related; type="application/dicom"; boundary="a b"'
        pieces = [b"--a b\r\nContent-Type: application/dicom\r\n\r\n" + one + b"\r\n" for one in files]
        return self.ask("POST", path, b"".join(pieces) + b"--a b--\r\n", **{"content_type": kind, **headers})

    def stow(self, images: list[Dataset]) -> httpx.Response:
        return self.post("/studies", [file_of(one) for one in images])

    def work(self, seconds: float = 5.0) -> None:
        """Let so much time pass, and what is due be done."""
        self.now += seconds
        self._runner.run(self.worker.round())

    def state(self, images: list[Dataset]) -> Any:
        return self.ask("GET", f"/series/{images[0].SeriesInstanceUID}").json()

    def health(self) -> Any:
        return self.ask("GET", "/health").json()


Maker = Callable[..., Bench]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def bench(tmp_path: Path, receiver: Receiver) -> Iterator[Maker]:
    """Starts the service; a second time it is a restart."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        for one in made:
            one.close()
        service = Bench(tmp_path / "folder", receiver, **options)
        service.now = made[-1].now if made else service.now
        made.append(service)
        return service

    yield make
    for one in made:
        one.close()


def unpack(kind: str, body: bytes) -> list[bytes]:
    """The parts of a body, by Python's own parser for mail."""
    message = BytesParser(policy=email.policy.HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    assert message.get_content_type() == "multipart/related"
    parts = list(message.iter_parts())
    assert {one.get_content_type() for one in parts} == {"application/dicom"}
    contents = [one.get_payload(decode=True) for one in parts]
    assert all(isinstance(one, bytes) for one in contents)
    return [one for one in contents if isinstance(one, bytes)]


def values(report: Dataset) -> list[float]:
    """The numbers of a report: volume and mean."""
    content = hd.sr.ComprehensiveSR.from_dataset(report).content
    assert isinstance(content, hd.sr.MeasurementReport)
    groups = [*content.get_volumetric_roi_measurement_groups(), *content.get_image_measurement_groups()]
    return [float(one.value) for group in groups for one in group.get_measurements()]


def failures(answer: httpx.Response) -> dict[str, int]:
    """The reasons in an answer, by SOP Instance UID; of what has none by its place."""
    assert answer.headers["content-type"] == "application/dicom+json"
    content = Dataset.from_json(answer.text)
    found = {str(one.ReferencedSOPInstanceUID): one.FailureReason for one in content.get("FailedSOPSequence", [])}
    return found | {str(n): one.FailureReason for n, one in enumerate(content.get("OtherFailuresSequence", []))}


def stored(answer: httpx.Response) -> set[str]:
    return {
        str(one.ReferencedSOPInstanceUID) for one in Dataset.from_json(answer.text).get("ReferencedSOPSequence", [])
    }


# -- both ways -------------------------------------------------------------------------------------------------


def test_a_series_in_several_requests_gives_one_segmentation_and_one_report(bench: Maker, receiver: Receiver) -> None:
    service = bench(results_authorization="Bearer secret")
    images = Phantom().ct()
    for part in (images[:5], images[5:]):
        answer = service.stow(part)
        assert answer.status_code == 200
        assert stored(answer) == {one.SOPInstanceUID for one in part}
        assert not failures(answer)
        service.work(4)
        assert not receiver.requests
        assert service.state(images) == {"state": "open", "failures": 0, "why": ""}
    service.work()
    assert service.state(images)["state"] == "done"
    assert service.health() == {
        "status": "ok",
        "series": {"open": 0, "done": 1, "unfit": 0, "undelivered": 0, "failing": 0},
    }
    (request,) = receiver.requests
    assert str(request.url) == "http://pacs.example/dicom-web/studies"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["accept"] == "application/dicom+json"
    voxels = sum(int((one.pixel_array.astype(int) - 1024 >= 200).sum()) for one in images)
    assert values(receiver.read()["SR"]) == [pytest.approx(voxels * 2.5 * 1.5 * 1.25 / 1000, abs=1e-4), 300.0]
    assert int(receiver.read()["SEG"].pixel_array.sum()) == voxels > 1000


@pytest.mark.parametrize("restart", [False, True])
def test_a_series_sent_twice_gives_one_result(bench: Maker, receiver: Receiver, restart: bool) -> None:
    service = bench()
    images = Phantom().mr()
    service.stow(images)
    service.work()
    first = dict(receiver.files)
    if restart:
        service = bench()
    service.stow(images[::-1])
    service.work()
    assert len(receiver.requests) == 2
    assert receiver.files == first  # byte for byte
    assert set(receiver.read()) == {"SEG", "SR"}


def test_the_synchronous_answer_has_the_same_results_and_nothing_is_kept(bench: Maker, receiver: Receiver) -> None:
    service = bench()
    images = Phantom().ct()
    service.stow(images)
    service.work()
    service = bench(results_url="")
    before = set(service.settings.folder.rglob("*"))
    answers = [service.post("/results", [file_of(one) for one in images], accept="multipart/related") for _ in "ab"]
    for answer in answers:
        assert answer.status_code == 200
        files = [dcmread(io.BytesIO(one)) for one in unpack(answer.headers["content-type"], answer.content)]
        assert {one.SOPInstanceUID for one in files} == set(receiver.files)
        assert values(files[1]) == values(receiver.read()["SR"])
    assert set(service.settings.folder.rglob("*")) == before


def test_an_image_that_comes_while_its_series_is_measured_is_measured_too(
    bench: Maker, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = bench()
    images, compute = Phantom().ct(), worker_module.compute
    service.stow(images[:-1])

    def late(paths: list[Path]) -> bytes:
        if len(paths) < len(images):
            place = service.store.images(images[0].SeriesInstanceUID)[0].parent.parent.parent / "late"
            place.write_bytes(file_of(images[-1]))
            service.store.add(images[0].SeriesInstanceUID, [(images[-1].SOPInstanceUID, place)])
        return compute(paths)

    monkeypatch.setattr(worker_module, "compute", late)
    service.work()
    assert not receiver.requests
    service.work()
    assert len(receiver.read()["SR"].CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence) == 2
    references = receiver.read()["SEG"].ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {one.ReferencedSOPInstanceUID for one in references} <= {one.SOPInstanceUID for one in images}
    assert service.state(images)["state"] == "done"


# -- what is refused -------------------------------------------------------------------------------------------


def test_what_is_taken_in_part_is_202_with_the_reason_of_each(bench: Maker) -> None:
    phantom = Phantom()
    (picture,), (frames,), good = phantom.secondary_capture(), phantom.multiframe(), phantom.ct()
    (other,) = Phantom().ct(slices=1)
    unreadable = dcmread(io.BytesIO(file_of(phantom.mr(slices=1)[0])))
    unreadable.file_meta.TransferSyntaxUID = MPEG2MPML
    unreadable.PixelData = encapsulate([b"film"])
    files = [*(file_of(one) for one in (picture, frames, *good, other, unreadable)), b"no DICOM"]
    answer = bench().post(f"/studies/{phantom.study_uid}", files)
    assert answer.status_code == 202
    assert failures(answer) == {
        picture.SOPInstanceUID: 0x0122,
        frames.SOPInstanceUID: 0x0122,
        other.SOPInstanceUID: 0xC000,
        unreadable.SOPInstanceUID: 0xC122,
        "0": 0xC000,
    }
    assert stored(answer) == {one.SOPInstanceUID for one in good}


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # pydicom's, of a UID that is none
def test_where_nothing_is_taken_it_is_409_and_400_where_there_is_no_dicom_at_all(bench: Maker) -> None:
    service = bench()
    (picture,) = Phantom().secondary_capture()
    answer = service.post("/studies", [file_of(picture), b"no DICOM"])
    assert (answer.status_code, failures(answer)) == (409, {picture.SOPInstanceUID: 0x0122, "0": 0xC000})
    answer = service.post("/studies", [b"no DICOM"])
    assert (answer.status_code, failures(answer)) == (400, {"0": 0xC000})
    evil = Phantom().ct(slices=1)[0]
    evil.SeriesInstanceUID = "../../x"
    assert service.stow([evil]).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "says"),
    [
        ("POST", "/studies", {"content_type": "application/dicom"}, 415, "multipart/related"),
        ("POST", "/studies", {"content_type": "multipart/related; type=application/dicom"}, 415, "no boundary"),
        ("POST", "/studies", {"accept": "application/dicom+xml"}, 406, "application/dicom+json"),
        ("POST", "/results", {"accept": "text/html, application/json"}, 406, "multipart/related"),
        ("POST", "/studies", {"content_length": "99999999999999"}, 413, "more than"),
        ("POST", "/studies", {}, 400, "ends before its last boundary"),
        ("GET", "/series/1.2.3", {}, 404, "no such series"),
        ("GET", "/instances", {}, 404, "POST /studies or /results"),
        ("GET", "/studies", {}, 405, "POST /studies or /results"),
    ],
)
def test_a_wrong_request_gets_one_clear_error(
    bench: Maker, method: str, path: str, headers: dict[str, str], status: int, says: str
) -> None:
    given = {"content_type": 'multipart/related; type="application/dicom"; boundary=x', **headers}
    answer = bench().ask(method, path, b"--x\r\n", **given)
    assert answer.status_code == status
    assert says in answer.json()["error"]


def test_what_is_larger_than_the_limits_is_413_and_nothing_of_it_is_kept(bench: Maker) -> None:
    service = bench(max_instances=5, max_instance_mb=1, max_body_mb=2)
    images = Phantom().ct()
    for files, says in (
        ([file_of(one) for one in images], "more than 5 instances"),
        ([file_of(images[0]), bytes(2**20 + 2**16)], "a part has more than"),
        ([file_of(images[0]), *[bytes(10**6)] * 3], "the body has more than"),
    ):
        # In chunks, and so without a Content-Length.
        answer = service.post("/studies", files, content_length="")
        assert answer.status_code == 413
        assert says in answer.json()["error"]
    assert not service.store.states
    assert not list(service.settings.folder.rglob("*.dcm"))
    assert service.stow(images[:5]).status_code == 200
    assert service.stow(images[:5]).status_code == 200
    answer = service.stow(images[5:6])
    assert (answer.status_code, list(failures(answer).values())) == (409, [0xA700])


def test_without_a_receiver_stow_says_what_to_set(bench: Maker) -> None:
    answer = bench(results_url="").stow(Phantom().ct(slices=1))
    assert answer.status_code == 501
    assert "AI_SERVICE_RESULTS_URL" in answer.json()["error"]


def test_the_synchronous_way_takes_one_whole_series_that_can_be_measured(bench: Maker) -> None:
    service, phantom = bench(), Phantom()
    images = [file_of(one) for one in phantom.ct()]
    answer = service.post("/results", [*images, file_of(phantom.mr()[0])])
    assert (answer.status_code, answer.json()["error"][:20]) == (400, "one series at a time")
    answer = service.post("/results", [*images, b"no DICOM"])
    assert (answer.status_code, failures(answer), stored(answer)) == (400, {"0": 0xC000}, set())
    answer = service.post("/results", [*images[:3], *images[4:]])
    assert answer.status_code == 422
    assert "not evenly spaced" in answer.json()["error"]


def test_a_full_disk_is_503(bench: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    service = bench()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ai_service.arrivals.write", full)
    answer = service.stow(Phantom().ct(slices=1))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert not service.store.states


# -- sending ---------------------------------------------------------------------------------------------------


def test_results_are_sent_again_until_the_receiver_has_stored_them_all(bench: Maker, receiver: Receiver) -> None:
    refused = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xA700]}}]}}
    receiver.troubles = [httpx.ConnectError("down"), 503, refused, 409]
    service = bench(retry_seconds=3.0)
    images = Phantom().ct()
    service.stow(images)
    service.work()
    for failed, (pause, why) in enumerate(
        [(1, "not reached (ConnectError)"), (2, "answered 503"), (3, "answered 200, failure reasons A700"), (3, "409")],
        1,
    ):
        state = service.state(images)
        assert (state["state"], state["failures"]) == ("open", failed)
        assert state["why"].endswith(why)
        assert service.health()["series"]["failing"] == 1
        service.work(pause - 0.5)
        assert len(receiver.requests) == failed
        if failed == 2:
            service = bench(retry_seconds=3.0)  # it goes on where it was
        service.work(0.5)
    assert service.state(images) == {"state": "done", "failures": 4, "why": ""}
    assert len({request.content for request in receiver.requests}) == 1


def test_after_the_last_hour_it_gives_up_and_begins_anew_when_the_series_comes_again(
    bench: Maker, receiver: Receiver
) -> None:
    receiver.troubles = [503, 503]
    service = bench(give_up_hours=1.0)
    images = Phantom().ct()
    service.stow(images)
    service.work()
    service.work(3600)
    assert service.state(images)["state"] == "undelivered"
    service.work(5)
    assert not receiver.files
    service.stow(images)
    service.work()
    assert set(receiver.read()) == {"SEG", "SR"}


# -- misbehaving, for tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "sent"), [("fault_crash", 0), ("fault_crash_sent", 1)])
def test_it_dies_once_at_the_chosen_series_and_gives_the_result_after_a_restart(
    bench: Maker, receiver: Receiver, fault: str, sent: int
) -> None:
    chosen = {fault: frozenset({2})}
    service = bench(**chosen)
    first, second = Phantom().ct(), Phantom().mr()
    service.stow(first)
    service.work()
    assert len(receiver.requests) == 1
    service.stow(second)
    with pytest.raises(Died):
        service.work()
    assert len(receiver.requests) == 1 + sent
    service = bench(**chosen)
    service.work()
    assert service.state(second)["state"] == "done"
    assert len(receiver.files) == 4
    assert len(receiver.requests) == 2 + sent


def test_it_is_late_once_at_the_chosen_series(bench: Maker, receiver: Receiver) -> None:
    service = bench(fault_late=frozenset({1}), fault_late_seconds=60.0)
    service.stow(Phantom().ct())
    service.work()
    service.work(59)
    assert not receiver.requests
    service.work(1)
    assert len(receiver.files) == 2


def test_it_refuses_the_chosen_series_for_good(bench: Maker, receiver: Receiver) -> None:
    service = bench(fault_refuse=frozenset({2}))
    first, second = Phantom().ct(), Phantom().ct()
    for _ in range(2):
        assert service.stow(first).status_code == 200
        answer = service.stow(second)
        assert answer.status_code == 409
        assert failures(answer) == {one.SOPInstanceUID: 0x0124 for one in second}
        service = bench(fault_refuse=frozenset({2}))
    service.work(50)
    assert {one.StudyInstanceUID for one in receiver.read().values()} == {first[0].StudyInstanceUID}


def test_the_synchronous_way_misbehaves_too(bench: Maker) -> None:
    options = {"fault_crash": {1}, "fault_late": {2}, "fault_refuse": {3}}
    chosen = {name: frozenset(numbers) for name, numbers in options.items()}
    service = bench(**chosen)
    files = [[file_of(one) for one in Phantom().ct()] for _ in range(3)]
    with pytest.raises(Died):
        service.post("/results", files[0])
    service = bench(**chosen)
    assert service.post("/results", files[0]).status_code == 200
    assert service.post("/results", files[1]).status_code == 200
    assert service.slept == [0.0, 30.0]
    assert [service.post("/results", files[2]).status_code for _ in "ab"] == [409, 409]


def test_by_default_it_does_not_misbehave(bench: Maker) -> None:
    service = bench()
    assert not Settings().faults
    service.stow(Phantom().ct())
    service.work()
    assert not (service.settings.folder / "faults.json").exists()


# -- no patient data in logs -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # pydicom's, which the program switches off: they repeat values
def test_no_patient_data_is_logged_or_answered(
    bench: Maker, receiver: Receiver, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("highdicom", "httpcore", "httpx", "pydicom"):
        caplog.set_level(logging.NOTSET, name)  # and so it is put back as it was
    quieten()
    canary = {"PatientName": "CANARY^A", "PatientID": "CANARY-B", "SeriesDescription": "CANARY C"}
    service = bench()
    good, gap, broken = (Phantom(tags=canary).ct() for _ in range(3))
    del gap[3]
    for one in broken:
        one.add_new("RescaleSlope", "LO", "CANARY D")
        one.add_new("StudyDate", "LO", "CANARY E")
    receiver.troubles = [400, httpx.ConnectError("CANARY F")]
    said = ""
    for images in (good, gap, broken):
        said += service.stow(images).text
        said += service.post("/results", [file_of(one) for one in images]).text if images != good else ""
    for _ in range(5):
        service.work()
    states = [service.state(images) for images in (good, gap, broken)]
    assert [state["state"] for state in states] == ["done", "unfit", "unfit"]
    assert {one.name for one in caplog.records} <= {"ai_service", "asyncio"}
    assert caplog.messages.count(f"series {good[0].SeriesInstanceUID}: results sent") == 1
    assert "CANARY" not in said + json.dumps(states) + caplog.text + "".join(capfd.readouterr())
    assert not re.search(r"CANARY", json.dumps(service.health()))


# -- whether results are valid ---------------------------------------------------------------------------------


def sample(name: str) -> Dataset:
    path = get_testdata_file(name, download=False)
    assert path is not None
    image = dcmread(str(path))
    assert isinstance(image, Dataset)
    return image


def stripped() -> list[Dataset]:
    """As pseudonymised images can be: without all that may be empty."""
    images = Phantom().ct()
    for one in images:
        for keyword in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            delattr(one, keyword)
        del one.ReferringPhysicianName, one.PatientName
    return images


def missing(dataset: Dataset) -> list[str]:
    """What the mandatory modules of its IOD ask for and it has not, by the tables of PS3.3 that highdicom brings.

    Not in the content of a report, where it depends on the type of each item (dsrdump and highdicom know), nor which
    functional groups there are, since each is in one of two places.
    """
    tables = Path(hd.__file__).parent / "_standard"
    iods, modules, attributes = (
        json.loads((tables / f"{name}.json").read_text("utf-8"))
        for name in ("sop_class_iod_map", "iod_module_map", "module_attribute_map")
    )
    found = []
    for module in modules[iods[dataset.SOPClassUID]]:
        if module["usage"] != "M" or module["key"] == "sr-document-content":
            continue
        for attribute in attributes[module["key"]]:
            if attribute["path"] in (["SharedFunctionalGroupsSequence"], ["PerFrameFunctionalGroupsSequence"]):
                continue
            items = [dataset]
            for keyword in attribute["path"]:
                items = [one for item in items for one in item.get(keyword, [])]
            name = ".".join([module["key"], *attribute["path"], attribute["keyword"]])
            for item in items:
                if attribute["type"] in ("1", "2") and attribute["keyword"] not in item:
                    found.append(f"{name} is missing")
                elif attribute["type"] == "1" and item[attribute["keyword"]].is_empty:
                    found.append(f"{name} is empty")
    return found


SERIES: dict[str, Callable[[], list[Dataset]]] = {
    "CT": lambda: Phantom().ct(),
    "MR": lambda: Phantom().mr(),
    "nothing found": lambda: Phantom().ct(value=0),
    "stripped": stripped,
    "pydicom's CT": lambda: [sample("CT_small.dcm")],
    "pydicom's MR": lambda: [sample("MR_small.dcm")],
}


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:highdicom")
def test_results_are_valid_dicom(bench: Maker, series: str, tmp_path: Path) -> None:
    answer = bench().post("/results", [file_of(one) for one in SERIES[series]()])
    assert answer.status_code == 200, answer.text
    for n, content in enumerate(unpack(answer.headers["content-type"], answer.content)):
        dataset = dcmread(io.BytesIO(content))
        assert missing(dataset) == []
        assert str(dataset)  # every value is converted
        path = tmp_path / f"{n}.dcm"
        path.write_bytes(content)
        if dataset.Modality == "SEG":
            assert hd.seg.Segmentation.from_dataset(dataset).number_of_segments == 1
            continue
        assert values(dataset)
        identification = dataset.ContentTemplateSequence[0]
        assert (identification.MappingResource, identification.TemplateIdentifier) == ("DCMR", "1500")
        if dsrdump := shutil.which("dsrdump"):
            # It fails where a report breaks the rules of its SOP class.
            done = subprocess.run([dsrdump, str(path)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert not re.search(r"(?m)^[EF]:", done.stderr), done.stderr
            assert "Volume" in done.stdout


def test_the_check_of_validity_finds_what_is_missing() -> None:
    (report,) = Phantom().sr(Phantom().ct())
    assert missing(report) == []
    del report.CompletionFlag
    report.ContentDate = None
    assert missing(report) == [
        "sr-document-general.ContentDate is empty",
        "sr-document-general.CompletionFlag is missing",
    ]


@pytest.mark.parametrize("encoding", ["implicit", "bigendian", "RLE", "jp2klossless", "jpeg_ls_lossless"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:highdicom")
def test_the_same_pixels_are_measured_alike_however_they_are_encoded(bench: Maker, encoding: str) -> None:
    service = bench()
    found = []
    for name in ("MR_small.dcm", f"MR_small_{encoding}.dcm"):
        path = get_testdata_file(name, download=False)
        assert path is not None
        answer = service.post("/results", [Path(str(path)).read_bytes()])
        assert answer.status_code == 200, answer.text
        found.append(values(dcmread(io.BytesIO(unpack(answer.headers["content-type"], answer.content)[-1]))))
    assert found[0] == found[1]
    pixels = sample("MR_small.dcm").pixel_array
    assert pixels.min() < found[0][1] < pixels.max()
    assert np.count_nonzero(pixels) > 0


# -- settings --------------------------------------------------------------------------------------------------


def test_settings_are_read_from_the_environment(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("Basic abc\n")
    settings = read(
        {
            "AI_SERVICE_RESULTS_URL": "https://pacs.example/dicom-web/",
            "AI_SERVICE_RESULTS_AUTHORIZATION_FILE": str(secret),
            "AI_SERVICE_QUIET_SECONDS": "0",
            "AI_SERVICE_FAULT_CRASH": "3, 7",
            "AI_SERVICE_PORT": "",
            "HOME": "/",
        }
    )
    assert (settings.results_url, settings.results_authorization) == ("https://pacs.example/dicom-web", "Basic abc")
    assert (settings.quiet_seconds, settings.port, settings.faults) == (0.0, 8008, frozenset({3, 7}))
    assert "abc" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RESULT_URL", "x", "did you mean AI_SERVICE_RESULTS_URL?"),
        ("PORT", "http", "has to be a whole number, not 'http'"),
        ("PORT", "0", "has to be 1 or more"),
        ("PORT", "65536", "has to be 65535 or less"),
        ("QUIET_SECONDS", "nan", "has to be 0 or more"),
        ("MAX_BODY_MB", "1.5", "has to be a whole number"),
        ("FAULT_LATE", "1;2", "numbers of series, as 3,7"),
        ("FAULT_REFUSE", "0", "counted from 1"),
        ("RESULTS_URL", "pacs:8042", "root of a DICOMweb server"),
        ("RESULTS_URL", "http://user:secret@pacs", "must not have a password in it"),
        ("RESULTS_URL", "http://[::1", "root of a DICOMweb server"),
        ("RESULTS_AUTHORIZATION_FILE", "/nonexistent", "can't be read (FileNotFoundError)"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)) as caught:
        read({PREFIX + name: value})
    assert PREFIX + name in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_readme_and_the_help_name_every_variable() -> None:
    variables = set(re.findall(r"AI_SERVICE_\w+", explain()))
    assert len(variables) == len(Settings.__dataclass_fields__)
    assert set(re.findall(r"AI_SERVICE_[A-Z_]+\w", (EXAMPLE / "README.md").read_text("utf-8"))) == variables


def test_the_program_says_what_is_wrong_and_ends_with_2() -> None:
    command = [sys.executable, "-m", "ai_service"]
    environment = {"AI_SERVICE_PORT": "x", "PYTHONPATH": str(EXAMPLE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ai_service: AI_SERVICE_PORT has to be a whole number, not 'x'\n"
