"""For tests: `event`, `derived`, `orthanc_id` and `FakeOrthanc` for users' own (docs/testing.md; extra ``testing``).

Beside them, for the project's own tests, demo and benchmarks: real servers, DICOM data, the ledger (extra ``servers``).
Nothing is imported before it is used: the plugin for pytest is loaded in every pytest of who has this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from orthanc_events_bridge.testing.events import derived, event, orthanc_id
    from orthanc_events_bridge.testing.orthanc_module import FakeOrthanc

__all__ = ["FakeOrthanc", "derived", "event", "orthanc_id"]

_PLACES: Final = {"FakeOrthanc": "orthanc_module", "derived": "events", "event": "events", "orthanc_id": "events"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
