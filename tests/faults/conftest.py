"""Fault tests: the whole line, broken on purpose, and the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import MissingComponentError, require, skip_or_fail
from tests.contract.harness import Harness
from tests.contract.table import TABLE


@pytest.fixture(params=[name for name, (_, can) in TABLE.items() if can.subscribable and can.durable])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """Every broker that consumers can be on, with a place of its own; ``indirect``: the named one."""
    kind, _ = TABLE[request.param]
    found = kind(tmp_path / "broker")
    found.new_place()
    try:
        yield found
    finally:
        found.tidy()
        found.close()


@pytest.fixture
def make_line(tmp_path: Path) -> Iterator[Callable[..., Line]]:
    """Start lines: ``make_line(**options of Line)``; what the test doesn't judge is allowed by it."""
    require("orthanc", "orthanc-python")
    with contextlib.ExitStack() as stack:

        def make(name: str = "line", **options: Any) -> Line:
            try:
                line = stack.enter_context(Line(tmp_path / name, **options))
            except MissingComponentError as error:
                skip_or_fail(error)
            line.ledger.allow("*.stable")
            line.ledger.allow("server.*")
            return line

        yield make
