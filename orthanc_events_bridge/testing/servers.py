"""Real servers as processes: Orthanc (with its Python plugin) and NATS, on free ports of this machine.

>>> with scratch_folder() as folder, OrthancServer(folder / "orthanc") as orthanc:
...     orthanc.upload(instance.data)["Status"]
'Success'

Nothing of it outlives its starter (see `orthanc_events_bridge.testing.guard`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import httpx

from orthanc_events_bridge.testing.guard import leftovers, scratch_folder
from orthanc_events_bridge.testing.processes import Server, ServerError, free_port, wait_until
from orthanc_events_bridge.testing.programs import (
    MissingComponentError,
    find_nats,
    find_orthanc,
    find_python_plugin,
    find_storescu,
    in_ci,
    require,
)

__all__ = [
    "MissingComponentError",
    "NatsServer",
    "NotAcknowledgedError",
    "OrthancServer",
    "ServerError",
    "broker_url",
    "find_nats",
    "find_orthanc",
    "find_python_plugin",
    "find_storescu",
    "free_port",
    "in_ci",
    "leftovers",
    "require",
    "scratch_folder",
    "wait_until",
]

#: The levels of DICOM resources as Orthanc's REST API spells them.
LEVELS = ("patients", "studies", "series", "instances")


#: The scheme of each broker's URL, as consumers are given it.
SCHEMES: Final = {"nats": "nats", "rabbitmq": "amqp", "kafka": "kafka"}


def broker_url(kind: str, port: int, host: str = "127.0.0.1") -> str:
    """A broker's address as consumers are given it."""
    return f"{SCHEMES[kind]}://{host}:{port}"


class NotAcknowledgedError(Exception):
    """A request was sent and not acknowledged: whether Orthanc has done it is not known."""


# ------------------------------------------------------------------------------------------------------- NATS


class NatsServer(Server):
    """``nats-server`` with JetStream, its store in the folder.

    :param port: for clients; a free one by default.
    :param config: text for the end of its configuration file; a block that is there already is replaced by
        the later one. Read at each start, from the attribute ``config``.
    :param binary: the program, where `find_nats` is not to look for it.
    """

    title = "nats-server"
    ends = (*Server.ends, 1)  # 2.10 says so

    def __init__(self, folder: Path, *, port: int | None = None, config: str = "", binary: Path | None = None) -> None:
        super().__init__(folder)
        self.binary = binary or find_nats()
        self.port = port or free_port()
        self.config = config

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        """Where JetStream keeps its data."""
        return self.folder / "store"

    def write_config(self) -> Path:
        """Write the configuration file, which the server reads when it starts."""
        path = self.folder / "nats.conf"
        lines = [
            f'listen: "127.0.0.1:{self.port}"',
            f"jetstream {{ store_dir: {json.dumps(str(self.store))} }}",
            self.config,
        ]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path

    def reload(self) -> None:
        """Let the running server take a changed ``config`` (SIGHUP); who may no longer log in is thrown out."""
        self.write_config()
        count = self.log_text().count("Reloaded server configuration")
        os.kill(self.pid, signal.SIGHUP)
        self.wait_log("Reloaded server configuration", count=count + 1)

    def _command(self) -> list[str]:
        return [str(self.binary), "--config", str(self.write_config())]

    def _is_ready(self) -> bool:
        # The server listens for clients only after JetStream has recovered its streams.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False


# ---------------------------------------------------------------------------------------------------- Orthanc


