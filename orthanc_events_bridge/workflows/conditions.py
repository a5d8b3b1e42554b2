"""Conditions on a resource: the language of rules. Pure: what they are asked of is given to them.

A condition is about one tag, one metadata or one label, or is made of others by ``all``, ``any`` and ``not``. A study
has several values of a tag where its series differ: a condition is true when one of them fits. So ``not`` means that
none does.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError

from orthanc_events_bridge.values import Options, Place, mistake

_SUBJECTS: Final = ("tag", "metadata", "label")
_OPERATORS: Final = ("is", "glob", "regex", "above", "below", "exists")
_GROUPS: Final = ("all", "any", "not")
#: Of a DICOM attribute, as Orthanc and pydicom spell it; inside of sequences with dots between.
_KEYWORD: Final = re.compile(r"[A-Z][A-Za-z0-9]*(\.[A-Z][A-Za-z0-9]*)*")
_NUMBER: Final = re.compile(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*")


class Facts(Protocol):
    """What is known of a resource."""

    def values(self, kind: Literal["tag", "metadata"], name: str) -> Sequence[str]:
        """All values of it, each once; empty where there is none."""

    @property
    def labels(self) -> Iterable[str]:
        """The labels that it has."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a condition, for who wants to know why.

    :ivar true: whether it holds.
    :ivar condition: in words: ``tag Modality is MR``.
    :ivar found: what there was, in words. Maybe patient data: for the terminal, never for a log.
    :ivar parts: of one that is made of others.
    """

    true: bool
    condition: str
    found: str = ""
    parts: tuple[Verdict, ...] = ()


def one_or_more(value: object) -> object:
    """One value counts as a list of one."""
    return value if isinstance(value, list | tuple) or value is None else [value]


def _conditions(value: object) -> object:
    return [value] if isinstance(value, Mapping) else value


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise mistake(f"is no regular expression: {error.msg}", "write one of Python's", shown=value) from None
    return value


def _keyword(value: str) -> str:
    if _KEYWORD.fullmatch(value) is None:
        right = "write its keyword, such as Modality, or BodyPartExamined"
        raise mistake("is no keyword of a DICOM attribute", right, shown=value)
    return value


class OneOrMany:
    """One counts as a list of one: for the schema."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Of either."""
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


#: A DICOM attribute's keyword.
Keyword = Annotated[str, AfterValidator(_keyword)]
_Texts = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(one_or_more), OneOrMany()]
_Parts = Annotated["tuple[Condition, ...]", Field(min_length=1), BeforeValidator(_conditions), OneOrMany()]


