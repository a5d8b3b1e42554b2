"""DICOM files, read and written by pydicom, which the extra ``anonymizer`` brings.

pydicom's own warnings and log lines quote values: they are silenced here, once for the process.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import pydicom
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue

from orthanc_events_bridge.errors import BridgeError

# What is not as the standard has it stays so: it is not for us to correct.
config.settings.reading_validation_mode = config.IGNORE
config.settings.writing_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="pydicom")

#: UIDs that the standard itself has given out.
STANDARD: Final = "1.2.840.10008."
_NEEDED: Final = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
#: Keywords of UIDs that say of what kind something is, and not which one it is.
_KINDS: Final = re.compile("Class|TransferSyntax|CodingScheme|ContextUID|ContextGroup|Mapping")


class UnreadableFileError(BridgeError):
    """It can't be read as DICOM, or not be written again."""


def read(content: bytes) -> Dataset:
    """A file's data set, all texts in it decoded; without elements that can't be read.

    :raises UnreadableFileError: it has none, or lacks a UID that an instance has.
    """
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
        _decode(dataset)
        whole = all(dataset.get(keyword) for keyword in _NEEDED)
    except Exception:  # whatever is in it; what is said of it can quote it
        raise UnreadableFileError("pydicom can't read it as DICOM") from None
    if not whole:
        raise UnreadableFileError("it lacks a UID that every instance has")
    return dataset


def _decode(dataset: Dataset) -> None:
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception:  # as many as there are ways to be wrong
            del dataset[tag]
            continue
        if element.VR == "SQ":
            for item in element.value:
                _decode(item)


def write(dataset: Dataset) -> bytes:
    """The data set as a file that tells nothing of where it was: UTF-8, with file meta information of our own.

    :raises UnreadableFileError: it can't be written.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.preamble = None  # zeros
    each(dataset, _without_character_set)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    file = io.BytesIO()
    try:
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    except Exception:
        raise UnreadableFileError("pydicom can't write it as DICOM") from None
    return file.getvalue()


def _without_character_set(dataset: Dataset, element: DataElement) -> None:
    if element.tag == 0x00080005:
        del dataset[element.tag]


def each(dataset: Dataset, change: Callable[[Dataset, DataElement], None]) -> None:
    """Change all elements, those in sequences first."""
    for tag in list(dataset.keys()):
        element = dataset[tag]
        if element.VR == "SQ":
            for item in element.value:
                each(item, change)
        change(dataset, element)


def values(element: DataElement) -> list[Any]:
    """An element's values, one by one; none where it is empty."""
    if element.value is None or element.value == "":
        return []
    return list(element.value) if isinstance(element.value, MultiValue | list) else [element.value]


def put(element: DataElement, found: list[Any]) -> None:
    """Give an element these values."""
    element.value = found[0] if len(found) == 1 else found or None


def join(value: object) -> str:
    """A value as text; several with backslashes between, as DICOM writes them."""
    if value is None:
        return ""
    return "\\".join(str(one) for one in value) if isinstance(value, MultiValue | list) else str(value)


def is_of_a_kind(keyword: str, uid: str) -> bool:
    """Whether a UID says of what kind something is: it is no identifier of anybody."""
    return uid.startswith(STANDARD) or _KINDS.search(keyword) is not None


def words(texts: Iterator[str]) -> Iterator[str]:
    """What texts are made of: they themselves, and the parts of names in them."""
    for text in texts:
        yield text
        yield from re.split(r"[\^=\s,\\]+", text)
