"""What the conformance runner compares, and that docs/any-language.md has its rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orthanc_events_bridge.cli import main
from orthanc_events_bridge.conformance.events import Played
from orthanc_events_bridge.conformance.judging import differences, steady
from orthanc_events_bridge.conformance.rules import RULES, Verdicts
from orthanc_events_bridge.events.catalog import TYPES
from orthanc_events_bridge.events.derived import DERIVED

PAGE = (Path(__file__).parents[2] / "docs" / "any-language.md").read_text("utf-8")


def test_the_page_marks_exactly_the_rules_that_are_played() -> None:
    assert sorted(re.findall(r"^- ▶ \*\*(\w+)\*\*", PAGE, re.MULTILINE)) == sorted(RULES)
    numbers = re.findall(r"^- (?:▶ )?\*\*(\w+)\*\*", PAGE, re.MULTILINE)
    assert len(numbers) == len(set(numbers))


def test_a_rule_is_met_when_it_was_played_and_nothing_is_against_it() -> None:
    verdicts = Verdicts()
    assert {row["result"] for row in verdicts.rows()} == {"not played"}
    for rule in RULES:
        verdicts.check(rule, True, "")
    assert verdicts.met
    verdicts.check("D1", False, "it is wrong")
    assert [row for row in verdicts.rows() if row["result"] != "met"] == [
        {"rule": "D1", "result": "failed", "text": RULES["D1"], "details": ["it is wrong"]}
    ]
    assert not Verdicts(verdicts.wrong, verdicts.shown).met


def test_what_was_not_played_is_not_met() -> None:
    verdicts = Verdicts(shown=RULES.keys() - {"L3"})
    assert not verdicts.met


@pytest.mark.parametrize(
    "spelt", ["2026-01-01T12:00:00.1Z", "2026-01-01T12:00:00.100000+00:00", "2026-01-01T13:00:00.1+01:00"]
)
def test_a_time_may_be_spelt_otherwise_and_nothing_else(spelt: str) -> None:
    event = {"time": "2026-01-01T12:00:00.100Z", "recordedtime": "2026-01-01T12:00:00.100Z", "data": {"a": 1}}
    assert not differences(event, {**event, "time": spelt})
    assert differences(event, {**event, "time": "2026-01-01T12:00:00Z"})
    assert differences(event, {**event, "recordedtime": "2026-01-01T12:00:00.1Z"})
    assert differences(event, {**event, "data": {"a": 2}}) == ["data is {'a': 2}, and not {'a': 1}"]
    assert differences(event, {**event, "more": ""}) == ["more is '', and not None"]


@pytest.mark.parametrize(
    ("attempts", "right"),
    [
        ([1], True),
        ([1, 2, 3], True),
        ([1, 1, 2, 1, 2, 3], True),
        ([], False),
        ([2], False),
        ([1, 3], False),
        ([0], False),
    ],
)
def test_attempts_go_up_by_one_and_some_may_come_again(attempts: list[int], right: bool) -> None:
    assert steady(attempts) is right


def test_every_type_is_played_in_both_modes_under_ids_of_its_own() -> None:
    played = Played()
    sent = played.every_type()
    bridge, consumers = sent[: 2 * len(TYPES)], sent[2 * len(TYPES) :]
    assert [f"{one.level}.{one.verb}" for one in bridge[::2]] == [one.name for one in TYPES]
    assert [f"{one.level}.{one.verb}" for one in consumers[::2]] == [one.name for one in DERIVED]
    assert len({one.id for one in sent}) == len(sent) == 2 * len(played.binary)
    assert not {one.id for one in sent} & {one.id for one in Played().every_type()}
    assert json.loads(sent[0].body) == played.expected[sent[0].id]


def test_each_message_that_is_no_event_has_bytes_of_its_own() -> None:
    bodies = [one.body for played in (Played(), Played()) for one in played.malformed()]
    assert len(set(bodies)) == len(bodies)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--broker", "nats://127.0.0.1:1"], "which program is to be tested is not said"),
        (["--", "true"], "at which broker is not said"),
        (["--broker", "http://127.0.0.1", "--", "true"], "is no URL of a broker"),
        (["--broker", "nats://127.0.0.1:1", "--patience", "0", "--", "true"], "--patience 0 is too short"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORTHANC_EVENTS_BROKER", raising=False)
    assert main(["conformance", *arguments]) == 2
    assert wrong in capsys.readouterr().err
