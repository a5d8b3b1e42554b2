"""The demo, as `make demo` runs it, and `make hello`, on every broker."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.programs import require
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration


def demo(module: str = "demo", **environment: str) -> subprocess.CompletedProcess[str]:
    require("orthanc", "orthanc-python", "storescu")
    return subprocess.run(
        [sys.executable, "-m", f"orthanc_events_bridge.testing.{module}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_demo_of_the_ring_ends_with_results_in_the_pacs() -> None:
    pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")
    done = demo("demo_ai", BROKER="nats")
    assert done.returncode == 0, done.stderr
    steps = [line.split(" s  ")[1] for line in done.stdout.splitlines() if " s  " in line]
    assert steps[0].startswith("PACS → gateway: 16 images") and steps[-1] == "PACS: it has all of them"
    assert any("gateway → service: series " in step for step in steps)
    assert any(step == "gateway → PACS: results by C-STORE" for step in steps)
    places = re.findall(r"^  (SEG|SR) +http://127.0.0.1:[0-9]+/instances/[0-9a-f-]{44}$", done.stdout, re.MULTILINE)
    assert sorted(places) == ["SEG", "SR"]


@pytest.mark.parametrize("kind", BROKERS)
def test_the_demo_loses_nothing(kind: str) -> None:
    broker_or_skip(kind)
    done = demo(BROKER=kind)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nlost: 0\n" in done.stdout
    assert not done.stderr
    if kind != "webhook":
        assert "a consumer reacts: study" in done.stdout
        assert "\na consumer has reacted to 3 of 3 stable studies\n" in done.stdout
    for told in ("study.created.v1", "series.stable.v1", "patient.deleted.v1", "job.succeeded.v1"):
        assert told in done.stdout


@pytest.mark.parametrize("kind", [kind for kind in BROKERS if kind != "webhook"])
def test_a_consumer_says_hello(kind: str) -> None:
    broker_or_skip(kind)
    done = demo("hello", BROKER=kind)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^hello, Orthanc with API \d+$", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_a_webhook_has_no_consumers() -> None:
    done = demo("hello", BROKER="webhook")
    assert done.returncode == 2 and "has no consumers" in done.stderr


@pytest.mark.parametrize("kind", BROKERS)
def test_the_demo_would_notice_a_loss(kind: str) -> None:
    broker_or_skip(kind)
    done = demo(BROKER=kind, DEMO_FAULT="drop")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\nlost: 1\n" in done.stdout


@pytest.mark.parametrize("wrong", [{"BROKER": "zeromq"}, {"DEMO_FAULT": "all"}])
def test_a_wrong_wish_is_named(wrong: dict[str, str]) -> None:
    done = demo(**wrong)
    assert done.returncode == 2
    assert "is not known" in done.stderr
    assert "Traceback" not in done.stderr
