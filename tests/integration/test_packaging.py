"""What holds the tree together without being code: the lock, the containers' files, the package's data."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from orthanc_events_bridge.cli_init import shim_text

ROOT = Path(__file__).parents[2]


COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


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


def test_what_containers_mount_and_read_is_there() -> None:
    mounted = [str(volume).split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    files = [outside for outside in mounted if outside.startswith("./")]
    assert len(files) > 5
    assert not [outside for outside in files if not (ROOT / outside).is_file()]
    assert {outside for outside in mounted if not outside.startswith("./")} == set(COMPOSE["volumes"])
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", ())} - {"demo"}
    assert profiles == {path.stem for path in (ROOT / "config" / "compose").glob("*.env")}


def test_each_image_is_built_once() -> None:
    """Compose builds what several services name as often, at the same time: the results get in each other's way."""
    own = {service["image"] for service in SERVICES.values() if ":-orthanc-events" in service["image"]}
    assert len(own) == 3
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert sorted(built) == sorted(own)


def test_the_image_runs_the_script_that_init_writes() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    config = "/etc/orthanc-events/orthanc-events.yaml"
    home = "/opt/orthanc-events"
    script = (ROOT / "config" / "orthanc_events.py").read_text("utf-8")
    assert script == shim_text(f"{home}/bin/python", f"{home}/package", config)
    assert f"ORTHANC_EVENTS_CONFIG={config} " in dockerfile
    assert f"ORTHANC__PYTHON_SCRIPT={home}/shim/orthanc_events.py " in dockerfile
    environment = (ROOT / "docker" / "environment.sh").read_text("utf-8")
    assert all(name in environment for name in (f"home={home}\n", '"$home/package"', '"$home/shim" config/'))


def test_outbox_and_index_of_containers_are_on_volumes() -> None:
    orthanc = json.loads((ROOT / "config" / "orthanc.json").read_text("utf-8"))
    inside = [str(volume).split(":")[1] for volume in SERVICES["orthanc"]["volumes"]]
    outbox = re.search(r"ORTHANC_EVENTS_OUTBOX=(\S+)", (ROOT / "docker" / "Dockerfile").read_text("utf-8"))
    assert outbox
    assert {outbox[1], orthanc["IndexDirectory"], orthanc["StorageDirectory"]} <= set(inside)


def test_images_are_pinned_and_can_be_replaced_and_ports_are_open_to_this_machine_only() -> None:
    for folder in ("docker", "docker/consumers", "examples/ai-service"):
        text = (ROOT / folder / "Dockerfile").read_text("utf-8")
        assert re.search(r"^ARG (ORTHANC|PYTHON)=\S+:\d+(\.\d+)+(-[\w-]+)?$", text, re.MULTILINE)
    built = {service["image"] for service in SERVICES.values() if "build" in service}
    for name, service in SERVICES.items():
        variable = re.fullmatch(r"\$\{([A-Z_]+_IMAGE):-(\S+)\}", service["image"])
        assert variable, name
        assert service["image"] in built or re.fullmatch(r"\S+:\d+\.\d+\.\d+(-\w+)?", variable[2]), name
    ports = [str(port) for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) > 5
    assert all(port.startswith("127.0.0.1:${") for port in ports)


def test_bases_are_the_same_in_compose_file_and_dockerfiles() -> None:
    for service in SERVICES.values():
        if "build" in service:
            text = (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).read_text("utf-8")
            for name, value in service["build"]["args"].items():
                assert f"ARG {name}={value.partition(':-')[2].rstrip('}')}\n" in text


def test_what_an_image_is_built_from_is_sent_to_the_engine() -> None:
    sent = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for file in ("docker/Dockerfile", "docker/consumers/Dockerfile", "docker/environment.sh"):
        for name in re.findall(r"\b((?:docker|requirements|config)/[\w.-]+\.\w+)", (ROOT / file).read_text("utf-8")):
            assert f"!{name}" in sent, name


