"""Whether an outbox with many rows is as fast and as small as one with few."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import outboxes, streams
from benchmarks.measure import median, ratios, spread
from benchmarks.report import Row, Section, say
from benchmarks.streams import Drained
from orthanc_events_bridge import status
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxReader
from orthanc_events_bridge.testing.servers import NatsServer, scratch_folder


@dataclass(slots=True)
class Sized:
    """One outbox, and what was measured on it."""

    kept: int
    folder: Folder
    appended: list[dict[str, Any]] = field(default_factory=list)
    drained: list[Drained] = field(default_factory=list)
    status: list[float] = field(default_factory=list)

    @property
    def last(self) -> int:
        reader = OutboxReader(self.folder.outbox)
        try:
            return reader.extent()[2]
        finally:
            reader.close()

    def read_status(self) -> None:
        begin = time.perf_counter()
        status.read(self.folder)
        self.status.append(1000 * (time.perf_counter() - begin))


def run(*, quick: bool) -> Section:
    """Append to outboxes of three sizes in turn, drain their ends in turn, then drain the largest whole."""
    sizes = (2_000, 20_000) if quick else (10_000, 100_000, 1_000_000)
    rounds, pending = (2, 4_000) if quick else (5, 20_000)
    with scratch_folder() as scratch, NatsServer(scratch / "nats") as broker:
        config = outboxes.write_config(scratch / "orthanc-events.yaml", broker.url)
        outbox = [Sized(size, Folder(scratch / str(size) / "outbox")) for size in sizes]
        for sized in outbox:
            sized.folder.path.mkdir(parents=True)
            filled = outboxes.append(sized.folder, config, sized.kept)
            say(f"million: an outbox of {sized.kept} rows, filled at {filled['rate']:.0f}/s")
        for number in range(rounds):
            for sized in _in_turn(outbox, number):
                sized.appended.append(outboxes.append(sized.folder, config, pending // rounds))
        for number in range(rounds):
            for sized in _in_turn(outbox, number):
                outboxes.place_before_end(sized.folder, pending)
                drained = streams.by_bridge(broker.url, sized.folder, config, pending, sized.last)
                sized.drained.append(drained)
                sized.read_status()
            say(
                f"million: round {number + 1} of {rounds}, events per second: "
                + ", ".join(f"{sized.kept} rows {sized.drained[-1].rate:.0f}" for sized in outbox)
            )
        whole = _drain_whole(outbox[-1], broker.url, config)
        say(f"million: all {outbox[-1].kept + pending} rows at {whole.rate:.0f}/s")
    return _section(outbox, whole, rounds, pending)


def _in_turn(outbox: list[Sized], number: int) -> list[Sized]:
    return outbox if number % 2 == 0 else outbox[::-1]


def _drain_whole(sized: Sized, url: str, config: Path) -> Drained:
    last = sized.last
    outboxes.place_before_end(sized.folder, last)
    return streams.by_bridge(url, sized.folder, config, last, last)


def _section(outbox: list[Sized], whole: Drained, rounds: int, pending: int) -> Section:
    small, large = outbox[0], outbox[-1]
    rate = ratios([one.rate for one in large.drained], [one.rate for one in small.drained])
    append = ratios([one["rate"] for one in large.appended], [one["rate"] for one in small.appended])
    bridge = max(one.memory for one in (*large.drained, whole)) - median(one.memory for one in small.drained)
    capture = median(one["memory"] for one in large.appended) - median(one["memory"] for one in small.appended)
    first, final = whole.parts
    lines = [
        (
            "rows kept",
            "drain, events/s",
            "bridge's peak memory, MiB",
            "append, rows/s",
            "writer's memory, MiB",
            "status, ms",
            "retention's look, ms",
        )
    ]
    for sized in outbox:
        lines.append(
            (
                f"{sized.kept:,}",
                spread([one.rate for one in sized.drained], ".0f"),
                f"{max(one.memory for one in sized.drained):.0f}",
                spread([one["rate"] for one in sized.appended], ".0f"),
                f"{median(one['memory'] for one in sized.appended):.0f}",
                f"{median(sized.status):.1f}",
                f"{median(one['retain'] for one in sized.appended):.1f}",
            )
        )
    names = f"{large.kept:,} rows / {small.kept:,}"
    return Section(
        "From ten thousand to a million rows",
        [
            f"Outboxes with that many rows that were delivered and are kept. To each capture's own writer appends {pending}"
            f" more, {outboxes.BATCH} rows in a transaction, in {rounds} portions, the three outboxes in turn; then the"
            f" bridge process drains these {pending}, {rounds} times, again in turn. Last, the largest is drained whole,"
            " from its first row.",
        ],
        [
            Row(
                f"drain at the end of {names}",
                "within 10 %",
                spread(rate),
                0.9 <= median(rate),
                "see the table: the read is by primary key and does not depend on the size, so look for the disk.",
            ),
            Row(
                f"append to {names}",
                "within 10 %",
                spread(append),
                0.9 <= median(append),
                "each new instance is put into an index of random ids (`resources`, which must be remembered until"
                " their deletion), and SQLite's page cache holds a smaller part of a larger one. It stays far above"
                " what Orthanc can ingest.",
            ),
            Row(
                "memory of the bridge, largest outbox above smallest",
                "≤ 50 MiB",
                f"{bridge:+.1f} MiB",
                bridge <= 50,
                "something grows with the rows.",
            ),
            Row(
                "memory of the outbox's writer, largest above smallest",
                "≤ 50 MiB",
                f"{capture:+.1f} MiB",
                capture <= 50,
                "something grows with the rows.",
            ),
            Row(
                f"draining all {large.kept + pending:,} rows: last tenth / first tenth",
                "within 10 %",
                f"{final / first:.2f}, at {whole.rate:.0f} events/s",
                final / first >= 0.9,
                "this includes NATS' own work, whose window of remembered ids holds several hundred thousand then.",
            ),
        ],
        [lines],
    )