class Condition(Options):
    """One condition: about a `tag`, a `metadata` or a `label`, or made of others."""

    tag: Keyword | None = Field(
        default=None,
        description="A DICOM attribute's keyword. Of a study or series it is looked for in all its series, in the "
        "first instance of each. Inside of a sequence, with dots between: "
        "`RequestAttributesSequence.ScheduledProcedureStepID`.",
        examples=["Modality"],
    )
    metadata: str | None = Field(
        default=None,
        min_length=1,
        description="A metadata of Orthanc: `RemoteAET`, `CalledAET`, `Origin`, `ReceptionDate` …, of the resource or "
        "of the first instance of each of its series.",
        examples=["RemoteAET"],
    )
    label: _Texts | None = Field(
        default=None,
        description="It has this label, or one of these. Orthanc has labels from 1.12 on.",
        examples=["ai"],
    )
    equals: _Texts | None = Field(
        default=None, alias="is", description="This, or one of these, letter by letter.", examples=[["CT", "MR"]]
    )
    glob: _Texts | None = Field(
        default=None,
        description="A pattern, or one of these: `*` anything, `?` one character, `[…]` one of these.",
        examples=["CT_*"],
    )
    regex: Annotated[str, AfterValidator(_regex)] | None = Field(
        default=None,
        description="A regular expression of Python's that fits anywhere; `^` and `$` tie it to the ends.",
        examples=["(?i)thorax"],
    )
    above: float | None = Field(
        default=None, allow_inf_nan=False, description="It is a number, or a DICOM date, greater than this."
    )
    below: float | None = Field(
        default=None, allow_inf_nan=False, description="It is a number, or a DICOM date, less than this."
    )
    exists: bool | None = Field(default=None, description="`true`: it is there. `false`: it is not, or is empty.")
    all: _Parts | None = Field(default=None, description="All of these hold.")
    any: _Parts | None = Field(default=None, description="One of these holds.")
    none: _Parts | None = Field(default=None, alias="not", description="This doesn't hold; of several, none does.")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """One subject, and what is said of it; or others."""
        subjects = [name for name in (*_SUBJECTS, *_GROUPS) if name in given]
        if len(subjects) != 1:
            wrong = "it says nothing" if not subjects else f"it has {' and '.join(subjects)}"
            right = f"write one of {', '.join((*_SUBJECTS, *_GROUPS))}; several conditions go into all or any"
            yield (), mistake(wrong, right)
            return
        operators = [name for name in _OPERATORS if name in given]
        limits = set(operators) <= {"above", "below"}
        if subjects[0] in ("tag", "metadata"):
            if not operators:
                yield (), mistake("it doesn't say what it has to be", f"add one of {', '.join(_OPERATORS)}")
            elif len(operators) > 1 and not limits:
                yield (), mistake(f"it has {' and '.join(operators)}", "keep one, or write several conditions in all")
        elif operators:
            yield (operators[0],), mistake(f"does not go with {subjects[0]}", "leave it out")

    def judge(self, facts: Facts) -> Verdict:
        """Does it hold?"""
        for name, parts in (("all", self.all), ("any", self.any), ("not", self.none)):
            if parts is not None:
                verdicts = tuple(part.judge(facts) for part in parts)
                holds = [one.true for one in verdicts]
                true = all(holds) if name == "all" else any(holds) if name == "any" else not any(holds)
                return Verdict(true, name, parts=verdicts)
        if self.label is not None:
            found = sorted(facts.labels)
            true = not set(self.label).isdisjoint(found)
            return Verdict(true, f"label {_either(self.label)}", _shown(found))
        kind: Literal["tag", "metadata"] = "tag" if self.tag is not None else "metadata"
        name = self.tag or self.metadata or ""
        values = facts.values(kind, name)
        if self.exists is not None:
            there = any(values)
            text = "is there" if self.exists else "is not there"
            return Verdict(there is self.exists, f"{kind} {name} {text}", _shown(values))
        true = any(self._fits(value) for value in values)
        return Verdict(true, f"{kind} {name} {self._operator()}", _shown(values))

    def _fits(self, value: str) -> bool:
        if self.equals is not None:
            return value in self.equals
        if self.glob is not None:
            return any(fnmatch.fnmatchcase(value, pattern) for pattern in self.glob)
        if self.regex is not None:
            return re.search(self.regex, value) is not None
        if _NUMBER.fullmatch(value) is None:
            return False
        number = float(value)
        return (self.above is None or number > self.above) and (self.below is None or number < self.below)

    def _operator(self) -> str:
        if self.equals is not None:
            return f"is {_either(self.equals)}"
        if self.glob is not None:
            return f"is like {_either(self.glob)}"
        if self.regex is not None:
            return f"fits /{self.regex}/"
        limits = (("above", self.above), ("below", self.below))
        return "is " + " and ".join(f"{name} {limit:.15g}" for name, limit in limits if limit is not None)

    def names(self, kind: Literal["tag", "metadata"]) -> Iterator[str]:
        """What it asks for."""
        own = self.tag if kind == "tag" else self.metadata
        if own is not None:
            yield own
        for parts in (self.all, self.any, self.none):
            for part in parts or ():
                yield from part.names(kind)

    def asks_labels(self) -> bool:
        """Whether it asks for labels."""
        parts = (part for group in (self.all, self.any, self.none) for part in group or ())
        return self.label is not None or any(part.asks_labels() for part in parts)


#: A condition, or several that must all hold.
When = Annotated[tuple[Condition, ...], Field(min_length=1), BeforeValidator(_conditions), OneOrMany()]


def judge(conditions: Sequence[Condition], facts: Facts) -> Verdict:
    """Do all of them hold? None is true of everything."""
    verdicts = tuple(one.judge(facts) for one in conditions)
    return Verdict(all(one.true for one in verdicts), "all", parts=verdicts)


def _either(values: Sequence[str]) -> str:
    return " or ".join(repr(value) for value in values)


def _shown(values: Sequence[str]) -> str:
    return ", ".join(repr(value) for value in values) or "nothing"
