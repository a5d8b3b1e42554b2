"""The brokers' servers for tests in containers: the same classes as for processes, run in another way.

>>> with scratch_folder() as folder, NatsContainer(folder / "nats") as server:
...     server.port

The folder is mounted under its own path, so that configuration, data and log are where a process would have them; a
server that was killed finds them again. It has this machine's network where the engine can give it that, and listens on
the loopback interface only. Elsewhere the ports on which its configuration listens are published, the same ones, on the
loopback interface only; then the engine's proxy takes connections also while the server is starting, and hangs up, and
a transport that looks twice in that time takes it for a wrong configuration. Each start makes a container anew.
"""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, ClassVar, Final

from docker.errors import (  # type: ignore[import-not-found]  # mypy looks for it in the folder docker/
    APIError,
    DockerException,
    NotFound,
)
from testcontainers.core.container import DockerContainer

from orthanc_events_bridge.testing.brokers.kafka_server import KafkaServer
from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer
from orthanc_events_bridge.testing.brokers.webhook import PROGRAM, WebhookServer
from orthanc_events_bridge.testing.engine import STARTER, find_image, shares_network, this_starter
from orthanc_events_bridge.testing.guard import LABEL, MARK, RUN
from orthanc_events_bridge.testing.processes import Process, Server, ServerError, wait_until
from orthanc_events_bridge.testing.servers import NatsServer

#: Output goes to the server's log, so that nothing is lost with the container.
_TO_LOG: Final = 'exec "$@" >>"$0" 2>&1'

_POLL = 0.02


class _Contained:
    """A started container, as a server's process."""

    def __init__(self, container: DockerContainer) -> None:
        self.container = container
        self.returncode: int | None = None

    def _state(self) -> dict[str, Any]:
        wrapped = self.container.get_wrapped_container()
        wrapped.reload()
        return dict(wrapped.attrs["State"])

    @property
    def pid(self) -> int:
        """The id of the container's first process, on the engine's machine."""
        return int(self._state()["Pid"])

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                state = self._state()
            except NotFound:
                self.returncode = -9
            else:
                if not state["Running"]:
                    code = int(state["ExitCode"])
                    # An end by a signal, as the shell tells it; a process's is told as the signal's negative.
                    self.returncode = 128 - code if code > 128 else code
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("the container", timeout or 0.0)
            time.sleep(_POLL)
        return code

    def terminate(self) -> None:
        self.container.get_wrapped_container().kill("SIGTERM")

    def kill(self) -> None:
        self.container.get_wrapped_container().kill("SIGKILL")

    def remove(self) -> None:
        with suppress(NotFound):
            self.container.stop()


