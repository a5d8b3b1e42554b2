"""DICOM data for tests: small, valid files, made fast, and the ids that Orthanc gives them."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

#: SOP classes by modality; others are stored as secondary captures.
SOP_CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "NM": "1.2.840.10008.5.1.4.1.1.20",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def orthanc_id(*identifiers: str) -> str:
    """Return the id that Orthanc gives a resource.

    It is the SHA-1 of the identifiers joined by ``|``, as five groups of eight hexadecimal digits (Orthanc's
    ``DicomInstanceHasher``): PatientID; then StudyInstanceUID, SeriesInstanceUID and SOPInstanceUID as far
    down as the resource is. Trailing spaces are dropped, an absent identifier is empty.
    """
    text = "|".join(identifier.rstrip(" ") for identifier in identifiers)
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return "-".join(digest[i : i + 8] for i in range(0, 40, 8))


def new_uid() -> str:
    """Return a new UID (derived from a random UUID: DICOM PS3.5, B.2)."""
    return f"2.25.{uuid.uuid4().int}"


@dataclass(frozen=True, slots=True)
class Instance:
    """One DICOM file and its identifiers."""

    patient_id: str
    study_uid: str
    series_uid: str
    sop_uid: str
    data: bytes

    @property
    def patient(self) -> str:
        """Orthanc's id of its patient."""
        return orthanc_id(self.patient_id)

    @property
    def study(self) -> str:
        """Orthanc's id of its study."""
        return orthanc_id(self.patient_id, self.study_uid)

    @property
    def series(self) -> str:
        """Orthanc's id of its series."""
        return orthanc_id(self.patient_id, self.study_uid, self.series_uid)

    @property
    def id(self) -> str:
        """Orthanc's id of the instance itself."""
        return orthanc_id(self.patient_id, self.study_uid, self.series_uid, self.sop_uid)


