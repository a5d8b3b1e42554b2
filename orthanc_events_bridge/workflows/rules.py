"""Rules: which resources go where, by conditions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.values import Options, Place, mistake
from orthanc_events_bridge.workflows.conditions import Verdict, When, judge
from orthanc_events_bridge.workflows.facts import Resource, Wanted


def _printable(value: str) -> str:
    if not value or not value.isprintable():
        raise mistake("can't be the name of a rule", "write some words, in one line", shown=value)
    return value


#: An option that is the name of a rule.
RuleName = Annotated[str, AfterValidator(_printable)]


class Conditional(Options):
    """A rule's beginning: what it is for."""

    # Whose conditions somebody has taken out, and no more, would be for everything.
    spoken = ("when",)
    name: RuleName = Field(description="For the audit log, for `--explain`, and for people.", examples=["mr-to-pacs"])
    when: When | None = Field(
        default=None, description="Conditions that must all hold; left out: it is for everything. One, or a list."
    )

    def judge(self, resource: Resource) -> Verdict:
        """Is it for that?"""
        return judge(self.when or (), resource)


class Rule(Conditional):
    """One rule: what it is for, and where that goes."""

    to: tuple[str, ...] = Field(min_length=1, description="Names of destinations, or of projects.", examples=[["pacs"]])


class Decision:
    """What rules say of a resource.

    :ivar rules: of each place that something goes to, the rule that says so: the first, where several do.
    :ivar verdicts: of each rule that was asked.
    :param match: ``first``: the first rule that fits counts, and no other.
    """

    def __init__(self, rules: Sequence[Rule], match: Literal["all", "first"], resource: Resource) -> None:
        self.rules: dict[str, str] = {}
        self.verdicts: list[tuple[Rule, Verdict]] = []
        for rule in rules:
            verdict = rule.judge(resource)
            self.verdicts.append((rule, verdict))
            if verdict.true:
                for place in rule.to:
                    self.rules.setdefault(place, rule.name)
                if match == "first":
                    break


def wanted_by(rules: Sequence[Conditional]) -> Wanted:
    """What has to be known of a resource, for these to be asked."""
    return Wanted.by(condition for rule in rules for condition in rule.when or ())


def named_twice(rules: Sequence[Conditional]) -> Iterator[tuple[Place, PydanticCustomError]]:
    """Names of rules that are there twice."""
    names = [rule.name for rule in rules]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield ("rules", number, "name"), mistake("is the name of another rule", "give each one of its own")


def mistakes(rules: Sequence[Rule], places: Collection[str], kind: str) -> Iterator[tuple[Place, PydanticCustomError]]:
    """Names of rules that are there twice, and names of places that lead to nothing.

    :param kind: of places: ``destination``.
    """
    yield from named_twice(rules)
    for number, rule in enumerate(rules):
        for position, place in enumerate(rule.to):
            if place not in places:
                right = f"the {kind}s are: {', '.join(places)}"
                yield ("rules", number, "to", position), mistake(f"is no {kind}", right, shown=place)