class ContainerServer(Server):
    """How a server is run in a container: stands behind the class that says how its kind is configured and asked.

    :raises MissingComponentError: no container engine answers, or the image is not to be had.

    :ivar published: whether its ports are published, in place of its having this machine's network. Read at each start.
    """

    #: The broker, as `orthanc_events_bridge.testing.images` calls it.
    kind: ClassVar[str]
    #: The name of its configuration file, which says where it listens.
    config_file: ClassVar[str]

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.image = find_image(self.kind)
        self.published = not shares_network()
        super().__init__(folder.absolute(), environment)
        self._contained: _Contained | None = None

    def _contain(self, command: Sequence[str], network: str | None, ports: Sequence[int] = ()) -> _Contained:
        folder = str(self.folder)
        container = (
            DockerContainer("")
            .with_command([str(self.log), *command])
            .with_envs(**self._environment())
            .with_kwargs(
                entrypoint=["sh", "-c", _TO_LOG],
                user=f"{os.getuid()}:{os.getgid()}",
                working_dir=folder,
                init=True,
                network=network,
                labels={LABEL: RUN, STARTER: this_starter()},
            )
        )
        container.image = self.image  # as it is: it may have its registry's prefix already
        for path, mode in self._mounts().items():
            container.with_volume_mapping(path, str(path), mode)
        for port in ports:
            container.ports[f"{port}/tcp"] = ("127.0.0.1", port)  # type: ignore[assignment]  # handed on as it is
        self.log.touch()  # a process has made it by the time that it is there
        contained = _Contained(container)
        try:
            container.start()
        except BaseException as error:
            contained.remove()
            if isinstance(error, DockerException | OSError):
                raise ServerError(self._message(f"can't be started in a container of {self.image}: {error}")) from error
            raise
        return contained

    def _mounts(self) -> dict[Path, str]:
        """The files and folders that it sees under their own paths, and how (``rw``, ``ro``)."""
        return {self.folder: "rw"}

    def _listen(self) -> list[int]:
        """Let the server listen inside the container too, and return the ports."""
        path = self.folder / self.config_file
        ports: list[int] = []

        def opened(line: re.Match[str]) -> str:
            ports.extend(int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", line[0]))
            return line[0].replace("127.0.0.1:", "0.0.0.0:")

        path.write_text(re.sub(r"(?m)^\s*listen.*$", opened, path.read_text("utf-8")), "utf-8")
        return sorted(set(ports))

    def _launch(self, command: Sequence[str]) -> Process:
        if self.published:
            self._contained = self._contain(command, None, self._listen())
        else:
            self._contained = self._contain(command, "host")
        return self._contained

    def _complete(self, command: Sequence[str]) -> int:
        contained = self._contain(command, "none")
        try:
            return contained.wait(self.deadline)
        finally:
            contained.remove()

    def execute(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a program beside the running server, and return its exit code and what it printed.

        :raises ServerError: the server isn't running.
        """
        wrapped = self._wrapped()
        user = f"{os.getuid()}:{os.getgid()}"
        result = wrapped.exec_run(list(command), environment={**self._environment(), **environment}, user=user)
        return int(result.exit_code), result.output.decode("utf-8", "replace")

    def _environment(self) -> dict[str, str]:
        return {"HOME": str(self.folder)} | self.environment | {MARK: self._mark}

    def _wrapped(self) -> Any:
        """The container as Docker's client has it."""
        if self._contained is None:
            raise ServerError(f"{self.title} in {self.folder} is not running")
        return self._contained.container.get_wrapped_container()

    def freeze(self) -> None:
        """Freeze all its processes: its sockets stay open and nobody answers."""
        wrapped = self._wrapped()

        def paused() -> bool:
            try:
                wrapped.pause()
            except APIError as error:  # one that makes threads at this moment can't be frozen
                if error.status_code != 500:
                    raise
                return False
            return True

        if not wait_until(paused, 10, every=0.2):
            raise ServerError(f"{self.title} in {self.folder} can't be frozen")
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen one go on."""
        if self._frozen:
            self._wrapped().unpause()
            self._frozen = False

    def children(self) -> list[int]:
        """None is ever left: they end with the container."""
        return []

    def _forget(self) -> None:
        if self._contained is not None:
            self._contained.remove()
        self._process = self._contained = None
        self._frozen = False

    def _kill_all(self) -> None:
        self._forget()
        super()._kill_all()


class NatsContainer(NatsServer, ContainerServer):
    """`NatsServer` in a container."""

    kind = "nats"
    config_file = "nats.conf"

    def __init__(self, folder: Path, *, port: int | None = None, config: str = "") -> None:
        super().__init__(folder, port=port, config=config, binary=Path("nats-server"))


class RabbitContainer(RabbitServer, ContainerServer):
    """`RabbitServer` in a container."""

    kind = "rabbitmq"
    config_file = "rabbitmq.conf"

    def __init__(self, folder: Path, *, config: str = "", plugins: Sequence[str] = (), port: int | None = None) -> None:
        super().__init__(folder, config=config, plugins=plugins, port=port, binary=Path("rabbitmq-server"))

    def _command(self) -> list[str]:
        command = super()._command()
        path = self.folder / self.config_file
        # Whoever comes from outside of the container is a stranger to it, which `guest` must not be.
        path.write_text("loopback_users = none\n" + path.read_text("utf-8"), "utf-8")
        return command

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """See `RabbitServer.ctl`."""
        command = ["rabbitmqctl", "--node", self.node, "--longnames", "--quiet", *arguments]
        flags = f"-start_epmd false -erl_epmd_port {self._distribution} -dist_listen false"
        code, output = self.execute(["timeout", f"{timeout:.0f}", *command], {"RABBITMQ_CTL_ERL_ARGS": flags})
        if code == 124:
            raise ServerError(f"rabbitmqctl {arguments[0]} took longer than {timeout:.0f} s")
        if code:
            raise ServerError(f"rabbitmqctl {arguments[0]} failed, exit code {code}: {output.strip()}")
        return output


class KafkaContainer(KafkaServer, ContainerServer):
    """`KafkaServer` in a container: one node, for others would have to reach it inside."""

    kind = "kafka"
    config_file = "server.properties"

    def __init__(self, folder: Path, *, config: str = "") -> None:
        super().__init__(folder, config=config, archive=False, java=Path("java"), jars=Path("/opt/kafka/libs"))


class WebhookContainer(WebhookServer, ContainerServer):
    """`WebhookServer` in a container."""

    kind = "webhook"

    def _command(self) -> list[str]:
        host = "0.0.0.0" if self.published else "127.0.0.1"  # noqa: S104  # inside the container
        return ["python3", "-I", str(PROGRAM), str(self.folder), str(self.port), host]

    def _listen(self) -> list[int]:
        return [self.port]

    def _is_ready(self) -> bool:
        # The engine takes connections before the receiver does, and hangs up.
        kind = HTTPSConnection if self.url.startswith("https:") else HTTPConnection
        with closing(kind("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("OPTIONS", "*")
                return connection.getresponse().status > 0
            except ssl.SSLCertVerificationError:
                return True
            except (HTTPException, OSError):
                return False

    def _mounts(self) -> dict[Path, str]:
        return {**super()._mounts(), PROGRAM: "ro"}


#: By the transport's ``type``.
CONTAINERS: Final[dict[str, Callable[..., Server]]] = {
    "kafka": KafkaContainer,
    "nats": NatsContainer,
    "rabbitmq": RabbitContainer,
    "webhook": WebhookContainer,
}