def test_our_orthanc_reads_variables_as_orthancs_own_images_do(tmp_path: Path) -> None:
    (tmp_path / "Orthanc").write_text('#!/bin/sh\ncat "$1"\n', "utf-8")
    (tmp_path / "Orthanc").chmod(0o755)
    variables = {
        "ORTHANC__NAME": "Ward 7",
        "ORTHANC__STABLE_AGE": "10",
        "ORTHANC__DICOM_WEB__ENABLE": "false",
        "ORTHANC__DICOM_MODALITIES": '{"pacs": ["PACS", "pacs", 104]}',
        "ORTHANC_PASSWORD": "hunter2",
        "ORTHANC_EVENTS_SITE": "not for Orthanc",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "orthanc" / "docker-entrypoint.py", tmp_path / "orthanc.json"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert (found["Name"], found["StableAge"], found["DicomWeb"]["Enable"]) == ("Ward 7", 10, False)
    assert found["DicomModalities"]["pacs"] == ["PACS", "pacs", 104]
    assert found["RegisteredUsers"]["orthanc"] == "${ORTHANC_PASSWORD}"  # Orthanc puts it in; the file has no secret
    assert "hunter2" not in done.stdout
    assert "not for Orthanc" not in done.stdout


def test_what_an_installation_has_of_its_own_is_made_once(tmp_path: Path) -> None:
    def start(folder: Path, **variables: str) -> dict[str, str]:
        for one in (folder, folder / "ai"):
            one.mkdir(exist_ok=True)
        environment = {"PATH": os.environ["PATH"], **variables}
        subprocess.run([ROOT / "docker" / "first-start.sh", folder, folder / "ai"], env=environment, check=True)
        made = [path for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in made if path.stat().st_mode & 0o007]
        return {path.name: path.read_text("utf-8").strip() for path in made}

    first = start(tmp_path / "a")
    assert set(first) == {
        "orthanc-password",
        "ai-password",
        "source",
        "research.secret",
        "ai.secret",
        "authorization",
    }
    assert base64.b64decode(first["authorization"].removeprefix("Basic ")).decode() == f"ai:{first['ai-password']}"
    assert first["ai-password"] not in (first["orthanc-password"], first["ai.secret"])
    assert start(tmp_path / "a") == first
    other = start(tmp_path / "b")
    assert not [name for name in first if other[name] == first[name]]
    given = start(tmp_path / "a", ORTHANC_PASSWORD="hunter2", ORTHANC_EVENTS_SOURCE="urn:too:late")
    assert given == first | {"orthanc-password": "hunter2"}


@pytest.mark.parametrize(
    ("status", "states", "said"),
    [
        (200, {"nats": "connected"}, ""),
        (200, {"nats": "connecting"}, "not connected yet: {'nats': 'connecting'}"),
        (200, {}, "not connected yet"),
        # Of the broker before this one, whose place is kept.
        (200, {"rabbitmq": "connected", "nats": "not configured"}, ""),
        (401, {}, "refuses the password: if it was changed, restart that server"),
        (500, {}, "HTTP Error 500"),
    ],
)
def test_consumers_begin_when_each_broker_that_is_configured_is_connected(
    status: int, states: dict[str, str], said: str
) -> None:
    transports = [
        {"name": name, "state": state, "configured": state != "not configured"} for name, state in states.items()
    ]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"transports": transports}).encode())

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/orthanc-events/status"
        command = [sys.executable, str(ROOT / "docker" / "health.py"), "--connected", url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        thread.join()
    assert said in done.stderr
    assert done.returncode == bool(said)


def test_the_scripts_are_executable() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh"), *(ROOT / "docker").glob("*.sh")]
    assert len(scripts) > 1
    assert not [script for script in scripts if not os.access(script, os.X_OK)]


def workflow(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))
    return found


def test_the_workflow_does_what_ci_does_on_a_bare_debian_and_keeps_what_setup_downloads() -> None:
    job = workflow("ci")["jobs"]["ci"]
    assert job["container"]["image"] == "debian:12"
    steps = job["steps"]
    # By the step that runs it what pip fetches; Kafka's jars by scripts/bootstrap.sh.
    assert steps[-1] == {"run": "PIP_CACHE_DIR=$PWD/.cache/pip .ci/run"}
    uses = {str(step["uses"]).partition("@")[0]: step["with"] for step in steps if "uses" in step}
    assert uses["actions/checkout"]["fetch-depth"] == 0  # without tags there is no version
    cache = uses["actions/cache"]
    assert cache["path"] == ".cache"
    assert "kafka_jars=.cache/" in (ROOT / "scripts" / "bootstrap.sh").read_text("utf-8")
    for pattern in re.findall(r"'(.+?)'", cache["key"]):
        assert list(ROOT.glob(pattern)), pattern


def test_nothing_is_published_before_all_of_ci_has_passed_for_the_tag() -> None:
    release = workflow("release")
    assert release[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}  # YAML's name for `on`
    jobs = release["jobs"]
    assert jobs["ci"] == {"uses": "./.github/workflows/ci.yml"}
    assert [jobs[name]["needs"] for name in ("build", "pypi", "github")] == ["ci", "build", "pypi"]
    assert "workflow_call" in workflow("ci")[True]
    assert "make build" in [step.get("run") for step in jobs["build"]["steps"]]
    others = {name: job.get("permissions", {}) for name, job in jobs.items() if name in ("ci", "build")}
    assert not any(others.values())
