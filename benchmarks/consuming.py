"""Handling events: a worker of the consumer kit against loops by hand, and from one worker to four."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import median, ratios, spread
from benchmarks.raw_consuming import WAYS, prepare
from benchmarks.receiving import HANDLERS, HELD, HELD_WAITING, KIT, WAIT, WAITING, Receiver
from benchmarks.report import Row, Section, say
from orthanc_events_bridge.testing.brokers import BROKERS, make_broker
from orthanc_events_bridge.testing.servers import scratch_folder
from orthanc_events_bridge.transports import create, registration
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.options import TransportOptions

_ALL: Final = (KIT, *WAYS)
KINDS: Final = ("nats", "rabbitmq", "kafka")
_TARGET: Final = 0.6
_SCALING: Final = 3.5
_WORKERS: Final = (1, 4)
#: Rounds, events, and those for handlers that wait.
_SIZE: Final = (5, 30_000, 8000)
_QUICK: Final = (1, 2000, 800)
#: Events of so many studies.
_KEYS: Final = 500
#: Numbers of events that are sent before the clock runs, until each worker has had some; so many at a time.
_BEFORE: Final = 1_000_000
_STEP: Final = 256
#: Seconds behind which something has gone wrong.
_DEADLINE: Final = 180.0


def run(*, quick: bool) -> Section:
    """Measure on one broker after the other."""
    rounds, events, waiting = _QUICK if quick else _SIZE
    rates: dict[tuple[str, str], list[float]] = {}
    cpu: dict[tuple[str, str], list[float]] = {}
    scaling: dict[str, list[float]] = {}
    for kind in KINDS:
        with scratch_folder() as scratch, make_broker(kind, scratch / kind) as broker:
            options = registration(kind).options.model_validate(_options(broker.options()))
            path = scratch / "options"
            path.write_bytes(pickle.dumps(options))
            for number in range(rounds):
                names = {way: f"{way}-{number}" for way in _ALL}
                asyncio.run(_publish(options, range(events), names))
                for way in reversed(_ALL) if number % 2 else _ALL:
                    found = _receive(way, path, events, names[way])
                    rates.setdefault((kind, way), []).append(found["rate"])
                    cpu.setdefault((kind, way), []).append(found["cpu"])
                broker.remove_place()
            rate = ", ".join(f"{way} {median(rates[kind, way]):.0f}/s" for way in _ALL)
            say(f"handling from {BROKERS[kind].title}: {rate}")
            for number in range(rounds):
                one, four = (
                    _scale(options, path, waiting, f"{WAITING}-{workers}-{number}", workers)
                    for workers in (reversed(_WORKERS) if number % 2 else _WORKERS)
                )
                if number % 2:
                    one, four = four, one
                scaling.setdefault(kind, []).append(four / one)
                broker.remove_place()
            say(f"handling from {BROKERS[kind].title}: one worker to four {spread(scaling[kind])}")
    return _section(rates, cpu, scaling, events, waiting, rounds)


def _receive(way: str, path: Path, events: int, name: str) -> dict[str, Any]:
    receiver = Receiver(way, path, events, name)
    receiver.wait_ready()
    return receiver.end()


def _options(lines: Sequence[str]) -> dict[str, Any]:
    import yaml

    found = yaml.safe_load("\n".join(line.strip() for line in lines))
    return dict(found)


async def _publish(options: TransportOptions, numbers: Sequence[int], names: dict[str, str] | None = None) -> None:
    """Send events.

    :param names: of consumers by their way: they begin with these events. The kit's has nothing of before to read.
    """
    transport = create(options)
    await transport.connect()
    for way, name in (names or {}).items():
        if way == KIT:
            await (await transport.subscribe(name)).close()
        else:
            await prepare(options, name)
    for start in range(0, len(numbers), 500):
        await transport.publish([_event(number, f"study-{number % _KEYS}") for number in numbers[start : start + 500]])
    await transport.close()


def _scale(options: TransportOptions, path: Path, events: int, name: str, workers: int) -> float:
    """Events per second of so many workers, from when a tenth is handled until nine tenths are.

    All of them receive before it begins, and have had their share of the work: how long an interpreter takes to start,
    and a broker to share things out, is not what is asked.
    """
    running = [Receiver(WAITING, path, 0, name) for _ in range(workers)]
    try:
        for one in running:
            one.wait_ready()
        before = 0
        deadline = time.monotonic() + _DEADLINE
        while not all(one.handled() for one in running) or sum(one.handled() for one in running) < before:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not every worker of {name} is given events")
            if sum(one.handled() for one in running) >= before:
                asyncio.run(_publish(options, range(_BEFORE + before, _BEFORE + before + _STEP)))
                before += _STEP
            time.sleep(0.2)
        asyncio.run(_publish(options, range(events)))
        while sum(one.handled() for one in running) < before + events:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not handle all events")
            time.sleep(0.1)
        found = [one.end()["times"] for one in running]
    except BaseException:
        for one in running:
            one.kill()
        raise
    first: dict[str, float] = {}
    for times in found:
        for number, moment in times.items():
            if int(number) < _BEFORE:
                first[number] = min(moment, first.get(number, moment))
    ordered = sorted(first.values())
    low, high = len(ordered) // 10, len(ordered) * 9 // 10
    return (high - low) / (ordered[high] - ordered[low])


def _event(number: int, key: str) -> Outgoing:
    from orthanc_events_bridge.events.mapping import partition

    identifier = f"{time.time_ns():016x}-{number:08d}"
    content = {
        "specversion": "1.0",
        "id": identifier,
        "source": "https://pacs.example.org/orthanc/main",
        "type": "io.orthanc-events.instance.created.v1",
        "subject": f"instances/{number:040x}",
        "time": "2026-11-27T08:00:00Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:orthanc-events:schema:instance.created.v1",
        "recorder": "5b0a0f0a-4d58-4bd3-a3b4-5cf5b8a7b7ef",
        "sequence": f"{number:020d}",
        "partitionkey": key,
        "recordedtime": "2026-11-27T08:00:00.123Z",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "data": {
            "change": "NewInstance",
            "level": "instance",
            "id": f"{number:040x}",
            "seq": number,
            "parents": {"series": f"{number:040x}", "study": key, "patient": f"{number:040x}"},
        },
    }
    where = ("main", "instance", "created", key, partition(key))
    return Outgoing(identifier, *where, "application/cloudevents+json", json.dumps(content).encode())


def _section(
    rates: dict[tuple[str, str], list[float]],
    cpu: dict[tuple[str, str], list[float]],
    scaling: dict[str, list[float]],
    events: int,
    waiting: int,
    rounds: int,
) -> Section:
    rows: list[Row] = []
    lines: list[Sequence[str]] = [("", "events/s", "kit / it", "CPU, µs per event")]
    for kind in KINDS:
        title = BROKERS[kind].title
        for way in _ALL:
            ratio = "" if way == KIT else spread(ratios(rates[kind, KIT], rates[kind, way]))
            lines.append((f"{title}, {way}", spread(rates[kind, way], ".0f"), ratio, spread(cpu[kind, way], ".0f")))
        found = ratios(rates[kind, KIT], rates[kind, "plain"])
        why = (
            f"a worker takes {median(cpu[kind, KIT]):.0f} µs of CPU per event, the loop by hand"
            f" {median(cpu[kind, 'plain']):.0f}."
        )
        rows.append(
            Row(
                f"handling from {title}: kit / plain loop", f"≥ {_TARGET}", spread(found), median(found) >= _TARGET, why
            )
        )
        rows.append(
            Row(
                f"handling from {title}: four workers / one, handlers that wait",
                f"≥ {_SCALING}",
                spread(scaling[kind]),
                median(scaling[kind]) >= _SCALING,
                "all processes share 2 cores.",
            )
        )
    return Section(
        "Handling",
        [
            (
                f"{events} events of {_KEYS} studies wait at the broker. One process with one worker of the kit, whose"
                f" async handler does nothing, {HANDLERS} at a time, takes them all, and holds {HELD} at most; against"
                " it loops by hand with the plain client (NATS: an own inbox and raw MSG.NEXT; RabbitMQ: aiormq, and an"
                " acknowledgement for 64 at a time; Kafka: getmany and a commit per batch) that hold as many:"
            ),
            (
                f"plain: what can be had by hand. It reads the event, awaits the same handler, {HANDLERS} at a time and"
                " those of one key one behind the other, and acknowledges an event when its handler has returned."
                " Retries, dead letters, attempts, metrics, freezes and stopping in good order it does without. The kit"
                " is held against this one. JSON: one behind the other, and no handler is awaited; each is parsed, and"
                " not looked at. nothing: not even that."
            ),
            f"Timed from when a tenth is handled until all is. {rounds} rounds, the order reversed in every other.",
            (
                f"Then {waiting} events whose handlers wait for {WAIT * 1000:.0f} ms each, {HANDLERS} at a time in each"
                f" worker, which holds {HELD_WAITING}, by one worker and by four: sent when all receive and have had"
                " some, and timed from when a tenth is handled until nine tenths are."
            ),
        ],
        rows,
        [lines],
    )
