"""What was found as DICOM: a segmentation (SEG) and a measurement report (SR, TID 1500), made with highdicom."""

from __future__ import annotations

import io
import uuid
from typing import Final

import highdicom as hd
import numpy as np
from highdicom import seg, sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ai_service.measure import Measurement

#: Whoever changes what is computed changes this too: results of another version are other instances.
VERSION: Final = "1.0.0"
_NAMESPACE: Final = uuid.UUID("3f0b3f5e-5a0f-5d1c-9e0e-0d4b0f5f2f61")
_MAKER: Final = "orthanc-events-bridge"
_STUDY: Final = ("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
_NAME: Final = "Threshold segmentation"


def derived_uid(*names: str) -> str:
    """Return the UID that follows from some names (PS3.5, B.2): the same names, the same UID."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(names)).int}"


def make(found: Measurement) -> list[bytes]:
    """Return the files of the results: SEG and SR; only SR where nothing was found, since a SEG has a segment.

    The same images always give the same UIDs, so that what is sent twice is stored once.
    """
    names = [VERSION, *sorted(str(image.SOPInstanceUID) for image in found.images)]
    images = list(found.images)
    # Images that were pseudonymised may lack what may be empty (type 2), and highdicom copies it.
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", *_STUDY):
        if keyword not in images[0]:
            setattr(images[0], keyword, None)
    segmentation = _segmentation(found, images, names) if found.mask.any() else None
    report = _report(found, images, segmentation, names)
    return [_file(one) for one in (segmentation, report) if one is not None]


def _segmentation(found: Measurement, images: list[Dataset], names: list[str]) -> seg.Segmentation:
    description = seg.SegmentDescription(
        segment_number=1,
        segment_label="Above threshold",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Mass,
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_algorithm(),
        tracking_uid=derived_uid("finding", *names),
        tracking_id="1",
    )
    return seg.Segmentation(
        source_images=images,
        pixel_array=found.mask.astype(np.uint8),
        segmentation_type=seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        series_instance_uid=derived_uid("SEG series", *names),
        series_number=9001,
        sop_instance_uid=derived_uid("SEG", *names),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name=_NAME,
        software_versions=VERSION,
        device_serial_number="1",
        series_description=_NAME,
    )


def _report(
    found: Measurement, images: list[Dataset], segmentation: seg.Segmentation | None, names: list[str]
) -> sr.ComprehensiveSR:
    tracking = sr.TrackingIdentifier(uid=derived_uid("finding", *names), identifier="1")
    unit = codes.UCUM.HounsfieldUnit if images[0].Modality == "CT" else codes.UCUM.NoUnits
    measurements = [
        sr.Measurement(name=codes.SCT.Volume, value=_decimal(found.volume), unit=codes.UCUM.CubicCentimeter)
    ]
    if found.mean is not None:
        name = codes.DCM.AttenuationCoefficient if images[0].Modality == "CT" else codes.DCM.MRSignalIntensity
        measurements.append(sr.Measurement(name=name, value=_decimal(found.mean), unit=unit, derivation=codes.SCT.Mean))
    group: sr.MeasurementsAndQualitativeEvaluations | sr.VolumetricROIMeasurementsAndQualitativeEvaluations
    if segmentation is None:
        group = sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking,
            measurements=measurements,
            algorithm_id=_identification(),
            source_images=[sr.SourceImageForMeasurementGroup.from_source_image(image) for image in images],
        )
    else:
        group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking,
            measurements=measurements,
            algorithm_id=_identification(),
            finding_type=codes.SCT.Mass,
            # Not by from_segmentation: it looks for the segment's number in each frame, where a SEG of a single
            # segment need not have it (highdicom 0.28.2).
            referenced_segment=sr.ReferencedSegment(
                sop_class_uid=segmentation.SOPClassUID,
                sop_instance_uid=segmentation.SOPInstanceUID,
                segment_number=1,
                source_images=[sr.SourceImageForSegmentation.from_source_image(image) for image in images],
            ),
        )
    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=derived_uid("device"), name=_NAME, manufacturer_name=_MAKER
        ),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device),
        procedure_reported=codes.cid100.CTUnspecifiedBodyRegion
        if images[0].Modality == "CT"
        else codes.cid100.MRIUnspecifiedBodyRegion,
        imaging_measurements=[group],
        title=codes.DCM.ImagingMeasurementReport,
    )
    return sr.ComprehensiveSR(
        evidence=[*images, *([] if segmentation is None else [segmentation])],
        content=content[0],
        series_instance_uid=derived_uid("SR series", *names),
        series_number=9002,
        sop_instance_uid=derived_uid("SR", *names),
        instance_number=1,
        manufacturer=_MAKER,
        is_complete=True,
        is_final=True,
        is_verified=False,
        series_description=_NAME,
    )


def _decimal(value: float) -> float:
    """A DICOM decimal string has 16 characters (PS3.5, 6.2)."""
    return round(value, 4)


def _algorithm() -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence(name=_NAME, version=VERSION, family=codes.DCM.ArtificialIntelligence)


def _identification() -> sr.AlgorithmIdentification:
    return sr.AlgorithmIdentification(name=_NAME, version=VERSION)


def _file(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
