"""An outbox's rows on their way to a broker: by the bridge's own process, and by the plain client with the same bytes.

Both are timed alike, from when a tenth of the events is there until all are, so that what either does before its first
events flow does not count: by the broker's own clock where it says when it stored an event (NATS), otherwise by what is
confirmed, which the plain client counts, and which for the bridge is its position in ``bridge.db``, read each 5 ms.
Afterwards the broker is asked whether it holds them all.

``python -m benchmarks.sending WAY FOLDER CONFIG ROWS`` is the plain client.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients import ROOT
from benchmarks.measure import cpu_seconds, memory
from benchmarks.raw import Raw, make_raw
from orthanc_events_bridge.bridge.config import load
from orthanc_events_bridge.bridge.fleet import Source
from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.status import BridgeView
from orthanc_events_bridge.testing.brokers import Broker
from orthanc_events_bridge.testing.processes import Server, wait_until
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.options import TransportOptions

#: The way of one connection per event, beside those of `benchmarks.raw.Raw.ways`.
ALONE = "one connection per event"
_POLL = 0.005


@dataclass(frozen=True, slots=True)
class Sent:
    """What sending took.

    :param rate: events per second, behind the first tenth.
    :param cpu: microseconds per event of the process that sent them, without its start.
    :param memory: its peak, MiB.
    :param parts: events per second in the first and in the last tenth.
    :param mapping: microseconds of CPU per event that reading and mapping took beforehand; NaN for the bridge, which
        does that meanwhile.
    """

    rate: float
    cpu: float
    memory: float
    parts: tuple[float, float]
    mapping: float = math.nan


class Stopwatch:
    """Notes when the first, a tenth, all but a tenth and all of the events are there, as soon as that is seen."""

    def __init__(self, events: int) -> None:
        self._marks = (1, max(1, events // 10), events - events // 10, events)
        self._seen: list[tuple[int, float]] = []

    def confirmed(self, count: int) -> None:
        while len(self._seen) < len(self._marks) and count >= self._marks[len(self._seen)]:
            self._seen.append((count, time.monotonic()))

    async def ask(self, raw: Raw[Any]) -> None:
        """Take the broker's own times in place of ours, if it tells them."""
        if (times := await raw.stored_at(self._marks)) is not None:
            self._seen = list(zip(self._marks, times, strict=True))

    @property
    def rate(self) -> float:
        return self._between(1, 3)

    @property
    def parts(self) -> tuple[float, float]:
        return self._between(0, 1), self._between(2, 3)

    def _between(self, first: int, last: int) -> float:
        (before, begin), (after, end) = self._seen[first], self._seen[last]
        return (after - before) / (end - begin) if end > begin else math.nan  # too few to be told apart


class BridgeProcess(Server):
    """The bridge, started by hand beside an outbox."""

    title = "the bridge"

    def __init__(self, outbox: Folder, config: Path) -> None:
        super().__init__(outbox.path.parent / "bridge-process")
        self._outbox = outbox.path
        self._config = config

    def _command(self) -> list[str]:
        module = [sys.executable, "-m", "orthanc_events_bridge", "run"]
        return [*module, "--outbox", str(self._outbox), "--config", str(self._config)]

    def _is_ready(self) -> bool:
        return True


def by_bridge(broker: Broker, folder: Folder, config: Path, events: int, last: int) -> Sent:
    """Let the bridge send the last rows of an outbox to a new place.

    :param last: the position that it has to reach.
    """
    before = _new_place(broker)
    view = BridgeView(folder.bridge)
    watch = Stopwatch(events)
    begun: tuple[int, float] | None = None
    with BridgeProcess(folder, config) as bridge:

        def done() -> bool:
            nonlocal begun
            position = max((transport["position"] for transport in view.transports()), default=0)
            watch.confirmed(position - (last - events))
            if begun is None and position > last - events:  # its start is over
                begun = position, cpu_seconds(bridge.pid)
            return position >= last

        if not wait_until(done, 600, every=_POLL):
            raise TimeoutError(f"the bridge did not drain the outbox:\n{bridge.log_text()[-2000:]}")
        cpu, peak = cpu_seconds(bridge.pid), memory(bridge.pid, "VmHWM")
    view.close()
    _check(broker, before + events)
    asyncio.run(watch.ask(make_raw(load(config).transports[0])))
    position, cpu_before = begun or (last, cpu)
    each = 1e6 * (cpu - cpu_before) / (last - position) if position < last else math.nan
    return Sent(watch.rate, each, peak, watch.parts)


def by_raw_client(way: str, broker: Broker, folder: Folder, config: Path, events: int) -> Sent:
    """Send the same bytes with the same headers to the same addresses of the same place, made anew.

    They are mapped beforehand, and only sent while the clock runs.

    :param way: one of the client's, or `ALONE`.
    """
    before = _new_place(broker)
    arguments = [way, str(folder.path), str(config), str(events)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.sending", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    _check(broker, before + events)
    return Sent(**json.loads(run.stdout))


def _new_place(broker: Broker) -> int:
    """Delete the place, which is made again by whoever sends first.

    :return: how many events it holds then.
    """
    if broker.has_place and broker.stored():
        broker.remove_place()
    return broker.stored()


def _check(broker: Broker, wanted: int) -> None:
    if (stored := broker.stored()) != wanted:
        raise RuntimeError(f"{broker.title} holds {stored} events, it should be {wanted}")


# The plain client's process.


def _mapped(folder: Folder, events: int) -> tuple[list[Outgoing], float]:
    reader, state = OutboxReader(folder.outbox), State(folder.path.parent / "unused.db")
    source = Source(reader, state.settings)
    _, _, last = reader.extent()
    gc.disable()  # as good as in the bridge, which hardly looks for cycles
    cpu = time.process_time()
    rows = reader.rows(last - events, events)
    mapped = [to_outgoing(row, source.shape(row.settings), source.recorder) for row in rows]
    cpu = time.process_time() - cpu
    gc.enable()
    reader.close()
    state.close()
    return mapped, 1e6 * cpu / events


async def _send(way: str, options: TransportOptions, mapped: list[Outgoing], mapping: float) -> Sent:
    declaring = create(options)
    await declaring.connect()  # the same place as the bridge's
    await declaring.close()
    raw, watch = make_raw(options), Stopwatch(len(mapped))
    messages = [raw.prepare(event) for event in mapped]
    gc.collect()
    gc.freeze()  # what was prepared shall not cost this side anything while the clock runs
    cpu = time.process_time()
    if way == ALONE:
        for count, message in enumerate(messages, 1):
            await raw.send_one(message)
            watch.confirmed(count)
    else:
        await raw.send(way, messages, watch.confirmed)
    cpu = time.process_time() - cpu
    await watch.ask(raw)
    return Sent(watch.rate, 1e6 * cpu / len(mapped), memory(os.getpid(), "VmHWM"), watch.parts, mapping)


def _main(way: str, folder: str, config: str, events: str) -> None:
    options = load(Path(config)).transports[0]
    sent = asyncio.run(_send(way, options, *_mapped(Folder(Path(folder)), int(events))))
    print(json.dumps(asdict(sent)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
