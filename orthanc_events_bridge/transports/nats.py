"""NATS JetStream.

``publish_async`` of nats-py 2.16 never reports an error acknowledgement and has no deadline, as measured, so
that acknowledgements come to an inbox of our own. The CloudEvents binding for NATS is structured only, in
1.0.2; binary mode is that of the draft of 1.0.3.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    TransportError,
)
from orthanc_events_bridge.transports.base import (
    Capabilities,
    DeadLetters,
    Incoming,
    Outgoing,
    Place,
    PublishError,
    Subscription,
    Transport,
)
from orthanc_events_bridge.transports.nats_batch import Batch, more_headers, size_of
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_consumer import open_consumers, open_inbox_only
from orthanc_events_bridge.transports.nats_dead import NatsDeadLetters
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_ordered import NatsOrderedSubscription
from orthanc_events_bridge.transports.nats_stream import open_stream, refused
from orthanc_events_bridge.transports.nats_subscription import NatsSubscription
from orthanc_events_bridge.transports.nats_tail import tail
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.servers import InTurn
from orthanc_events_bridge.transports.subscriptions import check_name
from orthanc_events_bridge.values import format_duration, format_size

#: Room for headers in the server's max_payload: id, content type, and NATS' own line.
_HEADERS: Final = 256
#: Events that are handed over before acknowledgements get their turn.
_SLICE: Final = 100


class NatsTransport(Transport):
    """Publishes to one stream, with the event's id for JetStream to remove duplicates by."""

    capabilities = Capabilities(
        durable=True,
        deduplicates=True,
        replayable=True,
        ordered=True,
        declares_topology=True,
        refuses_when_full=True,
        identifies_place=True,
        subscribable=True,
        has_inboxes=True,
        counts_deliveries=True,
        pipelined=True,
    )
    #: A seam for `make test-mutants`: protections that are left out.
    without: frozenset[str] = frozenset()

    def __init__(self, options: TransportOptions, consumer: str = "") -> None:
        """:param consumer: whose inbox is the place, in place of the stream for everybody."""
        assert isinstance(options, NatsOptions)
        super().__init__(options)
        self._options = options
        self._consumer = consumer
        self._stream = options.inbox_stream if consumer else options.stream
        self._subjects = f"{options.inbox_prefix}.{consumer}" if consumer else f"{options.subject_prefix}.>"
        self._connection: Connection | None = None
        self._servers = InTurn(options.servers, lambda server: Connection.open(self._options, server))
        self._inbox = ""
        self._batches = 0
        self._batch: Batch | None = None
        self._last = 0  # the stream's number of the last message that we know of

    async def connect(self) -> str:
        connection = self._connection
        if connection is None or connection.fault is not None or not connection.is_connected:
            await self.close()
            connection = self._connection = await self._servers.open()
            self._inbox = connection.new_inbox()
            await connection.ask(connection.listen(f"{self._inbox}.*.*", self._on_ack))
        info = await open_stream(connection, self._options, "inbox" if self._consumer else "events")
        self._last = info.state.last_seq
        return info.created.isoformat() if info.created else ""

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.give_up()

    def _connected(self) -> Connection:
        if self._connection is None:
            raise NotConnectedError("not connected to NATS", "connect first")
        self._connection.check()
        return self._connection

    # Publishing.

    def inbox(self, consumer: str) -> Place:
        check_name(self.name, consumer)
        return NatsTransport(self._options, consumer)

    def _subject(self, event: Outgoing) -> str:
        return f"{self._options.subject_prefix}.{event.address}"

    async def publish(self, events: Sequence[Outgoing]) -> None:
        try:
            connection = self._connected()
        except TransportError as error:
            raise PublishError(0, error) from error
        if self._consumer:
            events = [event.in_inbox(self._consumer, self._subject(event)) for event in events]
        largest = connection.max_payload - _HEADERS
        sendable = next((i for i, event in enumerate(events) if size_of(event) > largest), len(events))
        if sendable:
            await self._publish(connection, events[:sendable])
        if sendable < len(events):
            size = size_of(events[sendable])
            raise PublishError(
                sendable,
                EventRejectedError(
                    f"the event has {size} bytes, and NATS takes {largest}", "raise max_payload at the server"
                ),
            )

    async def _publish(self, connection: Connection, events: Sequence[Outgoing]) -> None:
        self._batches += 1
        batch = self._batch = Batch(len(events))
        sending = asyncio.create_task(self._send(connection, batch, events))
        try:
            if "confirm" in self.without:
                await sending
                return
            await self._settle(connection, batch)
        except TransportError as error:
            raise PublishError(batch.leading, error) from error
        finally:
            self._batch = None
            sending.cancel()
        if batch.error is not None:
            raise PublishError(batch.leading, batch.error)

    async def _send(self, connection: Connection, batch: Batch, events: Sequence[Outgoing]) -> None:
        reply = f"{self._inbox}.{self._batches}."
        try:
            for start in range(0, len(events), _SLICE):
                await asyncio.sleep(0)
                if self._batch is not batch or batch.error is not None:  # nats-py swallows a cancellation
                    return
                some = enumerate(events[start : start + _SLICE], start)
                await connection.send(b"".join(self._message(event, f"{reply}{i}") for i, event in some))
        except (nats.errors.Error, OSError) as error:
            connection.fail(connection.lost(error))

    def _message(self, event: Outgoing, reply: str) -> bytes:
        """As the protocol spells it: nats-py takes much of a drain's time to check what is right already."""
        dedupe = "" if "dedupe" in self.without else f"Nats-Msg-Id: {event.dedupe or event.id}\r\n"
        headers = f"NATS/1.0\r\n{dedupe}content-type: {event.content_type}\r\n{more_headers(event)}\r\n".encode()
        subject = self._subjects if self._consumer else self._subject(event)
        sizes = f"{len(headers)} {len(headers) + len(event.body)}"
        return b"%b%b%b\r\n" % (f"HPUB {subject} {reply} {sizes}\r\n".encode(), headers, event.body)

    async def _settle(self, connection: Connection, batch: Batch) -> None:
        """Wait for the acknowledgements, as long as they keep coming.

        :raises TransportError: they don't.
        """
        seen = -1
        while batch.progress > seen:
            seen = batch.progress
            if await connection.wait(batch.done, self._options.ack_timeout):
                return
        raise NotConnectedError(
            f"NATS has not confirmed an event within {self._options.ack_timeout:g} s",
            "check the server; the events are sent again",
        )

    def _on_ack(self, message: Msg) -> None:
        batch = self._batch
        number, _, index = message.subject[len(self._inbox) + 1 :].partition(".")
        if batch is None or int(number) != self._batches:
            return
        error = self._refusal(message)
        if error is None:
            batch.acknowledge(int(index))
        else:
            batch.fail(int(index), error)

    def _refusal(self, message: Msg) -> TransportError | None:
        """Why an event was not stored; none when it was."""
        if not message.data:  # "503": nobody listens on the subject
            return NotConnectedError(
                f"no NATS stream takes {self._subjects}: it was deleted, or has no leader",
                "it is made or found again by itself",
            )
        answer = json.loads(message.data.decode())
        if "error" in answer:
            return refused(answer["error"])
        made_again = answer["seq"] <= self._last and not answer.get("duplicate")
        if made_again or answer["stream"] != self._stream:
            return NotConnectedError(
                f"the NATS stream {self._stream} was made again while we were connected",
                "it is checked again by itself",
            )
        self._last = max(answer["seq"], self._last)
        return None

    # Receiving, and looking at it.

    async def subscribe(
        self,
        name: str,
        *,
        oldest: bool = False,
        in_flight: int = 256,
        ack_wait: float = 30.0,
        ordered: bool = False,
        longest: float = 0.0,
        inbox_only: bool = False,
    ) -> Subscription:
        """See `orthanc_events_bridge.transports.base.Transport.subscribe`. NATS has no limit below ``longest``."""
        check_name(self.name, name)
        connection, options = self._connected(), self._options
        infos = await (
            open_inbox_only(connection, options, name, ack_wait=ack_wait)
            if inbox_only
            else open_consumers(connection, options, name, oldest=oldest, ack_wait=ack_wait, ordered=ordered)
        )
        kind = NatsOrderedSubscription if ordered and not inbox_only else NatsSubscription
        return await kind.open(connection, options, name, infos, in_flight=in_flight)

    async def dead_letters(self, consumer: str) -> DeadLetters:
        check_name(self.name, consumer)
        return NatsDeadLetters(self._connected(), self._options, consumer)

    def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        return tail(self._connected, self._options, oldest=oldest)

    async def describe(self) -> list[str]:
        connection = self._connected()
        info = await open_stream(connection, self._options)
        config, state = info.config, info.state
        age = format_duration(config.max_age) if config.max_age else "unlimited"
        size = format_size(config.max_bytes) if config.max_bytes and config.max_bytes > 0 else "unlimited"
        count = f"{config.max_msgs} events" if config.max_msgs and config.max_msgs > 0 else "unlimited"
        version = connection._server_info.get("version", "of unknown version")
        tls = "with TLS" if connection.encrypted else "without TLS"
        largest = connection.max_payload - _HEADERS
        return [
            f"NATS {version}, {tls}, takes events of up to {largest} bytes",
            f"stream {config.name}: {state.messages} events, {state.bytes} bytes, {config.num_replicas} replicas",
            f"limits: age {age}, size {size}, number {count}; a full stream refuses new events",
            f"duplicates are removed within {format_duration(config.duplicate_window)}",
        ]
