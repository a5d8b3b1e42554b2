"""A user's own Python script goes on working beside ours, both ways: loaded by the shim, or loading us itself."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import orthanc_events_bridge
from orthanc_events_bridge.cli_init import shim_text
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.bridged import BridgedOrthanc
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import find_python_plugin, require
from orthanc_events_bridge.testing.servers import OrthancServer, ServerError
from tests.integration.whole import messages, started

pytestmark = pytest.mark.integration

#: Writes down every change, asks Orthanc about it, and raises now and then.
OWN = """\
import json
import time
import orthanc
import helper_of_mine

def on_change(kind, level, resource):
    time.sleep({seconds})
    with open({path!r}, "a") as file:
        file.write(json.dumps([int(kind), resource]) + "\\n")
    if kind == orthanc.ChangeType.NEW_STUDY:
        orthanc.RestApiGet("/studies/" + resource)
    if kind == orthanc.ChangeType.NEW_PATIENT:
        raise helper_of_mine.MyError("no such luck")

{register}
"""
REGISTER = "orthanc.RegisterOnChangeCallback(on_change)"

#: There is no broker, and no need to wait for one.
HASTY = "drain_timeout: 100ms\n"

NAMES = {
    1: "Deleted", 2: "NewChildInstance", 3: "NewInstance", 4: "NewPatient", 5: "NewSeries", 6: "NewStudy",
    7: "StablePatient", 8: "StableSeries", 9: "StableStudy", 10: "OrthancStarted", 11: "OrthancStopped",
}  # fmt: skip


def own_script(
    folder: Path, seconds: float = 0.0, register: str = REGISTER
) -> tuple[Path, Callable[[], list[list[object]]]]:
    """A user's script, with a module of its own beside it, and what it has seen."""
    folder.mkdir()
    (folder / "helper_of_mine.py").write_text("class MyError(Exception):\n    pass\n", "utf-8")
    script, seen = folder / "mine.py", folder / "seen.jsonl"
    script.write_text(OWN.format(seconds=seconds, path=str(seen), register=register), "utf-8")

    def shown() -> list[list[object]]:
        return [json.loads(line) for line in seen.read_text("utf-8").splitlines()] if seen.exists() else []

    return script, shown


def told(line: Line) -> list[list[object]]:
    events = [message.event["data"] for message in messages(line.broker.url)]
    return [[event["change"], event["id"] or ""] for event in events]


def exercise(line: Line) -> None:
    for number in range(3):
        study = dicom.make_study(instances=3)
        for instance in study:
            line.orthanc.upload(instance.data)
        if number:
            line.orthanc.delete("studies", study.id)
    line.settle()


@pytest.mark.parametrize("way", ["init --script", "start(on_change=…)"])
def test_the_users_callback_sees_every_change_in_our_order_and_its_exceptions_are_logged(
    tmp_path: Path, way: str
) -> None:
    if way == "init --script":
        script, shown = own_script(tmp_path / "mine")
        with started(tmp_path / "line", script=script) as line:
            judge(line, shown)
        return
    # The user's script is the one that Orthanc loads, and it starts us.
    script, shown = own_script(tmp_path / "mine", register="import shim")
    with_shim = Line(tmp_path / "line")
    shim = with_shim.orthanc.shim_path.read_text("utf-8")
    assert "start(python=PYTHON, config=CONFIG, script=SCRIPT)" in shim
    text = shim.replace("script=SCRIPT)", "on_change=on_change)")
    script.write_text(script.read_text("utf-8").replace("import shim", text), "utf-8")
    with_shim.orthanc.config["PythonScript"] = str(script)
    with with_shim:
        judge(with_shim, shown)


