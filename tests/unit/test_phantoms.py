"""The phantoms are what they say: where their pixels lie, what they measure, what refers to what."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

import highdicom as hd
import numpy as np
from pydicom import dcmread

from orthanc_events_bridge.testing.phantoms import Phantom, file_of, mixed_study


@pytest.mark.parametrize(("modality", "value"), [("CT", 300), ("MR", 900)])
def test_the_sphere_has_its_volume_and_lies_in_the_origin(modality: str, value: int) -> None:
    phantom = Phantom()
    images = phantom.ct() if modality == "CT" else phantom.mr()
    places = []
    for image in images:
        real = image.pixel_array * float(image.get("RescaleSlope", 1)) + float(image.get("RescaleIntercept", 0))
        x, y, z = image.ImagePositionPatient
        down, across = image.PixelSpacing
        places += [(x + column * across, y + row * down, z) for row, column in np.argwhere(real == value)]
    slice_step, row_step, column_step = phantom.spacing
    volume = len(places) * slice_step * row_step * column_step
    assert volume == pytest.approx(4 / 3 * math.pi * phantom.radius**3, rel=0.02)
    assert np.mean(places, axis=0) == pytest.approx([0, 0, 0], abs=1e-6)
    assert {b.ImagePositionPatient[2] - a.ImagePositionPatient[2] for a, b in pairwise(images)} == {slice_step}


def test_a_mixed_study_is_one_study_of_one_patient_and_survives_its_file() -> None:
    study = mixed_study(patient_id="P1", tags={"InstitutionName": "Somewhere"})
    images = [dcmread(io.BytesIO(one.data)) for one in study]
    assert {(image.PatientID, image.StudyInstanceUID) for image in images} == {("P1", study.study_uid)}
    assert len(study.series) == 6
    assert len({image.SeriesNumber for image in images}) == 6
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    assert {image.Modality for image in images} == {"CT", "MR", "OT", "SEG", "SR"}
    for image in images:
        if "PixelData" in image:
            assert image.pixel_array.size
    frames = [image.FrameOfReferenceUID for image in images if image.Modality in ("CT", "MR", "SEG")]
    assert len(set(frames)) == 1


def test_seg_and_sr_refer_to_the_images_that_they_were_made_of() -> None:
    phantom = Phantom()
    ct = phantom.ct()
    (segmentation,) = phantom.seg(ct)
    (report,) = phantom.sr(ct)
    uids = {image.SOPInstanceUID for image in ct}
    read = hd.seg.segread(io.BytesIO(file_of(segmentation)))
    pixels = read.get_pixels_by_source_instance([image.SOPInstanceUID for image in ct])
    expected = np.stack([image.pixel_array for image in ct]) == 300 + 1024
    assert np.array_equal(pixels[..., 0].astype(bool), expected)
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert {one.ReferencedSOPInstanceUID for one in evidence.ReferencedSOPSequence} == uids


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_the_samples_of_pydicom_join_the_study(name: str) -> None:
    phantom = Phantom()
    phantom.sample(name)
    (instance,) = phantom.study
    image = dcmread(io.BytesIO(instance.data))
    assert (image.PatientID, image.SOPInstanceUID) == (phantom.patient_id, instance.sop_uid)
