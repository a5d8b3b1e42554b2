"""What the plugin may do to Orthanc's process: nothing that anybody notices, whatever is wrong with the rest."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import orthanc_events_bridge
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.bridged import BridgedOrthanc
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import NatsServer, OrthancServer
from tests.integration.whole import messages, prepare, started

pytestmark = pytest.mark.integration

#: Seconds by which Orthanc's start, and its stop, may take longer.
START, STOP = 1.0, 5.0

PACKAGE = Path(orthanc_events_bridge.__file__).parent


def ours(server: OrthancServer, levels: str = "EW") -> list[str]:
    """Our errors and warnings in Orthanc's log."""
    lines = [line for line in server.log_text().splitlines() if line[:1] in levels and "orthanc-events: " in line]
    return [line.partition("orthanc-events: ")[2] for line in lines]


# ------------------------------------------------------------------------------------------------------- imports

MODULES = """\
import json, sys
import orthanc

def modules(output, uri, **request):
    found = {
        name: getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name not in sys.brought_along
    }
    output.AnswerBuffer(json.dumps(found), "application/json")

orthanc.RegisterRestCallback("/test/modules", modules)
orthanc.RegisterOnChangeCallback(lambda kind, level, resource: None)
"""


def test_only_the_standard_library_and_our_own_modules_are_imported(tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(MODULES, "utf-8")
    # What this machine's Python brings along by itself is not our doing.
    before = "import sys\nsys.brought_along = [*sys.modules]\n"
    everything = "data:\n  tags: [Modality]\n  metadata: [RemoteAET]\n"
    with started(tmp_path / "line", script=script, before=before, settings=everything) as line:
        study = dicom.make_study(instances=2)
        for instance in study:
            line.orthanc.upload(instance.data)
        line.orthanc.post(f"/studies/{study.id}/archive", {"Asynchronous": True})
        os.kill(line.bridge_pid(), signal.SIGKILL)
        line.orthanc.delete("studies", study.id)
        line.settle()
        found: dict[str, str | None] = line.orthanc.get("/test/modules")
        shim = line.orthanc.shim_path
    assert "orthanc_events_bridge.plugin.capture" in found and "sqlite3" in found
    for name, file in found.items():
        top = name.partition(".")[0]
        if file is None:
            assert top in {*sys.stdlib_module_names, "orthanc"}, name
        elif top == "orthanc_events_bridge":
            assert Path(file).is_relative_to(PACKAGE), name
        elif Path(file) not in (script, shim):
            assert top in sys.stdlib_module_names, f"{name} from {file}"
            assert not {"site-packages", "dist-packages"} & set(Path(file).parts), f"{name} from {file}"
    for layer in ("bridge", "events", "transports", "testing", "cli"):
        assert f"orthanc_events_bridge.{layer}" not in found


# ------------------------------------------------------------------------------------------------- what is wrong


@dataclass
class Wrong:
    """Something that is wrong when Orthanc starts."""

    #: What the one line in the log names: the place, and the remedy.
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    behind: str = ""
    #: Done to the folder before the start.
    harm: Callable[[BridgedOrthanc], None] = lambda orthanc: None
    #: Where the status says it; nowhere when the package is missing.
    status: Callable[[dict[str, Any]], Any] | None = lambda document: document["bridge"]["last_exit"]["reason"]


def break_yaml(orthanc: BridgedOrthanc) -> None:
    text = orthanc.config_path.read_text("utf-8")
    orthanc.config_path.write_text(text.replace("servers:", "srevers:"), "utf-8")


def move_package(orthanc: BridgedOrthanc) -> None:
    text = orthanc.shim_path.read_text("utf-8")
    orthanc.shim_path.write_text(text.replace(repr(str(PACKAGE)), repr("/nowhere/orthanc_events_bridge")), "utf-8")


def file_in_the_way(orthanc: BridgedOrthanc) -> None:
    (orthanc.folder / "taken").write_text("", "utf-8")
    orthanc.environment["ORTHANC_EVENTS_OUTBOX"] = str(orthanc.folder / "taken" / "outbox")


NFS = """\
import orthanc_events_bridge.folder as folder
look = folder.file_system
mounts = "1 0 0:1 / / rw - ext4 /dev/x rw\\n2 1 0:2 / {place} rw,relatime - nfs4 server:/x rw"
folder.file_system = lambda path, _=None: look(path, mounts)
"""

WRONG = {
    "a mistake in the YAML": Wrong(("orthanc-events.yaml:4", "srevers", "did you mean servers"), harm=break_yaml),
    "the package is gone": Wrong(
        ("NOT recorded", "/nowhere/orthanc_events_bridge", "orthanc-events init"), harm=move_package, status=None
    ),
    "the interpreter is gone": Wrong(
        ("/nowhere/python", "No such file", "orthanc-events init", "ORTHANC_EVENTS_PYTHON"),
        options={"python": "/nowhere/python"},
    ),
    "the outbox's folder can't be made": Wrong(
        ("NOT recorded", "taken/outbox", "Not a directory", "ORTHANC_EVENTS_OUTBOX"),
        harm=file_in_the_way,
        status=lambda document: document["problem"],
    ),
    "the outbox is on a network file system": Wrong(
        ("NOT recorded", "network file system (nfs4)", "local disk", "ORTHANC_EVENTS_OUTBOX"),
        behind=NFS,
        status=lambda document: document["problem"],
    ),
    "the broker is down": Wrong(
        ("can't be reached", "start NATS"),
        options={"yaml": "drain_timeout: 100ms\n"},
        status=lambda document: " ".join(map(str, document["transports"][0]["last_error"].values())),
    ),
}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> OrthancServer:
    """An Orthanc without any plugin; not running."""
    require("orthanc", "orthanc-python", "nats-server")
    return OrthancServer(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module")
def usual_start(without: OrthancServer) -> float:
    return seconds_to_start(without)


def seconds_to_start(server: OrthancServer, times: int = 3) -> float:
    """The median of a few starts; at the end it is not running."""
    seconds = []
    for _ in range(times):
        seconds.append(server.start())
        server.close(kill=True)
    return statistics.median(seconds)


@pytest.mark.parametrize("name", WRONG)
def test_orthanc_starts_as_fast_as_ever_and_says_what_is_wrong(tmp_path: Path, usual_start: float, name: str) -> None:
    wrong = WRONG[name]
    orthanc = BridgedOrthanc(tmp_path / "orthanc", nats="nats://127.0.0.1:9", **wrong.options)
    prepare(orthanc.shim_path, behind=wrong.behind.format(place=orthanc.database))
    wrong.harm(orthanc)
    try:
        seconds = seconds_to_start(orthanc)
        print(f"\n{name}: {seconds:.2f} s to start, without us {usual_start:.2f} s")
        assert seconds < usual_start + START
        orthanc.log.unlink()
        orthanc.start()
        assert wait_until(lambda: any(all(word in line for word in wrong.says) for line in ours(orthanc)), 10), ours(
            orthanc
        )
        if wrong.status:
            told = wrong.status

            def shown() -> bool:
                try:
                    return all(word in told(orthanc.status()) for word in wrong.says)
                except (KeyError, TypeError, IndexError, AttributeError):
                    return False

            assert wait_until(shown, 10), orthanc.status()
        else:
            assert httpx.get(f"{orthanc.url}/orthanc-events/status", trust_env=False).status_code == 404
        assert orthanc.upload(dicom.make_study().instances[0].data)["Status"] == "Success"
        time.sleep(1)  # several attempts, each of which fails in the same way
        assert len(ours(orthanc)) <= 2, ours(orthanc)
    finally:
        orthanc.close(kill=True)


#: For ten seconds capture would wait for the bridge's word.
IMPATIENT = "import orthanc_events_bridge.plugin.capture as capture\ncapture.FIRST_SETTINGS = 1.0\n"


def test_changes_are_recorded_while_the_yaml_is_broken_and_told_when_it_is_mended(tmp_path: Path) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(NatsServer(tmp_path / "nats"))
        tags = "data:\n  tags: [Modality]\n"
        orthanc = BridgedOrthanc(tmp_path / "orthanc", nats=broker.url, yaml=tags)
        prepare(orthanc.shim_path, behind=IMPATIENT)
        stack.callback(orthanc.close, kill=True)
        good = orthanc.config_path.read_text("utf-8")
        break_yaml(orthanc)

        # The first start ever: nobody can say which settings apply.
        orthanc.start()
        first = dicom.make_study()
        orthanc.upload(first.instances[0].data)
        assert wait_until(lambda: orthanc.status()["outbox"].get("rows", 0) >= 8, 15), orthanc.status()
        assert orthanc.status()["transports"] == []
        orthanc.config_path.write_text(good, "utf-8")
        assert wait_until(lambda: has(orthanc, "bridge", "running", True), 30, every=0.1)
        pid = orthanc.status()["bridge"]["pid"]
        second = dicom.make_study()
        assert wait_until(lambda: pending(orthanc) == 0, 10, every=0.1), orthanc.status()
        assert wait_until(lambda: settings_in_use(orthanc) == 1, 10, every=0.1)
        orthanc.upload(second.instances[0].data)

        # It breaks again: the last good settings stay, also over a restart of Orthanc's own.
        break_yaml(orthanc)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: "srevers" in str(orthanc.status()["bridge"]["last_exit"]), 10, every=0.1)
        orthanc.reset()
        third = dicom.make_study()
        orthanc.upload(third.instances[0].data)
        orthanc.config_path.write_text(good, "utf-8")
        assert wait_until(
            lambda: pending(orthanc) == 0 and has(orthanc, "capture", "state", "following"), 30, every=0.1
        )
        told = {
            message.event["data"]["id"]: message.event["data"]
            for message in messages(broker.url)
            if message.kind == "series.created"
        }
        assert "tags" not in told[first.series[0]], "nobody had allowed any"
        for study in (second, third):
            assert told[study.series[0]]["tags"] == {"Modality": "CT"}


def settings_in_use(orthanc: BridgedOrthanc) -> int:
    """How many different ones capture has recorded with. It looks for new ones about once a second."""
    reader = OutboxReader(orthanc.outbox / "outbox.db")
    try:
        return len(reader.settings())
    finally:
        reader.close()


def has(orthanc: BridgedOrthanc, part: str, key: str, value: object) -> bool:
    return bool(orthanc.status().get(part, {}).get(key) == value)


def pending(orthanc: BridgedOrthanc) -> int | None:
    document = orthanc.status()
    if not document["bridge"].get("running") or not document["transports"]:
        return None
    last = document["outbox"]["last_position"]
    return int(last - document["transports"][0]["position"])


# ------------------------------------------------------------------------------------------------------- stopping


def slow_guest(folder: Path) -> Path:
    script = folder / "slow.py"
    script.write_text(
        "import time\nimport orthanc\n"
        "orthanc.RegisterOnChangeCallback(lambda kind, level, resource: time.sleep(0.5))\n",
        "utf-8",
    )
    return script


def hanging_python(folder: Path) -> Path:
    program = folder / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 1000\n", "utf-8")
    program.chmod(0o755)
    return program


@contextmanager
def plain(folder: Path) -> Iterator[OrthancServer]:
    with OrthancServer(folder) as orthanc:
        yield orthanc


@contextmanager
def healthy(folder: Path) -> Iterator[OrthancServer]:
    with started(folder) as line:
        line.settle()
        assert ours(line.orthanc) == [], "with nothing wrong nothing is said"
        yield line.orthanc


@contextmanager
def broker_down(folder: Path) -> Iterator[OrthancServer]:
    with started(folder) as line:
        line.settle()
        line.broker.kill()
        yield line.orthanc


@contextmanager
def broker_frozen(folder: Path) -> Iterator[OrthancServer]:
    with started(folder) as line:
        line.settle()
        line.broker.freeze()
        yield line.orthanc


@contextmanager
def bridge_frozen(folder: Path) -> Iterator[OrthancServer]:
    with started(folder) as line:
        os.kill(line.bridge_pid(), signal.SIGSTOP)
        yield line.orthanc


@contextmanager
def bridge_hangs_at_its_start(folder: Path) -> Iterator[OrthancServer]:
    folder.mkdir()
    orthanc = BridgedOrthanc(folder, nats="nats://127.0.0.1:9", python=str(hanging_python(folder)))
    try:
        orthanc.start()
        yield orthanc
    finally:
        orthanc.close(kill=True)


@contextmanager
def guest_slow(folder: Path) -> Iterator[OrthancServer]:
    folder.mkdir()
    with started(folder / "line", script=slow_guest(folder)) as line:
        yield line.orthanc


STOPS: list[Callable[[Path], Any]] = [
    plain, healthy, broker_down, broker_frozen, bridge_frozen, bridge_hangs_at_its_start, guest_slow,
]  # fmt: skip


def seconds_to_stop(case: Callable[[Path], Any], folder: Path) -> float:
    """What a stop takes, right behind a few uploads; no process may be left then."""
    with case(folder) as orthanc:
        for instance in dicom.make_study(instances=10):
            orthanc.upload(instance.data)
        orthanc.client.close()  # Orthanc waits for open connections
        orthanc._client = None
        seconds: float = orthanc.stop()
        assert orthanc.children() == []
    return seconds


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    require("orthanc", "orthanc-python", "nats-server")
    with ThreadPoolExecutor() as pool:
        runs = {case: pool.submit(seconds_to_stop, case, tmp_path_factory.mktemp("stop") / "it") for case in STOPS}
        return {case.__name__: run.result() for case, run in runs.items()}


@pytest.mark.parametrize("case", [case.__name__ for case in STOPS[1:]])
def test_stopping_takes_at_most_five_seconds_more_and_leaves_no_bridge(stops: dict[str, float], case: str) -> None:
    print(f"\n{case}: {stops[case]:.2f} s to stop, without us {stops['plain']:.2f} s")
    assert stops[case] < stops["plain"] + STOP


# -------------------------------------------------------------------------------------------------- storage areas

STORAGE = """\
import os
import orthanc

def place(uuid):
    return os.path.join({folder!r}, uuid)

def create(uuid, kind, data):
    with open(place(uuid), "wb") as file:
        file.write(data)

def read(uuid, kind):
    with open(place(uuid), "rb") as file:
        return file.read()

def remove(uuid, kind):
    os.remove(place(uuid))

orthanc.RegisterStorageArea(create, read, remove)
"""


def test_beside_a_storage_area_in_python_capture_does_not_start_and_orthanc_works(tmp_path: Path) -> None:
    store, script = tmp_path / "store", tmp_path / "storage.py"
    store.mkdir()
    script.write_text(STORAGE.format(folder=str(store)), "utf-8")
    hasty = "drain_timeout: 100ms\n"
    orthanc = BridgedOrthanc(tmp_path / "orthanc", nats="nats://127.0.0.1:9", user_script=script, yaml=hasty)
    try:
        orthanc.start()
        assert wait_until(lambda: orthanc.status()["capture"]["state"] == "off", 20)
        words = ("NOT recorded", "RegisterStorageArea", "AllowThreads", "out of Python")
        for texts in ([orthanc.status()["capture"]["problem"]["message"]], ours(orthanc, "E")):
            # The bridge may say before it that the broker is away.
            assert any(all(word in text for word in words) for text in texts), texts
        study = dicom.make_study(instances=20)
        with ThreadPoolExecutor(4) as pool:
            for answer in pool.map(orthanc.upload, [instance.data for instance in study]):
                assert answer["Status"] == "Success"
        first = study.instances[0]
        assert orthanc.client.get(f"/instances/{first.id}/file").content == first.data
        assert len(list(store.iterdir())) >= 20
        assert orthanc.delete("studies", study.id)
        assert list(store.iterdir()) == []
        orthanc.stop()
    finally:
        orthanc.close(kill=True)
