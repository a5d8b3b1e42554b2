"""Looking at what a NATS stream receives, for ``orthanc-events tail``: no trace is left at the server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Final

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.transports.base import Escaped, Incoming
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions

#: How many old messages are asked for at a time, and for how many seconds.
_PULL: Final = 500
_PULL_SECONDS: Final = 20


async def tail(connected: Callable[[], Connection], options: NatsOptions, *, oldest: bool) -> AsyncGenerator[Incoming]:
    """See `orthanc_events_bridge.transports.base.Transport.tail`.

    :param connected: gives the connection when the first event is asked for.
    """
    connection = connected()
    subject = f"{options.subject_prefix}.>"
    inbox = connection.new_inbox()
    consumer = ""
    subscription = await connection.ask(connection.subscribe(inbox if oldest else subject))
    try:
        # A refused subscription is answered before this is, and nothing is missed from now on.
        await connection.ask(connection.flush())
        if oldest:
            consumer = await _consumer(connection, options.stream, subject)
        asked = 0
        while True:
            if oldest and not asked:
                asked = _PULL
                await _pull(connection, options.stream, consumer, inbox)
            message = await _next(connection, subscription)
            headers = {name.lower(): value for name, value in (message.headers or {}).items()}
            status = headers.get("status")
            if status == "408":  # nothing came in time: ask again
                asked = 0
            elif status is not None:
                raise connection.lost(OSError(headers.get("description", status)))
            else:
                asked -= 1
                position = str(message.metadata.sequence.stream) if oldest else ""
                yield Escaped(message.subject, message.data, headers, position)
    except nats.errors.Error as error:
        raise connection.lost(error) from error
    finally:
        with contextlib.suppress(nats.errors.Error, OSError, TransportError):
            await subscription.unsubscribe()
            if consumer:
                await connection.ask(connection.jsm().delete_consumer(options.stream, consumer))


async def _consumer(connection: Connection, stream: str, subject: str) -> str:
    """Make a consumer of our own that begins with the oldest event; return its name."""
    config = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.ALL,
        filter_subject=subject,
        inactive_threshold=2 * _PULL_SECONDS,
        mem_storage=True,
    )
    info = await connection.ask(connection.jsm().add_consumer(stream, config))
    return info.name


async def _pull(connection: Connection, stream: str, consumer: str, inbox: str) -> None:
    request = json.dumps({"batch": _PULL, "expires": _PULL_SECONDS * 1_000_000_000})
    await connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", request.encode(), inbox)


async def _next(connection: Connection, subscription: Subscription) -> Msg:
    while True:
        connection.check()
        with contextlib.suppress(nats.errors.TimeoutError):
            return await subscription.next_msg(timeout=0.5)
