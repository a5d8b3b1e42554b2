"""Draining a backlog to each broker, against its plain client with the same bytes, and one connection per event."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import outboxes, sending
from benchmarks.measure import median, ratios, spread
from benchmarks.raw import raw_class
from benchmarks.report import Row, Section, say
from benchmarks.sending import ALONE, Sent
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.testing.brokers import BROKERS, Broker, make_broker
from orthanc_events_bridge.testing.servers import scratch_folder

BRIDGE = "bridge"
_TARGET = 0.7
#: Rounds and events. A webhook takes a minute and a half for a round, and has no target.
_SIZES = {"nats": (7, 50_000), "rabbitmq": (3, 50_000), "kafka": (5, 50_000), "webhook": (1, 50_000)}
_QUICK = {"nats": (2, 5000), "rabbitmq": (2, 5000), "kafka": (2, 5000), "webhook": (2, 1000)}


@dataclass(slots=True)
class Comparison:
    """What was measured on one broker.

    :param alone: how many events were sent by one connection each.
    :ivar runs: by the way of sending, one for each round.
    """

    kind: str
    events: int
    alone: int
    runs: dict[str, list[Sent]] = field(default_factory=dict)

    def add(self, way: str, sent: Sent) -> None:
        self.runs.setdefault(way, []).append(sent)

    @property
    def title(self) -> str:
        return BROKERS[self.kind].title

    def rates(self, way: str) -> list[float]:
        return [sent.rate for sent in self.runs[way]]

    def cpu(self, way: str) -> list[float]:
        return [sent.cpu for sent in self.runs[way]]

    def against(self, way: str) -> list[float]:
        """The bridge's rate in units of this way's, round by round."""
        return ratios(self.rates(BRIDGE), self.rates(way))

    @property
    def mapping(self) -> float:
        """Microseconds of CPU per event that reading and mapping alone take."""
        return median(sent.mapping for way in raw_class(self.kind).ways for sent in self.runs[way])


def run(*, quick: bool) -> Section:
    """Compare on one broker after the other."""
    sizes, alone = (_QUICK, 50) if quick else (_SIZES, 300)
    return section([compare(kind, rounds, events, alone) for kind, (rounds, events) in sizes.items()])


def compare(kind: str, rounds: int, events: int, alone: int) -> Comparison:
    """Start a broker, and measure on it; for what the numbers are, see `measure`."""
    found = Comparison(kind, events, alone)
    with scratch_folder() as scratch, make_broker(kind, scratch / kind) as broker:
        for number in range(rounds):
            for way, sent in measure(broker, scratch, events, alone, reverse=number % 2 == 1):
                found.add(way, sent)
            say(
                f"drain to {found.title}: round {number + 1} of {rounds}, events per second: "
                + ", ".join(f"{way} {found.rates(way)[-1]:.0f}" for way in found.runs)
            )
    return found


def measure(
    broker: Broker, scratch: Path, events: int, alone: int, *, reverse: bool = False
) -> Iterator[tuple[str, Sent]]:
    """Send in each way, one after the other, and yield it while the broker holds what was sent.

    :param scratch: the same folder each time.
    :param events: that are sent by each way but the last.
    :param alone: that are sent by one connection each.
    """
    folder = Folder(scratch / "outbox")
    config = outboxes.write_config(scratch / "orthanc-events.yaml", broker)
    if not folder.outbox.exists():
        outboxes.append(folder, config, events)
    ways = [BRIDGE, *raw_class(broker.kind).ways, ALONE]
    for way in reversed(ways) if reverse else ways:
        if way == BRIDGE:
            last = outboxes.place_before_end(folder, events, broker.kind)
            yield way, sending.by_bridge(broker, folder, config, events, last)
        else:
            yield way, sending.by_raw_client(way, broker, folder, config, alone if way == ALONE else events)


def section(comparisons: Sequence[Comparison]) -> Section:
    """All of them on the page."""
    rows: list[Row] = []
    lines: list[Sequence[str]] = [("", "events/s", "bridge / it", "CPU, µs per event", "peak memory, MiB")]
    for one in comparisons:
        titles = {BRIDGE: "bridge: outbox, mapping, sending"}
        titles |= {way: about.title for way, about in raw_class(one.kind).ways.items()} | {ALONE: ALONE}
        for way, title in titles.items():
            ratio = "" if way == BRIDGE else spread(one.against(way), ".0f" if way == ALONE else ".2f")
            peak = f"{median(sent.memory for sent in one.runs[way]):.0f}"
            cells = (spread(one.rates(way), ".0f"), ratio, spread(one.cpu(way), ".0f"), peak)
            lines.append((f"{one.title}, {title}", *cells))
        rows += _rows(one)
    return Section(
        "Drain",
        _how(comparisons),
        rows,
        [lines],
        [
            (
                "One connection per event is the way of a script in Orthanc that publishes by itself: connect, send,"
                " wait for the confirmation, close. Here the plain client does it, with the same durability, over"
                " loopback and without TLS. What a network and TLS add, which is a few round trips for each event, was"
                " not measured."
            )
        ],
    )


def _rows(one: Comparison) -> list[Row]:
    rows: list[Row] = []
    for way, about in raw_class(one.kind).ways.items():
        what, ratio = f"drain to {one.title}: bridge / {about.title}", one.against(way)
        if not about.held:
            rows.append(Row(what, "-", spread(ratio)))
            continue
        why = (
            "the bridge's one thread reads, maps and sends:"
            f" {median(one.cpu(BRIDGE)):.0f} µs of CPU per event, of which reading and mapping take"
            f" {one.mapping:.0f}. The plain client only sends what was mapped beforehand:"
            f" {median(one.cpu(way)):.0f} µs."
        )
        rows.append(Row(what, f"≥ {_TARGET}", spread(ratio), median(ratio) >= _TARGET, why))
    rows.append(
        Row(f"drain to {one.title}: bridge / {ALONE}", "-", f"{spread(one.against(ALONE), '.0f')} times as fast")
    )
    rows.append(Row(f"drain to {one.title} by the bridge", "-", f"{spread(one.rates(BRIDGE), '.0f')} events/s"))
    return rows


def _how(comparisons: Sequence[Comparison]) -> list[str]:
    events = max(one.events for one in comparisons)
    clients = "; ".join(f"{one.title}: {raw_class(one.kind).how}" for one in comparisons)
    rounds = ", ".join(f"{one.title} {len(one.runs[BRIDGE])}" for one in comparisons)
    mapping = median(one.mapping for one in comparisons)
    return [
        (
            f"For each broker an outbox of {events} rows (new instances, each with the three rows of its parents), and"
            " beside it the bridge process with the smallest configuration: it reads, maps and sends, and waits until"
            " each event is confirmed. Against it the broker's plain client, in a process of its own, which sends the"
            " same bytes, mapped beforehand, with the same headers to the same addresses, and has them confirmed in"
            f" the same way. {clients}."
        ),
        (
            "Every run gets a new stream or topic with the bridge's settings. All are timed alike, from when a tenth is"
            " there until all is, so that starting up does not count: by NATS' own clock, which says when an event was"
            " stored; with the others by what is confirmed, which the plain client counts, and which for the bridge is"
            " its position, read each 5 ms. Afterwards the broker must hold exactly what was sent."
            f" {comparisons[0].alone} events are sent by one connection each. Rounds: {rounds}, the order reversed in"
            f" every other one; medians, with the middle half. Reading and mapping alone take {mapping:.0f} µs of CPU"
            " per event."
        ),
    ]
