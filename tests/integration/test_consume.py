"""`orthanc-events consume` as a process: mistakes in one line, workers that are kept alive, an end in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

APP = """\
from orthanc_events_bridge.consumers import Consumer

app = Consumer("hello", broker={"type": "memory"}, drain=0.2)
other = 3

@app.on("server.started")
def hello(event):
    pass
"""

#: A consumer whose event is handled by something that never ends.
STUCK = """\
import asyncio, json, time
from orthanc_events_bridge import transports
from orthanc_events_bridge.consumers import Consumer, app as module
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport

broker = Broker()
event = {"specversion": "1.0", "id": "1", "source": "urn:a", "type": "io.x.server.started.v1", "data": {}}
content = json.dumps(event).encode()
broker.store(Outgoing("1", "main", "server", "started", "k", "00", "application/cloudevents+json", content))
module.create = lambda options: MemoryTransport(options, broker)
app = Consumer("stuck", broker={"type": "memory"}, start="oldest", drain=0.2)

@app.on("server.started")
def stuck(event):
    print("begun", flush=True)
    while True:
        time.sleep(1)

if __name__ == "__main__":
    app.run()
    print("left", flush=True)
"""

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Run]:
    started = []

    def begin(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def consume(start: Run, *arguments: str) -> subprocess.Popen[str]:
    return start("-m", "orthanc_events_bridge", "consume", *arguments)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothere:app", "there is no module nothere: looked for nothere.py or a package nothere/ in {folder}"),
        ("hello:nope", "{folder}/hello.py has no nope (there are: app)"),
        ("hello:other", "hello:other is no Consumer: its type is int (there are: app)"),
        ("hello.py", "'hello.py' names no consumer"),
        ("bad:app", "bad can't be imported: {folder}/bad.py:2 raises ZeroDivisionError"),
        ("worse:app", "worse can't be imported: {folder}/worse.py:1 raises SyntaxError"),
        ("needy:app", "needy can't be imported: {folder}/needy.py:1 needs the module nothing_like_it"),
        ("wrong:app", "concurrency: '0' is out of range"),
    ],
)
def test_each_mistake_is_one_line(start: Run, tmp_path: Path, target: str, words: str) -> None:
    (tmp_path / "hello.py").write_text(APP, "utf-8")
    (tmp_path / "bad.py").write_text("x = 0\n1 / x\n", "utf-8")
    (tmp_path / "worse.py").write_text("def (\n", "utf-8")
    (tmp_path / "needy.py").write_text("import nothing_like_it\n", "utf-8")
    (tmp_path / "wrong.py").write_text(APP.replace("drain", "concurrency=0, drain"), "utf-8")
    process = consume(start, target)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.count("\n") == 1 and words.format(folder=tmp_path) in said, said


def test_check_connects_and_leaves(start: Run, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(APP, "utf-8")
    process = consume(start, "hello", "--check")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out == "consumer hello: hello handles server.started\nmemory: a broker in memory: 0 events\n"


#: The same of an async handler that has something else called in a thread.
IN_THREAD = STUCK.replace(
    "def stuck(event):", "async def waits(event):\n    await asyncio.to_thread(stuck)\n\ndef stuck():"
)


@pytest.mark.parametrize("text", [STUCK, IN_THREAD], ids=["sync", "to_thread"])
@pytest.mark.parametrize("command", [["stuck.py"], ["-m", "orthanc_events_bridge", "consume", "stuck:app"]])
def test_a_thread_that_never_ends_does_not_keep_the_process(
    start: Run, tmp_path: Path, command: list[str], text: str
) -> None:
    (tmp_path / "stuck.py").write_text(text, "utf-8")
    process = start(*command)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"gives back what did not end within 0.2 s: {'waits' if text == IN_THREAD else 'stuck'}" in said
    assert "threads run on: stuck" in said or "handlers behind that run on: stuck" in said
    assert out == ("left\n" if command == ["stuck.py"] else "")


def test_a_worker_that_is_killed_is_started_again_and_all_end_together(start: Run, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(APP + "import os\nprint('pid', os.getpid(), flush=True)\n", "utf-8")
    process = consume(start, "hello:app", "--workers", "2")
    assert process.stderr is not None and process.stdout is not None
    lines: list[str] = []
    threading.Thread(target=_collect, args=(process.stderr, lines), daemon=True).start()
    pids: list[str] = []
    threading.Thread(target=_collect, args=(process.stdout, pids), daemon=True).start()

    def receiving() -> int:
        return sum("receives events" in line for line in lines)

    _until(lambda: receiving() == 2 and len(pids) == 3)  # the first one is of who only looked
    os.kill(int(pids[-1].split()[1]), signal.SIGKILL)
    _until(lambda: receiving() == 3)
    assert any(re.search(r"worker \d .* was killed by signal 9; it is started again in 1 s", line) for line in lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    _until(lambda: not any(_alive(int(line.split()[1])) for line in pids))


def test_workers_end_with_their_supervisor(start: Run, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(APP + "import os\nprint('pid', os.getpid(), flush=True)\n", "utf-8")
    process = consume(start, "hello:app", "--workers", "2")
    lines: list[str] = []
    pids: list[str] = []
    for stream, place in ((process.stderr, lines), (process.stdout, pids)):
        threading.Thread(target=_collect, args=(stream, place), daemon=True).start()
    _until(lambda: sum("receives events" in line for line in lines) == 2)
    process.kill()
    _until(lambda: not any(_alive(int(line.split()[1])) for line in pids))


def _collect(stream: object, place: list[str]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        place.append(line)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
