"""Orthanc's REST ingest with the bridge, without any plugin, and with an empty Python callback."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.clients import Clients, events_of
from benchmarks.measure import cpu_seconds, median, ratios, spread
from benchmarks.report import Row, Section, say
from orthanc_events_bridge import status
from orthanc_events_bridge.testing.brokers import Broker
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.servers import OrthancServer, scratch_folder

#: The least that any Python plugin does with changes.
_EMPTY = """\
import orthanc


def on_change(kind, level, resource):
    pass


orthanc.RegisterOnChangeCallback(on_change)
"""
#: Orthanc's default, so that stable events don't fall into the measurement.
STABLE_AGE = 60
#: Who uses CPU, beside the brokers.
ORTHANC, CLIENTS, BRIDGE = "Orthanc", "clients", "bridge"
#: Seconds of rest before each run.
_REST = 0.5


@dataclass(slots=True)
class Side:
    """One Orthanc, which keeps running through all rounds, and what its runs showed.

    :param brokers: that run meanwhile, whether this Orthanc's events go there or not.
    :ivar cpu: seconds per run, by who used them: `ORTHANC`, `CLIENTS`, `BRIDGE` and the brokers' titles.
    :ivar busy: how many cores' worth of them all.
    :ivar settled: seconds from the last answer until everything was published.
    """

    name: str
    orthanc: OrthancServer
    line: Line | None = None
    brokers: Sequence[Broker] = ()
    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    settled: list[float] = field(default_factory=list)
    refused: int = 0

    def run(self, clients: Clients, instances: int, *, keep: bool = True) -> None:
        time.sleep(_REST)
        pids = {ORTHANC: self.orthanc.pid} | {broker.title: broker.pid for broker in self.brokers}
        wanted = 0
        if self.line is not None:
            pids[BRIDGE] = self.line.bridge_pid()
            wanted = status.read(self.line.folder)["outbox"]["last_position"]
            wanted += events_of(instances, clients.count)
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        load = clients.upload(self.orthanc.port, instances)
        answered = time.monotonic()
        if self.line is not None:
            self._settle(wanted)
        settled = time.monotonic() - answered
        used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()} | {CLIENTS: load.cpu}
        if not keep:
            return
        self.refused += load.refused
        self.rates.append(load.rate)
        for name, seconds in used.items():
            self.cpu.setdefault(name, []).append(seconds)
        if self.line is not None:
            self.settled.append(settled)
        self.busy.append(sum(used.values()) / (load.seconds + settled))

    def each(self, who: str, instances: int) -> list[float]:
        """Milliseconds of CPU per instance, run by run."""
        return [1000 * seconds / instances for seconds in self.cpu[who]]

    def whole(self, instances: int) -> float:
        """Milliseconds of CPU per instance that all of them used, medians."""
        return sum(median(self.each(who, instances)) for who in self.cpu)

    def _settle(self, wanted: int) -> None:
        """Until all is captured and published. The outbox's files are read: Orthanc isn't asked anything."""
        assert self.line is not None
        folder = self.line.folder

        def done() -> bool:
            document = status.read(folder)
            last = document["outbox"]["last_position"]
            return bool(last >= wanted and all(one["position"] == last for one in document["transports"]))

        if not wait_until(done, 60, every=0.02):
            raise TimeoutError(f"the bridge did not come to rest: {status.read(folder)}")


def run(*, quick: bool) -> Section:
    """Run the three sides in turn, the order reversed each time."""
    rounds, instances = (3, 200) if quick else (16, 1000)
    with scratch_folder() as folder, Clients() as clients:
        script = folder / "empty_callback.py"
        script.write_text(_EMPTY, "utf-8")
        with (
            OrthancServer(folder / "plain", stable_age=STABLE_AGE) as plain,
            OrthancServer(folder / "empty", script=script, stable_age=STABLE_AGE) as empty,
            Line(folder / "line", stable_age=STABLE_AGE) as line,
        ):
            sides = [
                Side("no plugin", plain),
                Side("empty callback", empty),
                Side("bridge", line.orthanc, line, [line.broker]),
            ]
            for side in sides:
                side.run(clients, instances, keep=False)  # warms up
            for number in range(rounds):
                for side in sides if number % 2 == 0 else sides[::-1]:
                    side.run(clients, instances)
                say(
                    f"ingest: round {number + 1} of {rounds}, instances per second: "
                    + ", ".join(f"{side.name} {side.rates[-1]:.0f}" for side in sides)
                )
    return _section(sides, rounds, instances)


def _section(sides: list[Side], rounds: int, instances: int) -> Section:
    plain, empty, bridge = sides
    nats = bridge.brokers[0].title
    ingest, floor = ratios(bridge.rates, plain.rates), ratios(empty.rates, plain.rates)
    over_floor = ratios(bridge.rates, empty.rates)

    def each(side: Side, who: str = ORTHANC) -> list[float]:
        return side.each(who, instances)

    lines: list[Sequence[str]] = [
        ("", "instances/s", "rate / no plugin", "CPU of Orthanc, ms per instance", "CPU / no plugin", "cores busy")
    ]
    for side in sides:
        lines.append(
            (
                side.name,
                spread(side.rates, ".0f"),
                spread(ratios(side.rates, plain.rates)),
                spread(each(side)),
                spread(ratios(side.cpu[ORTHANC], plain.cpu[ORTHANC])),
                f"{median(side.busy):.1f} of {os.cpu_count()}",
            )
        )
    extra = median(each(bridge)) - median(each(plain))
    floor_extra = median(each(empty)) - median(each(plain))
    refused = sum(side.refused for side in sides)
    return Section(
        "Ingest",
        [
            (
                f"Four clients (a process and a kept connection each) upload {instances} instances of about 1 kB, in"
                " new studies, as fast as Orthanc takes them. Three Orthancs run all the time, with a database each"
                f" and default settings, and are loaded one after another: {rounds} rounds, the order reversed in"
                " every other one, so that the three databases grow alike and what else the machine does hits all."
                " A ratio is taken within each round. Medians, with the middle half. CPU is user and system time of"
                " all threads from the first request until everything is published; it spreads less than the rate."
            )
        ],
        [
            Row(
                "ingest with the bridge / without a plugin, median of pairs",
                "≥ 0.95",
                spread(ingest),
                median(ingest) >= 0.95,
                f"Orthanc, bridge, NATS and clients share {os.cpu_count()} cores. An instance, with its four events,"
                f" takes {extra:.2f} ms of CPU more in Orthanc than without a plugin ({floor_extra:.2f} ms with an"
                f" empty callback), {median(each(bridge, BRIDGE)):.2f} ms in the bridge and"
                f" {median(each(bridge, nats)):.2f} ms in NATS: {bridge.whole(instances):.2f} ms in all, the clients"
                f" included, against {plain.whole(instances):.2f} ms. An empty Python callback alone, the least that"
                f" any plugin in Python does, brings Orthanc to {median(floor):.2f}; against that the bridge is at"
                f" {median(over_floor):.2f}.",
            ),
            Row("ingest with an empty Python callback / without a plugin", "-", spread(floor)),
            Row("ingest with the bridge / with an empty Python callback", "-", spread(over_floor)),
            Row(
                "CPU of Orthanc with the bridge / without a plugin",
                "-",
                spread(ratios(bridge.cpu[ORTHANC], plain.cpu[ORTHANC])),
            ),
            Row(
                "CPU of Orthanc with an empty Python callback / without a plugin",
                "-",
                spread(ratios(empty.cpu[ORTHANC], plain.cpu[ORTHANC])),
            ),
        ],
        [
            lines,
            [
                ("with the bridge, CPU per instance (4 events)", "ms"),
                ("Orthanc, above no plugin", f"{extra:.2f}"),
                ("bridge process", spread(each(bridge, BRIDGE))),
                (nats, spread(each(bridge, nats))),
                ("clients", spread(each(bridge, CLIENTS))),
            ],
        ],
        [
            (
                f"From the last answer until everything is published: {spread(bridge.settled)} s. Uploads that Orthanc"
                f" did not acknowledge: {refused} of {3 * rounds * instances}."
            )
        ],
    )
