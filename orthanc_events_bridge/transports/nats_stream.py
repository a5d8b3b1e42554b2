"""The JetStream streams that events go to: found and checked, or made; and what their refusals mean."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Final, Literal

import nats.js.errors
from nats.js import JetStreamManager
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions

# What JetStream refuses with, by its numbers (nats-server's server/errors.json).
#: The event is too large.
_TOO_LARGE: Final = frozenset({10054, 10097})
#: There is no room in the stream, in the account or on the server.
_FULL: Final = frozenset({10002, 10023, 10028, 10047, 10077, 10122})
#: JetStream is off, the account unknown, the stream sealed.
_NOT_ALLOWED: Final = frozenset({10035, 10039, 10076, 10109})
#: It has no leader at the moment.
_PASSING: Final = frozenset({10008, 10009})
#: Its store can't be made: at times for a moment only, while that of a deleted stream of this name is cleared away.
_NO_STORE: Final = 10049
#: Another stream takes some of its subjects.
_OVERLAP: Final = 10065
_STORE_PAUSES: Final = (0.1, 0.3, 1.0)

#: Settings with which a stream would lose events, or never confirm them.
_NEEDED: Final = ("retention", "discard", "no_ack", "max_msgs_per_subject")
#: Settings that follow `limits`.
_LIMITS: Final = ("max_age", "max_bytes", "max_msgs", "storage", "num_replicas", "duplicate_window")


#: The stream for everybody, the one with the consumers' inboxes, or the one with their dead letters.
Which = Literal["events", "inbox", "dead"]


async def open_stream(connection: Connection, options: NatsOptions, which: Which = "events") -> StreamInfo:
    """Find the stream and check it, or make it.

    :raises NotConnectedError: NATS doesn't answer.
    :raises TransportConfigurationError: the stream can't be used as it is.
    """
    manager = connection.jsm(timeout=options.connect_timeout * 2)  # the deadline is `ask`'s
    wanted = {"events": _wanted, "inbox": _inboxes, "dead": _dead}[which](options)
    stream = str(wanted.name)
    try:
        try:
            info = await connection.ask(manager.stream_info(stream))
        except nats.js.errors.NotFoundError as error:
            if not options.declare:
                raise TransportConfigurationError(
                    f"NATS has no stream {stream}, and declare is false",
                    "make it, or set declare to true",
                ) from error
            if which != "events" and options.limits_as_found:
                wanted = await _beside(connection, manager, options, wanted)
            return await _make(connection, manager, wanted)
    except nats.js.errors.APIError as error:
        raise _no_stream(error, stream) from error
    ours = f"{options.subject_prefix}.*.*.*.*" if which == "events" else str((wanted.subjects or [])[0])
    _check(info.config, wanted, ours, declared=options.declare and not options.limits_as_found)
    return info


async def _beside(
    connection: Connection, manager: JetStreamManager, options: NatsOptions, wanted: StreamConfig
) -> StreamConfig:
    """A consumer's stream, of one that says no limits: kept as safely, and for as long, as the one for everybody."""
    try:
        found = (await connection.ask(manager.stream_info(options.stream))).config
    except nats.js.errors.NotFoundError:
        return wanted
    return wanted.evolve(
        storage=found.storage,
        num_replicas=found.num_replicas,
        duplicate_window=found.duplicate_window,
        max_age=found.max_age if wanted.max_age else 0.0,
    )


async def _make(connection: Connection, manager: JetStreamManager, wanted: StreamConfig) -> StreamInfo:
    for pause in _STORE_PAUSES:
        try:
            return await connection.ask(manager.add_stream(wanted))
        except nats.js.errors.ServerError as error:
            if error.err_code != _NO_STORE:
                raise
            await asyncio.sleep(pause)
    return await connection.ask(manager.add_stream(wanted))


