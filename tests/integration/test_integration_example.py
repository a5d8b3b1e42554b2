"""`examples/integration-test` as a user runs it: in a fresh environment, with the package from its wheel.

Only with ``TEST_SERVERS=containers`` (``make test-containers``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.brokers import way
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

if way() != "containers":
    pytest.skip("TEST_SERVERS is not containers", allow_module_level=True)

from orthanc_events_bridge.testing.engine import find_image

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
#: What only this tree has in the environment.
PRIVATE = ("PYTEST_", "PYTHON", "COV_", "VIRTUAL_ENV", "TEST_SERVERS", "TEST_ORTHANC")


def test_the_example_passes_with_the_wheel_alone(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="requirements/build.txt is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)}
    try:  # the images of this checkout, of which the wheel knows nothing
        images = {f"ORTHANC_EVENTS_IMAGE_{kind.upper()}": find_image(kind) for kind in ("nats", "orthanc")}
    except MissingComponentError as error:
        skip_or_fail(error)
    # The versions that are locked; without hashes, which our own wheel has none of.
    locked = re.findall(r"(?m)^\S+==\S+(?: ;[^\\\n]*)?", (ROOT / "requirements" / "dev.txt").read_text("utf-8"))
    (tmp_path / "constraints.txt").write_text("\n".join(locked), "utf-8")
    project = shutil.copytree(ROOT / "examples" / "integration-test", tmp_path / "project")

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=project, env=environment | images, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
    wheels = tmp_path / "wheels"
    run(sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT, project)
    (counting,) = wheels.glob("counting-*.whl")
    venv.create(tmp_path / "fresh", with_pip=False)
    python = tmp_path / "fresh" / "bin" / "python"
    pip_there = ("-m", "pip", "--python", python, *pip[2:])
    given = ("--no-compile", "--find-links", wheels, "--constraint", tmp_path / "constraints.txt")
    run(sys.executable, *pip_there, "install", *given, f"{counting}[test]")
    where = run(python, "-c", "import orthanc_events_bridge as package; print(package.__file__)")
    assert Path(where).is_relative_to(tmp_path / "fresh")
    assert "3 passed" in run(python, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider")
