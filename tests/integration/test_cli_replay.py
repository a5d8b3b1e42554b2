"""``orthanc-events replay`` and ``backfill``: what they print, how they end, what they say of wrong input."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthanc_events_bridge.bridge.state import Progress, State
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.testing.processes import wait_until
from tests.integration.replay_tools import LONG, Command

pytestmark = pytest.mark.integration

SOURCE = "source: urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
SHAPE = {
    "source": "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
    "type_prefix": "io.orthanc-events",
    "schema_base": "urn:orthanc-events:schema:",
    "site": "main",
}
MEMORY = f"{SOURCE}\ntransports:\n  - type: memory\n"
SEVERAL = f"""\
{SOURCE}
events: {{exclude: ["job.*"]}}
transports:
  - type: memory
  - {{type: memory, name: other, events: {{include: ["study.*"]}}}}
  - {{type: memory, name: fresh}}
  - {{type: webhook, url: "http://127.0.0.1:9/", probe: false}}
"""


class Place:
    """An outbox with twelve rows, of which its transports were sent ten; and the command on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.folder = Folder(folder / "outbox")
        self.folder.prepare()
        self.config = folder / "orthanc-events.yaml"
        self.config.write_text(MEMORY, "utf-8")
        self.command = Command(self.folder.path, self.config)
        self.writer = OutboxWriter(self.folder.outbox, lambda: time.time() - 3600)
        facts = [Fact("NewStudy", "study", f"study-{n}", 5, n, "20261126T000000", {"patient": "p"}) for n in range(8)]
        facts += [Fact("JobSubmitted", "job", f"job-{n}", 5) for n in range(4)]
        state = State(self.folder.bridge)
        number = state.number_settings(SHAPE)
        self.writer.keep_settings(number, json.dumps(SHAPE))
        self.writer.append(facts, 42, number, lambda level, resource: None)
        with state.together():
            for name in ("memory", "other", "webhook"):
                state.progress(name, self.writer.recorder)
                state.save(name, Progress(10, 40, "", 10))
        state.close()

    def run(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        """Output and errors of a command, run in this process, that ends with this exit code."""
        self._capsys.readouterr()
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            found = int(ended.code or 0)
        printed = self._capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        assert found == code, printed
        return printed.out, printed.err

    def fails(self, *arguments: object, code: int = 1) -> str:
        """What a command says that can't be done."""
        out, err = self.run(*arguments, code=code)
        assert out == ""
        return err

    def replays(self) -> list[str]:
        return sorted(path.stem for path in self.folder.replays.glob("*.json"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Place]:
    for name in list(os.environ):
        if name.startswith("ORTHANC_EVENTS_"):
            monkeypatch.delenv(name)
    made = Place(tmp_path, capsys)
    monkeypatch.setenv("ORTHANC_EVENTS_OUTBOX", str(made.folder.path))
    monkeypatch.setenv("ORTHANC_EVENTS_CONFIG", str(made.config))
    yield made
    made.writer.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--since TIME, --from POSITION or --all"),
        (("--all",), "--to CONSUMER or --everyone"),
        (("--all", "--since", "2h", "--to", "one"), "not allowed with"),
        (("--all", "--to", "one", "--everyone"), "not allowed with"),
        (("--all", "--everyone"), "--yes"),
        (("--since", "yesterday", "--to", "one"), "is no time"),
        (("--since", "2h ago", "--to", "one"), "is no time"),
        (("--since", "90", "--to", "one"), "is no time"),
        (("--since", "2999-01-01", "--to", "one"), "yet to come"),
        (("--from", "-3", "--to", "one"), "--from"),
        (("--from", "x", "--to", "one"), "is no position"),
        (("--all", "--to", "one", "--rate", "0"), "is no rate"),
        (("--all", "--to", "one", "--rate", "fast"), "is no rate"),
        (("--all", "--to", "one", "--type", ""), "--type"),
        (("--resume", "--to", "one"), "--to can't be given with --resume"),
        (("--resume", "x"), "invalid int value"),
    ],
)
def test_wrong_arguments_are_named(place: Place, arguments: tuple[str, ...], says: str) -> None:
    err = place.fails("replay", *arguments, code=2)
    assert says in err and "usage: orthanc-events replay" in err
    assert not place.folder.replays.exists()


def test_what_cannot_be_done_is_named_and_begins_nothing(place: Place) -> None:
    assert "there is no transport x (there are: memory)" in place.fails(
        "replay", "--all", "--to", "one", "--transport", "x"
    )
    assert "can't be the name of a consumer" in place.fails("replay", "--all", "--to", "a.b")
    assert "every replay is done" in place.fails("replay", "--resume")
    assert "every replay is done" in place.fails("replay", "--resume", "5")
    place.config.write_text(SEVERAL, "utf-8")
    assert "--transport, one of: memory, other, fresh, webhook" in place.fails("replay", "--all", "--to", "one")
    assert "no inbox" in place.fails("replay", "--all", "--to", "one", "--transport", "webhook")
    assert "was sent nothing of this outbox yet" in place.fails(
        "replay", "--all", "--to", "one", "--transport", "fresh"
    )
    assert not place.replays()
    place.config.write_text("transports: 5\n", "utf-8")
    assert "transports" in place.fails("replay", "--all", "--to", "one", code=2)


