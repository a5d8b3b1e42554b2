"""The parts of examples/ai-service: what is measured, what is made of it, how bodies are cut, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

import highdicom as hd
import numpy as np
from ai_service.measure import UnfitError, measure, otsu
from ai_service.multipart import MultipartError, TooLargeError, boundary_of, join, kind_of, parts
from ai_service.results import make
from ai_service.store import InUseError, Store, is_uid
from pydicom import dcmread
from pydicom.dataset import Dataset

from orthanc_events_bridge.testing.phantoms import Phantom


def image(z: float, stored: list[list[int]], **tags: Any) -> Dataset:
    """A CT of a few pixels of 2 by 3 mm, which stores HU + 1000 in steps of 2."""
    (made,) = Phantom("P1", "1.2.4").ct(slices=1, rows=2)
    made.ImagePositionPatient, made.PixelSpacing, made.SliceThickness = [0, 0, z], [2, 3], 99
    made.RescaleSlope, made.RescaleIntercept = 2, -1000
    made.FrameOfReferenceUID = "1.2.3"
    made.PixelData = np.array(stored, "<u2").tobytes()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


# -- measuring ------------------------------------------------------------------------------------------------


def test_volume_and_mean_are_those_of_a_calculation_by_hand() -> None:
    # 600 is 200 HU, the threshold itself; 650 is 300 HU; 599 is 198 HU. Slices lie 4 mm apart.
    low, high = image(10, [[600, 599], [0, 0]]), image(14, [[650, 650], [0, 599]])
    found = measure([high, low])  # in whatever order
    assert [one.SOPInstanceUID for one in found.images] == [low.SOPInstanceUID, high.SOPInstanceUID]
    assert found.mask.tolist() == [[[True, False], [False, False]], [[True, True], [False, False]]]
    assert found.volume == pytest.approx(3 * 2 * 3 * 4 / 1000)
    assert found.mean == pytest.approx((200 + 300 + 300) / 3)


def test_a_single_slice_has_its_thickness() -> None:
    assert measure([image(0, [[600, 0], [0, 0]], SliceThickness=5)]).volume == pytest.approx(2 * 3 * 5 / 1000)


def test_otsu_parts_two_heaps_and_finds_nothing_in_one() -> None:
    assert 10 < otsu(np.array([9.0, 10.0, 9.5, 99.0, 100.0])) <= 99
    assert otsu(np.array([5.0, 5.0])) > 5


@pytest.mark.parametrize(
    ("images", "why"),
    [
        ([image(0, [[0, 0], [0, 0]], Modality="US")], "only single-frame CT and MR"),
        ([image(0, [[0, 0], [0, 0]], PixelSpacing=None)], "no PixelSpacing"),
        ([image(0, [[0, 0], [0, 0]], PixelData=b"\0")], "pixels can't be read"),
        ([image(z, [[0, 0], [0, 0]]) for z in (0, 1, 3)], "not evenly spaced"),
        ([image(z, [[0, 0], [0, 0]]) for z in (0, 0)], "not evenly spaced"),
        ([image(z, [[0, 0], [0, 0]], PixelSpacing=[1 + z, 1]) for z in (0, 1)], "one geometry"),
        ([image(z, [[0, 0], [0, 0]], PatientID=f"P{z}") for z in (0, 1)], "one study and patient"),
        ([], "no images"),
    ],
)
def test_what_can_not_be_measured_is_refused_with_the_reason(images: list[Dataset], why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        measure(images)


# -- results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_seg_and_sr_are_read_by_highdicom_and_say_what_was_measured(modality: str) -> None:
    found = measure(getattr(Phantom(), modality)())
    segmentation, report = (dcmread(io.BytesIO(one)) for one in make(found))
    read = hd.seg.Segmentation.from_dataset(segmentation)
    pixels = read.get_pixels_by_source_instance([one.SOPInstanceUID for one in found.images])
    assert np.array_equal(pixels[..., 0].astype(bool), found.mask)
    content = hd.sr.ComprehensiveSR.from_dataset(report).content
    assert isinstance(content, hd.sr.MeasurementReport)
    (group,) = content.get_volumetric_roi_measurement_groups()
    assert group.referenced_segment is not None
    assert group.referenced_segment.referenced_sop_instance_uid == segmentation.SOPInstanceUID
    assert [float(one.value) for one in group.get_measurements()] == [
        pytest.approx(found.volume, abs=1e-4),
        pytest.approx(found.mean, abs=1e-4),
    ]
    assert {one.PatientID for one in (segmentation, report)} == {found.images[0].PatientID}
    assert {one.StudyInstanceUID for one in (segmentation, report)} == {found.images[0].StudyInstanceUID}


def test_the_same_images_give_the_same_uids_and_others_others() -> None:
    images = Phantom().ct()

    def uids(of: list[Dataset]) -> list[tuple[str, str]]:
        read = [dcmread(io.BytesIO(one)) for one in make(measure(of))]
        return [(one.SOPInstanceUID, one.SeriesInstanceUID) for one in read]

    assert uids(images) == uids(images[::-1])
    assert not set(uids(images)) & set(uids(images[:-1]))


def test_where_nothing_is_found_the_report_says_so_and_there_is_no_seg() -> None:
    (report,) = make(measure(Phantom().ct(value=0)))
    content = hd.sr.ComprehensiveSR.from_dataset(dcmread(io.BytesIO(report))).content
    assert isinstance(content, hd.sr.MeasurementReport)
    (group,) = content.get_image_measurement_groups()
    assert [float(one.value) for one in group.get_measurements()] == [0.0]


# -- bodies ---------------------------------------------------------------------------------------------------


def cut(body: bytes, size: int, boundary: bytes, largest: int = 1000) -> list[bytes]:
    """The parts of a body that comes in chunks of so many bytes."""

    async def chunks() -> AsyncIterator[bytes]:
        for n in range(0, len(body), size):
            yield body[n : n + size]

    async def read() -> list[bytes]:
        return [part async for part in parts(chunks(), boundary, largest)]

    return asyncio.run(read())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_parts_are_the_same_however_the_body_is_cut(size: int) -> None:
    files = [b"one", b"\r\n--", b"", b"--x\r\n\r\nfour\r\n"]
    body = join(files)
    assert cut(body, size, boundary_of(kind_of(body))) == files


def test_what_is_no_such_body_is_refused() -> None:
    body = join([b"x" * 900])
    boundary = boundary_of(kind_of(body))
    with pytest.raises(TooLargeError):
        cut(body, 64, boundary, 500)
    with pytest.raises(MultipartError, match="last boundary"):
        cut(body[:-6], 64, boundary)
    with pytest.raises(MultipartError, match="not application/dicom"):
        cut(body.replace(b"application/dicom", b"text/html"), 64, boundary)
    with pytest.raises(MultipartError, match="no parts"):
        cut(b"--x--", 64, b"x")
    for wrong in ("application/dicom", "multipart/related; type=text/html; boundary=x", "multipart/related"):
        with pytest.raises(MultipartError):
            boundary_of(wrong)


# -- what is kept ---------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "store", clock)) as made:
        yield made


def add(store: Store, series: str, sop: str, content: bytes) -> None:
    with store.staging() as folder:
        path = Path(folder) / "1"
        path.write_bytes(content)
        store.add(series, [(sop, path)])


def test_a_series_is_ready_when_it_is_quiet_also_after_a_restart(store: Store, tmp_path: Path, clock: Clock) -> None:
    add(store, "1.1", "1.1.1", b"a")
    clock.now += 3
    add(store, "1.2", "1.2.1", b"b")
    assert store.ready(5) == []
    clock.now += 2
    assert store.ready(5) == ["1.1"]
    clock.now += 3
    with pytest.raises(InUseError):
        Store(tmp_path / "store", clock)
    store.close()
    with contextlib.closing(Store(tmp_path / "store", clock)) as again:
        assert again.ready(5) == ["1.1", "1.2"]
        assert [path.read_bytes() for path in again.images("1.1")] == [b"a"]


def test_what_was_not_acknowledged_is_gone_after_a_restart(store: Store, tmp_path: Path) -> None:
    with store.staging() as staged:
        (Path(staged) / "1").write_bytes(b"a")
        half = tmp_path / "store" / "series" / "1.1"
        half.mkdir()
        (half / "1.1.1.dcm").write_bytes(b"a")
        store.close()
        with contextlib.closing(Store(tmp_path / "store")) as again:
            assert not again.states
            assert not half.exists()
            assert not Path(staged).exists()


def test_the_same_image_opens_a_series_again_and_another_drops_its_results(store: Store) -> None:
    def done() -> None:
        store.keep_results("1.1", b"results")
        store.states["1.1"].state = "done"
        store.note("1.1")

    add(store, "1.1", "1.1.1", b"a")
    done()
    assert store.ready(0) == []
    add(store, "1.1", "1.1.1", b"a")
    assert store.ready(0) == ["1.1"]
    assert store.results("1.1") == b"results"
    for sop, content in (("1.1.1", b"other"), ("1.1.2", b"b")):
        done()
        add(store, "1.1", sop, content)
        assert store.ready(0) == ["1.1"]
        assert store.results("1.1") is None


def test_what_is_unfit_stays_so_until_other_images_come(store: Store) -> None:
    add(store, "1.1", "1.1.1", b"a")
    store.states["1.1"].state = "unfit"
    add(store, "1.1", "1.1.1", b"a")
    assert store.ready(0) == []
    add(store, "1.1", "1.1.2", b"b")
    assert store.ready(0) == ["1.1"]


def test_what_has_ended_is_forgotten_and_what_is_open_is_not(store: Store, tmp_path: Path, clock: Clock) -> None:
    for series in ("1.1", "1.2"):
        add(store, series, f"{series}.1", b"a")
    store.states["1.1"].state = "done"
    store.forget(10)
    assert set(store.states) == {"1.1", "1.2"}
    clock.now += 10
    store.forget(10)
    assert set(store.states) == {"1.2"}
    assert [path.name for path in (tmp_path / "store" / "series").iterdir()] == ["1.2"]
    assert store.counts() == {"open": 1, "done": 0, "unfit": 0, "undelivered": 0}


def test_only_uids_become_names_of_files() -> None:
    assert is_uid("1.2.840.10008")
    assert not any(is_uid(text) for text in ("", "..", "1..2", "1.2/3", "1." * 40 + "1", "a"))
