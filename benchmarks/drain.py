"""Draining a backlog to NATS, against the plain client with the same bytes."""

from __future__ import annotations

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
    rates = {name: [one.rate for one in all_] for name, all_ in runs.items()}
    against = ratios(rates["bridge"], rates["publish_async"])
    against_inbox = ratios(rates["bridge"], rates["inbox"])
    bridge_cpu = median(1e6 * one.cpu / events for one in runs["bridge"])
    plain_cpu = median(1e6 * one.cpu / events for one in runs["publish_async"])
    titles = {
        "bridge": "bridge: outbox → mapping → NATS",
        "publish_async": "nats-py `publish_async`",
        "inbox": "nats-py with an own inbox",
    }
    lines = [("", "events/s", "bridge / it", "CPU, µs per event", "peak memory, MiB")]
    for name, title in titles.items():
        lines.append(
            (
                title,
                spread(rates[name], ".0f"),
                "" if name == "bridge" else spread(ratios(rates["bridge"], rates[name])),
                spread([1e6 * one.cpu / events for one in runs[name]], ".0f"),
                f"{median(one.memory for one in runs[name]):.0f}",
            )
        )
    return Section(
        "Drain",
        [
            f"An outbox of {events} rows (new instances, each with the three rows of its parents), and the bridge process"
            " with the smallest configuration beside it: it reads, maps and sends them, and waits for JetStream's"
            " acknowledgement of each. Against it nats-py alone in a process of its own, which sends the same bytes, mapped"
            " beforehand, with the same headers to the same subjects: once with `publish_async` (up to 4000 under way,"
            " its default), once by a loop with an own reply inbox. Every run gets a new stream with the bridge's settings."
            " All are timed by NATS' clock, from the first stored message to the last."
            f" {rounds} rounds, the order reversed in every other one; medians, with the middle half.",
        ],
        [
            Row(
                "drain by the bridge / by nats-py `publish_async`",
                "≥ 0.7",
                spread(against),
                median(against) >= 0.7,
                "one Python thread does both the work of nats-py, which is all that the other side does, and the reading"
                f" and mapping: {bridge_cpu:.0f} µs of CPU per event (its start included) against {plain_cpu:.0f} µs.",
            ),
            Row("drain by the bridge / by nats-py with an own inbox", "–", spread(against_inbox)),
            Row("drain by the bridge", "–", f"{spread(rates['bridge'], '.0f')} events/s"),
        ],
        [lines],
    )
