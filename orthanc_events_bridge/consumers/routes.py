"""Which handlers an event is for, and how they are called."""

from __future__ import annotations

import difflib
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
from orthanc_events_bridge.loading import ConfigError, Problem

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
    """Check a handler.

    :param patterns: `check_terms` has looked at them, and at `where` and `retry`.
    :raises BridgeError: it can't be called with an event.
    """
    count, called = _arguments(handler), _called(handler)
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise BridgeError(f"the handler {_name(handler)} has `yield` in it: it would never run", "leave the yield out")
    if on_dead is not None and not inspect.iscoroutinefunction(on_dead):
        raise BridgeError(f"on_dead={on_dead!r} can't be awaited", "give a coroutine function of (event, reason)")
    return Route(patterns, handler, where, retry, count == 2, inspect.iscoroutinefunction(called), on_dead)


def check_terms(patterns: tuple[str, ...], where: object = None, retry: object = None) -> None:
    """Check what a handler is to be called for.

    :raises BridgeError: a pattern matches no event, or something is not what it has to be.
    """
    if not patterns:
        raise BridgeError("a handler is for no event", 'name types: @app.on("study.stable")')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise BridgeError("@app.on is given something that is no text", 'write @app.on("study.stable")')
        check_pattern(pattern)
    if where is not None and (not callable(where) or inspect.iscoroutinefunction(_called(where))):
        raise BridgeError("@app.on: where is no function that says at once", "write where=lambda event: …")
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise BridgeError("@app.on: retry is no policy", "write retry=RetryPolicy(max_attempts=…)")


def check_pattern(pattern: str) -> None:
    """Can there be an event of that name?

    :raises BridgeError: no.
    """
    foreign = pattern.count(".") > 1 and not _WILD.search(pattern)  # a whole type: of others too
    if not foreign and not fnmatch.filter(NAMES, pattern):
        right = "see docs/events.md; study.stable, *.stable and job.* are such names, without prefix and version"
        meant = near(pattern)
        raise BridgeError(f"no event is called {pattern!r}", f"did you mean {meant}?" if meant else right)


def near(pattern: str) -> str:
    """The event that is meant by a name that none has; empty where that is not to be seen."""
    return "" if fnmatch.filter(NAMES, pattern) else "".join(difflib.get_close_matches(pattern, NAMES, 1))


def incomplete(consumer: str, option: str, wrong: str, right: str) -> ConfigError:
    """What to raise where a consumer can't begin as it is."""
    return ConfigError([Problem(f"consumer {consumer}", None, option, wrong, right)])


def no_handler(consumer: str) -> ConfigError:
    """What to raise where it has no handler."""
    return incomplete(consumer, "", "there is no handler", 'write @app.on("study.stable") above one')


def _called(handler: Any) -> Any:
    return handler if inspect.isroutine(handler) else getattr(handler, "__call__", handler)  # noqa: B004


def _name(handler: Any) -> str:
    return str(getattr(handler, "__qualname__", repr(handler)))


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
    raise BridgeError(
        f"the handler {_name(handler)}{signature} can't be called", "it takes (event) or (event, orthanc)"
    )