class OrthancServer(Server):
    """Orthanc, its database and files in the folder.

    It takes C-STORE only from this machine and from the application entity ``STORESCU``, and REST only from
    this machine.

    :param script: a Python script; it brings the Python plugin with it.
    :param config: options of Orthanc's configuration, over those set here. Read at each start and reset, from
        the attribute ``config``, by way of `write_config`.
    :param environment: variables for the process.
    :param plugins: the plugins; by default the Python plugin where a script is given.
    :param stable_age: after how many seconds without news a resource is stable.
    :param verbose: write a log of everything.
    :param login: a user and a password, without which nobody is let in.
    :param binary: the program, where `find_orthanc` is not to look for it.
    """

    title = "Orthanc"

    def __init__(
        self,
        folder: Path,
        *,
        script: Path | None = None,
        config: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        plugins: Sequence[Path] | None = None,
        stable_age: int = 1,
        verbose: bool = False,
        login: tuple[str, str] | None = None,
        binary: Path | None = None,
    ) -> None:
        super().__init__(folder, environment)
        self.login = login
        self.binary = binary or find_orthanc()
        self.verbose = verbose
        self.port = free_port()
        self.dicom_port = free_port()
        self.aet = "ORTHANC"
        if plugins is None:
            plugins = [find_python_plugin()] if script else []
        self.config: dict[str, Any] = {
            "Name": "orthanc-events-bridge test",
            "StorageDirectory": str(self.database),
            "IndexDirectory": str(self.database),
            "TemporaryDirectory": str(self.folder),
            "HttpPort": self.port,
            "DicomPort": self.dicom_port,
            "DicomAet": self.aet,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomCheckModalityHost": True,
            "DicomModalities": {"storescu": ["STORESCU", "127.0.0.1", 104]},
            "StableAge": stable_age,
            "Plugins": [str(plugin) for plugin in plugins],
        }
        if script:
            self.config["PythonScript"] = str(script)
        self.config |= config or {}
        self._client_lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._old_clients: list[httpx.Client] = []

    @property
    def url(self) -> str:
        """Where the REST API is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        """Where Orthanc keeps its index and its files."""
        return self.folder / "db"

    @property
    def client(self) -> httpx.Client:
        """A client of the REST API, for any thread. It never tries a request again."""
        with self._client_lock:
            if self._client is None:
                self._client = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False, auth=self.login)
            return self._client

    # Life.

    def write_config(self) -> Path:
        """Write the configuration file, which Orthanc reads when it starts and when it is reset."""
        path = self.folder / "orthanc.json"
        users = {"AuthenticationEnabled": True, "RegisteredUsers": dict([self.login])} if self.login else {}
        path.write_text(json.dumps(self.config | users, indent=2), "utf-8")
        return path

    def start(self, *, wait: bool = True) -> float:
        """Start Orthanc and wait until ``GET /system`` answers (C-STORE works then too). See `Server`."""
        self._renew_client()
        return super().start(wait=wait)

    def reset(self) -> float:
        """``POST /tools/reset``, and wait until the same process answers again.

        :return: the seconds from the request to the answer of ``GET /system``.
        :raises ServerError: the process ended, or it did not answer in time.
        """
        self.write_config()
        started = self.log_text().count(_STARTED)
        began = time.monotonic()
        self.client.post("/tools/reset", content=b"").raise_for_status()
        # Until it has stopped, the old incarnation still answers: only the log tells the new one apart.
        end = began + self.deadline
        while self.log_text().count(_STARTED) <= started or not self._is_ready():
            if not self.running:
                self._ended_by_itself()
            if time.monotonic() > end:
                raise ServerError(self._message(f"did not come back from a reset within {self.deadline:.0f} s"))
            time.sleep(0.01)
        self._renew_client()
        return time.monotonic() - began

    def close(self, *, kill: bool = False) -> None:
        """See `Server.close`. A stop takes Orthanc more than three seconds."""
        try:
            super().close(kill=kill)
        finally:
            self._renew_client()
            self._close_old_clients()

    def _kill_all(self) -> None:
        super()._kill_all()
        self._renew_client()
        self._close_old_clients()

    def _renew_client(self) -> None:
        # Connections to the process that was there before only fail; another thread may still be using one.
        with self._client_lock:
            if self._client is not None:
                self._old_clients.append(self._client)
                self._client = None

    def _close_old_clients(self) -> None:
        while self._old_clients:
            self._old_clients.pop().close()

    def _command(self) -> list[str]:
        self.database.mkdir(exist_ok=True)
        command = [str(self.binary), str(self.write_config())]
        if self.verbose:
            command.append("--verbose")
        return command

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/system", timeout=5.0, trust_env=False, auth=self.login).status_code == 200
        except httpx.TransportError:
            return False

    # Requests.

    def get(self, path: str) -> Any:
        """Return the JSON of a ``GET``.

        :raises httpx.HTTPError: no answer, or not a good one.
        """
        answer = self.client.get(path)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any = None) -> Any:
        """Return the JSON answer of a ``POST`` of JSON (of an empty body by default), or None for an empty
        answer.

        :raises httpx.HTTPError: no answer, or not a good one.
        """
        answer = self.client.post(path, content=b"" if body is None else json.dumps(body))
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def upload(self, data: bytes | Path) -> dict[str, Any]:
        """Upload a DICOM file and return Orthanc's acknowledgement.

        Orthanc 1.10.1 answers some uploads with 500 while others upload and delete at the same time.

        :param data: its content, or where it is.
        :return: ``ID``, ``ParentPatient``, ``ParentStudy``, ``ParentSeries`` and ``Status`` (``Success`` or
            ``AlreadyStored``).
        :raises NotAcknowledgedError: no answer, or a status of 500 and above.
        :raises httpx.HTTPStatusError: Orthanc refuses the file.
        """
        content = data.read_bytes() if isinstance(data, Path) else data
        answer = self._request("POST", "/instances", content=content, headers={"Content-Type": "application/dicom"})
        answer.raise_for_status()
        return cast(dict[str, Any], answer.json())

    def delete(self, level: str, resource: str) -> bool:
        """Delete a resource.

        :param level: ``patients``, ``studies``, ``series`` or ``instances``.
        :return: True where Orthanc says that it is done; False where it has no such resource.
        :raises NotAcknowledgedError: no answer, or a status of 500 and above.
        """
        answer = self._request("DELETE", f"/{level}/{resource}")
        if answer.status_code == 404:
            return False
        answer.raise_for_status()
        return True

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            answer = self.client.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise NotAcknowledgedError(f"{method} {path}: {type(error).__name__}: {error}") from error
        if answer.status_code >= 500:
            raise NotAcknowledgedError(f"{method} {path}: {answer.status_code}")
        return answer

    def existing(self) -> set[str]:
        """Return the ids of all patients, studies, series and instances that Orthanc has."""
        return {resource for level in LEVELS for resource in self.get(f"/{level}")}

    def changes(self, since: int = 0) -> list[dict[str, Any]]:
        """Return the rows of Orthanc's log behind a number, as they are now (a deletion erases rows)."""
        rows: list[dict[str, Any]] = []
        while True:
            page = self.get(f"/changes?since={since}&limit=1000")
            rows += page["Changes"]
            if page["Done"] or not page["Changes"]:
                return rows
            since = page["Last"]

    def store_scu(self, paths: Iterable[Path]) -> dict[Path, bool]:
        """Send files by C-STORE, with DCMTK's ``storescu``, over one association per 500 of them.

        :return: for each file whether Orthanc has acknowledged it with success.
        :raises MissingComponentError: there is no ``storescu``.
        """
        program = find_storescu()
        everything = [Path(path).absolute() for path in paths]
        result: dict[Path, bool] = dict.fromkeys(everything, False)
        for first in range(0, len(everything), 500):
            command = [str(program), "--verbose", "--no-halt", "--aetitle", "STORESCU", "--call", self.aet]
            command += ["127.0.0.1", str(self.dicom_port)]
            command += [str(path) for path in everything[first : first + 500]]
            run = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | {"LC_ALL": "C"},
                check=False,
            )
            current: Path | None = None
            for line in run.stderr.decode("utf-8", "replace").splitlines():
                if line.startswith("I: Sending file: "):
                    current = Path(line.removeprefix("I: Sending file: "))
                elif line.startswith("I: Received Store Response (Success)") and current in result:
                    result[current] = True
        return result


_STARTED = "Orthanc has started"
