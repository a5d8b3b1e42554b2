"""The language of rules: what holds, what is said of why, and what is said of mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import pytest
import yaml

from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.workflows.conditions import Condition, judge
from orthanc_events_bridge.workflows.facts import Resource, Wanted
from orthanc_events_bridge.workflows.keywords import odd
from orthanc_events_bridge.workflows.router_settings import RouterSettings
from orthanc_events_bridge.workflows.rules import Decision


@dataclass
class Known:
    """Facts of a test."""

    tag: Mapping[str, Sequence[str]] = field(default_factory=dict)
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: Sequence[str] = ()

    def values(self, kind: Literal["tag", "metadata"], name: str) -> Sequence[str]:
        return (self.tag if kind == "tag" else self.metadata).get(name, ())


KNEE = Known(
    tag={
        "Modality": ["MR", "SR"],
        "BodyPartExamined": ["KNEE"],
        "StudyDate": ["20240102"],
        "SeriesNumber": ["1", "12"],
        "PatientComments": [""],
    },
    metadata={"RemoteAET": ["MR_1"], "Origin": ["DicomProtocol"]},
    labels=("research",),
)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("{tag: Modality, is: MR}", True),
        ("{tag: Modality, is: [CT, SR]}", True),
        ("{tag: Modality, is: mr}", False),
        ("{tag: Modality, is: CT}", False),
        ("{tag: Modality, glob: '[MN]R'}", True),
        ("{tag: Modality, glob: [CT*, 'M?']}", True),
        ("{tag: Modality, glob: M}", False),
        ("{tag: BodyPartExamined, regex: ^KN}", True),
        ("{tag: BodyPartExamined, regex: '(?i)nee$'}", True),
        ("{tag: BodyPartExamined, regex: ^NEE}", False),
        ("{tag: SeriesNumber, above: 11}", True),
        ("{tag: SeriesNumber, above: 1, below: 12}", False),
        ("{tag: SeriesNumber, above: 0, below: 2}", True),
        ("{tag: StudyDate, above: 20231231}", True),
        ("{tag: Modality, above: 0}", False),
        ("{tag: PatientComments, exists: true}", False),
        ("{tag: PatientComments, exists: false}", True),
        ("{tag: AccessionNumber, exists: false}", True),
        ("{tag: Modality, exists: true}", True),
        ("{tag: AccessionNumber, is: ''}", False),
        ("{metadata: RemoteAET, glob: MR_*}", True),
        ("{metadata: Origin, is: RestApi}", False),
        ("{label: research}", True),
        ("{label: [ai, research]}", True),
        ("{label: ai}", False),
        ("{not: {label: ai}}", True),
        ("{not: [{label: ai}, {tag: Modality, is: SR}]}", False),
        ("{all: [{label: research}, {tag: Modality, is: MR}]}", True),
        ("{all: [{label: research}, {tag: Modality, is: CT}]}", False),
        ("{any: [{label: ai}, {any: {tag: Modality, is: MR}}]}", True),
    ],
)
def test_what_holds(condition: str, holds: bool) -> None:
    assert Condition.model_validate(yaml.safe_load(condition)).judge(KNEE).true is holds


def test_why_is_said() -> None:
    conditions = [
        Condition.model_validate({"tag": "Modality", "is": ["CT", "MR"]}),
        Condition.model_validate({"not": {"metadata": "RemoteAET", "glob": "CT*"}}),
    ]
    verdict = judge(conditions, KNEE)
    assert verdict.true
    first, second = verdict.parts
    assert (first.condition, first.found) == ("tag Modality is 'CT' or 'MR'", "'MR', 'SR'")
    assert (second.condition, second.parts[0].condition) == ("not", "metadata RemoteAET is like 'CT*'")
    assert judge([], Known()).true


def test_what_is_asked_for() -> None:
    conditions = [
        Condition.model_validate(yaml.safe_load(text))
        for text in ("{any: [{tag: Modality, is: MR}, {not: {metadata: Origin, is: x}}]}", "{all: [{label: x}]}")
    ]
    assert Wanted.by(conditions) == Wanted(frozenset({"Modality"}), metadata=True, labels=True)
    assert Wanted.by(conditions[:1]) == Wanted(frozenset({"Modality"}), metadata=True, labels=False)
    assert Wanted.by([]) == Wanted()


# A resource.


def resource(main: Mapping[str, str], whole: Mapping[str, Any] | None = None, instances: str = "ab") -> Resource:
    return Resource("study", "s", "s", tuple(instances), (), [main], [whole or {}], [])


def test_values_are_looked_for_in_main_tags_then_in_instances_and_sequences() -> None:
    item = {"ScheduledProcedureStepID": "P1"}
    found = resource(
        {"Modality": "MR"},
        {"Modality": "CT", "ImageType": "ORIGINAL\\PRIMARY", "RequestAttributesSequence": [item, {"X": "1"}]},
    )
    assert found.values("tag", "Modality") == ["MR"]
    assert found.values("tag", "ImageType") == ["ORIGINAL\\PRIMARY", "ORIGINAL", "PRIMARY"]
    assert found.values("tag", "RequestAttributesSequence.ScheduledProcedureStepID") == ["P1"]
    assert found.values("tag", "ImageType.Nothing") == found.values("tag", "Nothing") == []


def test_the_fingerprint_tells_contents_apart() -> None:
    same = resource({"PatientName": "A"}).fingerprint
    assert resource({"PatientName": "A"}, {"other": "tags"}).fingerprint == same
    assert resource({"PatientName": "B"}).fingerprint != same
    assert resource({"PatientName": "A"}, instances="abc").fingerprint != same


# Rules.

ROOT = Path(__file__).resolve().parents[2]

RULES = """
broker: nats://127.0.0.1:4222
orthanc: http://127.0.0.1:8042
destinations:
  pacs: {modality: pacs}
  research: {peer: research}