def test_a_paused_transport_is_left_alone(place: Place) -> None:
    state = State(place.folder.bridge)
    state.pause("memory")
    state.close()
    assert "is paused (`orthanc-events transports resume memory` first)" in place.fails(
        "replay", "--all", "--to", "one"
    )


def test_a_dry_run_counts_what_the_transport_was_sent(place: Place) -> None:
    out, err = place.run("replay", "--all", "--dry-run")
    assert out.splitlines() == [
        "TYPE           EVENTS",
        "job.submitted  2",
        "study.created  8",
        "all            10",
        "10 events would be sent by transport memory",
    ]
    assert err == "" and not place.folder.replays.exists()


def test_filters_of_the_configuration_and_of_the_command_apply_together(place: Place) -> None:
    place.config.write_text(SEVERAL, "utf-8")

    def counted(*arguments: str) -> dict[str, int]:
        out, _ = place.run("replay", "--dry-run", "--json", *arguments)
        events: dict[str, int] = json.loads(out)["events"]
        return events

    assert counted("--all", "--transport", "memory") == {"study.created": 8}
    assert counted("--from", "5", "--transport", "other") == {"study.created": 4}
    assert counted("--all", "--transport", "memory", "--type", "series.*", "--type", "study.c*") == {"study.created": 8}
    assert counted("--all", "--transport", "memory", "--type", "series.*") == {}
    assert counted("--since", "30m", "--transport", "memory") == {}
    assert counted("--since", "2h", "--transport", "memory", "--study", "study-3") == {"study.created": 1}


def test_a_replay_says_what_it_has_done_and_leaves_nothing(place: Place) -> None:
    out, err = place.run("replay", "--all", "--to", "one")
    assert "10 events were sent to one's inbox by transport memory" in out
    assert err.startswith("replay 1") and "one's inbox" in err
    out, _ = place.run("replay", "--all", "--everyone", "--yes", "--json")
    document = json.loads(out)
    assert document["done"] and document["to"] is None
    assert (document["events"], document["refused"], document["gone"]) == (
        {"job.submitted": 2, "study.created": 8},
        0,
        0,
    )
    assert list(place.folder.replays.iterdir()) == []


def test_what_is_gone_is_said(place: Place) -> None:
    place.writer.detach(10, limit=4)
    _, err = place.run("replay", "--since", "3d", "--to", "one")
    assert "the outbox keeps what was recorded since" in err
    out, _ = place.run("replay", "--from", "2", "--to", "one")
    assert "6 events were sent" in out and "3 rows were deleted from the outbox before they could be looked at" in out


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_everyone_is_asked_for_on_a_terminal(place: Place, answer: str, code: int) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer.encode())
        done = subprocess.run(
            [sys.executable, "-m", "orthanc_events_bridge", "replay", "--all", "--everyone"],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "get these events a second time. Go on? [y/N]" in done.stdout
    assert ("10 events were sent to everyone" in done.stdout) == (code == 0)
    assert ("nothing was sent" in done.stderr) == (code == 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_interrupted_and_gone_on_with(place: Place, number: signal.Signals) -> None:
    process = place.command.begin("replay", "--all", "--to", "one", "--rate", "2")
    try:

        def some_are_sent() -> bool:
            return any(json.loads(path.read_text("utf-8"))["sent"] for path in place.folder.replays.glob("*.json"))

        assert wait_until(some_are_sent, LONG, every=0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    (replay,) = place.replays()
    assert f"interrupted; go on with `orthanc-events replay --resume {replay}`" in err
    assert "events were sent" in out
    before = json.loads((place.folder.replays / f"{replay}.json").read_text("utf-8"))
    assert 0 < before["position"] < 10
    out, _ = place.run("replay", "--resume", "--json")
    assert json.loads(out)["events"] == {"job.submitted": 2, "study.created": 8}
    assert not place.replays()


def test_of_several_that_were_interrupted_one_is_named(place: Place) -> None:
    for _ in range(2):
        before = len(place.replays())
        process = place.command.begin("replay", "--all", "--to", "one", "--rate", "0.01")
        assert wait_until(lambda before=before: len(place.replays()) > before, LONG, every=0.05)  # type: ignore[misc]
        busy = place.replays()[-1]
        assert "another process is at work" in place.fails("replay", "--resume", busy, code=75)
        process.kill()
        process.communicate()
    first, second = place.replays()
    assert f"2 replays were interrupted (say which: {first}, {second})" in place.fails("replay", "--resume")
    place.run("replay", "--resume", first)
    assert place.replays() == [second]


# -- backfill ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("--level", "job"), ("--since", "soon"), ("--stop", "--level")])
def test_wrong_arguments_of_a_backfill_are_named(place: Place, arguments: tuple[str, ...]) -> None:
    assert "usage: orthanc-events backfill" in place.fails("backfill", *arguments, code=2)


def test_a_backfill_waits_for_the_bridge(place: Place) -> None:
    out, _ = place.run("backfill", "--level", "series")
    assert "the bridge is not running" in out
    state = State(place.folder.bridge)
    (command,) = state.commands()
    assert (command.command, command.argument["level"], command.argument["stop"]) == ("backfill", "series", False)
    state.close()
