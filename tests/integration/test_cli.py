"""The command line: what it prints, how it ends, and that bad input is never a traceback."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from orthanc_events_bridge import __version__
from orthanc_events_bridge.bridge.state import Progress, State
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.cli_init import CONFIG_NAME, SHIM_NAME, shim_text
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing.servers import free_port

COMMANDS = ("init", "check", "run", "status", "set-aside", "transports", "tail", "replay", "backfill", "schema")
PACKAGE = Path(__file__).parents[2] / "orthanc_events_bridge"

MEMORY = """\
source: urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e
transports:
  - type: memory
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("ORTHANC_EVENTS_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return code, printed.out, printed.err

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "memory.yaml"
    path.write_text(MEMORY, "utf-8")
    return path


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    """An outbox with five rows, of which one transport has three."""
    folder = tmp_path / "outbox"
    folder.mkdir()
    writer = OutboxWriter(folder / "outbox.db", lambda: 1_795_464_387.0)
    facts = [Fact("JobSubmitted", "job", f"job-{n}", 5) for n in range(5)]
    writer.append(facts, 42, 0, lambda level, resource: None)
    writer.note("capture", {"state": "following", "dropped": 0, "vanished": 1})
    state = State(folder / "bridge.db")
    state.progress("nats", writer.recorder)
    state.save("nats", Progress(3, 40, "made then", 3))
    state.set_aside("nats", 2, "the-event-id", "job.submitted", "too large")
    state.close()
    writer.close()
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "orthanc_events_bridge", *map(str, arguments)]


