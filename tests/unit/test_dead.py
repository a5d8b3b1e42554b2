"""The dead letters of a consumer, and the commands that work with them, on a broker in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from orthanc_events_bridge import transports
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.consumers.dead import Choice, again, letter_of, redrive, select
from orthanc_events_bridge.errors import RefusedError
from orthanc_events_bridge.transports.base import DeadLetter, Incoming, PublishError
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport
from orthanc_events_bridge.transports.options import MemoryOptions

NOW = 1_800_000_000.0
WHY = {
    "content-type": "application/cloudevents+json",
    "orthanc-event-id": "id-0",
    "orthanc-consumer": "one",
    "orthanc-address": "orthanc.events.main.study.stable.07",
    "orthanc-attempts": "3",
    "orthanc-operation": "retry",
    "orthanc-reason": "failed 3 times of 3",
    "orthanc-exception": "ValueError",
    "orthanc-first-failure": "2027-01-15T06:00:00.000Z",
    "orthanc-last-failure": "2027-01-15T07:00:00.000Z",
    "nats-msg-id": "id-0",
    "x-own": "dropped with the brokers' own",
    "own": "kept",
}


def body(number: int = 0, name: str = "study.stable") -> bytes:
    event = {
        "specversion": "1.0",
        "id": f"id-{number}",
        "source": "urn:orthanc",
        "type": f"io.orthanc-events.{name}.v1",
        "partitionkey": "study-1",
        "data": {"patient": "Doe^Jane"},
    }
    return json.dumps(event).encode()


def message(number: int = 0, name: str = "study.stable", **more: str) -> Incoming:
    changed = {key.replace("_", "-"): value for key, value in more.items()}
    return Incoming("dead.one", body(number, name), {**WHY, "orthanc-event-id": f"id-{number}", **changed}, "5")


def test_what_is_said_of_one() -> None:
    letter = letter_of(DeadLetter(message(), None))
    assert (letter.id, letter.type, letter.attempts, letter.age(NOW)) == ("id-0", "study.stable", 3, 3600.0)
    unreadable = letter_of(DeadLetter(Incoming("a", b"\xff", {}), None))
    assert (unreadable.type, unreadable.attempts, unreadable.age(NOW)) == ("", 0, None)
    assert len(unreadable.id) == 32


@pytest.mark.parametrize(
    ("choice", "fits"),
    [
        (Choice(), True),
        (Choice(ids=("id-0",)), True),
        (Choice(ids=("id-1",)), False),
        (Choice(reason="FAILED 3"), True),
        (Choice(reason="failed ? times of *"), True),
        (Choice(reason="failed*of"), False),
        (Choice(type="study.*"), True),
        (Choice(type="job.*"), False),
        (Choice(older=3600), True),
        (Choice(older=3601), False),
        (Choice(newer=3600), True),
        (Choice(newer=3599), False),
        (Choice(type="study.*", newer=1), False),
    ],
)
def test_choosing(choice: Choice, fits: bool) -> None:
    assert choice.fits(letter_of(DeadLetter(message(), None)), NOW) is fits
    ageless = letter_of(DeadLetter(message(orthanc_last_failure=""), None))
    assert not Choice(older=1).fits(ageless, NOW) and not Choice(newer=1).fits(ageless, NOW)


def test_it_is_sent_again_as_it_was_and_its_attempts_begin_anew() -> None:
    sent = again(letter_of(DeadLetter(message(), None)))
    assert (sent.id, sent.body, sent.key, sent.content_type) == ("id-0", body(), "study-1", WHY["content-type"])
    assert (sent.site, sent.level, sent.verb, sent.partition, sent.attributes) == ("main", "study", "stable", "07", ())
    assert dict(sent.headers) == {
        "own": "kept",
        "orthanc-operation": "redrive",
        "orthanc-address": WHY["orthanc-address"],
    }
    inbox = dict(sent.in_inbox("one", "elsewhere").headers)
    assert inbox["orthanc-address"] == WHY["orthanc-address"] and inbox["orthanc-consumer"] == "one"
    later = again(letter_of(DeadLetter(message(orthanc_last_failure="2027-01-16T07:00:00.000Z"), None)))
    assert sent.dedupe.startswith("id-0:redrive:") and later.dedupe != sent.dedupe


@pytest.mark.parametrize("prefix", ["ce-", "ce_"])
def test_binary_mode_stays_binary(prefix: str) -> None:
    attributes = {"specversion": "1.0", "id": "id-9", "source": "urn:a", "type": "io.x.study.stable.v1"}
    headers = {f"{prefix}{name}": value for name, value in attributes.items()}
    headers |= {f"{prefix}datacontenttype": "application/json", "content-type": "application/json"}
    sent = again(letter_of(DeadLetter(Incoming("a", b"{}", headers), None)))
    assert dict(sent.attributes) == attributes
    assert sent.content_type == "application/json" and sent.body == b"{}" and sent.id == "id-9"
    assert [name for name, _ in sent.headers] == ["orthanc-operation", "orthanc-address"]


def filled(*messages: Incoming) -> Broker:
    broker = Broker()
    broker.dead["one"] = list(messages)
    return broker


def test_what_the_inbox_refuses_stays_a_dead_letter() -> None:
    broker = filled(message(0), message(1), message(2))
    broker.refuse = lambda event: RefusedError("full") if event.id == "id-1" else None

    async def run() -> None:
        transport = MemoryTransport(MemoryOptions(), broker)
        await transport.connect()
        letters, inbox = await transport.dead_letters("one"), transport.inbox("one")
        await inbox.connect()
        chosen = [one async for one in select(letters, Choice(), NOW)]
        with pytest.raises(PublishError):
            await redrive(letters, inbox, chosen)

    asyncio.run(run())
    assert [letter_of(DeadLetter(one, None)).id for one in broker.dead["one"]] == ["id-1", "id-2"]
    assert [one.headers["orthanc-event-id"] for one in broker.inboxes["one"]] == ["id-0"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    for name in ("ORTHANC_EVENTS_BROKER", "ORTHANC_EVENTS_CONSUMER"):
        monkeypatch.delenv(name, raising=False)

    def run(broker: Broker, *arguments: str) -> int:
        monkeypatch.setattr(transports, "create", lambda options: MemoryTransport(MemoryOptions(), broker))
        return main(["dlq", arguments[0], "--consumer", "one", "--broker", "nats://h", *arguments[1:]])

    return run


def test_the_list_shows_nothing_of_the_data(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broker = filled(message(0), message(1, "job.failed"))
    assert command(broker, "list") == 0
    said = capsys.readouterr().out
    assert "FAILED LAST" in said and "failed 3 times of 3 (ValueError)" in said and "Doe" not in said
    assert command(broker, "list", "--type", "job.*", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["id"] == "id-1" and row["attempts"] == 3 and row["address"] == WHY["orthanc-address"]
    assert command(filled(), "list") == 0
    assert capsys.readouterr().out == "consumer one: no dead letters\n"


def test_show_prints_bodies_only_when_asked(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broker = filled(message(0))
    assert command(broker, "show") == 0
    said = capsys.readouterr().out
    assert "orthanc-reason: failed 3 times of 3" in said and "Doe" not in said and "patient data" in said
    assert command(broker, "show", "--data") == 0
    assert "Doe^Jane" in capsys.readouterr().out
    assert command(broker, "show", "--json") == 0
    assert "body_base64" not in capsys.readouterr().out


def test_redrive_and_discard(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broker = filled(message(0), message(1, "job.failed"), message(2))
    assert command(broker, "redrive", "--type", "study.*", "--dry-run") == 0
    assert "2 would be given" in capsys.readouterr().out and len(broker.dead["one"]) == 3
    assert command(broker, "redrive", "--type", "study.*") == 0
    assert "2 given to consumer one again" in capsys.readouterr().out
    assert [one.headers["orthanc-operation"] for one in broker.inboxes["one"]] == ["redrive"] * 2
    assert command(broker, "discard", "--all", "--dry-run") == 0
    assert len(broker.dead["one"]) == 1
    assert command(broker, "discard", "--all", "--yes") == 0
    assert broker.dead["one"] == []


@pytest.mark.parametrize("action", ["redrive", "discard"])
def test_without_a_choice_nothing_is_done(command: Any, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    broker = filled(message(0))
    assert command(broker, action) == 2
    assert "--all" in capsys.readouterr().err and len(broker.dead["one"]) == 1


def test_deleting_has_to_be_confirmed(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broker = filled(message(0))
    assert command(broker, "discard", "--all") == 2
    assert "--yes" in capsys.readouterr().err and len(broker.dead["one"]) == 1


def test_a_broker_that_is_down_is_one_sentence(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broker = filled(message(0))
    broker.up = False
    assert command(broker, "list") == 1
    assert capsys.readouterr().err == "orthanc-events: the broker is down (start it again)\n"
    assert main(["dlq", "list"]) == 2
    assert "--consumer NAME" in capsys.readouterr().err
