"""Whether an outbox with many rows is as fast and as small as one with few."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import outboxes, sending
from benchmarks.measure import median, ratios, spread
from benchmarks.report import Row, Section, say
from benchmarks.sending import Sent
from orthanc_events_bridge import status
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing.brokers import Broker, make_broker
from orthanc_events_bridge.testing.servers import scratch_folder


@dataclass(slots=True)
class Sized:
    """One outbox, and what was measured on it."""

    kept: int
    folder: Folder
    appended: list[dict[str, Any]] = field(default_factory=list)
    drained: list[Sent] = field(default_factory=list)
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
    with scratch_folder() as scratch, make_broker("nats", scratch / "nats") as broker:
        config = outboxes.write_config(scratch / "orthanc-events.yaml", broker)
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
                last = outboxes.place_before_end(sized.folder, pending, broker.kind)
                drained = sending.by_bridge(broker, sized.folder, config, pending, last)
                sized.drained.append(drained)
                sized.read_status()
            say(
                f"million: round {number + 1} of {rounds}, events per second: "
                + ", ".join(f"{sized.kept} rows {sized.drained[-1].rate:.0f}" for sized in outbox)
            )
        whole = _drain_whole(outbox[-1], broker, config)
        say(f"million: all {outbox[-1].kept + pending} rows at {whole.rate:.0f}/s")
    return _section(outbox, whole, rounds, pending)


def _in_turn(outbox: list[Sized], number: int) -> list[Sized]:
    return outbox if number % 2 == 0 else outbox[::-1]


def _drain_whole(sized: Sized, broker: Broker, config: Path) -> Sent:
    outboxes.place_before_end(sized.folder, sized.last, broker.kind)
    return sending.by_bridge(broker, sized.folder, config, sized.last, sized.last)


def _section(outbox: list[Sized], whole: Sent, rounds: int, pending: int) -> Section:
    small, large = outbox[0], outbox[-1]
    rate = ratios([one.rate for one in large.drained], [one.rate for one in small.drained])
    append = ratios([one["rate"] for one in large.appended], [one["rate"] for one in small.appended])
    bridge = max(one.memory for one in (*large.drained, whole)) - min(one.memory for one in small.drained)
    writer = median(one["memory"] for one in large.appended) - median(one["memory"] for one in small.appended)
    first, final = whole.parts
    lines: list[Sequence[str]] = [
        (
            "rows kept",
            "drain, events/s",
            "bridge's peak memory, MiB",
            "append, rows/s",
            "appending process's memory, MiB",
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
    total = large.kept + pending
    return Section(
        "From ten thousand to a million rows",
        [
            (
                "Outboxes with that many rows, which were delivered and are kept. To each, capture's own writer"
                f" appends {pending} more, {outboxes.BATCH} in a transaction, in {rounds} portions, the outboxes in"
                f" turn. Then the bridge process drains these {pending}, {rounds} times, again in turn. Last, the"
                f" largest is drained whole, all {total:,} rows ({whole.rate:.0f} events/s, at most"
                f" {whole.memory:.0f} MiB)."
            )
        ],
        [
            Row(
                f"drain at the end of {names}",
                "≥ 0.9",
                spread(rate),
                median(rate) >= 0.9,
                "the cause is not known: the rows are read by primary key, so that their number should not matter.",
            ),
            Row(
                f"append to {names}",
                "≥ 0.9",
                spread(append),
                median(append) >= 0.9,
                "probably because each new instance goes to a random place of an index (`resources`, kept until the"
                " deletion): the more that holds, the more of its pages a transaction writes. A larger page cache did"
                " not change it."
                f" Even so one writer takes {median(one['rate'] for one in large.appended):.0f} rows/s, and an instance"
                " is four.",
            ),
            Row(
                f"draining all {total:,} rows: last tenth / first tenth",
                "≥ 0.9",
                f"{final / first:.2f}",
                final / first >= 0.9,
                "the cause is not known; NATS' own work is in it, which remembers the ids of ten minutes.",
            ),
            Row(
                "memory of the bridge: largest outbox, drained whole too, above smallest",
                "≤ 50 MiB",
                f"{bridge:+.1f} MiB",
                bridge <= 50,
                "something grows with the rows.",
            ),
            Row(
                "memory of the process that appends: largest outbox above smallest",
                "≤ 50 MiB",
                f"{writer:+.1f} MiB",
                writer <= 50,
                "something grows with the rows.",
            ),
        ],
        [lines],
    )
