"""What the anonymizer's tests share: data sets full of what must not get out, and how it is looked for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from collections.abc import Sequence as Sequence_
from pathlib import Path
from typing import Any, Final

import pydicom
from pydicom._dicom_dict import DicomDictionary
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.servers import OrthancServer
from tests.integration.routers import Routers

#: Original identifiers: nothing of a pseudonymised file may hold one of them.
NAME: Final = "Zwetschgenmann^Kunigunde"
PATIENT_ID: Final = "47110815"
ACCESSION: Final = "AN99887766"
#: UIDs of the original all begin so.
ROOT: Final = "1.2.826.0.1.3680043.8.498.987654"

_TEXTS: Final[dict[str, Any]] = {
    "AE": "KUNIGUNDE",
    "AS": "47110815",
    "CS": "ZWETSCHGENMANN",
    "DS": "47110815",
    "IS": "47110815",
    "LO": f"of {NAME}, {PATIENT_ID}",
    "LT": f"Dear Mrs. Zwetschgenmann,\r\nyour number is {ACCESSION}, and your image {ROOT}.3.1",
    "PN": NAME,
    "SH": ACCESSION,
    "ST": f"{PATIENT_ID} of kunigunde",
    "UC": f"{NAME}",
    "UR": f"https://pacs.example.org/{PATIENT_ID}",
    "UT": f"seen by kunigunde ZWETSCHGENMANN at {ROOT}.1",
    "UI": f"{ROOT}.9.9",
    "DA": "19660401",
    "DT": "19660401112233.123456",
    "TM": "112233.123456",
    **dict.fromkeys(("OB", "OW", "OD", "OF", "OL", "OV", "UN"), f"{NAME} {PATIENT_ID}, {ROOT}.1".encode() + b" " * 16),
}
#: One element of each kind; where there is one, that the standard's table of what is to be removed doesn't name.
_ONE_OF_EACH: Final = (
    *("AcquisitionProtocolDescription", "PatientName", "CodeMeaning", "ImageType", "SliceThickness", "InstanceNumber"),
    *("RetrieveURI", "TextValue", "LongCodeValue", "AccessionNumber", "ReferencedSOPInstanceUID", "CalibrationDate"),
    *("EncapsulatedDocument", "SpectroscopyData", "DestinationAE", "ICCProfile"),
)


@disable_value_validation()
def full_of_canaries(data: bytes) -> bytes:
    """The file, with every element of DICOM's dictionary in it that can hold an identifier, at the top and in a
    sequence of a sequence, private ones, curves, overlays, preamble and file meta information too."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    inner, item = Dataset(), Dataset()
    _fill(inner, {})
    _private(inner)
    for keyword in _ONE_OF_EACH:
        setattr(item, keyword, _TEXTS[dictionary_VR(keyword)])
    _private(item)
    kept = (
        "SpecificCharacterSet",
        "Modality",
        "SOPClassUID",
        "PixelData",
        "PatientIdentityRemoved",
        "BurnedInAnnotation",
    )
    own = {
        keyword: dataset.get(keyword) for keyword in (*kept, "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    }
    sequences = [one[4] for one in DicomDictionary.values() if one[0] == "SQ" and not one[3]]
    _fill(dataset, {**dict.fromkeys(sequences, item), "RequestAttributesSequence": inner})
    for keyword, value in own.items():
        if value is None:
            if keyword in dataset:
                delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.PatientID = PATIENT_ID
    dataset.PatientName = NAME
    _private(dataset, inner)
    dataset.add_new(0x50000020, "CS", "KUNIGUNDE")
    dataset.add_new(0x50003000, "OW", _TEXTS["OW"])
    dataset.add_new(0x60004000, "LT", _TEXTS["LT"])
    dataset.add_new(0x60003000, "OW", _TEXTS["OW"])
    dataset.add_new(0x60000022, "LO", _TEXTS["LO"])
    dataset.preamble = PATIENT_ID.encode().ljust(128, b" ")
    dataset.file_meta.SourceApplicationEntityTitle = "KUNIGUNDE"
    dataset.file_meta.PrivateInformationCreatorUID = UID(f"{ROOT}.5")
    dataset.file_meta.PrivateInformation = _TEXTS["OB"]
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def _fill(dataset: Dataset, sequences: dict[str, Dataset]) -> None:
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if tag >> 16 < 8 or not keyword or keyword in ("SpecificCharacterSet", "PixelData", "DataSetTrailingPadding"):
            continue
        if keyword in ("FloatPixelData", "DoubleFloatPixelData"):
            continue
        if vr in _TEXTS:
            dataset.add_new(tag, vr, _TEXTS[vr])
        elif vr == "SQ" and keyword in sequences:
            dataset.add_new(tag, "SQ", Sequence([sequences[keyword]]))


def _private(dataset: Dataset, item: Dataset | None = None) -> None:
    block = dataset.private_block(0x0011, "ACME KUNIGUNDE", create=True)
    block.add_new(1, "LO", _TEXTS["LO"])
    block.add_new(2, "UN", _TEXTS["UN"])
    if item is not None:
        block.add_new(3, "SQ", Sequence([item]))
    dataset.add_new(0x00131010, "LO", NAME)  # whose creator is not said


@disable_value_validation()
def tells(data: bytes) -> list[str]:
    """What of the original is still in a file: in its bytes, or in an element of it."""
    found = [
        word for word in (b"zwetschgen", b"kunigunde", b"47110815", b"99887766", ROOT.encode()) if word in data.lower()
    ]
    dates = [
        str(element) for element in elements(pydicom.dcmread(io.BytesIO(data))) if "19660401" in str(element.value)
    ]
    return [word.decode() for word in found] + dates


def elements(dataset: Dataset) -> Iterator[DataElement]:
    """All of them, those in sequences too."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item)
        else:
            yield element


@disable_value_validation()
def as_dataset(data: bytes) -> Any:
    """A file, read."""
    return pydicom.dcmread(io.BytesIO(data))


def files(orthanc: OrthancServer, study: str) -> list[bytes]:
    """The files of a study, by its id in Orthanc."""
    found = orthanc.get(f"/studies/{study}/instances")
    return [orthanc.client.get(f"/instances/{one['ID']}/file").content for one in found]


def results_of(pseudonymised: Sequence_[bytes], *, apart: bool = False) -> list[bytes]:
    """What an AI makes of a study: a secondary capture, and a report that names it and all the images.

    :param apart: in a study of their own.
    """
    first = as_dataset(pseudonymised[0])
    capture = _result(first, SecondaryCaptureImageStorage, "OT")
    capture.SourceImageSequence = [_reference(as_dataset(one)) for one in pseudonymised]
    capture.Rows = capture.Columns = 2
    capture.BitsAllocated = capture.BitsStored = 8
    capture.HighBit, capture.PixelRepresentation, capture.SamplesPerPixel = 7, 0, 1
    capture.PhotometricInterpretation = "MONOCHROME2"
    capture.add_new(0x7FE00010, "OB", b"AI!!")
    report = _result(first, ComprehensiveSRStorage, "SR")
    series = Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    series.ReferencedSOPSequence = [_reference(as_dataset(one)) for one in pseudonymised]
    evidence = Dataset()
    evidence.StudyInstanceUID = first.StudyInstanceUID
    evidence.ReferencedSeriesSequence = [series]
    report.CurrentRequestedProcedureEvidenceSequence = [evidence]
    image = Dataset()
    image.RelationshipType, image.ValueType = "CONTAINS", "IMAGE"
    image.ReferencedSOPSequence = [_reference(capture)]
    frame = Dataset()
    frame.RelationshipType, frame.ValueType, frame.UID = "CONTAINS", "UIDREF", first.SOPInstanceUID
    report.ValueType = "CONTAINER"
    report.ContentSequence = [image, frame]
    made = []
    if apart:
        capture.StudyInstanceUID = report.StudyInstanceUID = generate_uid()
    for dataset in (capture, report):
        file = io.BytesIO()
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
        made.append(file.getvalue())
    return made


def _result(source: Dataset, kind: str, modality: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "PatientIdentityRemoved"):
        setattr(dataset, keyword, source.get(keyword))
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = ""
    dataset.SOPClassUID, dataset.Modality = kind, modality
    dataset.SeriesInstanceUID, dataset.SOPInstanceUID = generate_uid(), generate_uid()
    dataset.ContentDate = "20260101"
    if "FrameOfReferenceUID" in source:
        dataset.FrameOfReferenceUID = source.FrameOfReferenceUID
    return dataset


def _reference(dataset: Dataset) -> Dataset:
    made = Dataset()
    made.ReferencedSOPClassUID, made.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    return made


@contextlib.contextmanager
def memory(folder: Path, kind: str) -> Iterator[str | None]:
    """Where it is remembered what stands for what: a PostgreSQL with RabbitMQ, else a file."""
    if kind != "rabbitmq":
        yield None
        return
    with PostgresServer(folder / "postgres") as server:
        yield f"postgresql://postgres@127.0.0.1:{server.port}/postgres"


class Anonymizers(Routers):
    """Anonymizers of one configuration, as processes.

    :param more: the rest of the file: rules and projects.
    :param store: where they remember; none: a file.
    """

    COMMAND = "anonymize"

    def __init__(self, folder: Path, line: Line, more: str, store: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "secret").write_text("0123456789abcdef0123456789abcdef\n")
        super().__init__(folder, line, f"store: {store or f'sqlite:///{folder}/anonymizer.db'}\n{more}")
