"""``orthanc-events backup``: a copy of the outbox and of what the transports have of it, taken while all goes on."""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from orthanc_events_bridge.cli_options import (
    EXIT_CODES,
    Commands,
    Meter,
    add_command,
    outbox_folder,
    outbox_options,
)
from orthanc_events_bridge.cli_status import in_bytes
from orthanc_events_bridge.errors import BridgeError, OutboxError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox_schema import translated

_ARCHIVES: Final = {".tar": "w", ".tgz": "w:gz", ".gz": "w:gz"}
#: Pages that are copied between two looks at the clock.
_STEP: Final = 500

_EPILOG: Final = f"""\
examples:
  orthanc-events backup /var/backups/orthanc-events-monday      a folder
  orthanc-events backup /var/backups/orthanc-events.tar.gz      one file

Recording and sending go on meanwhile. bridge.db is copied first, so that no transport
is ahead of the rows in the copy; both are checked when they are there. What is in it is
as private as the outbox itself: readable by you only.

To restore: stop Orthanc, move the files in the outbox's folder out of it, put those of
the backup there, let them belong to Orthanc's user, start Orthanc. What happens then is
in docs/operating.md: the copy knows that it is one, so that no number names two facts.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    summary = "copy the outbox into a folder or an archive, while everything runs"
    parser = add_command(commands, "backup", _backup, summary, epilog=_EPILOG)
    parser.add_argument(
        "target", metavar="DIR|FILE", type=Path, help="a folder that is new or empty, or a new .tar, .tar.gz or .tgz"
    )
    outbox_options(parser)


def _backup(options: argparse.Namespace) -> int:
    place, target = outbox_folder(options), options.target.absolute()
    if not place.outbox.exists():
        raise OutboxError(
            f"there is no outbox at {place.outbox}", "start Orthanc with the bridge once, or name its folder"
        )
    archive = _ARCHIVES.get(target.suffix)
    if target.exists() and (archive or not target.is_dir() or any(target.iterdir())):
        raise BridgeError(f"{target} is there already", "name a new one: a backup is never written over")
    if not target.parent.is_dir():
        raise BridgeError(f"there is no folder {target.parent}", "make it first")
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # mode 0700
    try:
        size = backup(place, folder)
        if archive:
            _pack(folder, target, archive)
        else:
            if target.exists():
                target.rmdir()
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{target}: {in_bytes(size)}, checked")
    return 0


def backup(place: Folder, target: Path) -> int:
    """Copy both databases into a folder, each as it is at one moment.

    :return: how many bytes.
    :raises OutboxError: one can't be read, or the copy not be written; or it is damaged.
    """
    copied = []
    # A transport's position must never be ahead of the rows: what it has had is in the copy that is taken later.
    for source in (place.bridge, place.outbox):
        if source.exists():
            with Meter(f"copying {source.name}", in_bytes) as meter:
                copied.append(_copy(source, target / source.name, meter.show))
    with translated(target / "outbox.db"), closing(sqlite3.connect(target / "outbox.db")) as db:
        # Opened for writing, it goes on under another recorder (`OutboxWriter`).
        db.execute("REPLACE INTO meta VALUES ('backup', ?)", (int(time.time() * 1000),))
        db.commit()
    for path in copied:
        _check(path)
    return sum(path.stat().st_size for path in copied)


def _copy(source: Path, target: Path, show: Callable[[int, int], None]) -> Path:
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    uri = f"{source.absolute().as_uri()}?mode=rw"
    with translated(source), closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as reading:
        reading.execute("PRAGMA query_only = 1")
        # The one moment that it is a copy of; without it, every change would begin it anew. Writers are not held up.
        reading.execute("BEGIN")
        size = reading.execute("PRAGMA page_size").fetchone()[0]
        reading.execute("SELECT count(*) FROM sqlite_master").fetchone()

        def progress(_status: int, remaining: int, total: int) -> None:
            show((total - remaining) * size, total * size)

        with translated(target), closing(sqlite3.connect(target, isolation_level=None)) as writing:
            reading.backup(writing, pages=_STEP, progress=progress, sleep=0)
    return target


def _check(path: Path) -> None:
    with translated(path), closing(sqlite3.connect(path)) as db:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise OutboxError(
            f"the copy of {path.name} is damaged ({found}), and so is what it was copied from", "see the log"
        )


def _pack(folder: Path, target: Path, mode: str) -> None:
    descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
    except BaseException:
        target.unlink()
        raise
