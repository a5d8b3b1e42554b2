"""The merge of log and callbacks, on real Orthanc: the runs of `docs/decisions/0002-merge.md`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    ("broker", "loopers", "seconds"),
    [
        ("nats", 1, 20),
        ("nats", 4, 20),
        pytest.param("nats", 1, 60, marks=pytest.mark.slow),
        pytest.param("rabbitmq", 1, 60, marks=pytest.mark.slow),
        pytest.param("kafka", 1, 60, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_when_a_study_is_uploaded_and_deleted_in_a_tight_loop(
    make_line: Callable[..., Line], broker: str, loopers: int, seconds: int
) -> None:
    line = make_line(broker=broker)
    with Clients(line, adders=1, loopers=loopers) as clients:
        time.sleep(seconds)
    report = line.report()
    print(f"{clients.acknowledged} acknowledged", report, sep="\n")
    report.assert_clean()
    assert clients.acknowledged > 500
    assert report.duplicated == 0
    assert line.status()["capture"]["reanchored"] == 0


@pytest.mark.parametrize("broker", ["nats", pytest.param("kafka", marks=pytest.mark.slow)])
def test_nothing_is_lost_when_orthanc_is_killed_25_times_under_load(
    make_line: Callable[..., Line], broker: str
) -> None:
    line = make_line(broker=broker)
    kills = 25
    with Clients(line, adders=2, loopers=2) as clients:
        for _ in range(kills):
            time.sleep(random.uniform(0.1, 1.0))
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(0.5)
    report = line.report(kills=kills)
    print(f"{clients.acknowledged} acknowledged", report, sep="\n")
    # What is unrecoverable was created and deleted again, or only called back, while it still waited in memory. That is
    # at most what came in within a wait and a batch: a few hundred changes for each kill.
    report.assert_clean(unrecoverable=kills * 400)
    assert report.duplicated == 0


def test_nothing_is_lost_when_orthanc_is_stopped_while_changes_come_in(make_line: Callable[..., Line]) -> None:
    line = make_line()
    stops = 4
    # Orthanc 1.10.1 itself, without any plugin, doesn't obey SIGTERM while busy clients keep their connections open.
    with Clients(line, adders=1, pause=0.1):
        for _ in range(stops):
            time.sleep(0.5)
            for instance in dicom.make_study(series=3, instances=20):
                line.ledger.stored(line.orthanc.upload(instance.data))
            line.orthanc.restart()
        time.sleep(1)
    report = line.report(kills=stops)
    print(report)
    report.assert_clean(unrecoverable=stops * 100)
    assert report.duplicated == 0