def finished(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


# -- as a program --------------------------------------------------------------------------------------------


def test_module_is_the_program() -> None:
    done = finished(command("--version"))
    assert (done.returncode, done.stdout.strip()) == (0, f"orthanc-events {__version__}")


def test_nothing_said_shows_the_help_and_is_wrong() -> None:
    done = finished(command())
    assert done.returncode == 2
    assert all(name in done.stdout for name in COMMANDS)


def test_reader_of_the_output_may_go() -> None:
    pipe = " ".join(["set -o pipefail;", *command("schema"), "| head -n 1"])
    done = finished(["bash", "-c", pipe])
    assert done.returncode == 0 and done.stdout == "{\n" and done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, run: Run) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: orthanc-events {name}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("init",),
        ("init", "a", "b"),
        ("check", "--no-such-option"),
        ("status", "surplus"),
        ("run", "--config"),
        ("schema", "--all", "--router"),
        ("transports", "pause"),
        ("transports", "forget", "a", "b"),
        ("transports", "stop", "nats"),
    ],
)
def test_wrong_arguments_are_said_and_end_with_2(arguments: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert "usage: orthanc-events" in err and "error:" in err


# -- init ----------------------------------------------------------------------------------------------------


def test_init_writes_two_files_and_says_what_to_do(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "deep" / "er"
    code, out, err = run("init", folder)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, SHIM_NAME]
    assert f'"PythonScript": "{folder / SHIM_NAME}"' in out
    assert '"Plugins": ["' in out and "check" in out


def test_init_s_configuration_passes_check_as_it_is(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    code, out, err = run("check", tmp_path / CONFIG_NAME)
    assert (code, err) == (0, "")
    assert "the configuration is right" in out and "nats (nats)" in out


def test_every_installation_gets_a_source_of_its_own(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path / "a")
    run("init", tmp_path / "b")
    assert run("check", tmp_path / "a" / CONFIG_NAME)[1] != run("check", tmp_path / "b" / CONFIG_NAME)[1]


@pytest.mark.parametrize("name", [CONFIG_NAME, SHIM_NAME])
def test_init_never_writes_over_a_file_without_force(name: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / name).write_text("mine", "utf-8")
    code, out, err = run("init", tmp_path)
    assert code == 1 and out == ""
    assert str(tmp_path / name) in err and "--force" in err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text("utf-8") == "mine"
    assert run("init", tmp_path, "--force")[0] == 0
    assert (tmp_path / name).read_text("utf-8") != "mine"
    assert (tmp_path / f"{name}.bak").read_text("utf-8") == "mine"


def test_init_can_write_the_shim_alone_so_that_the_source_stays(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    before = (tmp_path / CONFIG_NAME).read_text("utf-8")
    (tmp_path / SHIM_NAME).write_text("old", "utf-8")
    assert run("init", tmp_path, "--shim")[0] == 0
    assert (tmp_path / CONFIG_NAME).read_text("utf-8") == before
    assert "spec_from_file_location" in (tmp_path / SHIM_NAME).read_text("utf-8")


def test_init_where_nothing_can_be_written(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("init", tmp_path / "file" / "folder")
    assert code == 1
    assert "can't be written" in err or "Not a directory" in err


def test_shim_names_this_interpreter_and_package(tmp_path: Path, run: Run) -> None:
    script = tmp_path / "mine.py"
    run("init", tmp_path, "--script", script)
    text = (tmp_path / SHIM_NAME).read_text("utf-8")
    compile(text, SHIM_NAME, "exec")
    assert f"PYTHON = {sys.executable!r}" in text
    assert f"PACKAGE = {str(PACKAGE)!r}" in text
    assert f"CONFIG = {str(tmp_path / CONFIG_NAME)!r}" in text
    assert f"SCRIPT = {str(script)!r}" in text


def test_shim_stands_names_with_quotes_and_braces() -> None:
    names: dict[str, object] = {}
    text = shim_text("/o'brien/{x}/python", 'C:\\new\n"', "/ü", None)
    compile(text, SHIM_NAME, "exec")
    for line in text.splitlines():
        if line.startswith(("PYTHON =", "PACKAGE =", "CONFIG =", "SCRIPT =")):
            exec(line, names)  # noqa: S102
    assert (names["PYTHON"], names["PACKAGE"], names["CONFIG"], names["SCRIPT"]) == (
        "/o'brien/{x}/python",
        'C:\\new\n"',
        "/ü",
        None,
    )


FAKE_ORTHANC = '''\
"""Orthanc's module, as far as the plugin needs it."""
import json, os

class OrthancException(Exception):
    pass

callbacks, routes = [], {}

def LogError(message): print("E", message, flush=True)
def LogWarning(message): print("W", message, flush=True)
def LogInfo(message): print("I", message, flush=True)
def GetConfiguration(): return json.dumps({"IndexDirectory": os.environ["FAKE_INDEX"]})
def GetConfigurationPath(): return os.environ["FAKE_INDEX"]
def RegisterRestCallback(pattern, callback): routes[pattern] = callback
def RegisterStorageArea(*given): pass

def RegisterOnChangeCallback(callback):
    if callbacks:
        raise OrthancException(1, "Can only register one Python on-changes callback")
    callbacks.append(callback)

def RestApiGet(path):
    if path.startswith("/changes?"):
        return json.dumps({"Changes": [], "Done": True, "Last": 0}).encode()
    raise OrthancException(17, "Unknown resource")
'''

#: Loads the shim as Orthanc does, calls back, and waits until that is recorded.
DRIVER = """\
import runpy, sqlite3, sys, time
sys.path.insert(0, sys.argv[1])
import orthanc
runpy.run_path(sys.argv[2])
wanted = int(sys.argv[3])
for callback in orthanc.callbacks:
    callback(10, 4, "")
until = time.monotonic() + 30
def recorded():
    try:
        db = sqlite3.connect(f"file:{sys.argv[4]}/outbox.db?mode=ro", uri=True)
        try:
            return db.execute("SELECT count(*) FROM rows").fetchone()[0]
        finally:
            db.close()
    except sqlite3.Error:
        return 0
while recorded() < wanted and time.monotonic() < until:
    time.sleep(0.02)
print("routes", sorted(orthanc.routes), flush=True)
"""


def drive(folder: Path, shim: str, wanted: int) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Load a shim beside a fake Orthanc; gives what it said, and the outbox's folder."""
    (folder / "fake").mkdir()
    (folder / "fake" / "orthanc.py").write_text(FAKE_ORTHANC, "utf-8")
    (folder / "driver.py").write_text(DRIVER, "utf-8")
    (folder / SHIM_NAME).write_text(shim, "utf-8")
    box = folder / "orthanc-events"
    arguments = [folder / "driver.py", folder / "fake", folder / SHIM_NAME, wanted, box]
    done = finished([sys.executable, "-P", *map(str, arguments)], FAKE_INDEX=str(folder), PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    return done, box


def test_shim_records_and_runs_the_bridge(tmp_path: Path, config: Path) -> None:
    done, box = drive(tmp_path, shim_text(sys.executable, str(PACKAGE), str(config)), wanted=1)
    assert "routes ['/orthanc-events/status']" in done.stdout
    reader = OutboxReader(box / "outbox.db")
    try:
        assert [row.change for row in reader.rows(0, 10)] == ["OrthancStarted"]
    finally:
        reader.close()
    assert not [line for line in done.stdout.splitlines() if line.startswith("E")], done.stdout


def test_shim_loads_the_user_s_script_with_its_callback(tmp_path: Path, config: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import orthanc\n"
        "def on_change(kind, level, resource): orthanc.LogWarning(f'mine saw {kind}')\n"
        "orthanc.RegisterOnChangeCallback(on_change)\n",
        "utf-8",
    )
    shim = shim_text(sys.executable, str(PACKAGE), str(config), str(script))
    done, _ = drive(tmp_path, shim, wanted=1)
    assert "W mine saw 10" in done.stdout


def test_shim_without_its_package_says_so_and_orthanc_starts(tmp_path: Path, config: Path) -> None:
    shim = shim_text(sys.executable, str(tmp_path / "gone"), str(config))
    done, _ = drive(tmp_path, shim, wanted=0)
    assert "E orthanc-events: changes are NOT recorded" in done.stdout
    assert "init --shim" in done.stdout


def test_shim_without_its_package_still_loads_the_user_s_script(tmp_path: Path, config: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("import orthanc\northanc.LogWarning('mine is loaded')\n", "utf-8")
    done, _ = drive(tmp_path, shim_text(sys.executable, str(tmp_path / "gone"), str(config), str(script)), wanted=0)
    assert "W mine is loaded" in done.stdout


def test_shim_with_an_interpreter_that_is_gone_still_records(tmp_path: Path, config: Path) -> None:
    shim = shim_text(str(tmp_path / "no-python"), str(PACKAGE), str(config))
    (tmp_path / "orthanc-events").mkdir()
    OutboxWriter(tmp_path / "orthanc-events" / "outbox.db", time.time).close()
    writer = OutboxWriter(tmp_path / "orthanc-events" / "outbox.db", time.time)
    writer.move_cursor(0)  # no first start: it doesn't wait for the bridge's settings
    writer.close()
    done, _ = drive(tmp_path, shim, wanted=1)
    assert "can't be run" in done.stdout and "ORTHANC_EVENTS_PYTHON" in done.stdout


# -- check ---------------------------------------------------------------------------------------------------


def test_check_of_a_right_one(config: Path, run: Run) -> None:
    code, out, err = run("check", config)
    assert (code, err) == (0, "")
    assert "transports memory (memory)" in out


def test_check_finds_the_file_in_the_environment(config: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHANC_EVENTS_CONFIG", str(config))
    assert run("check")[0] == 0


def test_check_without_a_file(run: Run) -> None:
    code, _, err = run("check")
    assert code == 2 and "ORTHANC_EVENTS_CONFIG" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        ("", "the file is empty"),
        ("source: [", ":1: "),
        ("a: b: c\n", ":1: "),
        ("- 1\n", "options are expected"),
        ("source: urn:x\ntransports: []\nsorce: 5\n", "did you mean source"),
        (b"source: \xff\xfe\n", "not UTF-8"),
        (b"\x00\x01", ""),
        ("source: urn:uuid:x\n", "transports"),
        ("&a [*a]\n", ""),
    ],
)
def test_check_of_a_wrong_one_is_one_line_per_mistake(
    content: str | bytes | None, said: str, tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "wrong.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run("check", path)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines and all(line.startswith(f"orthanc-events: {path}") for line in lines), err
    assert said in err


def test_check_of_a_folder(tmp_path: Path, run: Run) -> None:
    code, _, err = run("check", tmp_path)
    assert code == 2 and "this is a folder" in err


def test_check_connects_when_told(config: Path, run: Run) -> None:
    code, out, _ = run("check", config, "--connect")
    assert code == 0
    assert "\nmemory: " in out


def test_check_with_a_broker_that_is_down(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "down.yaml"
    path.write_text(MEMORY + f'  - {{type: nats, servers: ["nats://127.0.0.1:{free_port()}"]}}\n', encoding="utf-8")
    code, out, err = run("check", path, "--connect")
    assert code == 1
    assert "\nmemory: " in out
    assert err.startswith("nats: ") and "can't be reached" in err
    assert len(err.splitlines()) == 1


# -- status --------------------------------------------------------------------------------------------------


def test_status_shows_everything_though_nothing_runs(outbox: Path, run: Run) -> None:
    code, out, err = run("status", "--outbox", outbox)
    assert (code, err) == (0, "")
    assert f"outbox      {outbox}" in out
    assert "5 rows" in out and "log cursor 42" in out and "NOT running" in out
    (row,) = (line for line in out.splitlines() if line.startswith("nats "))
    assert row.split() == ["nats", "-", "not", "configured", "3", "2", "3", "-", "1"]
    assert "`orthanc-events transports forget nats`" in out


def test_status_as_json(outbox: Path, run: Run) -> None:
    code, out, _ = run("status", "--outbox", outbox, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["version"] == __version__
    assert document["outbox"]["rows"] == 5 and document["log"] == {"cursor": 42}
    assert document["transports"][0]["pending"] == 2
    assert document["set_aside"][0]["event"] == "the-event-id"


def test_status_finds_the_folder_in_the_environment(outbox: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHANC_EVENTS_OUTBOX", str(outbox))
    assert run("status")[0] == 0


def test_status_finds_the_folder_in_orthanc_s_configuration(outbox: Path, tmp_path: Path, run: Run) -> None:
    configuration = tmp_path / "orthanc.json"
    configuration.write_text('{"OrthancEvents": {"Outbox": "outbox"}} // relative to this file\n', "utf-8")
    assert run("status", "--orthanc-config", configuration)[0] == 0
    assert run("status", "--orthanc-config", tmp_path)[0] == 0


@pytest.mark.parametrize("content", [None, "{", "[]", '"text"'])
def test_status_with_a_configuration_that_can_not_be_read(content: str | None, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "orthanc.json"
    if content is not None:
        path.write_text(content, "utf-8")
    code, _, err = run("status", "--orthanc-config", path)
    assert code == 1 and str(path) in err and len(err.splitlines()) == 1


def test_status_of_an_outbox_that_is_not_there(tmp_path: Path, run: Run) -> None:
    code, out, err = run("status", "--outbox", tmp_path)
    assert (code, out) == (1, "")
    assert f"there is no outbox at {tmp_path}" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_status_of_an_outbox_that_is_damaged(outbox: Path, run: Run) -> None:
    (outbox / "outbox.db").write_bytes(b"no database" * 1000)
    code, _, err = run("status", "--outbox", outbox)
    assert code == 1 and "file is not a database" in err


def test_status_when_nobody_says_which(run: Run) -> None:
    code, _, err = run("status")
    assert code == 1 and "--outbox DIR" in err


def test_status_where_the_path_leads_through_a_file(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("status", "--outbox", tmp_path / "file" / "x")
    assert code == 1 and "can't be opened" in err


# -- set-aside, tail, schema ---------------------------------------------------------------------------------


def test_set_aside_lists(outbox: Path, run: Run) -> None:
    code, out, _ = run("set-aside", "--outbox", outbox)
    first, last = out.splitlines()
    assert code == 0
    assert first.startswith("nats  2  ") and first.endswith("job.submitted  the-event-id  too large")
    assert last == "1 set aside"
    assert json.loads(run("set-aside", "--outbox", outbox, "--json")[1])[0]["position"] == 2
    assert run("set-aside", "--outbox", outbox, "--transport", "other")[1] == "0 set aside\n"


def test_set_aside_leaves_a_command_for_the_bridge(outbox: Path, run: Run) -> None:
    code, out, _ = run("set-aside", "--outbox", outbox, "--resend")
    assert code == 0 and "was asked" in out
    state = State(outbox / "bridge.db")
    try:
        assert [(c.command, c.transport, c.argument) for c in state.commands()] == [("resend", "nats", 2)]
    finally:
        state.close()


@pytest.mark.parametrize("action", ["pause", "resume", "forget"])
def test_help_of_every_action_on_transports(action: str, run: Run) -> None:
    code, out, err = run("transports", action, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: orthanc-events transports {action}") and "exit codes:" in out
    assert action in run("transports", "--help")[1]


def test_transports_leaves_a_command_for_the_bridge(outbox: Path, run: Run) -> None:
    """The folder may be named in front of the action or behind it."""
    for arguments in (("--outbox", outbox, "forget", "nats"), ("pause", "nats", "--outbox", outbox)):
        code, out, err = run("transports", *arguments)
        assert (code, err) == (0, "") and "the bridge is not running" in out
    state = State(outbox / "bridge.db")
    try:
        assert [(c.command, c.transport) for c in state.commands()] == [("forget", "nats"), ("pause", "nats")]
    finally:
        state.close()
    out = run("transports", "--outbox", outbox)[1]
    assert "nats: to forget it was asked for, and the bridge has not done it yet" in out


def test_transports_of_an_outbox_that_no_bridge_has_seen(tmp_path: Path, run: Run) -> None:
    (tmp_path / "box").mkdir()
    OutboxWriter(tmp_path / "box" / "outbox.db", time.time).close()
    code, out, _ = run("transports", "--outbox", tmp_path / "box")
    assert code == 0 and len(out.splitlines()) == 1
    code, _, err = run("transports", "pause", "nats", "--outbox", tmp_path / "box")
    assert code == 1 and "none was ever started" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "box" / "bridge.db").exists()


def test_transports_waits_for_a_bridge_that_does_not_answer_only_so_long(
    outbox: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthanc_events_bridge.cli_asking._WAIT", 0.3)
    lock = os.open(outbox / "bridge.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        code, out, err = run("transports", "pause", "nats", "--outbox", outbox)
    finally:
        os.close(lock)
    assert (code, out) == (1, "")
    assert "the bridge has not answered" in err and len(err.splitlines()) == 1


def test_tail_of_a_transport_that_is_not_there(config: Path, run: Run) -> None:
    code, _, err = run("tail", "--config", config, "--transport", "nats")
    assert code == 1 and "there is no transport nats" in err and "memory" in err


def test_tail_of_a_broker_that_is_down(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "down.yaml"
    servers = f'["nats://127.0.0.1:{free_port()}"]'
    path.write_text(f"source: urn:a:b\ntransports: [{{type: nats, servers: {servers}}}]\n", "utf-8")
    code, _, err = run("tail", "--config", path)
    assert code == 1 and "can't be reached" in err and len(err.splitlines()) == 1


def test_schema_is_json(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0 and "source" in json.loads(out)["properties"]


# -- run -----------------------------------------------------------------------------------------------------


def test_run_without_a_configuration_ends_with_2(tmp_path: Path, run: Run) -> None:
    code, _, err = run("run", "--outbox", tmp_path / "box")
    assert code == 2 and "no configuration file is named" in err


def test_run_with_a_wrong_configuration_ends_with_2(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("source: 5\n", "utf-8")
    code, _, err = run("run", "--outbox", tmp_path / "box", "--config", path)
    assert code == 2 and str(path) in err


def test_run_supervised_marks_each_line_with_its_level(tmp_path: Path, run: Run) -> None:
    code, _, err = run("run", "--supervised", "--outbox", tmp_path / "box", "--config", tmp_path / "none.yaml")
    assert code == 2 and all(line.startswith("E ") for line in err.splitlines())


def test_run_without_a_folder(config: Path, run: Run) -> None:
    code, _, err = run("run", "--config", config)
    assert code == 1 and "which outbox is not said" in err


def test_run_in_a_folder_that_can_not_be_made(tmp_path: Path, config: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("run", "--config", config, "--outbox", tmp_path / "file" / "x")
    assert code == 1 and "can't be made" in err


def test_second_bridge_ends_with_75(outbox: Path, config: Path) -> None:
    lock = os.open(outbox / "bridge.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    impatient = (
        "import sys, orthanc_events_bridge.bridge as bridge\n"
        "from orthanc_events_bridge.cli import main\n"
        "bridge._LOCK_WAIT = 0.2\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["run", "--outbox", str(outbox), "--config", str(config)]
    try:
        done = finished([sys.executable, "-c", impatient, *arguments])
    finally:
        os.close(lock)
    assert done.returncode == 75
    assert f"another bridge works on {outbox}" in done.stderr


@pytest.fixture
def bridge(outbox: Path, config: Path) -> Iterator[subprocess.Popen[str]]:
    """A bridge of its own, without Orthanc and with a broker in memory."""
    process = subprocess.Popen(
        command("run", "--outbox", outbox, "--config", config), stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def transports(outbox: Path, run: Run) -> dict[str, dict[str, object]]:
    document = json.loads(run("status", "--outbox", outbox, "--json")[1])
    return {transport["name"]: transport for transport in document["transports"]}


def test_run_publishes_what_the_outbox_has_and_ends_when_told(
    bridge: subprocess.Popen[str], outbox: Path, run: Run
) -> None:
    until = time.monotonic() + 30
    while transports(outbox, run).get("memory", {}).get("pending") != 0:
        assert bridge.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    code, out, _ = run("status", "--outbox", outbox)
    assert code == 0 and "running since" in out
    bridge.send_signal(signal.SIGTERM)
    _, err = bridge.communicate(timeout=30)
    assert bridge.returncode == 0
    assert "Traceback" not in err and "is running: memory" in err
    found = transports(outbox, run)["memory"]
    assert (found["position"], found["published"], found["state"]) == (5, 5, "bridge not running")
