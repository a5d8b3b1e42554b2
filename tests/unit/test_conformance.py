"""What the conformance runner compares, and that docs/any-language.md has its rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orthanc_events_bridge.cli import main
from orthanc_events_bridge.conformance.events import Played
from orthanc_events_bridge.conformance.judging import Expected, differences, judge, steady
from orthanc_events_bridge.conformance.rules import RULES, Verdicts, rules_of
from orthanc_events_bridge.consumers.dead import letter_of
from orthanc_events_bridge.events.catalog import TYPES
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.events.mapping import STRUCTURED
from orthanc_events_bridge.transports.base import DeadLetter, Incoming, Outgoing

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
    assert not Verdicts(RULES, verdicts.wrong, verdicts.shown).met


def test_what_is_for_one_broker_alone_is_played_there_alone() -> None:
    assert RULES.keys() - rules_of("nats").keys() == {"S9"}
    assert RULES.keys() - rules_of("kafka").keys() == {"S8"}
    assert RULES.keys() - rules_of("rabbitmq").keys() == {"S8", "S9"}
    verdicts = Verdicts(rules_of("kafka"), shown={*rules_of("kafka")})
    assert verdicts.met
    assert [row["rule"] for row in verdicts.rows()] == list(rules_of("kafka"))


def said(**more: str) -> dict[str, str]:
    """The headers of a dead letter as they have to be, with some others."""
    return {
        "content-type": STRUCTURED,
        "orthanc-consumer": "one",
        "orthanc-address": "orthanc.events",
        "orthanc-event-id": "id-1",
        "orthanc-attempts": "3",
        "orthanc-reason": "failed 3 times of 3",
        "orthanc-exception": "RuntimeError",
        "orthanc-first-failure": "2026-01-01T12:00:00.000Z",
        "orthanc-last-failure": "2026-01-01T12:00:03.000Z",
        "nats-msg-id": "id-1:dead:one:S.1.2",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }


@pytest.mark.parametrize(
    ("rule", "kind", "mark", "headers"),
    [
        ("", "nats", 1, said()),
        ("", "kafka", b"another", said()),
        ("S8", "nats", 1, said(nats_msg_id="id-1:dead:S.1.2")),
        ("S9", "kafka", b"key", said()),
        ("S6", "rabbitmq", 1, said(orthanc_exception="no patient called private-1")),
        ("S6", "rabbitmq", 1, said(orthanc_last_failure="2026-01-01T12:00:00.000Z")),
        ("S6", "rabbitmq", 1, said(orthanc_attempts="03")),
        ("S4", "rabbitmq", 1, said(content_type="application/json")),
    ],
)
def test_a_dead_letter_is_judged_by_its_headers_and_its_key(
    rule: str, kind: str, mark: object, headers: dict[str, str]
) -> None:
    event = Outgoing("id-1", "main", "study", "stable", "key", "00", STRUCTURED, b"{}")
    verdicts = Verdicts(rules_of(kind))
    expected = Expected(event, "one", "orthanc.events", "ce-", 3, failed=True, secret="private-1")
    judge(verdicts, letter_of(DeadLetter(Incoming("orthanc.events", b"{}", headers), mark)), expected)
    assert [*verdicts.wrong] == ([rule] if rule else [])


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
    *plain, odd, also_odd = sent
    bridge, consumers = plain[: 2 * len(TYPES)], plain[2 * len(TYPES) :]
    assert [f"{one.level}.{one.verb}" for one in bridge[::2]] == [one.name for one in TYPES]
    assert [f"{one.level}.{one.verb}" for one in consumers[::2]] == [one.name for one in DERIVED]
    assert all("east%20wing" in played.expected[one.id]["source"] for one in (odd, also_odd))
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
        (["--broker", "http://127.0.0.1", "--", "true"], "the broker is no URL of a broker"),
        (["--broker", "nats://127.0.0.1:1", "--patience", "0", "--", "true"], "--patience 0 is too short"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORTHANC_EVENTS_BROKER", raising=False)
    assert main(["conformance", *arguments]) == 2
    assert wrong in capsys.readouterr().err
