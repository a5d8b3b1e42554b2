"""Fault tests: the whole line, broken on purpose, and the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import MissingComponentError, require, skip_or_fail


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
