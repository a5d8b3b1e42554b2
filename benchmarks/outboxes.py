"""Outboxes with as many rows as are wanted, filled by the product's own writer in a process of its own.

``python -m benchmarks.outboxes FOLDER CONFIG ROWS`` appends rows to an outbox, as capture does under ingest,
and prints what that took.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.clients import PER_INSTANCE, ROOT
from benchmarks.measure import memory
from orthanc_events_bridge.bridge.config import load
from orthanc_events_bridge.bridge.state import Progress, State
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing.bridged import smallest
from orthanc_events_bridge.testing.brokers import Broker

#: Rows in a transaction: those of ten instances, such as gather while capture waits for more.
BATCH = 40
_STUDY, _SERIES = 200, 100
_SETTINGS = 1


def write_config(path: Path, broker: Broker) -> Path:
    """The smallest configuration for a broker."""
    path.write_text(smallest(broker.kind, broker.options()), "utf-8")
    return path


def append(folder: Folder, config: Path, rows: int) -> dict[str, Any]:
    """Append rows in a process of its own.

    :return: ``rate`` in rows per second, ``memory`` of the process in MiB, and ``retain``, the milliseconds of
        one look for rows that are old enough to go, with none that are.
    """
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.outboxes", str(folder.path), str(config), str(rows)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def place_before_end(folder: Folder, rows: int, transport: str) -> int:
    """Give the outbox a new ``bridge.db`` whose transport still has so many rows before it.

    :param transport: its name.
    :return: the outbox's last position.
    """
    for path in folder.path.glob("bridge.*"):
        path.unlink()
    reader = OutboxReader(folder.outbox)
    _, _, last = reader.extent()
    recorder = reader.recorder
    reader.close()
    state = State(folder.bridge)
    state.progress(transport, recorder)
    state.save(transport, Progress(last - rows, None, "", 0))
    state.close()
    return last


def _facts(first: int) -> Iterator[Fact]:
    """What capture makes of new instances: each, and a new child for its series, study and patient."""
    for number in range(first, first + 10**9):
        date, at = "20240102T030405", 1704164645000 + number % 1000
        parents = {
            "series": _id("series", number // _SERIES),
            "study": _id("study", number // _STUDY),
            "patient": _id("patient", number // _STUDY),
        }
        yield Fact("NewInstance", "instance", _id("instance", number), at - at % 1000, number, date, parents)
        above = dict(parents)
        for level in ("series", "study", "patient"):
            identifier = above.pop(level)
            yield Fact("NewChildInstance", level, identifier, at, None, None, dict(above))


def _id(kind: str, number: int) -> str:
    digits = hashlib.sha1(f"{kind}{number}".encode(), usedforsecurity=False).hexdigest()
    return "-".join(digits[i : i + 8] for i in range(0, 40, 8))


def _append(folder: Folder, config: Path, rows: int) -> dict[str, Any]:
    folder.prepare()
    writer = OutboxWriter(folder.outbox, time.time)
    writer.keep_settings(_SETTINGS, json.dumps(load(config).shape()))
    cursor = writer.cursor or 0
    facts = list(islice(_facts(cursor + 1), rows)) if rows <= 50_000 else None
    source = iter(facts) if facts is not None else islice(_facts(cursor + 1), rows)
    seconds = 0.0
    while batch := list(islice(source, BATCH)):
        cursor += len(batch) // PER_INSTANCE
        begin = time.perf_counter()
        writer.append(batch, cursor, _SETTINGS, lambda _level, _resource: None)
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    writer.retain(writer.position, 0)
    retain = time.perf_counter() - begin
    used = memory(os.getpid())
    writer.close()
    return {"rate": rows / seconds, "memory": used, "retain": 1000 * retain}


if __name__ == "__main__":
    print(json.dumps(_append(Folder(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))))
