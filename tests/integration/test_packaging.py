"""What holds the tree together without being code: the lock, the containers' files, the package's data."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthanc_events_bridge.cli_init import shim_text

ROOT = Path(__file__).parents[2]


def service(name: str) -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    found: dict[str, Any] = compose["services"][name]
    return found


def mounts(of: str) -> dict[str, str]:
    """Where the container has which file or folder of the tree."""
    bound = (str(volume).split(":") for volume in service(of)["volumes"])
    return {inside: outside for outside, inside, *_ in bound if outside.startswith("./")}


@pytest.mark.parametrize("name", ["build", "bridge", "dev"])
def test_every_locked_package_is_pinned_and_hashed_and_no_index_is_named(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
    entries = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).strip().splitlines()
    assert len(entries) > 5
    assert not [line for line in entries if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)]
    assert not re.search(r"https?://|--(extra-)?index|--find-links", text)


def test_what_builds_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    required = project["build-system"]["requires"]
    assert [one.partition("==")[0] for one in required] == ["hatchling", "hatch-vcs"]
    for one in required:
        assert f"\n{one} " in (ROOT / "requirements" / "build.txt").read_text("utf-8")


def test_what_the_container_mounts_is_there() -> None:
    assert mounts("orthanc")
    assert not [outside for outside in mounts("orthanc").values() if not (ROOT / outside).is_file()]


def test_the_container_runs_the_script_that_init_writes() -> None:
    orthanc = json.loads((ROOT / "config" / "orthanc.json").read_text("utf-8"))
    script = mounts("orthanc")[orthanc["PythonScript"]]
    config = next(inside for inside, outside in mounts("orthanc").items() if outside.endswith("orthanc-events.yaml"))
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    assert (ROOT / script).read_text("utf-8") == shim_text(
        "/opt/orthanc-events/bin/python", "/opt/orthanc-events/package", config
    )
    for name in ("/opt/orthanc-events/bin/python", "/opt/orthanc-events/package", config):
        assert name in dockerfile


def test_the_outbox_of_the_container_is_on_a_volume() -> None:
    orthanc = json.loads((ROOT / "config" / "orthanc.json").read_text("utf-8"))
    inside = [str(volume).split(":")[1] for volume in service("orthanc")["volumes"]]
    assert {
        orthanc["OrthancEvents"]["Outbox"],
        orthanc["IndexDirectory"],
        orthanc["StorageDirectory"],
    } <= set(inside)


def test_images_are_pinned_and_ports_are_open_to_this_machine_only() -> None:
    assert re.search(
        r"^ARG ORTHANC=\S+:\d+(\.\d+)+$", (ROOT / "docker" / "Dockerfile").read_text("utf-8"), re.MULTILINE
    )
    assert re.fullmatch(r"nats:\d+\.\d+\.\d+(-\w+)?", service("nats")["image"])
    ports = [str(port) for name in ("orthanc", "nats") for port in service(name)["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_scripts_are_executable() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh")]
    assert len(scripts) > 1
    assert not [script for script in scripts if not os.access(script, os.X_OK)]


def workflow(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))
    return found


def test_the_workflow_does_what_ci_does_on_a_bare_debian_and_keeps_what_setup_downloads() -> None:
    job = workflow("ci")["jobs"]["ci"]
    assert job["container"]["image"] == "debian:12"
    steps = job["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    uses = {str(step["uses"]).partition("@")[0]: step["with"] for step in steps if "uses" in step}
    assert uses["actions/checkout"]["fetch-depth"] == 0  # without tags there is no version
    cache = uses["actions/cache"]
    # Kafka's jars (scripts/bootstrap.sh), and by the environment what pip fetches.
    assert cache["path"] == ".cache"
    assert job["env"]["PIP_CACHE_DIR"].endswith("/.cache/pip")
    assert "kafka_jars=.cache/" in (ROOT / "scripts" / "bootstrap.sh").read_text("utf-8")
    for pattern in re.findall(r"'(.+?)'", cache["key"]):
        assert list(ROOT.glob(pattern)), pattern


def test_nothing_is_published_before_all_of_ci_has_passed_for_the_tag() -> None:
    release = workflow("release")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML's name for `on`
    jobs = release["jobs"]
    assert jobs["ci"] == {"uses": "./.github/workflows/ci.yml"}
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("ci", "build")
    assert "workflow_call" in workflow("ci")[True]
    assert {"run": "make build"} in jobs["build"]["steps"]
    others = {name: job.get("permissions", {}) for name, job in jobs.items() if name != "publish"}
    assert not any(others.values())
