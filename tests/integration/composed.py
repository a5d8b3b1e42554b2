"""The Compose file brought up for a test: with our own images, under a name and at ports of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self, cast

import httpx
import yaml

from orthanc_events_bridge.testing import engine
from orthanc_events_bridge.testing.brokers import BROKERS, Broker
from orthanc_events_bridge.testing.dicom import Study
from orthanc_events_bridge.testing.guard import LABEL, RUN
from orthanc_events_bridge.testing.images import own_image
from orthanc_events_bridge.testing.ledger import Ledger, Report
from orthanc_events_bridge.testing.processes import free_port, wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError

ROOT: Final = Path(__file__).parents[2]
#: Of Compose's own: what a container belongs to.
_PROJECT: Final = "com.docker.compose.project"
_SERVICE: Final = "com.docker.compose.service"
#: Variables of the Compose file → kinds of our own images.
_IMAGES: Final = {
    "ORTHANC_EVENTS_IMAGE": "orthanc-events",
    "CONSUMERS_IMAGE": "consumers",
    "AI_SERVICE_IMAGE": "ai-service",
    "NATS_IMAGE": "nats",
    "RABBITMQ_IMAGE": "rabbitmq",
    "KAFKA_IMAGE": "kafka",
}
#: Seconds that something may take on a slow machine.
DEADLINE: Final = 240.0


def find_compose() -> list[str]:
    """The command: Debian's docker-compose, else Docker's plugin.

    :raises MissingComponentError: there is neither.
    """
    if found := shutil.which("docker-compose"):
        return [found]
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    raise MissingComponentError("docker-compose is missing: apt-get install docker-compose, or Docker's compose plugin")


def _images() -> dict[str, str]:
    engine.find_engine()
    found = {}
    with engine.engine_client() as client:
        there = {tag for image in client.images.list() for tag in image.tags}
    for variable, kind in _IMAGES.items():
        name = own_image(kind)
        if name not in there:
            raise MissingComponentError(
                f"the image {name or kind} isn't there: build it (Debian, as root: make images)"
            )
        found[variable] = str(name)
    return found


class Composed:
    """What ``docker compose up`` makes of the Compose file. Used as a context manager, it leaves nothing behind.

    :param folder: for what the test adds to the Compose file.
    :param profile: ``nats``, ``rabbitmq``, ``kafka``, ``all``.
    :raises MissingComponentError: no engine, no Compose, or an image that was not built.

    :ivar ledger: what Orthanc acknowledged.
    :ivar stored: the instances among that.
    """

    def __init__(self, folder: Path, profile: str) -> None:
        self.profile = profile
        self.project = f"orthanc-events-{RUN[:12]}"
        self.ledger = Ledger()
        self.stored: set[str] = set()
        self.ledger.allow("*.stable", "*.completed", "*.routed", "*.ready", "*.anonymized", "job.*", "server.*")
        published = ("orthanc", "dicom", "archive", "research", "nats", "rabbitmq", "kafka")
        self.ports = {name: free_port() for name in published}
        more = {"COMPOSE_PROJECT_NAME": self.project, "COMPOSE_PROFILES": profile, "PYTHONWARNINGS": "ignore"}
        taken = ("ORTHANC_", "COMPOSE_")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
        self._environment |= _images() | more
        self._environment |= {f"{name.upper()}_PORT": str(port) for name, port in self.ports.items()}
        files = ["-f", str(ROOT / "docker-compose.yml"), "-f", str(self._labels(folder))]
        self._command = [*find_compose(), "--project-directory", str(ROOT), *files]
        self._clients: dict[str, httpx.Client] = {}

    def _labels(self, folder: Path) -> Path:
        """By which the guard knows what is ours, should this process be killed."""
        compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
        labels = {"labels": {LABEL: RUN, engine.STARTER: engine.this_starter()}}
        compose["networks"]["default"] = None
        document = {"services": dict.fromkeys(compose["services"], labels)}
        for kind in ("volumes", "networks"):  # whose options docker-compose 1.29 takes from the last file alone
            document[kind] = {name: {**(one or {}), **labels} for name, one in compose[kind].items()}
        path = folder / "labels.yml"
        path.write_text(yaml.safe_dump(document), "utf-8")
        return path

    def compose(self, *arguments: str) -> str:
        """Run a command of Compose's, and return what it printed."""
        done = subprocess.run(
            [*self._command, *arguments], env=self._environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}: {done.stderr[-3000:]}\n{self.ends()}"
        return done.stdout

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, **scale: int) -> None:
        """Bring everything up, and wait until all is healthy."""
        numbers = [part for service, number in scale.items() for part in ("--scale", f"{service}={number}")]
        self.compose("up", "--detach", "--no-build", *numbers)
        self.until(lambda: not self.unwell(), "healthy", self.unwell)

    def down(self) -> None:
        """Take everything down; volumes too."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        subprocess.run(
            [*self._command, "down", "--volumes", "--timeout", "10"],
            env=self._environment,
            capture_output=True,
            timeout=300,
            check=True,
        )

    def left(self) -> list[str]:
        """What is there of this project: containers, networks, volumes."""
        filters = {"label": f"{_PROJECT}={self.project}"}
        with engine.engine_client() as client:
            found = [one.name for one in client.containers.list(all=True, filters=filters, ignore_removed=True)]
            found += [one.name for one in client.networks.list(filters=filters)]
            return found + [one.name for one in client.volumes.list(filters=filters)]

    # -- containers

    @contextlib.contextmanager
    def containers(self, service: str | None = None) -> Iterator[list[Any]]:
        """Those of a service, or all, as Docker's client has them."""
        labels = [f"{_PROJECT}={self.project}"] + ([f"{_SERVICE}={service}"] if service else [])
        with engine.engine_client() as client:
            yield client.containers.list(all=True, filters={"label": labels}, ignore_removed=True)

    def unwell(self) -> list[str]:
        """Which containers are not as they should be: healthy, running, or ended well."""
        wrong = []
        with self.containers() as found:
            for one in found:
                state = one.attrs["State"]
                health = state.get("Health", {}).get("Status", "healthy")
                once = one.labels[_SERVICE] in ("setup", "ready")
                well = state["Status"] == "exited" and state["ExitCode"] == 0 if once else state["Status"] == "running"
                if not well or (not once and health != "healthy"):
                    wrong.append(f"{one.name}: {state['Status']} {health}")
        return wrong

    def logs(self, service: str) -> list[str]:
        """What each container of a service has printed."""
        with self.containers(service) as found:
            return [one.logs().decode("utf-8", "replace") for one in found]

    def ends(self) -> str:
        """The ends of all logs, for a failure."""
        with self.containers() as found:
            return "\n".join(f"--- {one.name}\n{one.logs(tail=15).decode('utf-8', 'replace')}" for one in found)

    def crash(self, service: str) -> None:
        """Kill the programs of a service's first container, without asking; the engine starts it again."""
        with self.containers(service) as found:
            before = found[0].attrs["RestartCount"]
            found[0].exec_run(["sh", "-c", "kill -9 -1"])

            def again() -> bool:
                found[0].reload()
                return bool(found[0].attrs["RestartCount"] > before)

            self.until(again, f"started again: {service}")

    def until(self, condition: Any, what: str, more: Any = lambda: "") -> None:
        """Wait for something, on a slow machine too."""
        assert wait_until(condition, DEADLINE, every=0.5), f"not {what}: {more()}\n{self.ends()}"

    # -- what is in it

    @functools.cached_property
    def password(self) -> str:
        """As documented: of Orthanc's user `orthanc`."""
        return self.secret("orthanc-password")

    def secret(self, name: str) -> str:
        """One that was made at the first start."""
        return self.compose("exec", "-T", "orthanc", "cat", f"/run/orthanc-events/{name}").strip()

    def client(self, name: str) -> httpx.Client:
        """Of an Orthanc, by the port that is published."""
        if name not in self._clients:
            url, login = f"http://127.0.0.1:{self.ports[name]}", ("orthanc", self.password)
            self._clients[name] = httpx.Client(base_url=url, auth=login, timeout=60, trust_env=False)
        return self._clients[name]

    def get(self, name: str, path: str) -> Any:
        """What an Orthanc answers."""
        answer = self.client(name).get(path)
        answer.raise_for_status()
        return answer.json()

    def has(self, name: str, study: Study) -> bool:
        """Whether all of a study is in an Orthanc."""
        there = set(self.get(name, "/instances"))
        return {instance.id for instance in study} <= there

    def modalities(self, name: str, study: str) -> list[str]:
        """Of the series of a study in an Orthanc."""
        return sorted(one["MainDicomTags"]["Modality"] for one in self.get(name, f"/studies/{study}/series"))

    def store(self, study: Study) -> None:
        """Upload a study, again and again where nobody answers; the ledger knows."""
        for instance in study:
            ids = (instance.id, instance.series, instance.study, instance.patient)

            def acknowledged(data: bytes = instance.data, ids: tuple[str, str, str, str] = ids) -> bool:
                try:
                    answer = self.client("orthanc").post("/instances", content=data)
                except httpx.TransportError:
                    self.ledger.maybe_stored(*ids)
                    return False
                answer.raise_for_status()
                self.ledger.stored(answer.json())
                self.stored.add(ids[0])
                return True

            self.until(acknowledged, "acknowledged")

    def brokers(self) -> list[Broker]:
        """Plain clients of the brokers that run, at the ports that are published."""
        kinds = ("nats", "rabbitmq", "kafka") if self.profile == "all" else (self.profile,)
        ports = {kind: self.ports[kind] for kind in kinds}
        return [BROKERS[kind](cast(Any, SimpleNamespace(port=p, admin_port=p))) for kind, p in ports.items()]

    def note_all(self) -> None:
        """Let the ledger know of what others have put into Orthanc: the demo, the anonymizer."""
        parents = {
            level: {one["ID"]: one for one in self.get("orthanc", f"/{level}?expand")}
            for level in ("series", "studies")
        }
        for instance in self.get("orthanc", "/instances?expand"):
            series = instance["ParentSeries"]
            study = parents["series"][series]["ParentStudy"]
            ids = (instance["ID"], series, study, parents["studies"][study]["ParentPatient"])
            if instance["ID"] not in self.stored:
                self.stored.add(instance["ID"])
                self.ledger.stored_ids(*ids)

    def report(self, broker: Broker, kills: int = 0) -> Report:
        """Compare what was acknowledged with what a broker has."""
        levels = ("patients", "studies", "series", "instances")
        existing = {one for level in levels for one in self.get("orthanc", f"/{level}")}
        log = self.get("orthanc", "/changes?limit=10000")["Changes"]
        return self.ledger.compare(broker.read(), kills=kills, existing=existing, log=log)
