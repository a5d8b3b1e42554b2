"""What `orthanc-events status` and `tail` print for people."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from orthanc_events_bridge.cli import _bytes, _event_line, _status_text
from orthanc_events_bridge.status import iso


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


def test_everything_is_shown() -> None:
    lines = _status_text(document()).splitlines()
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
    lines = _status_text(document(transports=[document()["transports"][0], long])).splitlines()
    head, first, second = lines[5:8]
    assert head.index("POSITION") == first.index("1001200") == second.index("1001200")
    assert all(line == line.rstrip() for line in lines)


def test_nothing_is_running_yet() -> None:
    text = _status_text(
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
    text = _status_text(document(transports=[{**stored, "set_aside": 0, "gap": None}]))
    assert text.splitlines()[-1].split() == ["old", "-", "not", "configured", "0", "5", "0", "-", "0"]


def test_what_is_wrong_is_shown_with_its_remedy() -> None:
    transport = {
        **document()["transports"][0],
        "last_error": {
            "at": "then",
            "count": 7,
            "message": "the stream is full",
            "remedy": "raise its limits",
        },
        "gap": [5, 9],
    }
    text = _status_text(
        document(
            capture={"state": "paused", "problem": {"message": "the disk is full", "at": "then"}},
            bridge={
                "running": False,
                "restarts": 3,
                "last_exit": {"at": "then", "reason": "killed by SIGKILL"},
            },
            transports=[transport],
        )
    )
    assert "            the disk is full" in text
    assert "            last exit then: killed by SIGKILL" in text
    assert "research: last error then (7 times): the stream is full" in text
    assert "          what to do: raise its limits" in text
    assert "research: LOST its place: positions 5 to 9 were given up undelivered" in text


def test_remedy_is_left_out_where_there_is_none() -> None:
    error = {"at": "then", "count": 1, "message": "gone", "remedy": ""}
    assert "what to do" not in _status_text(document(transports=[{**document()["transports"][0], "last_error": error}]))


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
def test_bytes(count: int, text: str) -> None:
    assert _bytes(count) == text


def test_line_of_an_event_shows_no_data() -> None:
    event = {
        "time": "2026-11-23T20:06:27Z",
        "type": "t.study.stable.v1",
        "subject": "studies/x",
        "data": "CANARY",
    }
    line = _event_line(json.dumps(event).encode())
    assert line.split() == ["2026-11-23T20:06:27Z", "t.study.stable.v1", "studies/x"]


def test_line_of_an_event_without_subject() -> None:
    line = _event_line(b'{"time": "now", "type": "t.server.started.v1"}')
    assert line.split() == ["now", "t.server.started.v1"] and line == line.rstrip()


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"5", b"{}", b"\xff\xfe", b'{"time": 5, "type": "x"}'])
def test_line_of_something_else(body: bytes) -> None:
    line = _event_line(body)
    assert line and "\n" not in line


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
