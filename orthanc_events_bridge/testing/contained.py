"""How a server is run in a container: the same class as for a process, with another way to start it.

The folder is mounted under its own path, so that configuration, data and log are where a process would have them; a
server that was killed finds them again. It has this machine's network where the engine can give it that, and listens on
the loopback interface only. Elsewhere it is in a network of this run, and the ports on which its configuration listens
are published, the same ones, on the loopback interface only; then the engine's proxy takes connections also while the
server is starting, and hangs up, and a transport that looks twice in that time takes it for a wrong configuration. Each
start makes a container anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final

from docker.constants import (  # type: ignore[import-not-found]  # mypy looks for it in the folder docker/
    DEFAULT_DOCKER_API_VERSION,
)
from docker.errors import (  # type: ignore[import-not-found]
    APIError,
    DockerException,
    NotFound,
)
from docker.types import (  # type: ignore[import-not-found]
    EndpointConfig,
    Mount,
)
from testcontainers.core.container import DockerContainer

from orthanc_events_bridge.testing.engine import STARTER, find_image, run_network, shares_network, this_starter
from orthanc_events_bridge.testing.guard import LABEL, MARK, RUN, scratch_folder
from orthanc_events_bridge.testing.processes import Process, Server, ServerError, wait_until
from orthanc_events_bridge.testing.servers import broker_url

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
                    self.returncode = 128 - code if 128 < code < 128 + signal.NSIG else code
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
    """Stands behind the class that says how its kind is configured and asked.

    :param folder: where it keeps everything. What `_prepare` makes where none is given goes when this is closed.
    :raises MissingComponentError: no container engine answers, or the image is not to be had.

    :ivar image: in which it runs.
    :ivar mounts: files and folders that it sees too, under their own paths, and can't change. Read at each start.
    :ivar published: whether its ports are published, in place of its having this machine's network. Read at each start.
    """

    #: The server, as `orthanc_events_bridge.testing.images` calls it.
    kind: ClassVar[str]
    #: The name of its configuration file, which says where it listens.
    config_file: ClassVar[str]
    image: str
    mounts: tuple[Path, ...] = ()
    _scratch: contextlib.ExitStack | None = None
    _temporary = False

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        if self._scratch is None:
            folder = self._prepare(folder)
        self.published = not shares_network()
        super().__init__(folder, environment)
        self._contained: _Contained | None = None

    def _prepare(self, folder: Path | None, image: str | None = None, mounts: Iterable[str | Path] = ()) -> Path:
        """Find the image, and the folder, before everything else is made."""
        self.mounts = tuple(Path(path).absolute() for path in mounts)
        self.image = find_image(self.kind, image)
        self._scratch = contextlib.ExitStack()
        self._temporary = folder is None
        return (folder or self._scratch.enter_context(scratch_folder())).absolute()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Of a temporary one nothing is kept for which it would have to be stopped, which takes seconds.
        if kind is None and self._temporary:
            self.close(kill=True)
        else:
            super().__exit__(kind, error, trace)

    @property
    def alias(self) -> str:
        """Its name in the network of this run, where it is published."""
        return f"{self.kind}-{self.port}"

    def _contain(self, command: Sequence[str], network: str, ports: Sequence[int] = ()) -> _Contained:
        folder = str(self.folder)
        named = {network: EndpointConfig(DEFAULT_DOCKER_API_VERSION, aliases=[self.alias])} if ports else None
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
                networking_config=named,
                labels={LABEL: RUN, STARTER: this_starter()},
                # Unlike a volume, of which an engine makes what isn't there.
                mounts=[
                    Mount(str(path), str(path), "bind", read_only=mode == "ro") for path, mode in self._mounts().items()
                ],
            )
        )
        container.image = self.image  # as it is: it may have its registry's prefix already
        for port in ports:
            container.ports[f"{port}/tcp"] = ("127.0.0.1", port)  # type: ignore[assignment]  # handed on as it is
        self.log.touch()  # a process has made it by the time that it is there
        contained = _Contained(container)
        try:
            container.start()
        except BaseException as error:
            contained.remove()
            if isinstance(error, DockerException | OSError):
                what = f"can't be started in a container of {self.image}: {error}{_remedy(error)}"
                raise ServerError(self._message(what)) from error
            raise
        return contained

    def _mounts(self) -> dict[Path, str]:
        """The files and folders that it sees under their own paths, and how (``rw``, ``ro``)."""
        return {self.folder: "rw", **dict.fromkeys(self.mounts, "ro")}

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
            self._contained = self._contain(command, run_network(), self._listen())
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
        if self._scratch is not None:
            self._scratch.close()


def _remedy(error: Exception) -> str:
    """What to do where an engine does not find what it is to mount."""
    if "bind source path does not exist" not in str(error):
        return ""
    return (
        " (the engine sees no such file or folder; an engine on another machine does not see this one's, nor what is "
        "in the container in which this process is)"
    )


class BrokerContainer(ContainerServer):
    """A broker that an Orthanc in a container, and consumers on this machine, can reach."""

    @property
    def inner_port(self) -> int:
        """Where others in the network of this run connect, where it is published."""
        return self.port

    def get_url(self) -> str:
        """Where consumers connect: ``nats://127.0.0.1:PORT``, ``amqp://…`` (as ``guest``), ``kafka://…``."""
        return broker_url(self.kind, self.port)

    def get_inner_url(self) -> str:
        """The same for who is in a container beside it."""
        return broker_url(self.kind, self.inner_port, self.alias) if self.published else self.get_url()
