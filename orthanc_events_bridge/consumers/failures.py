"""How a failure is told: in the log, and in headers. Never with what an exception says: that can hold patient data."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.holding import Held
    from orthanc_events_bridge.consumers.routes import Route

_LONGEST_TEXT: Final = 500


def spell(held: Held) -> str:
    """For the log; of events of others nobody knows what their attributes hold."""
    return repr(held.event) if held.event.ours else f"a message at position {held.delivery.message.position}"


def kind_of(problem: BaseException) -> str:
    """The type of an exception; what it says can hold patient data."""
    kind = type(problem)
    return ascii_text(kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")


def place(problem: BaseException, route: Route | None) -> str:
    """Where a handler failed: the deepest line of the file that the handler is in."""
    if route is None:
        return ""
    file = getattr(getattr(inspect.unwrap(route.handler), "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(problem.__traceback__)
    for frame in reversed(frames):
        if frame.filename == file:
            return f"{route.name} (line {frame.lineno})"
    return route.name


def ascii_text(text: str) -> str:
    """As a header of any broker can hold it."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain.encode("ascii", "backslashreplace").decode()[:_LONGEST_TEXT]