def _no_stream(error: nats.js.errors.APIError, stream: str) -> TransportError:
    code, text = error.err_code, f"{error.description} ({error.err_code})"
    if code in _PASSING:
        return NotConnectedError(f"JetStream of NATS is not ready: {text}", "wait until it has a leader")
    if code is None or code in _NOT_ALLOWED:
        return TransportConfigurationError(
            "JetStream is not on at this NATS server or for this account",
            "start nats-server with -js, and enable JetStream for the account",
        )
    remedy = "check the account's limits and the user's permissions"
    if code in _FULL:
        remedy = "lower `limits.max_bytes`, `inbox_max_bytes` or `dead_max_bytes`, or give the account more room"
    if code == _OVERLAP:
        remedy = "let no stream of others take them: choose another `subject_prefix`, `inbox_prefix` or `dead_prefix`"
    return TransportConfigurationError(f"NATS can't make or read the stream {stream}: {text}", remedy)


def _wanted(options: NatsOptions) -> StreamConfig:
    limits = options.limits
    return StreamConfig(
        name=options.stream,
        description="Changes of Orthanc as CloudEvents",
        subjects=[f"{options.subject_prefix}.>"],
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW,  # by default NATS evicts the oldest event silently
        max_age=limits.max_age,
        max_bytes=limits.max_bytes or -1,
        max_msgs=limits.max_messages or -1,
        storage=StorageType(limits.storage),
        num_replicas=limits.replicas,
        duplicate_window=limits.duplicate_window,
    )


def _inboxes(options: NatsOptions) -> StreamConfig:
    """An inbox is read by one consumer only: what that one has acknowledged goes."""
    return _wanted(options).evolve(
        name=options.inbox_stream,
        description="Changes of Orthanc that are sent to one consumer",
        subjects=[f"{options.inbox_prefix}.*"],
        retention=RetentionPolicy.WORK_QUEUE,
        max_bytes=options.inbox_max_bytes or -1,
        max_msgs=-1,
    )


def _dead(options: NatsOptions) -> StreamConfig:
    """Nothing goes by itself: somebody has to look at it first."""
    return _wanted(options).evolve(
        name=options.dead_stream,
        description="Changes of Orthanc that a consumer could not handle",
        subjects=[f"{options.dead_prefix}.*"],
        max_age=0.0,
        max_bytes=options.dead_max_bytes or -1,
        max_msgs=-1,
    )


def _check(found: StreamConfig, wanted: StreamConfig, ours: str, *, declared: bool) -> None:
    """A stream that exists is never changed: what differs is named.

    :param ours: a pattern of the subjects that it has to take.
    """
    differing = []
    for name in (*_NEEDED, *_LIMITS) if declared else _NEEDED:
        is_, should = (getattr(config, name) for config in (found, wanted))
        if is_ != should and not (isinstance(is_, float) and math.isclose(is_, should, rel_tol=1e-8)):
            differing.append(f"{name} is {_plain(is_)}, wanted {_plain(should)}")
    if not any(_covers(subject, ours) for subject in found.subjects or []):
        differing.append(f"subjects are {found.subjects}, wanted {wanted.subjects}")
    if differing:
        raise TransportConfigurationError(
            f"the NATS stream {found.name} exists with other settings: {'; '.join(differing)}",
            "change `limits` or the stream so that they agree, or set declare to false to keep its limits; an"
            " empty one can be deleted: a consumer that came first made it with the defaults",
        )


def _covers(subject: str, pattern: str) -> bool:
    """Whether a stream's subject takes all that a pattern matches."""
    ours = pattern.split(".")
    theirs = subject.split(".")
    if theirs[-1] == ">" and len(theirs) <= len(ours):
        theirs[-1:] = ["*"] * (len(ours) - len(theirs) + 1)
    return len(ours) == len(theirs) and all(a in ("*", b) for a, b in zip(theirs, ours, strict=True))


def _plain(value: object) -> object:
    return getattr(value, "value", value)


def refused(error: dict[str, Any]) -> TransportError:
    """Which of our errors an error acknowledgement of JetStream is."""
    code, text = error.get("err_code", 0), error.get("description", "")
    if code in _TOO_LARGE:
        return EventRejectedError(f"the NATS stream refuses an event as too large: {text}", "raise its max_msg_size")
    if code in _FULL:
        return RefusedError(
            f"the NATS stream is full: {text} ({code})",
            "raise its limits or the account's, purge it, or wait until its oldest events have aged out",
        )
    if code in _NOT_ALLOWED:
        return TransportConfigurationError(f"NATS refuses: {text} ({code})", "check the account and the stream")
    return RefusedError(f"NATS refuses: {text} ({code})", "see the NATS server's log")
