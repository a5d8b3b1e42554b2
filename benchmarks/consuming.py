"""Handling events: a worker of the consumer kit against the plain client's loop, and from one worker to four.

``python -m benchmarks.consuming WAY OPTIONS EVENTS NAME`` is one process that receives: it prints what it measured.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.clients import ROOT
from benchmarks.measure import median, ratios, spread
from benchmarks.raw_consuming import loop_of, prepare_rabbitmq
from benchmarks.report import Row, Section, say
from orthanc_events_bridge.consumers import Consumer, Event
from orthanc_events_bridge.testing.brokers import BROKERS, make_broker
from orthanc_events_bridge.testing.servers import scratch_folder
from orthanc_events_bridge.transports import create, registration
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.options import TransportOptions

_WAYS: Final = ("kit", "raw", "raw and JSON")
KINDS: Final = ("nats", "rabbitmq", "kafka")
_TARGET: Final = 0.6
_SCALING: Final = 3.5
#: Seconds that a handler waits for something else, as for an answer of Orthanc.
_WAITING: Final = 0.02
#: Rounds, events, and those for handlers that wait.
_SIZE: Final = (5, 30_000, 4000)
_QUICK: Final = (1, 2000, 400)


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
                names = {way: f"{way.replace(' ', '-')}-{number}" for way in _WAYS}
                asyncio.run(_publish(options, events, list(names.values())))
                for way in reversed(_WAYS) if number % 2 else _WAYS:
                    (found,) = _receive(way, path, events, names[way])
                    rates.setdefault((kind, way), []).append(found["rate"])
                    cpu.setdefault((kind, way), []).append(found["cpu"] / events * 1e6)
                broker.remove_place()
            say(
                f"handling from {BROKERS[kind].title}: "
                + ", ".join(f"{w} {median(rates[kind, w]):.0f}/s" for w in _WAYS)
            )
            for number in range(rounds):
                pair = []
                for workers in (1, 4):
                    name = f"waiting-{workers}-{number}"
                    asyncio.run(_publish(options, waiting, [name], keys=waiting))
                    all_of = _receive("waiting", path, waiting, name, workers)
                    pair.append(waiting / (max(one["end"] for one in all_of) - min(one["begin"] for one in all_of)))
                    broker.remove_place()
                scaling.setdefault(kind, []).append(pair[1] / pair[0])
            say(f"handling from {BROKERS[kind].title}: one worker to four {spread(scaling[kind])}")
    return _section(rates, cpu, scaling, events, waiting, rounds)


def _options(lines: Sequence[str]) -> dict[str, Any]:
    import yaml

    found = yaml.safe_load("\n".join(line.strip() for line in lines))
    return dict(found)


async def _publish(options: TransportOptions, count: int, names: Sequence[str], keys: int = 500) -> None:
    """Let all names begin, and then send them the same events."""
    transport = create(options)
    await transport.connect()
    for name in names:
        if name.startswith("raw") and options.type == "rabbitmq":
            await prepare_rabbitmq(options, name)  # type: ignore[arg-type]
        elif not name.startswith("raw"):
            await (await transport.subscribe(name, oldest=True)).close()
    made = [_event(number, f"study-{number % keys}") for number in range(count)]
    for start in range(0, count, 500):
        await transport.publish(made[start : start + 500])
    await transport.close()


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


def _receive(way: str, options: Path, events: int, name: str, workers: int = 1) -> list[dict[str, Any]]:
    """Have processes receive all; what each measured."""
    share = str(events) if workers == 1 else "0"
    command = [sys.executable, "-m", "benchmarks.consuming", way, str(options), share, name]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(workers)
    ]
    if workers > 1:  # each says how many it has; when all are handled they are told to end
        _until_all(running, events)
    found = []
    for process in running:
        out, _ = process.communicate("end\n" if workers > 1 else None, timeout=300)
        found.append(json.loads(out.splitlines()[-1]))
    return found


def _until_all(running: Sequence[subprocess.Popen[str]], events: int) -> None:
    counts = [0] * len(running)
    while sum(counts) < events:
        for number, process in enumerate(running):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("how many\n")
            process.stdin.flush()
            counts[number] = int(process.stdout.readline())
        time.sleep(0.05)


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
        for way in _WAYS:
            ratio = "" if way == "kit" else spread(ratios(rates[kind, "kit"], rates[kind, way]))
            lines.append((f"{title}, {way}", spread(rates[kind, way], ".0f"), ratio, spread(cpu[kind, way], ".0f")))
        found = ratios(rates[kind, "kit"], rates[kind, "raw"])
        why = (
            f"a worker takes {median(cpu[kind, 'kit']):.0f} µs of CPU per event, the plain loop, which looks at"
            f" nothing, {median(cpu[kind, 'raw']):.0f}, and {median(cpu[kind, 'raw and JSON']):.0f} where it reads it."
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
                f"{events} events of 500 studies wait at the broker. One process with one worker of the kit, whose"
                " async handler does nothing, takes them all; against it the plain client in the fastest loop that"
                " it has (NATS: an own inbox and raw MSG.NEXT; RabbitMQ: aiormq, every 64th acknowledgement for"
                " all before it; Kafka: getmany and a commit per batch), once looking at nothing, once reading JSON."
                f" Timed from when a tenth is handled until all is. {rounds} rounds, the order reversed in every other."
            ),
            (
                f"Then {waiting} events whose handlers wait for {_WAITING * 1000:.0f} ms each, 16 at a time in each"
                " worker, by one worker and by four."
            ),
        ],
        rows,
        [lines],
    )


# In the process that receives.


async def _measure(way: str, options: TransportOptions, events: int, name: str) -> None:
    done, count = asyncio.Event(), 0
    begin = end = cpu = 0.0

    def seen() -> None:
        nonlocal count, begin, end, cpu
        count += 1
        if count == (events // 10 or 1):
            begin, cpu = time.monotonic(), time.process_time()
        end = time.monotonic()
        if count == events:
            cpu = time.process_time() - cpu
            done.set()

    if way.startswith("raw"):
        reads = way == "raw and JSON"

        def on_body(body: bytes) -> None:
            if reads:
                json.loads(body)
            seen()

        await loop_of(options)(options, name, on_body, done)
    else:
        app = Consumer(name, broker=options, start="oldest", concurrency=16, prefetch=32 if way == "waiting" else 512)

        @app.on("instance.created")
        async def handler(event: Event) -> None:
            if way == "waiting":
                await asyncio.sleep(_WAITING)
            seen()

        working = asyncio.create_task(app.serve())
        if events:
            await done.wait()
        else:
            await asyncio.get_running_loop().run_in_executor(None, _answer, lambda: count)
        app.stop()
        await working
    rate = (events - events // 10) / (end - begin) if events else 0.0
    print(json.dumps({"rate": rate, "cpu": cpu / 0.9, "begin": begin, "end": end}), flush=True)


def _answer(count: Any) -> None:
    for line in sys.stdin:
        if line.startswith("end"):
            return
        print(count(), flush=True)


def _main() -> None:
    way, options, events, name = sys.argv[1:]
    asyncio.run(_measure(way, pickle.loads(Path(options).read_bytes()), int(events), name))  # noqa: S301 -- our own


if __name__ == "__main__":
    _main()