def judge(line: Line, shown: Callable[[], list[list[object]]]) -> None:
    exercise(line)
    line.orthanc.stop()
    events = told(line)
    assert [[NAMES[int(str(kind))], resource] for kind, resource in shown()] == events
    assert events[0][0] == "OrthancStarted" and events[-1][0] == "OrthancStopped"
    assert [change for change, _ in events].count("Deleted") == 2 * 6
    # Once in words; that it goes on and on is no news.
    lines = [text for text in line.orthanc.log_text().splitlines() if "your OnChange callback raised" in text]
    assert len(lines) == 1 and "MyError: no such luck" in lines[0], lines
    assert len([change for change, _ in events if change == "NewPatient"]) == 3


def test_a_slow_callback_costs_us_nothing_and_sees_everything_until_the_stops_deadline(tmp_path: Path) -> None:
    script, shown = own_script(tmp_path / "mine", seconds=0.05)
    with started(tmp_path / "line", script=script) as line:
        line.ledger.allow("*.stable", "server.*")
        for instance in dicom.make_study(instances=60):  # 243 callbacks: 12 seconds of it
            line.ledger.stored(line.orthanc.upload(instance.data))
        line.settle()
        assert len(shown()) < 200, "it lags behind, and we don't"
        seconds = line.orthanc.stop()
        assert wait_until(lambda: line.orthanc.children() == [], 5)
        report = line.ledger.compare(line.events())
        print(f"\nstopped within {seconds:.1f} s", report, sep="\n")
        report.assert_clean()
        events, seen = told(line), [[NAMES[int(str(kind))], resource] for kind, resource in shown()]
        assert seen == events[: len(seen)]
        (left,) = re.findall(r"too slow: (\d+) changes were not shown to it", line.orthanc.log_text())
        assert len(seen) + int(left) == len(events)
        assert seconds < 8


def test_a_callback_that_hangs_does_not_keep_orthanc_from_stopping(tmp_path: Path) -> None:
    script, shown = own_script(tmp_path / "mine", seconds=60)
    with started(tmp_path / "line", script=script) as line:
        line.orthanc.upload(dicom.make_study().instances[0].data)
        line.settle()
        seconds = line.orthanc.stop()
        print(f"\nstopped within {seconds:.1f} s")
        assert seconds < 8
        assert shown() == []
        assert "OrthancStopped" in [change for change, _ in told(line)]


def test_a_second_callback_is_refused_as_orthanc_does(tmp_path: Path) -> None:
    again = f"""{REGISTER}
try:
    {REGISTER}
except Exception as error:
    orthanc.LogWarning("refused: " + repr(error))
"""
    script, _ = own_script(tmp_path / "mine", register=again)
    orthanc = BridgedOrthanc(tmp_path / "orthanc", nats="nats://127.0.0.1:9", user_script=script, yaml=HASTY)
    try:
        orthanc.start()
        assert "refused: RuntimeError" in orthanc.log_text()
    finally:
        orthanc.close(kill=True)


def test_a_script_that_raises_keeps_orthanc_from_starting_as_it_does_without_us(tmp_path: Path) -> None:
    require("orthanc", "orthanc-python")
    script = tmp_path / "broken.py"
    script.write_text("import orthanc\nraise ValueError('mine is broken')\n", "utf-8")
    alone = OrthancServer(tmp_path / "alone", script=script, plugins=[find_python_plugin()])
    both = BridgedOrthanc(tmp_path / "both", nats="nats://127.0.0.1:9", user_script=script, yaml=HASTY)
    codes = []
    for orthanc in (alone, both):
        orthanc.grace = 5
        with pytest.raises(ServerError, match="exit code") as caught:
            orthanc.start()
        codes += re.findall(r"exit code (-?\d+)", str(caught.value))
        assert "mine is broken" in orthanc.log_text()
        orthanc.close()  # which raises where a bridge is left for longer than this
    # 255; or -11, which Orthanc 1.10.1 makes of it half the time where such a script imports sqlite3, also without us.
    assert "0" not in codes and len(codes) == 2


def test_the_shim_names_the_users_script() -> None:
    package = Path(orthanc_events_bridge.__file__).parent
    assert "SCRIPT = '/etc/orthanc/mine.py'" in shim_text(
        sys.executable, str(package), "x.yaml", "/etc/orthanc/mine.py"
    )
