"""RabbitMQ's server for tests, as a process. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from orthanc_events_bridge.testing.processes import Server, ServerError, free_port, wait_until
from orthanc_events_bridge.testing.programs import find_rabbitmq

_HANDSHAKE: Final = b"AMQP\x00\x00\x09\x01"
_STARTED: Final = b"Server startup complete"


class RabbitServer(Server):
    """One RabbitMQ node, its data in the folder; the user ``guest`` may do everything.

    Nothing of it listens anywhere but on this machine, on free ports: there is no ``epmd``, because the port for
    other Erlang nodes is told to whom it concerns.

    :param config: text for the end of ``rabbitmq.conf``, where a later line replaces an earlier one. Read at each
        start, from the attribute ``config``.
    :param plugins: names of plugins to enable. Read at each start, from the attribute ``plugins``.
    :param port: for clients; a free one by default.
    :param binary: the program, where `find_rabbitmq` is not to look for it.
    """

    title = "rabbitmq-server"

    def __init__(
        self,
        folder: Path,
        *,
        config: str = "",
        plugins: Sequence[str] = (),
        port: int | None = None,
        binary: Path | None = None,
    ) -> None:
        self.binary = binary or find_rabbitmq()
        self.config = config
        self.plugins = list(plugins)
        self.port = port or free_port()
        self._begin = 0
        self._distribution = free_port()
        self.node = f"rabbit{self.port}@127.0.0.1"
        super().__init__(folder)
        flags = f"-start_epmd false -erl_epmd_port {self._distribution}"
        listen = "-kernel inet_dist_use_interface {127,0,0,1}"
        self.environment |= {
            "HOME": str(self.folder),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_USE_LONGNAME": "true",
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            # The script then becomes the Erlang machine, in place of waiting for it.
            "RUNNING_UNDER_SYSTEMD": "true",
            # With a name of its own from the start it doesn't look for epmd.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-name {self.node} {flags} {listen} +S 2:2 +A 8",
            "ERL_CRASH_DUMP_SECONDS": "0",
        }

    def _command(self) -> list[str]:
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(f"cookie{os.urandom(12).hex()}")
            cookie.chmod(0o400)
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            "disk_free_limit.absolute = 1MB",
            "vm_memory_high_watermark.absolute = 2GB",
            "log.console = true",
            "log.console.level = info",
            "log.console.use_colors = off",
            "log.file = false",
            self.config,
        ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n", "utf-8")
        (self.folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n", "utf-8")
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        return [str(self.binary)]

    def _is_ready(self) -> bool:
        # Clients are let in before all listeners are there.
        with self.log.open("rb") as log:
            log.seek(self._begin)
            if _STARTED not in log.read():
                return False
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(_HANDSHAKE)
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    def _message(self, what: str) -> str:
        # After its reason it also logs what each of its supervisors has to say.
        reason = self.log_text()[-100_000:].partition("BOOT FAILED")[0].splitlines()[-30:]
        return f"{self.title} {what}. The end of {self.log}:\n" + "\n".join(f"    {line}" for line in reason)

    def kill(self) -> None:
        """See `Server.kill`."""
        super().kill()
        self._sweep()

    def stop(self) -> float:
        """See `Server.stop`."""
        seconds = super().stop()
        self._sweep()
        return seconds

    def _sweep(self) -> None:
        """What the server had started ends by itself, and is waited for; once in a while one of Erlang's doesn't."""
        if not wait_until(lambda: not self.children(), 5):
            for pid in self.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run ``rabbitmqctl`` against it (about a second) and return what it printed.

        :raises ServerError: it failed, or took longer than ``timeout`` seconds.
        """
        flags = f"-start_epmd false -erl_epmd_port {self._distribution} -dist_listen false"
        command = [str(self.binary.with_name("rabbitmqctl")), "--node", self.node, "--longnames", "--quiet", *arguments]
        try:
            run = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment | {"ERL_FLAGS": flags},
                cwd=self.folder,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServerError(f"rabbitmqctl {arguments[0]} took longer than {timeout:.0f} s") from None
        text = run.stdout.decode("utf-8", "replace")
        if run.returncode:
            raise ServerError(f"rabbitmqctl {arguments[0]} failed, exit code {run.returncode}: {text.strip()}")
        return text
