"""Orthanc's REST ingest with one bridge that publishes to three brokers at once, against no plugin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from benchmarks.clients import Clients
from benchmarks.ingest import BRIDGE, ORTHANC, STABLE_AGE, Side
from benchmarks.measure import median, ratios, spread
from benchmarks.report import Row, Section, say
from orthanc_events_bridge.testing.brokers import Broker, make_broker
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.servers import OrthancServer, scratch_folder

_FIRST, _OTHERS = "nats", ("rabbitmq", "kafka")


def run(*, quick: bool) -> Section:
    """Run both sides in turn, the order reversed each time."""
    rounds, instances = (2, 200) if quick else (10, 1000)
    return section(compare(rounds, instances), rounds, instances)


def compare(rounds: int, instances: int) -> tuple[Side, Side]:
    """Load the Orthanc without a plugin and the one with the bridge, round by round."""
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        clients = stack.enter_context(Clients())
        others = [stack.enter_context(make_broker(kind, folder / kind)) for kind in _OTHERS]
        plain = stack.enter_context(OrthancServer(folder / "plain", stable_age=STABLE_AGE))
        line = stack.enter_context(Line(folder / "line", broker=_FIRST, settings=_more(others), stable_age=STABLE_AGE))
        line.wait(_all_connected, what="the line to three brokers")
        brokers = [line.broker, *others]
        sides = (Side("no plugin", plain, None, brokers), Side("bridge", line.orthanc, line, brokers))
        for side in sides:
            side.run(clients, instances, keep=False)  # warms up
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.run(clients, instances)
            say(
                f"fan-out: round {number + 1} of {rounds}, instances per second: "
                + ", ".join(f"{side.name} {side.rates[-1]:.0f}" for side in sides)
            )
        _compare_counts(brokers)
    return sides


def _more(brokers: Iterable[Broker]) -> str:
    """Further transports behind those of the smallest configuration, whose list is its end."""
    return "".join(
        f"  - type: {broker.kind}\n" + "".join(f"    {option}\n" for option in broker.options()) for broker in brokers
    )


def _all_connected(document: dict[str, list[dict[str, str]]]) -> bool:
    transports = document["transports"]
    return len(transports) == 1 + len(_OTHERS) and all(one["state"] == "connected" for one in transports)


def _compare_counts(brokers: Iterable[Broker]) -> None:
    stored = {broker.title: broker.stored() for broker in brokers}
    if len(set(stored.values())) != 1:
        raise RuntimeError(f"the brokers should hold the same events, and hold {stored}")


def _fits(sides: tuple[Side, Side], instances: int, cores: int) -> str:
    plain, bridge = sides
    room = 1000 * cores / median(plain.rates)
    if bridge.whole(instances) <= room:
        return ""
    return (
        f" At the rate without a plugin {cores} cores have {room:.2f} ms for each instance: so much work does not fit,"
        " whoever does it when. What a plugin in Python costs Orthanc at the least, an empty callback, is in *Ingest*."
    )


def section(sides: tuple[Side, Side], rounds: int, instances: int) -> Section:
    """Both of them on the page."""
    plain, bridge = sides
    ingest, cores = ratios(bridge.rates, plain.rates), os.cpu_count() or 1
    titles = [broker.title for broker in bridge.brokers]
    names = f"{', '.join(titles[:-1])} and {titles[-1]}"

    def cpu(side: Side, who: str) -> float:
        return median(side.each(who, instances))

    extra = cpu(bridge, ORTHANC) - cpu(plain, ORTHANC)
    sending = ", ".join(f"{cpu(bridge, title):.2f} ms in {title}" for title in titles)
    lines: list[Sequence[str]] = [
        ("", "instances/s", "rate / no plugin", *(f"{who}, ms" for who in bridge.cpu), "all, ms", "cores busy")
    ]
    for side in sides:
        parts = [spread(side.each(who, instances)) if who in side.cpu else "" for who in bridge.cpu]
        lines.append(
            (
                side.name,
                spread(side.rates, ".0f"),
                spread(ratios(side.rates, plain.rates)),
                *parts,
                f"{side.whole(instances):.2f}",
                f"{median(side.busy):.1f} of {cores}",
            )
        )
    return Section(
        "Ingest with three transports at once",
        [
            (
                f"As in *Ingest*, with one bridge that publishes everything to {names}, all three on the same"
                f" machine, and {rounds} rounds. The brokers run while the Orthanc without a plugin is loaded too: what"
                " they use then, they use for themselves. CPU is given per instance."
            )
        ],
        [
            Row(
                "ingest with three transports at once / without a plugin, median of pairs",
                "≥ 0.95",
                spread(ingest),
                median(ingest) >= 0.95,
                f"Orthanc, bridge, three brokers and clients share {cores} cores, and an instance is four events, each"
                f" sent three times. It takes {extra:.2f} ms of CPU more in Orthanc than without a plugin,"
                f" {cpu(bridge, BRIDGE):.2f} ms in the bridge, {sending}: {bridge.whole(instances):.2f} ms in all, the"
                f" clients included, against {plain.whole(instances):.2f} ms without a plugin, where the brokers have"
                f" nothing to do.{_fits(sides, instances, cores)}",
            ),
            Row(
                "CPU of Orthanc with three transports at once / without a plugin",
                "-",
                spread(ratios(bridge.cpu[ORTHANC], plain.cpu[ORTHANC])),
            ),
            Row("CPU of the bridge with three transports, per instance", "-", f"{cpu(bridge, BRIDGE):.2f} ms"),
        ],
        [lines],
        [
            (
                "From the last answer until all three have everything:"
                f" {spread(bridge.settled)} s. Uploads that Orthanc did not acknowledge:"
                f" {plain.refused + bridge.refused} of {2 * rounds * instances}."
            )
        ],
    )