rules:
  - name: mr
    when: {tag: Modality, is: MR}
    to: [pacs]
  - name: labelled
    when: [{label: research}]
    to: [research, pacs]
  - name: rest
    to: [research]
"""


def settings(folder: Path, text: str) -> RouterSettings:
    path = folder / "router.yaml"
    path.write_text(text, "utf-8")
    return configure_as(RouterSettings, {}, path, {}, CommandLine()).settings


def decided(found: RouterSettings, main: Mapping[str, str], *labels: str) -> dict[str, str]:
    return Decision(found.rules, found.match, Resource("study", "s", "s", (), labels, [main], [], [])).rules


def test_all_rules_that_fit_or_the_first(tmp_path: Path) -> None:
    every, first = settings(tmp_path, RULES), settings(tmp_path, RULES + "match: first\n")
    assert decided(every, {"Modality": "MR"}) == {"pacs": "mr", "research": "rest"}
    assert decided(first, {"Modality": "MR"}, "research") == {"pacs": "mr"}
    assert decided(first, {"Modality": "CT"}, "research") == {"research": "labelled", "pacs": "labelled"}
    assert decided(first, {"Modality": "CT"}) == {"research": "rest"}


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("to: [pacs]", "to: [pasc]", "router.yaml:10: rules[0].to[0]: 'pasc' is no destination; the destinations are"),
        ("name: labelled", "name: mr", "rules[1].name: is the name of another rule"),
        ("{modality: pacs}", "{modality: pacs, peer: x}", "destinations.pacs: it is modality and peer; give one of"),
        ("{modality: pacs}", "{modalty: pacs}", "destinations.pacs.modalty: there is no such option; did you mean mod"),
        ("{modality: pacs}", "{concurrency: 1}", "destinations.pacs: where it sends to is not said; give one of"),
        ("  pacs: {", "  pacs 1: {", "'pacs 1' can't be the name of a destination"),
        ("tag: Modality", "tag: modality", "rules[0].when.tag: 'modality' is no keyword of a DICOM attribute"),
        ("tag: Modality, is: MR", "tag: Modality", "rules[0].when: it doesn't say what it has to be; add one of is"),
        ("is: MR", "iss: MR", "rules[0].when.iss: there is no such option; did you mean is?"),
        ("is: MR", "regex: '('", "regex: '(' is no regular expression: "),
        ("is: MR", "is: MR, glob: M*", "it has is and glob; keep one"),
        ("tag: Modality, is: MR", "tag: Modality, label: x", "it has tag and label; write one of tag, metadata"),
        ("{label: research}", "{label: research, is: x}", "rules[1].when[0].is: does not go with label; leave it out"),
        ("{label: research}", "{not: []}", "rules[1].when[0].not: is an empty list"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, right: str, wrong: str, message: str) -> None:
    assert right in RULES
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, RULES.replace(right, wrong, 1))
    text = str(caught.value)
    assert message in text
    assert len(set(text.splitlines())) == len(text.splitlines())


def test_what_dicom_does_not_know_is_said_with_what_may_be_meant() -> None:
    said = list(odd(["Modality", "Modalty", "RequestAttributesSequence.Nothing"]))
    assert said == ["DICOM knows no attribute Modalty (did you mean Modality?)", "DICOM knows no attribute Nothing"]


def test_the_example_is_right() -> None:
    found = configure_as(RouterSettings, {}, ROOT / "config" / "router.yaml", {}, CommandLine()).settings
    assert set(found.destinations) == {"pacs", "archive", "export"}
    assert found.destinations["archive"].retry.max_attempts == 0
    assert decided(found, {"Modality": "CT", "StudyDescription": "Trial 7"}) == {
        "archive": "everything",
        "export": "research",
    }


def test_the_schema_for_editors_takes_what_is_right() -> None:
    schema = json.loads((ROOT / "orthanc_events_bridge/workflows/orthanc-router.schema.json").read_text("utf-8"))
    jsonschema_rs.meta.validate(schema)
    example = (ROOT / "config" / "router.yaml").read_text("utf-8")
    for text in (RULES, example):
        jsonschema_rs.validate(schema, yaml.safe_load(text))
    for right, wrong in (
        ("to: [pacs]", "to: pacs"),
        ("to: [research]", "to: []"),
        ("is: MR", "iss: MR"),
        ("{label: research}", "[{label: research}]"),
        ("modality: pacs", "modlity: pacs"),
        ("destinations:", "destination:"),
        ("  - name: rest", "  - nmae: rest"),
    ):
        assert right in RULES
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, yaml.safe_load(RULES.replace(right, wrong, 1)))
