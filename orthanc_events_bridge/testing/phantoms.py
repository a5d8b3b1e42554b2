"""DICOM that means something, for tests: series with geometry, pixels whose truth is known, and results made of them.

>>> phantom = Phantom()
>>> ct = phantom.ct()                        # a sphere of 300 HU in water, in air
>>> phantom.seg(ct), phantom.sr(ct)
>>> phantom.study                            # as `orthanc_events_bridge.testing.dicom.make_study` gives it
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import highdicom as hd
import numpy as np
from highdicom import seg, sr
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

from orthanc_events_bridge.testing.dicom import Instance, Study, new_uid


def _volume(shape: tuple[int, int, int], spacing: tuple[float, float, float], radius: float) -> NDArray[np.bool_]:
    """The voxels of a sphere in the middle: slices, rows, columns; millimetres."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    return np.asarray(z**2 + y**2 + x**2 <= radius**2)


@dataclass
class Phantom:
    """A study of one patient that grows by series. All images lie in one frame of reference.

    Each method adds a series, and returns its data sets in order.

    :ivar tags: elements by keyword that each image gets.
    """

    patient_id: str = field(default_factory=lambda: f"P{uuid.uuid4().hex[:12]}")
    study_uid: str = field(default_factory=new_uid)
    patient_name: str = "Phantom^Sphere"
    tags: dict[str, Any] = field(default_factory=dict)
    frame_of_reference: str = field(default_factory=new_uid)
    datasets: list[Dataset] = field(default_factory=list)
    _series: int = 0

    #: Millimetres between slices, rows and columns; the radius of the sphere.
    spacing = (2.5, 1.5, 1.25)
    radius = 12.0

    @property
    def study(self) -> Study:
        """All of it as files."""
        instances = [
            Instance(self.patient_id, self.study_uid, one.SeriesInstanceUID, one.SOPInstanceUID, file_of(one))
            for one in self.datasets
        ]
        return Study(self.patient_id, self.study_uid, tuple(instances))

    def ct(self, *, slices: int = 12, rows: int = 32, value: int = 300) -> list[Dataset]:
        """A CT: a sphere of so many Hounsfield units in a cylinder of water (0), in air (-1000)."""
        return self._slices("CT", slices, rows, value)

    def mr(self, *, slices: int = 12, rows: int = 32, value: int = 900) -> list[Dataset]:
        """An MR: a bright sphere in a darker cylinder (200), in nothing."""
        return self._slices("MR", slices, rows, value)

    def multiframe(self, *, frames: int = 8, rows: int = 32) -> list[Dataset]:
        """The same sphere as one instance of many frames, each with its position (Enhanced CT)."""
        image = self._image("CT", EnhancedCTImageStorage, 1)
        stored = self._stored("CT", frames, rows, 300)
        _pixels(image, stored)
        image.NumberOfFrames = frames
        image.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        shared, plane, order = Dataset(), Dataset(), Dataset()
        plane.PixelSpacing, plane.SliceThickness = list(self.spacing[1:]), self.spacing[0]
        order.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        rescale = Dataset()
        rescale.RescaleIntercept, rescale.RescaleSlope, rescale.RescaleType = -1024, 1, "HU"
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [plane], [order]
        shared.PixelValueTransformationSequence = [rescale]
        image.SharedFunctionalGroupsSequence = [shared]
        groups = []
        for n in range(frames):
            group, place, content = Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient = self._position(n, frames, rows)
            content.InStackPositionNumber, content.StackID = n + 1, "1"
            group.PlanePositionSequence, group.FrameContentSequence = [place], [content]
            groups.append(group)
        image.PerFrameFunctionalGroupsSequence = groups
        return self._add([image])

    def secondary_capture(self, *, rows: int = 32) -> list[Dataset]:
        """A picture in colours that lies nowhere."""
        image = self._image("OT", SecondaryCaptureImageStorage, 1)
        del image.FrameOfReferenceUID, image.PositionReferenceIndicator
        image.ConversionType = "WSD"
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
        image.Rows = image.Columns = rows
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
        ramp = np.linspace(0, 255, rows, dtype=np.uint8)
        image.PixelData = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1).tobytes()
        return self._add([image])

    def seg(self, images: Sequence[Dataset]) -> list[Dataset]:
        """A segmentation of the sphere in a series of `ct` or `mr`."""
        first = images[0]
        mask = _volume((len(images), first.Rows, first.Columns), self.spacing, self.radius)
        algorithm = hd.AlgorithmIdentificationSequence(
            name="Phantom", version="1", family=codes.DCM.ArtificialIntelligence
        )
        segment = seg.SegmentDescription(
            segment_number=1,
            segment_label="Sphere",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Mass,
            algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        made = seg.Segmentation(
            source_images=list(images),
            pixel_array=mask.astype(np.uint8),
            segmentation_type=seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=new_uid(),
            series_number=self._next(),
            sop_instance_uid=new_uid(),
            instance_number=1,
            manufacturer="Phantom",
            manufacturer_model_name="Phantom",
            software_versions="1",
            device_serial_number="1",
        )
        return self._add([made])

    def sr(self, images: Sequence[Dataset]) -> list[Dataset]:
        """A measurement report (TID 1500) of the sphere's volume in millilitres, with the images as evidence."""
        volume = 4 / 3 * np.pi * self.radius**3 / 1000
        group = sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(uid=new_uid(), identifier="Sphere"),
            measurements=[
                sr.Measurement(name=codes.SCT.Volume, value=round(volume, 4), unit=codes.UCUM.CubicCentimeter)
            ],
            source_images=[sr.SourceImageForMeasurementGroup.from_source_image(image) for image in images],
        )
        observer = sr.ObserverContext(
            observer_type=codes.DCM.Device,
            observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(uid=new_uid(), name="Phantom"),
        )
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=codes.cid100.CTUnspecifiedBodyRegion,
            imaging_measurements=[group],
            title=codes.DCM.ImagingMeasurementReport,
        )
        made = sr.ComprehensiveSR(
            evidence=list(images),
            content=content[0],
            series_instance_uid=new_uid(),
            series_number=self._next(),
            sop_instance_uid=new_uid(),
            instance_number=1,
            manufacturer="Phantom",
            is_complete=True,
        )
        return self._add([made])

    def sample(self, name: str) -> list[Dataset]:
        """A sample file that pydicom brings (``CT_small.dcm``, ``MR_small.dcm``, …), as one of this study's.

        :raises FileNotFoundError: it brings none of that name.
        """
        path = get_testdata_file(name, download=False)
        if path is None:
            raise FileNotFoundError(name)
        image = dcmread(str(path))
        image.PatientID, image.PatientName, image.StudyInstanceUID = self.patient_id, self.patient_name, self.study_uid
        image.SeriesInstanceUID, image.SOPInstanceUID = new_uid(), new_uid()
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        return self._add([image])

    # Inner works.

    def _next(self) -> int:
        self._series += 1
        return self._series

    def _add(self, datasets: list[Dataset]) -> list[Dataset]:
        self.datasets += datasets
        return datasets

    def _position(self, number: int, slices: int, rows: int) -> list[float]:
        """Of the first pixel's centre; the sphere's is in the origin."""
        slice_step, row_step, column_step = self.spacing
        middle = (rows - 1) / 2
        return [-middle * column_step, -middle * row_step, (number - (slices - 1) / 2) * slice_step]

    def _stored(self, modality: str, slices: int, rows: int, value: int) -> NDArray[np.uint16]:
        """As a scanner stores them: CT with 1024 added."""
        background, water, more = (-1000, 0, 1024) if modality == "CT" else (0, 200, 0)
        middle = np.arange(rows) - (rows - 1) / 2
        real = np.full((slices, rows, rows), background, np.int32)
        real[:, middle[:, None] ** 2 + middle[None, :] ** 2 <= (0.45 * rows) ** 2] = water
        real[_volume(real.shape, self.spacing, self.radius)] = value
        return (real + more).astype(np.uint16)

    def _slices(self, modality: str, slices: int, rows: int, value: int) -> list[Dataset]:
        stored = self._stored(modality, slices, rows, value)
        number, series_uid, images = self._next(), new_uid(), []
        for n in range(slices):
            image = self._image(modality, CTImageStorage if modality == "CT" else MRImageStorage, n + 1, number)
            image.SeriesInstanceUID = series_uid
            _pixels(image, stored[n])
            image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            image.ImagePositionPatient = self._position(n, slices, rows)
            image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            image.PixelSpacing, image.SliceThickness = list(self.spacing[1:]), self.spacing[0]
            if modality == "CT":
                image.RescaleIntercept, image.RescaleSlope, image.RescaleType, image.KVP = -1024, 1, "HU", 120
            else:
                image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "SE", "NONE", ""
                image.MRAcquisitionType, image.EchoTime, image.RepetitionTime, image.EchoTrainLength = "2D", 15, 500, 1
            images.append(image)
        return self._add(images)

    def _image(self, modality: str, sop_class: str, number: int, series: int | None = None) -> Dataset:
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SpecificCharacterSet = "ISO_IR 192"
        image.SOPClassUID, image.SOPInstanceUID = UID(sop_class), UID(new_uid())
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.StudyDate = image.SeriesDate = image.ContentDate = "20240102"
        image.StudyTime = image.SeriesTime = image.ContentTime = "030405"
        image.AccessionNumber, image.StudyID, image.ReferringPhysicianName = "A1", "1", ""
        image.Modality, image.Manufacturer = modality, "Phantom"
        image.StudyDescription, image.SeriesDescription = "Phantom", f"Sphere {modality}"
        image.PatientName, image.PatientID = self.patient_name, self.patient_id
        image.PatientBirthDate, image.PatientSex, image.PatientPosition = "19700101", "O", "HFS"
        image.StudyInstanceUID, image.SeriesInstanceUID = self.study_uid, new_uid()
        image.SeriesNumber = self._next() if series is None else series
        image.InstanceNumber, image.AcquisitionNumber = number, 1
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = self.frame_of_reference, ""
        for keyword, value in self.tags.items():
            setattr(image, keyword, value)
        return image


def mixed_study(**options: Any) -> Study:
    """A study of a CT, an MR, a multi-frame CT, a secondary capture, and a SEG and an SR of the CT.

    The options are those of `Phantom`.
    """
    phantom = Phantom(**options)
    ct = phantom.ct()
    phantom.mr()
    phantom.multiframe()
    phantom.secondary_capture()
    phantom.seg(ct)
    phantom.sr(ct)
    return phantom.study


def file_of(dataset: Dataset) -> bytes:
    """The data set as a DICOM file."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _pixels(image: Dataset, stored: NDArray[np.uint16]) -> None:
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = stored.shape[-2:]
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.add_new("PixelData", "OW", stored.astype("<u2").tobytes())
