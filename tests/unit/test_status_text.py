"""What `orthanc-events status` and `tail` print for people."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from orthanc_events_bridge.cli_status import in_bytes, status_text
from orthanc_events_bridge.cli_tail import event_line
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Incoming


def document(**parts: Any) -> dict[str, Any]:
    return {
        "version": "0.1",
        "capture": {"state": "following", "dropped": 0, "vanished": 3, "problem": None},
        "bridge": {"running": True, "since": "2026-11-23T20:06:27.000Z", "restarts": 2, "last_exit": None},
        "outbox": {
            "folder": "/var/lib/orthanc/orthanc-events",
            "recorder": "r",
            "rows": 1234,
            "bytes": 5 * 1024 * 1024,
            "oldest": "2026-11-22T20:06:27.000Z",
            "last_position": 1_001_234,
        },
        "log": {"cursor": 815},
        "transports": [
            {
                "name": "research",
                "type": "nats",
                "state": "connected",
                "since": "2026-11-23T20:06:28.000Z",
                "configured": True,
                "paused": None,
                "position": 1_001_200,
                "pending": 34,
                "published": 99,
                "rate": 12.5,
                "set_aside": 0,
                "last_error": None,
                "gap": None,
            }
        ],
        "set_aside": [],
        **parts,
    }


def test_an_orthanc_without_the_plugin_is_named() -> None:
    capture = {"state": "not connected", "orthanc": "https://pacs", "problem": {"message": "it is away", "at": ""}}
    lines = status_text(document(capture=capture)).splitlines()
    assert lines[2].startswith("capture     not connected, ")
    assert lines[3:5] == ["            of https://pacs, followed over HTTP", "            it is away"]


def test_everything_is_shown() -> None:
    lines = status_text(document()).splitlines()
    assert lines[:4] == [
        "outbox      /var/lib/orthanc/orthanc-events",
        "            1234 rows, 5.0 MiB, oldest 2026-11-22T20:06:27.000Z",
        "capture     following, log cursor 815, dropped 0, vanished 3",
        "bridge      running since 2026-11-23T20:06:27.000Z, restarts 2",
    ]
    assert re.split(" {2,}", lines[5]) == [
        "TRANSPORT",
        "TYPE",
        "STATE",
        "POSITION",
        "PENDING",
        "PUBLISHED",
        "RATE/S",
        "SET ASIDE",
    ]
    assert lines[6].split() == ["research", "nats", "connected", "1001200", "34", "99", "12.5", "0"]
    assert len(lines) == 7


def test_columns_are_under_their_heads() -> None:
    long = {
        **document()["transports"][0],
        "name": "a-much-longer-name-than-the-others",
        "state": "needs attention",
    }
    lines = status_text(document(transports=[document()["transports"][0], long])).splitlines()
    head, first, second = lines[5:8]
    assert head.index("POSITION") == first.index("1001200") == second.index("1001200")
    assert all(line == line.rstrip() for line in lines)


def test_nothing_is_running_yet() -> None:
    text = status_text(
        document(
            capture={},
            bridge={"running": False},
            outbox={"folder": "/x", "rows": 0, "bytes": 0, "oldest": None},
            log={"cursor": None},
            transports=[],
        )
    )
    assert "NOT running, restarts 0" in text
    assert "0 rows, 0 B, oldest -" in text
    assert "not seen yet, log cursor None" in text


def test_transport_that_the_bridge_does_not_know_any_more() -> None:
    stored = {"name": "old", "state": "not configured", "position": 0, "pending": 5, "published": 0}
    text = status_text(document(transports=[{**stored, "set_aside": 0, "gap": None}]))
    assert text.splitlines()[6].split() == ["old", "-", "not", "configured", "0", "5", "0", "-", "0"]


def told(**different: Any) -> list[str]:
    """What is said below the table of a transport."""
    return status_text(document(transports=[{**document()["transports"][0], **different}])).splitlines()[7:]


FULL = {"at": "then", "count": 7, "message": "the stream is full", "remedy": "raise its limits"}


def test_what_is_wrong_is_shown() -> None:
    text = status_text(
        document(
            capture={"state": "paused", "problem": {"message": "the disk is full", "at": "then"}},
            bridge={
                "running": False,
                "restarts": 3,
                "last_exit": {"at": "then", "reason": "killed by SIGKILL"},
            },
        )
    )
    assert "            the disk is full" in text
    assert "            last exit then: killed by SIGKILL" in text


@pytest.mark.parametrize("state", ["refused", "not connected", "needs attention"])
def test_fault_says_what_since_when_and_what_to_do(state: str) -> None:
    assert told(state=state, since="long ago", last_error=FULL) == [
        f"research: {state} since long ago: the stream is full",
        "          tried: 7 times like this, last at then",
        "          what to do: raise its limits",
    ]


def test_fault_that_is_over_asks_for_nothing() -> None:
    assert told(state="connected", last_error=FULL) == ["research: last error then (7 times): the stream is full"]


def test_last_fault_is_shown_with_its_remedy_while_nobody_tries() -> None:
    assert told(state="bridge not running", last_error=FULL) == [
        "research: last error then (7 times): the stream is full",
        "          what to do: raise its limits",
    ]


def test_remedy_is_left_out_where_there_is_none() -> None:
    assert len(told(state="refused", last_error={**FULL, "remedy": ""})) == 2


def test_pause_says_since_when_and_how_to_go_on() -> None:
    assert told(state="paused", paused="noon") == [
        "research: paused since noon; the outbox holds 34 rows",
        "          what to do: `orthanc-events transports resume research`, when it shall go on",
    ]


def test_transport_that_is_not_configured_any_more_says_what_it_holds_and_how_to_end_that() -> None:
    assert told(state="not configured", configured=False) == [
        "research: not configured any more; it keeps its place, and the outbox holds 34 rows",
        "          what to do: put it back, or `orthanc-events transports forget research`",
    ]


def test_gap_and_events_set_aside_are_shown() -> None:
    assert told(gap=[5, 9], set_aside=2) == [
        "research: LOST its place: positions 5 to 9 were given up undelivered",
        "research: 2 events are set aside: `orthanc-events set-aside` lists them",
    ]


def test_mistakes_of_a_changed_configuration_are_shown_while_the_last_good_one_applies() -> None:
    configuration = {"file": "/x.yaml", "since": "then", "mistakes": ["/x.yaml:3: site: is wrong; mend it"]}
    bridge = {**document()["bridge"], "configuration": configuration}
    text = status_text(document(bridge=bridge))
    assert (
        "            the configuration was changed and has mistakes; running on with the last good one:\n"
        "            /x.yaml:3: site: is wrong; mend it\n"
    ) in text
    assert "mistakes" not in status_text(document(bridge={**bridge, "running": False}))
    right = {**bridge, "configuration": {**configuration, "mistakes": []}}
    assert "mistakes" not in status_text(document(bridge=right))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2, "1.0 MiB"),
        (1024**3, "1.0 GiB"),
        (5000 * 1024**3, "5000.0 GiB"),
    ],
)
def testin_bytes(count: int, text: str) -> None:
    assert in_bytes(count) == text


# -- tail ----------------------------------------------------------------------------------------------------

SHAPE = {"source": "urn:x", "site": "main", "type_prefix": "t", "schema_base": "urn:s:"}
EVENT = {"specversion": "1.0", "id": "1", "source": "urn:x", "type": "t.study.stable.v1"}
STRUCTURED = {"content-type": "application/cloudevents+json"}


def message(event: object, headers: dict[str, str] = STRUCTURED) -> Incoming:
    return Incoming("address", json.dumps(event).encode(), headers)


def test_line_of_an_event_shows_no_data() -> None:
    event = {**EVENT, "time": "2026-11-23T20:06:27Z", "subject": "studies/x", "data": "CANARY"}
    assert event_line(message(event)).split() == ["2026-11-23T20:06:27Z", "t.study.stable.v1", "studies/x"]


def test_line_of_an_event_without_subject() -> None:
    line = event_line(message({**EVENT, "time": "now", "type": "t.server.started.v1"}))
    assert line.split() == ["now", "t.server.started.v1"] and line == line.rstrip()


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"5", b"{}", b"\xff\xfe", b'{"time": 5, "type": "x"}', b'{"specversion": "1.0"}']
)
def test_line_of_something_else(body: bytes) -> None:
    assert event_line(Incoming("address", body)) == "a message that is no CloudEvent"


def test_line_is_one_line_whatever_an_event_holds() -> None:
    line = event_line(message({**EVENT, "time": "a\nb", "subject": "\x1b[2J", "type": 5}))
    assert line.split() == ["a?b", "5", "?[2J"]


@pytest.mark.parametrize("prefix", ["ce-", "ce_"])
def test_binary_message_is_the_same_event_as_the_structured_one(prefix: str) -> None:
    row = OutboxRow(7, "StableStudy", "study", "r7", 5, 3, "20261123T200627", None, 6, 1, {"parents": {"patient": "p"}})
    structured, binary = to_outgoing(row, SHAPE, "recorder"), to_outgoing(row, SHAPE, "recorder", binary=True)
    headers = {"content-type": binary.content_type, "other": "1"}
    headers |= {f"{prefix}{name}": value for name, value in binary.attributes}
    whole = Incoming("a", structured.body, {"content-type": structured.content_type})
    parts = Incoming("a", binary.body, headers)
    assert event_of(parts) == event_of(whole) == json.loads(structured.body)
    assert event_line(parts) == event_line(whole)
    assert event_line(parts).split()[1:] == ["t.study.stable.v1", "studies/r7"]


def test_binary_message_with_other_content_or_none() -> None:
    headers = {f"ce-{name}": value for name, value in EVENT.items()}
    assert event_of(Incoming("a", b"", headers)) == EVENT
    spaced = b" %b \r\n\t" % json.dumps(EVENT).encode()
    assert event_of(Incoming("a", spaced)) == event_of(Incoming("a", spaced.lstrip())) == EVENT
    text = {**headers, "content-type": "text/plain"}
    assert event_of(Incoming("a", b"a b", text)) == {**EVENT, "datacontenttype": "text/plain", "data_base64": "YSBi"}


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1795464387083, "2026-11-23T20:06:27.083Z"),
        (1795464387083.9, "2026-11-23T20:06:27.083Z"),
    ],
)
def test_iso(milliseconds: float, text: str) -> None:
    assert iso(milliseconds) == text
