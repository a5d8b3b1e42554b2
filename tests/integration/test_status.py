"""To be seen: the status over REST and by the command line, `tail`, and a log that a long fault can't fill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from orthanc_events_bridge import __version__
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from tests.integration.whole import messages, started

pytestmark = pytest.mark.integration

#: A Python for the bridge whose relay lives so many times faster: in its waits, and in how often it repeats itself.
FASTER = 600
HURRIED = f"""\
#!/bin/sh
exec {sys.executable} -c '
import sys
from orthanc_events_bridge.bridge import relay
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.logs import Repeats
relay._LONGEST_WAIT /= {FASTER}
relay._FIRST_WAIT /= {FASTER}
relay.Repeats = lambda now: Repeats(lambda: now() * {FASTER})
sys.exit(main(sys.argv[4:]))
' "$@"
"""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orthanc_events_bridge", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def recently(text: str) -> bool:
    """Whether it is a time in UTC, and of this test."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    return datetime.now(UTC) - datetime.fromisoformat(text) < timedelta(minutes=2)


def work(line: Line) -> dicom.Study:
    study = dicom.make_study(instances=2)
    for instance in study:
        line.orthanc.upload(instance.data)
    line.settle()
    return study


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """One line for the tests that don't break it."""
    with started(tmp_path_factory.mktemp("status") / "line", stable_age=1000) as made:
        yield made


def test_the_status_says_how_everything_is(line: Line) -> None:
    work(line)
    tip = line.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"]
    document = line.orthanc.get("/orthanc-events/status")
    assert document.keys() == {"version", "capture", "bridge", "outbox", "log", "transports", "set_aside"}
    assert document["version"] == __version__
    assert document["capture"]["state"] == "following"
    assert document["capture"]["problem"] is None
    bridge = document["bridge"]
    assert bridge["running"] is True
    assert bridge["pid"] in line.orthanc.children()
    assert recently(bridge["since"])
    assert isinstance(bridge["restarts"], int)
    outbox = document["outbox"]
    assert outbox["folder"] == str(line.orthanc.outbox)
    assert outbox["rows"] == outbox["last_position"] == len(messages(line.broker.url))
    assert recently(outbox["oldest"])
    assert 10_000 < outbox["bytes"] < 200_000
    assert document["log"] == {"cursor": tip}
    (transport,) = document["transports"]
    assert transport["name"] == transport["type"] == "nats"
    assert transport["state"] == "connected"
    assert recently(transport["since"])
    assert transport["position"] == transport["published"] == outbox["last_position"]
    assert transport["pending"] == 0
    assert isinstance(transport["rate"], float)
    assert (transport["last_error"], transport["gap"], transport["set_aside"]) == (None, None, 0)
    assert document["set_aside"] == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_status_can_only_be_read(line: Line, method: str) -> None:
    answer = line.orthanc.client.request(method, "/orthanc-events/status", content=b"" if method != "DELETE" else None)
    assert answer.status_code == 405


def test_a_killed_bridge_is_started_again_and_the_status_says_so(line: Line) -> None:
    before = line.status()["bridge"]
    os.kill(line.bridge_pid(), signal.SIGKILL)
    after = line.wait(lambda document: document["bridge"]["pid"] not in (None, before["pid"]))["bridge"]
    assert after["restarts"] == before["restarts"] + 1
    assert after["last_exit"]["reason"] == "killed by SIGKILL"
    assert recently(after["last_exit"]["at"])
    assert "the bridge has stopped: killed by SIGKILL; it is started again" in line.orthanc.log_text()
    work(line)


def test_the_command_line_shows_the_same_from_the_folder_alone(line: Line, tmp_path: Path) -> None:
    work(line)
    folder = str(line.orthanc.outbox)
    ways: dict[str, tuple[tuple[object, ...], Mapping[str, str]]] = {
        "--outbox": (("--outbox", folder), {}),
        "the environment": ((), {"ORTHANC_EVENTS_OUTBOX": folder}),
        "Orthanc's configuration": (("--orthanc-config", line.orthanc.write_config()), {}),
    }
    rest = line.status()
    for way, (arguments, environment) in ways.items():
        run = command("status", "--json", *arguments, **environment)
        assert (run.returncode, run.stderr) == (0, ""), way
        document = json.loads(run.stdout)
        for part in ("version", "outbox", "log", "set_aside"):
            assert document[part] == rest[part], way
        assert document["bridge"]["pid"] == rest["bridge"]["pid"]
        assert document["transports"][0]["position"] == rest["transports"][0]["position"]
        run = command("status", *arguments, **environment)
        assert run.returncode == 0
        for text in (folder, "following", "running since", "TRANSPORT", "connected"):
            assert text in run.stdout, way
        assert re.search(r"^nats +nats +connected +\d+ +0 +\d+", run.stdout, re.MULTILINE)


