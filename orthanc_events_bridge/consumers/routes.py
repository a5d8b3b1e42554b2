"""Which handlers an event is for, and how they are called."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import RetryPolicy
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.derived import NAMES

#: ``handler(event)`` or ``handler(event, orthanc)``, sync or async. What it returns is ignored.
Handler = Callable[..., Any] | Callable[..., Awaitable[Any]]

#: Is told of an event that goes among the dead letters, and why.
Dead = Callable[[Event, str], Awaitable[None]]

_WILD: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Route:
    """A handler, and what it is for.

    :ivar patterns: short names with wildcards (``study.stable``, ``*.stable``, ``job.*``), or whole types of others.
    :ivar handler: what is called.
    :ivar where: says whether it wants an event; none: all that match.
    :ivar retry: its own policy; none: the consumer's.
    :ivar wants_orthanc: whether it takes a second argument.
    :ivar is_async: whether it is a coroutine function; others run in threads.
    :ivar on_dead: is told when an event of its goes among the dead letters; none: nobody is.
    """

    patterns: tuple[str, ...]
    handler: Handler
    where: Callable[[Event], bool] | None
    retry: RetryPolicy | None
    wants_orthanc: bool
    is_async: bool
    on_dead: Dead | None = None

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return str(getattr(self.handler, "__qualname__", type(self.handler).__name__))

    def matches(self, event: Event) -> bool:
        """Is it one of the types? `where` is asked apart."""
        return any(fnmatch.fnmatchcase(event.name, one) or event.type == one for one in self.patterns)


def route(
    patterns: tuple[str, ...],
    handler: Handler,
    where: Callable[[Event], bool] | None = None,
    retry: RetryPolicy | None = None,
    on_dead: Dead | None = None,
) -> Route:
    """Check a handler and its patterns.

    :raises BridgeError: a pattern matches no event, or the handler can't be called with one.
    """
    if not patterns:
        raise BridgeError("a handler is for no event", 'name types: @app.on("study.stable")')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise BridgeError("@app.on is given something that is no text", 'write @app.on("study.stable")')
        foreign = pattern.count(".") > 1 and not _WILD.search(pattern)  # a whole type: of others too
        if not foreign and not fnmatch.filter(NAMES, pattern):
            raise BridgeError(
                f"no event is called {pattern!r}",
                "see docs/events.md; study.stable, *.stable and job.* are such names, without prefix and version",
            )
    if on_dead is not None and not inspect.iscoroutinefunction(on_dead):
        raise BridgeError(f"on_dead={on_dead!r} can't be awaited", "give a coroutine function of (event, reason)")
    called = handler if inspect.isroutine(handler) else getattr(handler, "__call__", handler)  # noqa: B004
    return Route(
        patterns, handler, where, retry, _arguments(handler) == 2, inspect.iscoroutinefunction(called), on_dead
    )


def _arguments(handler: Handler) -> int:
    """How many it wants: 1 or 2.

    :raises BridgeError: neither.
    """
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):
        raise BridgeError(
            f"{handler!r} can't be called", "a handler is a function of (event) or (event, orthanc)"
        ) from None
    for count in (2, 1):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count
    name = getattr(handler, "__qualname__", repr(handler))
    raise BridgeError(f"the handler {name}{signature} can't be called", "it takes (event) or (event, orthanc)")
