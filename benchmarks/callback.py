"""How long Orthanc's change thread is held up by our callback."""

from __future__ import annotations

import array
from collections.abc import Sequence
from pathlib import Path

from benchmarks.clients import Clients, events_of
from benchmarks.measure import median, quantile
from benchmarks.report import Row, Section, say
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.servers import scratch_folder

#: Put in front of the shim: it times whatever is registered as the callback, and the timing itself.
_PREAMBLE = """\
import array as _array
import time as _time

import orthanc as _orthanc


def _instrument(register, path, size=2_000_000, trials=20_000):
    clock = _time.perf_counter_ns

    def timed_with(callback, samples):
        count = 0

        def timed(kind, level, resource):
            nonlocal count
            begin = clock()
            callback(kind, level, resource)
            end = clock()
            if count < size:
                samples[count] = end - begin
                count += 1
            if kind == _orthanc.ChangeType.ORTHANC_STOPPED:
                with open(path, "wb") as file:
                    _array.array("q", samples[:count]).tofile(file)

        return timed

    def nothing(kind, level, resource):
        pass

    empty = [0] * size
    measured = timed_with(nothing, empty)
    for _ in range(trials):
        measured(3, 3, "01234567-01234567-01234567-01234567-01234567")
    with open(path + ".empty", "wb") as file:
        _array.array("q", empty[:trials]).tofile(file)
    del empty

    def register_timed(callback):
        register(timed_with(callback, [0] * size))

    _orthanc.RegisterOnChangeCallback = register_timed


_instrument(_orthanc.RegisterOnChangeCallback, {path!r})
"""


def run(*, quick: bool) -> Section:
    """Time each call while four clients upload."""
    instances = 400 if quick else 6000
    with scratch_folder() as folder, Clients() as clients:
        line = Line(folder, stable_age=60)
        times = folder / "times"
        shim = line.orthanc.shim_path
        shim.write_text(_PREAMBLE.format(path=str(times)) + shim.read_text("utf-8"), "utf-8")
        with line:
            load = clients.upload(line.orthanc.port, instances)
            say(f"callback: {instances} instances uploaded at {load.rate:.0f}/s")
            line.settle()
        samples, empty = _microseconds(times), _microseconds(times.with_name("times.empty"))
    expected = events_of(instances, clients.count)
    p50, p99 = quantile(samples, 0.5), quantile(samples, 0.99)
    slow = sum(sample > 1000 for sample in samples)
    lines: list[Sequence[str]] = [("µs", "p50", "p90", "p99", "p99.9", "longest")]
    for name, values in (("callback", samples), ("empty function", empty)):
        lines.append((name, *(f"{quantile(values, share):.1f}" for share in (0.5, 0.9, 0.99, 0.999, 1.0))))
    return Section(
        "Callback",
        [
            (
                "The function that the plugin registers with Orthanc is timed by `time.perf_counter_ns` around each"
                f" call, inside Orthanc, while four clients upload {instances} instances ({load.rate:.0f}/s):"
                f" {len(samples)} calls, of which {expected} come from the uploads. The timing itself shows"
                f" {median(empty):.2f} µs around an empty function in the same process; that is not subtracted. The"
                " wait for Python's interpreter lock *before* the callback is not in it (the latency below has it)."
            )
        ],
        [
            Row(
                "callback, p50",
                "≤ 10 µs",
                f"{p50:.1f} µs",
                p50 <= 10,
                "it is one append and one `Event.set()`, and this machine takes that long for it.",
            ),
            Row(
                "callback, p99",
                "≤ 100 µs",
                f"{p99:.1f} µs",
                p99 <= 100,
                "what these calls wait for is not known; capture's thread (the bell's lock, the interpreter) and"
                " whatever else ran on this core are the candidates.",
            ),
        ],
        [lines],
        [f"{slow} of {len(samples)} calls took longer than 1 ms."],
    )


def _microseconds(path: Path) -> list[float]:
    samples = array.array("q")
    samples.frombytes(path.read_bytes())
    return [nanoseconds / 1000 for nanoseconds in samples]
