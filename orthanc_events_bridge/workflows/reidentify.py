"""One DICOM file that is about a pseudonymised study is given back the original's patient, study and UIDs.

Pure: the same file, memory and secret give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from orthanc_events_bridge.workflows.deidentify import IDENTITY
from orthanc_events_bridge.workflows.dicom_files import each, is_of_a_kind, put, read, values, write
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms

#: Marks of what is pseudonymised.
_MARKS = ("DeidentificationMethod", "DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified")


@dataclass(frozen=True, slots=True)
class Result:
    """A result, as it came.

    :ivar uids: all UIDs in it that may stand for others.
    """

    dataset: Dataset = field(repr=False)
    uids: frozenset[str]

    @classmethod
    def read(cls, content: bytes) -> Result:
        """Read a file.

        :raises UnreadableFileError: it is no DICOM file.
        """
        dataset = read(content)
        found: set[str] = set()

        def look(_: Dataset, element: DataElement) -> None:
            if element.VR == "UI":
                found.update(uid for one in values(element) if not is_of_a_kind(element.keyword, uid := str(one)))

        each(dataset, look)
        return cls(dataset, frozenset(found))

    def give_back(
        self, identity: Mapping[str, str], patient: str, originals: Mapping[str, str], pseudonyms: Pseudonyms
    ) -> bytes:
        """The file, of the original patient and study, in a series of its own. To be called once.

        :param identity: elements of the original's patient and study, by keyword.
        :param patient: what stands for the patient, wherever it is in the file.
        :param originals: UIDs by what stands for them. The others are the result's own, and get new ones.
        """

        def change(_: Dataset, element: DataElement) -> None:
            if element.VR == "UI":
                put(element, [self._uid(element.keyword, str(uid), originals, pseudonyms) for uid in values(element)])
            elif element.keyword in ("PatientID", "PatientName") and str(element.value) == patient:
                element.value = identity.get(element.keyword, "")

        each(self.dataset, change)
        for keyword in _MARKS:
            if keyword in self.dataset:
                delattr(self.dataset, keyword)
        if "PatientIdentityRemoved" in self.dataset:
            self.dataset.PatientIdentityRemoved = "NO"
        for keyword in IDENTITY:
            if keyword in identity:
                value = identity[keyword]
                setattr(self.dataset, keyword, value.split("\\") if "\\" in value else value)
            elif keyword in self.dataset:  # the original has none
                setattr(self.dataset, keyword, None)
        return write(self.dataset)

    @staticmethod
    def _uid(keyword: str, uid: str, originals: Mapping[str, str], pseudonyms: Pseudonyms) -> str:
        if not uid or is_of_a_kind(keyword, uid):
            return uid
        # One that was new: the same thing of another patient is another thing (PS3.5, section 9).
        return originals.get(uid) or pseudonyms.result(uid)
