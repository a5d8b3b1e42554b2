"""The durable pull consumer that a name's subscribers share at a NATS stream: found and checked, or made."""

from __future__ import annotations

from typing import Final

import nats.js.errors
from nats.js import JetStreamManager
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions

#: JetStream's numbers for: no leader at the moment, or the stream has just been deleted.
_PASSING: Final = frozenset({10008, 10009, 10059})
#: Settings with which a consumer would lose events, or hold them up.
_NEEDED: Final = ("ack_policy", "max_deliver", "max_ack_pending", "deliver_subject", "headers_only", "backoff")


async def open_consumer(
    connection: Connection, options: NatsOptions, name: str, *, oldest: bool, ack_wait: float
) -> ConsumerInfo:
    """Find the consumer and check it, or make it.

    :raises NotConnectedError: NATS doesn't answer, or the stream is gone.
    :raises TransportConfigurationError: it can't be used as it is, or not be made.
    """
    manager = connection.jsm(timeout=options.connect_timeout * 2)  # the deadline is `ask`'s
    wanted = ConsumerConfig(
        name=name,
        durable_name=name,
        deliver_policy=DeliverPolicy.ALL if oldest else DeliverPolicy.NEW,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        filter_subject=f"{options.subject_prefix}.>",
        max_deliver=-1,  # with fewer, NATS skips an event silently
        max_ack_pending=-1,  # those that wait for their delay would fill it
    )
    try:
        info = await _find(connection, manager, options.stream, name)
        if info is None:
            if not options.declare:
                raise TransportConfigurationError(
                    f"the NATS stream {options.stream} has no consumer {name}, and declare is false",
                    "make it, or set declare to true",
                )
            info = await _make(connection, manager, options.stream, wanted)
    except nats.js.errors.APIError as error:
        raise _no_consumer(error, options.stream, name) from error
    _check(info, wanted, options.stream)
    return info


async def _find(connection: Connection, manager: JetStreamManager, stream: str, name: str) -> ConsumerInfo | None:
    try:
        return await connection.ask(manager.consumer_info(stream, name))
    except nats.js.errors.NotFoundError:
        return None


async def _make(connection: Connection, manager: JetStreamManager, stream: str, wanted: ConsumerConfig) -> ConsumerInfo:
    try:
        return await connection.ask(manager.add_consumer(stream, wanted))
    except nats.js.errors.APIError:
        # Perhaps another subscriber has made it meanwhile, to begin elsewhere.
        info = await _find(connection, manager, stream, wanted.name or "")
        if info is None:
            raise
        return info


def _no_consumer(error: nats.js.errors.APIError, stream: str, name: str) -> TransportError:
    text = f"{error.description} ({error.err_code})"
    if error.err_code in _PASSING:
        return NotConnectedError(f"the NATS stream {stream} is not ready: {text}", "connect again")
    return TransportConfigurationError(
        f"NATS can't make or read the consumer {name} of the stream {stream}: {text}",
        "check the account's limits and the user's permissions",
    )


def _check(info: ConsumerInfo, wanted: ConsumerConfig, stream: str) -> None:
    """A consumer that exists is never changed: what differs is named."""
    differing = []
    for setting in _NEEDED:
        is_, should = getattr(info.config, setting), getattr(wanted, setting)
        if (is_ or None) != (should or None):
            differing.append(f"{setting} is {_plain(is_)}, wanted {_plain(should)}")
    filters: list[str | None] = list(info.config.filter_subjects or [])
    filters = filters or [info.config.filter_subject or wanted.filter_subject]
    if filters != [wanted.filter_subject]:
        differing.append(f"its filter is {filters}, wanted {wanted.filter_subject}")
    if differing:
        raise TransportConfigurationError(
            f"the consumer {info.name} of the NATS stream {stream} exists with other settings: {'; '.join(differing)}",
            "delete it or change it, or use another name",
        )


def _plain(value: object) -> object:
    return getattr(value, "value", value)
