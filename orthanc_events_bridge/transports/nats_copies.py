"""Copies of a consumer's events at NATS: into its inbox, to be given again, and among its dead letters.

JetStream has counted how often it gave an event, and knows no more about it: what a copy says is in its headers. A copy
is confirmed by its stream before what it is a copy of is acknowledged, and has a key by which JetStream drops a second
one of the same original.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any, Final

import nats.errors

from orthanc_events_bridge.errors import NotConnectedError, RefusedError, TransportConfigurationError
from orthanc_events_bridge.transports.base import Incoming
from orthanc_events_bridge.transports.headers import (
    ADDRESS,
    ATTEMPTS,
    CONSUMER,
    DUE,
    EVENT_ID,
    OPERATION,
    attempts_before,
    due_text,
)
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_stream import Which, open_stream, refused

#: By which JetStream removes duplicates.
_KEY: Final = "nats-msg-id"
#: What is appended to an event's id in the keys of what is sent again.
_OURS: Final = re.compile(r":(retry|redrive|replay|dead):.*$")
#: What a header can be called (RFC 9110, section 5.1); others don't come through.
_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
#: Bytes around the headers, about.
_AROUND: Final = 64


class Copies:
    """Stores copies of one consumer's events.

    :param name: of the consumer.
    """

    def __init__(self, connection: Connection, options: NatsOptions, name: str) -> None:
        self._connection = connection
        self._options = options
        self._name = name

    async def again(self, message: Incoming, key: str, attempt: int, delay: float, headers: Mapping[str, str]) -> None:
        """Into the inbox, not to be given before so many seconds have passed.

        :param key: of the original: where it is stored.
        :raises TransportError: as `_store`.
        """
        said = {OPERATION: "retry", **headers}
        if delay > 0:
            said[DUE] = due_text(time.time() + delay)
        await self._store("inbox", message, "retry", key, attempt, said)

    async def anew(self, message: Incoming, key: str) -> None:
        """A copy that is in the inbox once more, as it is: due when it was.

        :raises TransportError: as `_store`.
        """
        attempt = attempts_before(message.headers, self._name)
        await self._store("inbox", message, "retry", key, attempt, {DUE: message.headers[DUE]})

    async def dead(self, message: Incoming, key: str, attempt: int, headers: Mapping[str, str]) -> None:
        """Among the dead letters.

        :raises TransportError: as `_store`.
        """
        await self._store("dead", message, "dead", key, attempt, headers)

    async def _store(
        self, which: Which, message: Incoming, what: str, key: str, attempt: int, headers: Mapping[str, str]
    ) -> None:
        """Store a copy; its stream is made where it is missing.

        Consumers share the stream: the key by which it drops duplicates has their name in it.

        :raises NotConnectedError: the connection is gone, and nobody knows whether it was stored.
        :raises TransportError: it was not, or nobody knows, and the connection is well: try again, by the same key.
        """
        prefix = self._options.inbox_prefix if which == "inbox" else self._options.dead_prefix
        identifier = message.headers.get(EVENT_ID) or _OURS.sub("", message.headers.get(_KEY, ""))
        kept = {
            name: " ".join(value.split())  # a line break would begin another header
            for name, value in message.headers.items()
            if name not in (DUE, _KEY) and _NAME.fullmatch(name)
        }
        kept |= {CONSUMER: self._name, ADDRESS: message.address, ATTEMPTS: str(attempt), **headers}
        if identifier:
            kept[EVENT_ID] = identifier
        kept["Nats-Msg-Id"] = f"{identifier}:{what}:{self._name}:{key}"
        size = len(message.body) + sum(len(name) + len(value) + 4 for name, value in kept.items()) + _AROUND
        if size > self._connection.max_payload:
            raise RefusedError(
                f"an event with what is to be said about it has {size} bytes, and NATS takes"
                f" {self._connection.max_payload}",
                "raise max_payload at the server",
            )
        subject = f"{prefix}.{self._name}"
        try:
            answer = await self._connection.ask(self._request(subject, message.body, kept))
            if answer is None:
                await self._open(which)
                answer = await self._connection.ask(self._request(subject, message.body, kept))
        except NotConnectedError as error:
            self._connection.check()
            raise RefusedError(error.message, error.remedy) from error
        if answer is None:
            raise RefusedError(
                f"no NATS stream takes {subject}: it was deleted, or has no leader", "it is tried again by itself"
            )
        if "error" in answer:
            raise refused(answer["error"])

    async def _request(self, subject: str, body: bytes, headers: dict[str, str]) -> dict[str, Any] | None:
        """What the stream answers; none where there is none."""
        try:
            answer = await self._connection.request(subject, body, self._options.ack_timeout * 2, headers=headers)
        except nats.errors.NoRespondersError:
            return None
        found: dict[str, Any] = json.loads(answer.data)
        return found

    async def _open(self, which: Which) -> None:
        try:
            await open_stream(self._connection, self._options, which)
        except TransportConfigurationError as error:
            raise RefusedError(error.message, error.remedy) from error
