"""What becomes of each element of a data set: DICOM PS3.15's basic profile, its options, and lists of one's own.

``confidentiality.csv`` is Table E.1-1 of PS3.15, edition 2024b: tag, action, and the options that keep it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.values import Options, Place, mistake
from orthanc_events_bridge.workflows.conditions import one_or_more

#: What can become of an element. ``map``: a UID, by its pseudonym. ``clean``: of a sequence, the elements in it.
Action = Literal["remove", "empty", "dummy", "map", "clean", "keep", "replace", "shift"]
#: Edition of the table.
EDITION: Final = "2024b"
#: These are pseudonyms, or marks, and nobody's to choose.
RESERVED: Final = frozenset(
    {
        "PatientID",
        "PatientName",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "SOPClassUID",
        "SpecificCharacterSet",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
        "LongitudinalTemporalInformationModified",
    }
)
_DATES: Final = ("DA", "DT", "TM")
_TEXTS: Final = ("AE", "AS", "CS", "DS", "IS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", *_DATES)


def _path(value: str) -> str:
    right = "write its keyword, such as StudyDescription; inside of a sequence with dots between"
    if re.fullmatch(r"[A-Z][A-Za-z0-9]*(\.[A-Z][A-Za-z0-9]*)*", value) is None:
        raise mistake("is no keyword of a DICOM attribute", right, shown=value)
    try:
        from pydicom.datadict import tag_for_keyword
    except ImportError:  # whoever works with it says so
        return value
    for keyword in value.split("."):
        if tag_for_keyword(keyword) is None:
            raise mistake("is no keyword of a DICOM attribute", right, shown=keyword)
    if value.rpartition(".")[2] in RESERVED:
        raise mistake("is always made by the anonymizer", "leave it out", shown=value)
    return value


def _element(value: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{2}|all", value) is None:
        raise mistake("is no element of a private block", "write the last two digits of its tag, or all", shown=value)
    return value.lower()


def _text(value: str) -> str:
    try:
        from pydicom.datadict import dictionary_VR
    except ImportError:
        return value
    if dictionary_VR(value.rpartition(".")[2]) not in _TEXTS:
        raise mistake("is no attribute of text", "keep it or remove it", shown=value)
    return value


_Path = Annotated[str, AfterValidator(_path)]
_TextPath = Annotated[str, AfterValidator(_path), AfterValidator(_text)]
_Elements = Annotated[tuple[Annotated[str, AfterValidator(_element)], ...], BeforeValidator(one_or_more)]


class Profile(Options):
    """What is kept, replaced and removed. With nothing said it is the basic profile of DICOM PS3.15."""

    retain: tuple[Literal["device", "institution", "patient"], ...] = Field(
        default=(),
        description="Options of PS3.15: Retain Device Identity, Retain Institution Identity, Retain Patient "
        "Characteristics (sex, age, weight …). What would have to be cleaned by reading it is removed all the same.",
        examples=[["device"]],
    )
    dates: Literal["remove", "shift", "keep"] = Field(
        default="remove",
        description="`remove`: as the basic profile has it. `shift`: all dates of a patient are moved back by the same "
        "1 to `shift_days` days, which follow from secret and PatientID; times stay (Retain Longitudinal Temporal "
        "Information with Modified Dates). `keep`: they stay (… with Full Dates). The date of birth goes in any case.",
    )
    shift_days: int = Field(
        default=365, ge=1, le=36500, description="With `dates: shift`: by how many days at most dates are moved back."
    )
    keep: tuple[_Path, ...] = Field(
        default=(),
        description="Elements that stay as they are, by keyword: wherever they are, or with dots between in that "
        "sequence only. The longest path that fits counts.",
        examples=[["StudyDescription", "RequestAttributesSequence.ScheduledProcedureStepDescription"]],
    )
    remove: tuple[_Path, ...] = Field(default=(), description="Elements that go, by keyword.")
    replace: dict[_TextPath, str] = Field(
        default_factory=dict,
        description="Elements that get another value where they are there, by keyword.",
        examples=[{"InstitutionName": "Trial 7"}],
    )
    private: dict[str, _Elements] = Field(
        default_factory=dict,
        description="Private elements that stay: of each creator, the last two digits of their tags, or `all`. Others "
        "go.",
        examples=[{"SIEMENS MR HEADER": ["0c", "0e"]}],
    )
    burned_in: Literal["leave-out", "keep"] = Field(
        default="leave-out",
        description="What becomes of instances that say that there is text in their pixels (`BurnedInAnnotation` is "
        "`YES`). Pixels are not looked at.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """An element in two lists."""
        seen: dict[str, str] = {}
        for option in ("keep", "remove", "replace"):
            for path in given.get(option) or ():
                if seen.setdefault(str(path), option) != option:
                    yield (option,), mistake(f"is in {seen[str(path)]} too", "name it once", shown=path)

    def own(self, path: tuple[str, ...]) -> Action | None:
        """What the lists say of an element.

        :param path: its keyword, behind those of the sequences that it is in.
        """
        for start in range(len(path)):
            name = ".".join(path[start:])
            for action in ("keep", "remove", "replace"):
                if name in getattr(self, action):
                    return action
        return None

    def replacement(self, path: tuple[str, ...]) -> str:
        """Of an element that the lists replace, its value."""
        names = (".".join(path[start:]) for start in range(len(path)))
        return next(self.replace[name] for name in names if name in self.replace)

    def action(self, tag: int, vr: str, path: tuple[str, ...]) -> Action:
        """What becomes of an element that is not private."""
        own = self.own(path)
        if own is not None:
            return "clean" if vr == "SQ" and own == "keep" else own
        entry = entry_of(tag)
        if entry is None:
            return self.unlisted(vr)
        if "dates" in entry.kept_by and self.dates == "shift" and vr in _DATES:
            return "keep" if vr == "TM" else "shift"
        if entry.kept_by.intersection(self.retain):
            return "clean" if vr == "SQ" else "keep"
        if "dates" in entry.kept_by and self.dates == "keep":
            return "clean" if vr == "SQ" else "keep"
        return _chosen(entry.action, vr, path)

    def unlisted(self, vr: str) -> Action:
        """What becomes of an element that the table leaves alone: it stays, if by its kind it is nobody's name, no time
        and no identifier."""
        if vr in _DATES:
            if self.dates == "remove":
                return "empty"
            return "keep" if self.dates == "keep" or vr == "TM" else "shift"
        special: dict[str, Action] = {"SQ": "clean", "PN": "empty", "UI": "map"}
        return special.get(vr, "keep")


def _chosen(action: str, vr: str, path: tuple[str, ...]) -> Action:
    """Where the table gives a choice, by what an element is for in its kind of object: what is valid for all kinds.

    PS3.15, Annex E.1.1: X removes, Z empties, D puts something else there that is as valid, U maps.
    """
    if "U" in action:
        return "clean" if vr == "SQ" else "map"
    if vr == "SQ":
        # A report's content is made of elements that the table names one by one.
        choices: dict[str, Action] = {"X": "remove", "D": "clean" if path[-1] == "ContentSequence" else "dummy"}
        return choices.get(action, "empty")
    return "dummy" if "D" in action else "empty" if "Z" in action else "remove"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table."""

    action: str
    kept_by: frozenset[str]


def entry_of(tag: int) -> Entry | None:
    """The row of an element; none where the table doesn't name it."""
    table = _table()
    group = tag >> 16
    if group & 0xFF00 == 0x5000:
        return table["50xxxxxx"]
    if group & 0xFF00 == 0x6000:
        return table.get(f"60xx{tag & 0xFFFF:04x}")
    return table.get(f"{tag:08x}")


@cache
def _table() -> dict[str, Entry]:
    text = resources.files(__package__).joinpath("confidentiality.csv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["tag"]: Entry(row["action"], frozenset(row["kept by"].split())) for row in rows}
