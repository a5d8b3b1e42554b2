"""The outbox's folder: where it is, what is in it, and whether it can be trusted with it.

It is found without any YAML, so that a broken configuration never keeps a change from being recorded.
Standard library only: Orthanc's process, the bridge and the command line use it alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from orthanc_events_bridge.errors import FolderError

with contextlib.suppress(ImportError):  # not on Windows, where the plugin does not run
    import fcntl

ENVIRONMENT: Final = "ORTHANC_EVENTS_OUTBOX"
DEFAULT_NAME: Final = "orthanc-events"

#: On these, SQLite's shared memory or its locks can't be trusted (sqlite.org/wal.html, section 8).
_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afs", "ncpfs", "ceph", "glusterfs", "lustre"}
    | {"beegfs", "gpfs", "ocfs2", "gfs2", "davfs"}
    | {f"fuse.{kind}" for kind in ("sshfs", "glusterfs", "ceph", "davfs2", "s3fs", "rclone")}
)


#: What belongs to a database besides the file itself: its write-ahead log, and the index of that.
_BESIDE: Final = ("", "-wal", "-shm")


class Folder:
    """The files of one outbox.

    :ivar outbox: written by capture alone (rows, log cursor).
    :ivar bridge: written by the bridge (positions, status, settings) and, for commands, by the command line.
    :ivar lock: held by the one bridge that works on this outbox.
    :ivar outbox_lock: held by the one process that records into it.
    :ivar replays: how far each replay is, written by the command line that does it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outbox = path / "outbox.db"
        self.bridge = path / "bridge.db"
        self.lock = path / "bridge.lock"
        self.outbox_lock = path / "outbox.lock"
        self.replays = path / "bridge.replays"

    def prepare(self) -> None:
        """Make the folder, readable by its owner only, and check that it is on a local disk.

        One that is there already is closed to others as well, unless it holds files that aren't ours.

        :raises FolderError: it can't be made or written, or is on a network file system.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A folder that others use too (/tmp, say) is left as it is: our files are closed to others
            # anyway.
            ours = all(path.name.startswith(("outbox.", "bridge.")) for path in self.path.iterdir())
            # Not without need: on a disk that is read-only for now it fails, and recording would have ended for good.
            if ours and (found := self.path.stat()).st_uid == os.geteuid() and found.st_mode & 0o077:
                self.path.chmod(0o700)
        except OSError as error:
            raise FolderError(
                f"the outbox's folder {self.path} can't be made: {error.strerror}",
                f"let Orthanc's user write there, or name another folder in {ENVIRONMENT}",
            ) from error
        kind = file_system(self.path)
        if kind in _NETWORK:
            raise FolderError(
                f"the outbox's folder {self.path} is on a network file system ({kind}), which can damage it",
                f"name a folder on a local disk in {ENVIRONMENT}, or in Orthanc's configuration as "
                '"OrthancEvents": {"Outbox": …}',
            )

    def hold_outbox(self) -> int:
        """Keep every other process from recording into this outbox, for as long as the returned descriptor is open.

        The lock is the process's own (POSIX): it goes with a killed one, a child doesn't inherit it, and an interpreter
        that Orthanc makes anew in the same process gets it again.

        :raises FolderError: another process holds it, or the file can't be opened.
        """
        try:
            descriptor = os.open(self.outbox_lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FolderError(
                f"{self.outbox_lock} can't be opened: {error.strerror}", "free or mend its disk"
            ) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise FolderError(
                f"another process records into the outbox {self.path}",
                "stop it, or give each Orthanc an outbox of its own",
            ) from error
        return descriptor


def identity(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """Which files a database consists of just now: device and inode of each, none for one that isn't there."""
    found: list[tuple[int, int] | None] = []
    for suffix in _BESIDE:
        try:
            stat = os.stat(f"{path}{suffix}")  # noqa: PTH116 -- a name, not a path of parts
            found.append((stat.st_dev, stat.st_ino))
        except FileNotFoundError:
            found.append(None)
    return tuple(found)


def set_aside(path: Path) -> Path | None:
    """Give a database's files another name, under which they belong together still.

    :return: that name; none where nothing was there.
    :raises OSError: they can't be renamed.
    """
    stem = f"{path}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside, number = stem, 1
    while any(Path(f"{aside}{suffix}").exists() for suffix in _BESIDE):
        number += 1
        aside = f"{stem}-{number}"
    moved = False
    for suffix in _BESIDE:
        try:
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")  # noqa: PTH104 -- as above
            moved = True
        except FileNotFoundError:
            pass
    return Path(aside) if moved else None


def find(configuration: Mapping[str, Any] | None, base: Path, environment: Mapping[str, str]) -> Folder:
    """Where the outbox is: as the environment says, else Orthanc's configuration, else beside its index.

    :param configuration: Orthanc's own, as it answers ``orthanc.GetConfiguration()``.
    :param base: the folder that its relative paths start from: that of its configuration file.
    :raises FolderError: nothing names it.
    """
    if environment.get(ENVIRONMENT):
        return Folder(Path(environment[ENVIRONMENT]).absolute())
    if configuration is None:
        raise FolderError(
            "which outbox is not said", f"say --outbox DIR, or set {ENVIRONMENT}, or say --orthanc-config"
        )
    section = configuration.get("OrthancEvents")
    if isinstance(section, Mapping) and section.get("Outbox"):
        return Folder((base / str(section["Outbox"])).absolute())
    index = configuration.get("IndexDirectory") or configuration.get("StorageDirectory") or "OrthancStorage"
    return Folder((base / str(index) / DEFAULT_NAME).absolute())


def read_orthanc_configuration(path: Path) -> dict[str, Any]:
    """Orthanc's own configuration: a file, or a folder whose ``*.json`` files are merged as Orthanc does.

    Comments and environment variables are read as Orthanc reads them.

    :raises FolderError: it can't be read.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    merged: dict[str, Any] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            found = json.loads(_without_comments(_with_variables(text, os.environ)))
            if not isinstance(found, dict):
                raise TypeError("a JSON object is expected")
            merged.update(found)
        except (OSError, ValueError, TypeError) as error:
            raise FolderError(f"Orthanc's configuration {file} can't be read: {error}") from error
    return merged


def _with_variables(text: str, environment: Mapping[str, str]) -> str:
    """``${VAR}`` and ``${VAR:-default}``, as Orthanc's ``Toolbox::SubstituteVariables`` does."""
    return re.sub(r"\$\{([^${}:]+)(?::-([^${}]*))?\}", lambda match: environment.get(match[1], match[2] or ""), text)


def _without_comments(text: str) -> str:
    """JsonCpp, which Orthanc reads its configuration with, allows ``//`` and ``/* */``."""
    return re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda match: match[1] or "", text, flags=re.DOTALL)


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that a path is on; empty where the host doesn't say (only Linux does).

    :param mounts: the content of ``/proc/self/mountinfo`` (proc(5)), read when not given.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        except OSError:
            return ""
    target = str(path.resolve())
    best, kind = "", ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        columns = fields.split(" ")
        if len(columns) < 5 or not rest:
            continue
        point = columns[4].replace("\\040", " ")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, rest.split(" ")[0]
    return kind
