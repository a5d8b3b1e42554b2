"""The plugin for pytest: fixtures for users' own tests (docs/testing.md).

It is loaded in every pytest of who has this package: it imports what it needs when a fixture is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers import Consumer
    from orthanc_events_bridge.testing.kit import Kit
    from orthanc_events_bridge.testing.orthanc_module import FakeOrthanc


@pytest.fixture
def consumer_kit() -> Iterator[Callable[[Consumer], Kit]]:
    """Starts the kit of a consumer (``Consumer.test``), and ends it with the test: ``kit = consumer_kit(app)``."""
    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(app.test())


@pytest.fixture
def orthanc_module() -> Iterator[FakeOrthanc]:
    """The module ``orthanc``, for scripts that import it: it is there for as long as the test runs."""
    from orthanc_events_bridge.testing.orthanc_module import FakeOrthanc

    with FakeOrthanc() as orthanc:
        yield orthanc
