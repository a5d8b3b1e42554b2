"""One DICOM file is pseudonymised. Pure: the same file, profile and secret give the same bytes.

An element becomes what `orthanc_events_bridge.workflows.profile` says; then whatever is left is searched for the
patient's identifiers, in case somebody has typed a name where none belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from pydicom.datadict import repeater_has_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from orthanc_events_bridge.workflows.dicom_files import (
    STANDARD,
    each,
    is_of_a_kind,
    join,
    put,
    read,
    values,
    words,
    write,
)
from orthanc_events_bridge.workflows.profile import EDITION, Action, Profile
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms

#: What results are given back: of the patient, and of the study (PS3.3, sections C.7.1.1 and C.7.2.1).
IDENTITY: Final = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
)
#: What tells who somebody is: looked for in all that is left.
_TELLING: Final = (
    "PatientName",
    "PatientID",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientBirthDate",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "AccessionNumber",
)
#: Shorter ones are in too many words; these are looked for as whole words, and from the second on anywhere.
_WORD, _ANYWHERE = 3, 6
_NUMBERS: Final = ("DS", "IS", "AS")
_DATES: Final = ("DA", "DT", "TM")
_BYTES: Final = ("OB", "OW", "OD", "OF", "OL", "OV", "UN")
_PIXELS: Final = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_UIDS: Final = re.compile(r"[0-9]+(?:\.[0-9]+){3,}")
#: What takes the place of a value, by its kind; of texts it is a word.
_DUMMIES: Final = {
    **dict.fromkeys(("DS", "IS"), "0"),
    **dict.fromkeys(("US", "SS", "UL", "SL", "UV", "SV", "AT"), 0),
    **dict.fromkeys(("FL", "FD"), 0.0),
    **dict.fromkeys(_BYTES, bytes(8)),
    "AS": "000Y",
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
}
#: PS3.16, CID 7050.
_METHODS: Final = {
    "basic": ("113100", "Basic Application Confidentiality Profile"),
    "keep": ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    "shift": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "patient": ("113108", "Retain Patient Characteristics Option"),
    "device": ("113109", "Retain Device Identity Option"),
    "private": ("113111", "Retain Safe Private Option"),
    "institution": ("113112", "Retain Institution Identity Option"),
}
_LONGITUDINAL: Final = {"remove": "REMOVED", "shift": "MODIFIED", "keep": "UNMODIFIED"}


@dataclass(frozen=True, slots=True)
class Pseudonymised:
    """What has become of a file.

    :ivar content: the file.
    :ivar uid: its SOPInstanceUID.
    :ivar study: its StudyInstanceUID.
    :ivar patient: its PatientID.
    :ivar identity: what it was of, by keyword: `IDENTITY`.
    :ivar uids: originals by what stands for them.
    """

    content: bytes = field(repr=False)
    uid: str
    study: str
    patient: str
    identity: dict[str, str] = field(repr=False)
    uids: dict[str, str] = field(repr=False)


class LeftOutError(Exception):
    """A file is not to be pseudonymised.

    :param why: in a few words, without any of its content.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def pseudonymise(content: bytes, profile: Profile, pseudonyms: Pseudonyms) -> Pseudonymised:
    """Pseudonymise a file.

    :raises LeftOutError: it is not to be.
    :raises UnreadableFileError: it is no DICOM file.
    """
    dataset = read(content)
    if dataset.get("PatientIdentityRemoved") == "YES":
        raise LeftOutError("it is de-identified already")
    if profile.burned_in == "leave-out" and dataset.get("BurnedInAnnotation") == "YES":
        raise LeftOutError("there is text in its pixels")
    telling: list[str] = []
    each(dataset, lambda _, one: telling.append(join(one.value)) if one.keyword in _TELLING else None)
    identity = {name: text for name in IDENTITY if (text := join(dataset.get(name)))}
    work = _Work(dataset, profile, pseudonyms)
    work.clean(dataset, ())
    search = _Search(words(iter(telling)), frozenset(work.uids.values()))
    each(dataset, search.blank)
    _mark(dataset, profile)
    uid, study = str(dataset.SOPInstanceUID), str(dataset.StudyInstanceUID)
    return Pseudonymised(write(dataset), uid, study, work.patient, identity, work.uids)