class Tail:
    """``orthanc-events tail`` as a process, and the lines that it has printed."""

    def __init__(self, line: Line, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orthanc_events_bridge", "tail", "--config", str(line.config), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that a shell runs in the background are started with SIGINT ignored, and so would this be.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)

    def has(self, text: str) -> bool:
        """Whether a text has been printed."""
        return any(text in line for line in self.lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self.lines.append(text.rstrip("\n"))

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._reader.join()
            assert self._process.stdout is not None and self._process.stderr is not None
            self._process.stdout.close()
            said = self._process.stderr.read()
            self._process.stderr.close()
        assert (code, said) == (0, "")


def test_tail_prints_events_live_and_from_the_oldest(line: Line) -> None:
    before = len(messages(line.broker.url))
    with Tail(line) as live, Tail(line, "--oldest") as oldest, Tail(line, "--oldest", "--json") as whole:
        assert wait_until(lambda: len(oldest.lines) >= before and len(whole.lines) >= before, 15)
        for _ in range(50):  # until the live one has subscribed
            study = work(line)
            if wait_until(partial(live.has, study.id), 0.5):
                break
        told = messages(line.broker.url)
        assert wait_until(lambda: len(oldest.lines) >= len(told) <= len(whole.lines), 15)
    wanted = [
        f"{event['time']:<24}  {event['type']:<45}  {event.get('subject', '')}".rstrip()
        for event in (message.event for message in told)
    ]
    assert oldest.lines[: len(wanted)] == wanted
    assert [json.loads(text) for text in whole.lines[: len(told)]] == [message.event for message in told]
    assert 0 < len(live.lines) <= len(wanted) - before, "nothing of before"
    assert live.lines[0] in wanted[before:]


def test_a_broker_that_is_down_for_an_hour_is_a_few_lines(tmp_path: Path) -> None:
    program = tmp_path / "hurried-python"
    program.write_text(HURRIED, "utf-8")
    program.chmod(0o755)
    environment = {"ORTHANC_EVENTS_PYTHON": str(program)}
    with started(tmp_path / "line", environment=environment, settings="drain_timeout: 100ms\n") as line:
        line.settle()
        line.broker.kill()
        line.orthanc.upload(dicom.make_study().instances[0].data)
        line.wait(lambda document: document["transports"][0]["state"] == "not connected")
        began, first = time.monotonic(), line.status()["transports"][0]["last_error"]
        line.wait(lambda _: time.monotonic() > began + 3600 / FASTER)
        error = line.status()["transports"][0]["last_error"]
        assert error["count"] > first["count"] + 300, "it has tried and tried"
        assert "can't be reached" in error["message"]
        assert error["remedy"] == "start NATS, or check `servers`"
        assert recently(error["at"])
        told = [text for text in line.orthanc.log_text().splitlines() if "orthanc-events: " in text and text[0] in "EW"]
        print(f"\n{error['count']} attempts, {len(told)} lines")
        assert 1 <= len(told) <= 20, told
        kinds = {text.partition("orthanc-events: ")[2].partition(" (and ")[0] for text in told}
        assert len(kinds) <= 2, "lost, and can't be reached"
        assert "times more since the last line about it" in told[-1]


def test_the_status_is_shown_while_orthanc_is_down(tmp_path: Path) -> None:
    with started(tmp_path / "line", settings="drain_timeout: 100ms\n") as line:
        work(line)
        line.broker.kill()
        line.orthanc.upload(dicom.make_study().instances[0].data)
        line.wait(lambda document: document["transports"][0]["pending"] > 0 and document["transports"][0]["last_error"])
        pending = line.status()["transports"][0]["pending"]
        line.orthanc.stop()
        document: dict[str, Any] = json.loads(command("status", "--json", "--outbox", line.orthanc.outbox).stdout)
        assert document["capture"]["state"] == "stopped"
        assert document["bridge"]["running"] is False
        assert document["transports"][0]["pending"] > pending, "and OrthancStopped"
        assert document["transports"][0]["state"] == "bridge not running"
        table = command("status", "--outbox", line.orthanc.outbox).stdout
        assert "NOT running" in table
        assert "what to do: start NATS" in table
