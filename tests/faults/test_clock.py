"""The machine's clock is set forwards and backwards while everything runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.programs import require

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("broker", ["nats", pytest.param("kafka", marks=pytest.mark.slow)])
def test_nothing_is_lost_when_the_clock_jumps_by_an_hour(
    make_line: Callable[..., Line], tmp_path: Path, broker: str
) -> None:
    """Forwards, back, and back once more, each while changes come in; with Orthanc started anew in the past."""
    require("faketime")
    clock = tmp_path / "clock"
    clock.write_text("+0\n", "utf-8")
    line = make_line(broker=broker, environment=faked(clock))
    with Clients(line, adders=1, loopers=1, pause=0.005):
        for offset in ("+3600", "+0", "-3600"):
            time.sleep(1)
            clock.write_text(f"{offset}\n", "utf-8")
            time.sleep(3)
    line.settle()
    assert len({event.time[:13] for event in line.events()}) >= 3, "the clock was the same"
    line.orthanc.kill()
    line.orthanc.start()
    with Clients(line, adders=1, loopers=1, pause=0.005):
        time.sleep(1)
    report = line.report(kills=1)
    print(report)
    report.assert_clean(unrecoverable=400)
    assert line.status()["capture"]["discontinuities"] == 0


def faked(clock: Path) -> dict[str, str]:
    """The environment of a process whose clock is that of a file; what only measures time is left to the machine."""
    from orthanc_events_bridge.testing.programs import find_faketime

    return {
        "LD_PRELOAD": str(find_faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",  # seconds between two looks at the file
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