@dataclass(frozen=True, slots=True)
class Study:
    """The instances of one study, series by series."""

    patient_id: str
    study_uid: str
    instances: tuple[Instance, ...]

    @property
    def patient(self) -> str:
        """Orthanc's id of its patient."""
        return orthanc_id(self.patient_id)

    @property
    def id(self) -> str:
        """Orthanc's id of the study."""
        return orthanc_id(self.patient_id, self.study_uid)

    @property
    def series(self) -> tuple[str, ...]:
        """Orthanc's ids of its series."""
        return tuple(dict.fromkeys(instance.series for instance in self.instances))

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    def __len__(self) -> int:
        return len(self.instances)

    def write(self, folder: Path) -> list[Path]:
        """Write each instance into a file named by its SOPInstanceUID, and return the paths in order."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{instance.sop_uid}.dcm" for instance in self.instances]
        for path, instance in zip(paths, self.instances, strict=True):
            path.write_bytes(instance.data)
        return paths


def make_study(
    *,
    series: int = 1,
    instances: int = 1,
    patient_id: str | None = None,
    study_uid: str | None = None,
    modality: str = "CT",
    rows: int = 8,
    canary: Mapping[str, Any] | None = None,
) -> Study:
    """Make a study.

    :param series: how many series.
    :param instances: how many instances in each of them.
    :param patient_id: a new random one by default; of the canary if that names ``PatientID``.
    :param study_uid: a new one by default.
    :param rows: height and width of the image in pixels of two bytes.
    :param canary: elements by keyword that each instance gets, to be looked for where they must not be.
    """
    tags = dict(canary or {})
    patient = str(tags.pop("PatientID", patient_id or f"P{uuid.uuid4().hex[:12]}"))
    study = study_uid or new_uid()
    made = []
    for _ in range(series):
        series_uid = new_uid()
        for _ in range(instances):
            sop_uid = new_uid()
            data = instance_bytes(patient, study, series_uid, sop_uid, modality=modality, rows=rows, tags=tags)
            made.append(Instance(patient, study, series_uid, sop_uid, data))
    return Study(patient, study, tuple(made))


def make_patient(*, studies: int = 1, patient_id: str | None = None, **options: Any) -> list[Study]:
    """Make several studies of one patient; the options are those of `make_study`."""
    patient = patient_id or f"P{uuid.uuid4().hex[:12]}"
    return [make_study(patient_id=patient, **options) for _ in range(studies)]


def instance_bytes(
    patient_id: str,
    study_uid: str,
    series_uid: str,
    sop_uid: str,
    *,
    modality: str = "CT",
    rows: int = 8,
    tags: Mapping[str, Any] | None = None,
) -> bytes:
    """Return a DICOM file (Explicit VR Little Endian) of about one kilobyte, in some ten microseconds.

    pydicom writes one file for each combination of modality, rows and tags; the identifiers are put in
    afterwards.

    :param tags: more elements by keyword.
    """
    pieces = _template(modality, rows, tuple(sorted((tags or {}).items())))
    sop = _padded(sop_uid, b"\0")
    values = {
        "media": b"\x02\x00\x03\x00UI" + len(sop).to_bytes(2, "little") + sop,
        "sop": b"\x08\x00\x18\x00UI" + len(sop).to_bytes(2, "little") + sop,
        "patient": _element(b"\x10\x00\x20\x00LO", patient_id, b" "),
        "study": _element(b"\x20\x00\x0d\x00UI", study_uid, b"\0"),
        "series": _element(b"\x20\x00\x0e\x00UI", series_uid, b"\0"),
    }
    values["length"] = b"\x02\x00\x00\x00UL\x04\x00" + (pieces.meta_length + len(values["media"])).to_bytes(4, "little")
    return b"".join(piece if isinstance(piece, bytes) else values[piece] for piece in pieces.parts)


def measured(report: Mapping[str, Any]) -> str:
    """The first number in a structured report: what it has measured, if that is one thing.

    :param report: its tags as Orthanc's ``/instances/{id}/simplified-tags`` tells them.
    :return: empty if there is none.
    """
    for name, value in report.items():
        if name == "NumericValue":
            return str(value)
        for item in value if isinstance(value, list) else ():
            if found := measured(item):
                return found
    return ""


def _padded(text: str, fill: bytes) -> bytes:
    value = text.encode()
    return value + fill if len(value) % 2 else value


def _element(head: bytes, text: str, fill: bytes) -> bytes:
    value = _padded(text, fill)
    return head + len(value).to_bytes(2, "little") + value


@dataclass(frozen=True, slots=True)
class _Template:
    #: Bytes as they are, and the names of the elements that go between them.
    parts: tuple[bytes | str, ...]
    #: Length of the file meta information without the MediaStorageSOPInstanceUID.
    meta_length: int


@lru_cache(maxsize=64)
def _template(modality: str, rows: int, tags: tuple[tuple[str, Any], ...]) -> _Template:
    marks = {
        "media": (b"\x02\x00\x03\x00UI", "1.2.3.1", b"\0"),
        "sop": (b"\x08\x00\x18\x00UI", "1.2.3.1", b"\0"),
        "patient": (b"\x10\x00\x20\x00LO", "MARK OF THE PATIENT", b" "),
        "study": (b"\x20\x00\x0d\x00UI", "1.2.3.2", b"\0"),
        "series": (b"\x20\x00\x0e\x00UI", "1.2.3.3", b"\0"),
    }
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = SOP_CLASSES.get(modality, _SECONDARY_CAPTURE)
    dataset.SOPInstanceUID = marks["sop"][1]
    dataset.StudyDate = "20240102"
    dataset.StudyTime = "030405"
    dataset.AccessionNumber = "A1"
    dataset.Modality = modality
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "Test study"
    dataset.SeriesDescription = "Test series"
    dataset.PatientName = "Test^Patient"
    dataset.PatientID = marks["patient"][1]
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "O"
    dataset.StudyInstanceUID = marks["study"][1]
    dataset.SeriesInstanceUID = marks["series"][1]
    dataset.StudyID = "1"
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = 1
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = rows
    dataset.Columns = rows
    dataset.BitsAllocated = 16
    dataset.BitsStored = 12
    dataset.HighBit = 11
    dataset.PixelRepresentation = 0
    dataset.add_new("PixelData", "OW", bytes(2 * rows * rows))
    for keyword, value in tags:
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    rest = buffer.getvalue()

    # The group length is the file's first element, 12 bytes behind the preamble and "DICM".
    length = int.from_bytes(rest[140:144], "little")
    parts: list[bytes | str] = [rest[:132], "length"]
    rest = rest[144:]
    for name, (head, text, fill) in marks.items():
        mark = _element(head, text, fill)
        before, found, rest = rest.partition(mark)
        assert found, name
        parts += [before, name]
    parts.append(rest)
    return _Template(tuple(parts), length - len(_element(*marks["media"])))
