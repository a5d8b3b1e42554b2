"""Draining a backlog to NATS, against the plain client with the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import outboxes, streams
from benchmarks.measure import median, ratios, spread
from benchmarks.report import Row, Section, say
from benchmarks.streams import Drained
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxReader
from orthanc_events_bridge.testing.servers import NatsServer, scratch_folder


def run(*, quick: bool) -> Section:
    """Run the three in turn, the order reversed each time."""
    rounds, events = (2, 5000) if quick else (7, 50_000)
    names = ("bridge", "publish_async", "inbox")
    runs: dict[str, list[Drained]] = {name: [] for name in names}
    with scratch_folder() as scratch, NatsServer(scratch / "nats") as broker:
        folder = Folder(scratch / "outbox")
        config = outboxes.write_config(scratch / "orthanc-events.yaml", broker.url)
        outboxes.append(folder, config, events)
        reader = OutboxReader(folder.outbox)
        _, _, last = reader.extent()
        reader.close()
        for number in range(rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                if name == "bridge":
                    outboxes.place_before_end(folder, events)
                    drained = streams.by_bridge(broker.url, folder, config, events, last)
                else:
                    drained = streams.by_plain_client(name, broker.url, folder, config, events)
                runs[name].append(drained)
            say(
                f"drain: round {number + 1} of {rounds}, events per second: "
                + ", ".join(f"{name} {runs[name][-1].rate:.0f}" for name in names)
            )
    return _section(runs, rounds, events)


def _section(runs: dict[str, list[Drained]], rounds: int, events: int) -> Section:
    rates = {name: [one.rate for one in drained] for name, drained in runs.items()}
    cpu = {name: [one.cpu for one in drained] for name, drained in runs.items()}
    against = {name: ratios(rates["bridge"], theirs) for name, theirs in rates.items()}
    titles = {
        "bridge": "bridge: outbox, mapping, NATS",
        "publish_async": "nats-py `publish_async`",
        "inbox": "nats-py with an own inbox",
    }
    lines: list[Sequence[str]] = [("", "events/s", "bridge / it", "CPU, µs per event", "peak memory, MiB")]
    for name, title in titles.items():
        ratio = "" if name == "bridge" else spread(against[name])
        peak = f"{median(one.memory for one in runs[name]):.0f}"
        lines.append((title, spread(rates[name], ".0f"), ratio, spread(cpu[name], ".0f"), peak))
    return Section(
        "Drain",
        [
            (
                f"An outbox of {events} rows (new instances, each with the three rows of its parents), and beside it"
                " the bridge process with the smallest configuration: it reads, maps and sends, and waits for"
                " JetStream's acknowledgement of each event. Against it nats-py alone, in a process of its own, which"
                " sends the same bytes, mapped beforehand, with the same headers to the same subjects: once by"
                " `publish_async` (4000 under way at most, its default), once by a loop with an own reply inbox."
                " Every run gets a new stream with the bridge's settings. All are timed by NATS' clock, from when a"
                " tenth is stored until all is, so that starting up does not count."
                f" {rounds} rounds, the order reversed in every other one; medians, with the middle half."
            )
        ],
        [
            Row(
                "drain by the bridge / by nats-py `publish_async`",
                "≥ 0.7",
                spread(against["publish_async"]),
                median(against["publish_async"]) >= 0.7,
                "the bridge's one thread does what the plain client does and the reading and mapping besides:"
                f" {median(cpu['bridge']):.0f} µs of CPU per event against {median(cpu['publish_async']):.0f} µs.",
            ),
            Row("drain by the bridge / by nats-py with an own inbox", "-", spread(against["inbox"])),
            Row("drain by the bridge", "-", f"{spread(rates['bridge'], '.0f')} events/s"),
        ],
        [lines],
    )
