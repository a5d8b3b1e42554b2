"""The bridge process killed and frozen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault


def test_nothing_is_lost_when_the_bridge_is_killed(make_line: Callable[..., Line]) -> None:
    line = make_line()
    kills = 5
    with Clients(line, adders=2, loopers=1):
        for _ in range(kills):
            pid = line.bridge_pid()
            time.sleep(0.7)
            os.kill(pid, signal.SIGKILL)
            line.wait(lambda document, pid=pid: document["bridge"]["pid"] not in (None, pid), what="the supervisor")
    report = line.report()
    print(report)
    report.assert_clean()
    assert report.duplicated == 0
    document = line.status()
    assert document["bridge"]["restarts"] == kills
    assert "SIGKILL" in document["bridge"]["last_exit"]["reason"]


def test_a_frozen_bridge_holds_up_nobody_and_goes_on(make_line: Callable[..., Line]) -> None:
    line = make_line()
    with Clients(line, adders=2, loopers=1) as clients:
        time.sleep(1)
        pid = line.bridge_pid()
        os.kill(pid, signal.SIGSTOP)
        before, cursor = clients.acknowledged, line.status()["log"]["cursor"]
        time.sleep(4)
        assert clients.acknowledged > before + 100, "Orthanc must not notice"
        assert line.status()["log"]["cursor"] > cursor, "capture must not notice"
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)
    report = line.report()
    print(report)
    report.assert_clean()
    assert report.duplicated == 0
    assert line.bridge_pid() == pid


def test_the_bridge_does_not_outlive_a_killed_orthanc(make_line: Callable[..., Line]) -> None:
    line = make_line(transport=["ack_timeout: 1s", "connect_timeout: 1s"])
    pid = line.bridge_pid()
    line.broker.freeze()  # the worst case: it can't send what is left
    with Clients(line, adders=1):
        time.sleep(0.5)
        line.orthanc.kill()
        deadline = time.monotonic() + 4.0 + 1.0 + 1.0  # drain_timeout, the watchdog's second, and one of ours
        while line.orthanc.children() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert pid not in line.orthanc.children()
        line.broker.thaw()
        line.orthanc.start()
    line.report(kills=1).assert_clean(unrecoverable=400)
