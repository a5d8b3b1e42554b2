"""The test of hello.py: no Orthanc, no broker (docs/testing.md)."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import pytest

from orthanc_events_bridge.consumers import Consumer
from orthanc_events_bridge.testing import event
from orthanc_events_bridge.testing.kit import Kit


def test_hello(consumer_kit: Callable[[Consumer], Kit], capsys: pytest.CaptureFixture[str]) -> None:
    kit = consumer_kit(run_path(str(Path(__file__).with_name("hello.py")))["app"])
    kit.orthanc.get("/system").respond(json={"ApiVersion": 18})
    kit.send(event("server.started"))
    assert capsys.readouterr().out == "hello, Orthanc with API 18\n"
