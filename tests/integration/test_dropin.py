"""What a user does: install the package, `orthanc-events init`, two lines into Orthanc's configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import NatsServer, OrthancServer
from tests.integration.whole import messages

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def run(*command: object, folder: Path) -> str:
    """Run a program in a folder of its own, so that the tree isn't imported by accident."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ORTHANC_EVENTS_"))
    }
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed."""
    pytest.importorskip("hatchling", reason="requirements/build.txt is not installed")
    folder, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree")
    (tree / "tools").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "tools/index_page.py"):
        shutil.copy(ROOT / name, tree / name)
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "orthanc_events_bridge", tree / "orthanc_events_bridge", ignore=leave)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree, folder=folder)
    (found,) = folder.glob("*.whl")
    return found


def environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the package in it, and what it depends on borrowed from this one; its ``bin``."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return python.parent


def drop_in(folder: Path, programs: Path) -> str:
    """Go the way of the README, and see an event; returns the version of the Python that the bridge runs with."""
    require("orthanc", "orthanc-python", "nats-server")
    program = programs / "orthanc-events"
    said = run(program, "init", "etc", folder=folder)
    config, shim = folder / "etc" / "orthanc-events.yaml", folder / "etc" / "orthanc_events.py"
    assert {path.name for path in (folder / "etc").iterdir()} == {config.name, shim.name}
    package = re.search(r"^PACKAGE = '(.*)'$", shim.read_text("utf-8"), re.MULTILINE)
    assert package and Path(package[1]).is_relative_to(programs.parent), "not the tree"
    two_lines = re.findall(r'^  "\w+": .*$', said, re.MULTILINE)
    assert len(two_lines) == 2
    lines = json.loads("{" + "".join(two_lines) + "}")
    with NatsServer(folder / "nats") as broker:
        text = config.read_text("utf-8")
        assert "nats://127.0.0.1:4222" in text
        config.write_text(text.replace("nats://127.0.0.1:4222", broker.url), "utf-8")
        assert "the configuration is right" in run(program, "check", config, "--connect", folder=folder)
        orthanc = OrthancServer(folder / "orthanc", config=lines)
        orthanc.start()
        try:
            study = dicom.make_study()
            orthanc.upload(study.instances[0].data)
            told: list[str] = []

            def arrived() -> bool:
                told[:] = [message.event.get("subject", "") for message in messages(broker.url)]
                return f"studies/{study.id}" in told

            assert wait_until(arrived, 20, every=0.1), orthanc.log_text()
            (bridge,) = orthanc.children()
            line = Path(f"/proc/{bridge}/cmdline").read_text("utf-8").split("\0")
            assert Path(line[0]).parent == programs
            assert run(program, "status", "--outbox", orthanc.database / "orthanc-events", folder=folder)
            return run(line[0], "-c", "import platform; print(platform.python_version())", folder=folder).strip()
        finally:
            orthanc.close(kill=True)


def test_a_fresh_installation_publishes_with_two_lines_of_configuration(tmp_path: Path, wheel: Path) -> None:
    programs = environment(tmp_path, wheel)
    assert drop_in(tmp_path, programs).startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def find_python(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))):
        if found and subprocess.run([found, "-c", "import venv"], check=False, capture_output=True).returncode == 0:
            return found
    return None


FOUND = {version: python for version in ("3.12", "3.13", "3.14") if (python := find_python(version))}


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason="there is no Python but this one on this machine")
@pytest.mark.parametrize("version", FOUND)
def test_the_bridge_runs_with_another_python_than_orthancs(tmp_path: Path, wheel: Path, version: str) -> None:
    run(FOUND[version], "-m", "venv", tmp_path / "venv", folder=tmp_path)
    own = tmp_path / "venv" / "bin" / "python"
    pip = [own, *PIP[1:]]
    run(*pip, "install", "--require-hashes", "-r", ROOT / "requirements" / "bridge.txt", folder=tmp_path)
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    assert drop_in(tmp_path, own.parent).startswith(f"{version}.")
