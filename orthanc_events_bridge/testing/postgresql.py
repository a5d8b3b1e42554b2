"""PostgreSQL as a process, for Orthancs that keep their index there."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.testing.guard import guard
from orthanc_events_bridge.testing.processes import Server, ServerError, free_port, wait_until
from orthanc_events_bridge.testing.programs import find_postgres, find_postgresql_plugin, find_python_plugin

#: Who runs it where this process is root's, whom PostgreSQL refuses: the first of them that there is.
_USERS: Final = ("postgres", "nobody")
#: The database and its user, of those that a new cluster has.
_DATABASE: Final = "postgres"


class PostgresServer(Server):
    """One PostgreSQL, for this machine only.

    Its data are not in the folder but in one of their own: root's folders are closed to the user that it runs as. They
    are there until it is closed.

    :param options: settings (``postgresql.conf``). Read at each start, from the attribute ``options``.
    """

    title = "postgres"

    def __init__(self, folder: Path, *, options: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.binary = find_postgres()
        self.port = free_port()
        self.options = dict(options or {})
        self._own: Path | None = None

    @property
    def data(self) -> Path:
        """The cluster's files; made at the first start."""
        if self._own is None:
            raise ServerError(f"{self.title} in {self.folder} has never been started")
        return self._own / "data"

    def orthanc(self, *, connections: int = 8, read_committed: bool = False) -> dict[str, Any]:
        """Options of the configuration of an Orthanc that keeps its index here.

        :param connections: of one Orthanc.
        :param read_committed: let its transactions be READ COMMITTED, as the plugin does by default from version 7.0
            on. Debian 12's version 4.0 knows SERIALIZABLE alone: it gets a copy in which that one word is another.
        """
        plugin = self._read_committed() if read_committed else find_postgresql_plugin()
        return {
            "Plugins": [str(find_python_plugin()), str(plugin)],
            "PostgreSQL": {
                "EnableIndex": True,
                "EnableStorage": False,
                "Host": "127.0.0.1",
                "Port": self.port,
                "Database": _DATABASE,
                "Username": _DATABASE,
                "Password": "",
                "Lock": False,
                "IndexConnectionsCount": connections,
            },
        }

    def _read_committed(self) -> Path:
        content = find_postgresql_plugin().read_bytes()
        for mode in (b"READ WRITE", b"READ ONLY"):
            serializable = b"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE " + mode
            if content.count(serializable) != 1:
                raise ServerError(f"{find_postgresql_plugin()} is not the version that can be made READ COMMITTED")
            committed = b"SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
            content = content.replace(serializable, committed.ljust(len(serializable)))
        path = self.folder / "libOrthancPostgreSQLIndex.so"
        path.write_bytes(content)
        return path

    def query(self, statement: str) -> str:
        """Run SQL and return what it answers: a line for each row, columns parted by ``|``."""
        command = [str(self.binary.parent / "psql"), "--no-psqlrc", "--quiet", "--no-align", "--tuples-only"]
        command += ["--host=127.0.0.1", f"--port={self.port}", f"--username={_DATABASE}", f"--command={statement}"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout

    def stop(self) -> float:
        """Stop it without waiting for its clients to leave; see `Server.stop`."""
        if self.running:
            os.kill(self.pid, signal.SIGINT)
        return super().stop()

    def kill(self) -> None:
        """Kill it, and wait until its own processes are gone; see `Server.kill`.

        They end when they notice. As long as one is there it holds the shared memory, and a server refuses to start.
        """
        own: list[int] = []
        if self.running:
            self.freeze()  # so that it starts no more of them
            own = [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("utf-8").split()]
        super().kill()
        if not wait_until(lambda: not any(map(_is_there, own)), 10):
            for pid in filter(_is_there, own):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not any(map(_is_there, own)), 10)

    def _kill_all(self) -> None:
        super()._kill_all()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            guard.tell("removed", str(self._own))
            self._own = None

    def _command(self) -> list[str]:
        if self._own is None:
            self._own = self._make_folder()
            command = [str(self.binary.parent / "initdb"), f"--pgdata={self.data}", f"--username={_DATABASE}"]
            command += ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
            if self._complete(_as_user(command)):
                raise ServerError(self._message("could not make its files"))
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", **self.options}
        command = [str(self.binary), "-D", str(self.data), "-p", str(self.port)]
        return _as_user(command + [f"--{name}={value}" for name, value in settings.items()])

    def _make_folder(self) -> Path:
        folder = tempfile.mkdtemp(prefix="orthanc-events-postgres-")
        guard.tell("folder", folder)
        if not os.geteuid():
            user = _user()
            os.chown(folder, user.pw_uid, user.pw_gid)
        return Path(folder)

    def _is_ready(self) -> bool:
        command = [str(self.binary.parent / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _is_there(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # of a zombie it is empty
    except OSError:
        return False


def _user() -> pwd.struct_passwd:
    for name in _USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ServerError(f"PostgreSQL does not run as root, and none of the users {', '.join(_USERS)} is there")


def _as_user(command: Sequence[str]) -> list[str]:
    if os.geteuid():
        return list(command)
    user = _user()
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *command]