class _Work:
    """What is done to one file.

    :ivar patient: what stands for its PatientID.
    :ivar uids: originals by what stands for them.
    """

    def __init__(self, dataset: Dataset, profile: Profile, pseudonyms: Pseudonyms) -> None:
        self._profile = profile
        self._pseudonyms = pseudonyms
        # Without an ID all patients would be one: then it is by the study.
        who = join(dataset.get("PatientID")).strip() or join(dataset.get("StudyInstanceUID"))
        self.patient = pseudonyms.patient(who)
        self._shift = timedelta(days=pseudonyms.days(who, profile.shift_days))
        self.uids: dict[str, str] = {}

    def clean(self, dataset: Dataset, place: tuple[str, ...]) -> None:
        """Clean all elements.

        :param place: the keywords of the sequences that it is in.
        """
        kept = {tag for tag in list(dataset.keys()) if tag.is_private and self._keeps(dataset, tag)}
        creators = {BaseTag(tag.group << 16 | tag.element >> 8) for tag in kept}
        for tag in list(dataset.keys()):
            if tag in creators:
                continue
            element = dataset[tag]
            path = (*place, element.keyword)
            if tag in kept:
                self._do(dataset, element, self._profile.unlisted(element.VR), path)
            elif tag.is_private or not (element.keyword or repeater_has_tag(tag)):
                del dataset[tag]  # nobody knows what it is
            else:
                self._do(dataset, element, self._profile.action(tag, element.VR, path), path)
        if not place:
            dataset.PatientID = dataset.PatientName = self.patient

    def _keeps(self, dataset: Dataset, tag: BaseTag) -> bool:
        """Whether the profile keeps a private element: by who made it (PS3.5, section 7.8)."""
        if tag.is_private_creator or tag.element < 0x1000:
            return False
        creator = join(dataset.get(BaseTag(tag.group << 16 | tag.element >> 8), DataElement(tag, "LO", "")).value)
        elements = self._profile.private.get(creator.strip(), ())
        return "all" in elements or f"{tag.element & 0xFF:02x}" in elements

    def _do(self, dataset: Dataset, element: DataElement, action: Action, path: tuple[str, ...]) -> None:
        keyword = path[-1]
        if keyword in ("PatientID", "PatientName"):
            element.value = self.patient if element.value else element.value
        elif action == "remove":
            del dataset[element.tag]
        elif action == "empty":
            element.value = [] if element.VR == "SQ" else None
        elif action == "dummy":
            self._dummy(element)
        elif action == "map":
            listed = not is_of_a_kind(keyword, "")
            put(element, [self._uid(str(uid)) if listed else uid for uid in values(element)])
        elif action == "shift":
            put(element, [self._shifted(str(one)) for one in values(element)])
        elif action == "replace":
            element.value = self._profile.replacement(path)
        elif action == "clean":
            for item in element.value:
                self.clean(item, path)

    def _uid(self, uid: str) -> str:
        if not uid or uid.startswith(STANDARD):
            return uid
        found = self._pseudonyms.uid(uid)
        self.uids[found] = uid
        return found

    def _shifted(self, value: str) -> str:
        """A date, or a date with a time, moved back; nothing where it is no whole one."""
        try:
            day = datetime.strptime(value[:8], "%Y%m%d") - self._shift  # noqa: DTZ007 -- a date
        except (ValueError, OverflowError):
            return ""
        return f"{day:%Y%m%d}{value[8:]}" if re.fullmatch(r"[0-9.+-]*", value[8:]) else ""

    def _dummy(self, element: DataElement) -> None:
        """Something else, as valid where it is."""
        if element.VR == "SQ":
            for item in element.value:
                each(item, lambda _, one: self._dummy(one) if one.VR != "SQ" else None)
                for tag in [tag for tag in list(item.keys()) if tag.is_private]:
                    del item[tag]
        elif element.VR == "UI":
            put(element, [self._uid(str(uid)) for uid in values(element)])
        else:
            element.value = _DUMMIES.get(element.VR, "ANONYMIZED")


class _Search:
    """Looks for what tells who somebody is, in values that were left.

    :param telling: texts that do.
    :param uids: the originals of UIDs.
    """

    def __init__(self, telling: Iterable[str], uids: frozenset[str]) -> None:
        found = {word for text in telling if len(word := text.strip()) >= _WORD}
        # In elements of bytes, texts are as they were encoded.
        found |= {word.encode().decode("latin-1") for word in found}
        anywhere = [re.escape(word) for word in sorted(found) if len(word) >= _ANYWHERE]
        whole = [rf"(?<![^\W_]){re.escape(word)}(?![^\W_])" for word in sorted(found)]
        nothing = r"(?!)"
        self._long = re.compile("|".join(anywhere) or nothing, re.IGNORECASE)
        self._any = re.compile("|".join([*anywhere, *whole]) or nothing, re.IGNORECASE)
        self._uids = uids

    def blank(self, dataset: Dataset, element: DataElement) -> None:
        """Empty the values of an element that tell."""
        if element.VR == "SQ" or element.keyword in ("PatientID", "PatientName"):
            return
        if element.VR in _BYTES:
            if element.keyword not in _PIXELS and isinstance(element.value, bytes) and self._tells(element):
                element.value = b""
            return
        found = values(element)
        if any(isinstance(one, int | float) and element.VR not in _NUMBERS for one in found):
            return
        cleaned = ["" if self._tells_text(str(one), element.VR) else one for one in found]
        if any(one != before for one, before in zip(cleaned, found, strict=True)):
            put(element, cleaned)

    def _tells(self, element: DataElement) -> bool:
        return self._tells_text(element.value.decode("latin-1"), element.VR)

    def _tells_text(self, text: str, vr: str) -> bool:
        if vr in _DATES and re.fullmatch(r"[0-9.:+-]*", text):
            return False
        pattern = self._long if vr in _NUMBERS else self._any
        return pattern.search(text) is not None or not self._uids.isdisjoint(_UIDS.findall(text))


def _mark(dataset: Dataset, profile: Profile) -> None:
    """Say what was done (PS3.15, section E.1; PS3.3, section C.7.1.1)."""
    methods = ["basic", *profile.retain, *([profile.dates] if profile.dates != "remove" else [])]
    methods += ["private"] if profile.private else []
    codes = []
    for method in methods:
        code = Dataset()
        code.CodeValue, code.CodeMeaning = _METHODS[method]
        code.CodingSchemeDesignator = "DCM"
        codes.append(code)
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = f"PS3.15 {EDITION}, by orthanc-events-bridge"
    dataset.DeidentificationMethodCodeSequence = codes
    dataset.LongitudinalTemporalInformationModified = _LONGITUDINAL[profile.dates]
