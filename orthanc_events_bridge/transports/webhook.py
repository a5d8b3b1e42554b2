"""Webhooks: each CloudEvent is posted to a URL, as CloudEvents' HTTP binding says, and confirmed by 2xx.

One event after the other, so that the receiver gets them in order. With ``concurrency`` several are under way at once,
of different partitions, so that each key's are still in order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final
from urllib.parse import quote

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.base import Capabilities, Incoming, Outgoing, PublishError, Transport
from orthanc_events_bridge.transports.headers import ADDRESS, EVENT_ID
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.webhook_answers import problem, spelt
from orthanc_events_bridge.transports.webhook_client import Answer, Client, Header
from orthanc_events_bridge.transports.webhook_options import WebhookOptions
from orthanc_events_bridge.transports.webhook_signature import keys, sign

#: What a header's value can hold as it is: HTTP binding 1.0.2, section 3.1.3.2.
_SAFE: Final = "".join(chr(number) for number in range(0x21, 0x7F) if chr(number) not in '"%')
#: Seconds without an answer after which a receiver that has hung up is asked whether it is there.
_LOOK: Final = 30.0
#: Seconds that requests under way have to end when the transport is closed.
_CLOSING: Final = 0.4
#: How many lanes there are without order.
_DISORDER: Final = 8


class _Batch:
    """What has become of the events of one batch."""

    def __init__(self, size: int) -> None:
        self.confirmed = bytearray(size)
        self.end = size  # those from here on are not begun any more
        self.error: TransportError | None = None

    def fail(self, index: int, error: TransportError) -> None:
        if index < self.end:
            self.end, self.error = index, error

    @property
    def leading(self) -> int:
        """So many from the first on are confirmed without a hole."""
        hole = self.confirmed.find(0)
        return len(self.confirmed) if hole < 0 else hole


class WebhookTransport(Transport):
    """Posts to one URL. What a receiver has answered with 2xx is its own to keep."""

    capabilities = Capabilities(
        durable=True,
        deduplicates=False,
        replayable=False,
        ordered=True,
        declares_topology=False,
        refuses_when_full=True,
        identifies_place=False,
        subscribable=False,
        has_inboxes=False,
        counts_deliveries=False,
        pipelined=False,
    )
    #: A seam for `make test-mutants`: protections that are left out.
    without: frozenset[str] = frozenset()

    def __init__(self, options: TransportOptions) -> None:
        assert isinstance(options, WebhookOptions)
        super().__init__(options)
        self._options = options
        self._client: Client | None = None
        self._keys: tuple[bytes, ...] = ()
        self._probed: Answer | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def connect(self) -> str:
        """There is no session: the receiver is asked whether it is there, and again when it has hung up since."""
        client = self._client
        if client is not None:
            silent = asyncio.get_running_loop().time() - client.answered
            if not self._options.probe or silent < _LOOK or not client.hung_up:
                return ""
        await self.close()
        secret = self._options.secret("signing_secret")
        self._keys = keys(secret, f"transport {self.name}: signing_secret") if secret is not None else ()
        client = Client(self._options)
        self._probed = None
        if self._options.probe:
            try:
                answer = await client.probe()
            except BaseException:
                await client.close()
                raise
            if not isinstance(answer, Answer):
                await client.close()
                raise answer
            self._probed = answer
        self._client = client
        return ""

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        sending = list(self._sending)
        for task in sending:
            task.cancel()
        if sending:
            await asyncio.wait(sending, timeout=_CLOSING)
        await client.close()

    def _connected(self) -> Client:
        if self._client is None:
            raise NotConnectedError(f"not connected to the webhook at {self._options.address}", "connect first")
        return self._client

    # Publishing.

    async def publish(self, events: Sequence[Outgoing]) -> None:
        try:
            client = self._connected()
        except TransportError as error:
            raise PublishError(0, error) from error
        batch = _Batch(len(events))
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes(events):
                task = group.create_task(self._send(client, batch, events, lane))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
        if batch.leading < len(events):
            raise await self._failure(client, batch)

    async def _failure(self, client: Client, batch: _Batch) -> PublishError:
        error = batch.error
        if error is None or batch.leading < batch.end:  # `close` has come in between
            error = NotConnectedError(
                f"the connection to the webhook at {self._options.address} was closed", "it is made again by itself"
            )
        elif isinstance(error, NotConnectedError) and client is self._client:
            await self.close()
        confirmed = batch.leading
        stored = (index for index, one in enumerate(batch.confirmed) if one and index > confirmed)
        return PublishError(confirmed, error, stored)

    def _lanes(self, events: Sequence[Outgoing]) -> list[list[int]]:
        """Indices of the events, those of one partition in one lane."""
        if "order" in self.without:
            return [list(range(first, len(events), _DISORDER)) for first in range(min(_DISORDER, len(events)))]
        lanes: dict[int, list[int]] = {}
        for index, event in enumerate(events):
            lanes.setdefault(int(event.partition) % self._options.concurrency, []).append(index)
        return list(lanes.values())

    async def _send(self, client: Client, batch: _Batch, events: Sequence[Outgoing], lane: list[int]) -> None:
        """Send a lane's events, one after the other; behind a failure, in any lane, only what comes before it."""
        for index in lane:
            if index >= batch.end:
                return
            event = events[index]
            answer = await client.ask("POST", self._headers(event), event.body)
            error = self._problem(answer, event)
            if error is not None and "confirm" not in self.without:
                batch.fail(index, error)
                return
            batch.confirmed[index] = 1

    def _problem(self, answer: Answer | TransportError, event: Outgoing) -> TransportError | None:
        if not isinstance(answer, Answer):
            return answer
        return problem(answer.status, answer.headers, self._options.address, event.size)

    def _headers(self, event: Outgoing) -> list[Header]:
        headers = {"Content-Type": event.content_type}
        for name, value in event.attributes:
            headers[f"ce-{name}"] = quote(value, safe=_SAFE)
        headers[EVENT_ID] = event.id
        headers[ADDRESS] = event.address
        headers.update(event.headers)
        if self._keys:
            now, identifier = int(time.time()), event.dedupe or event.id
            headers["webhook-id"] = identifier
            headers["webhook-timestamp"] = str(now)
            headers["webhook-signature"] = sign(self._keys, identifier, now, event.body)
        return [(name.encode(), value.encode()) for name, value in headers.items()]

    # Looking at it.

    async def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        for message in self._received():
            yield message

    def _received(self) -> list[Incoming]:
        self._connected()
        raise TransportConfigurationError(
            f"the webhook at {self._options.address} can't be read: only its receiver knows what it got",
            "look at the outbox, or ask the receiver",
        )

    async def describe(self) -> list[str]:
        self._connected()
        options = self._options
        tls = "with TLS" if options.encrypted else "without TLS"
        signed = f"signed with {len(self._keys)} key(s)" if self._keys else "not signed"
        several = f"{options.concurrency} events at a time, each key in order"
        lines = [
            f"webhook at {options.address}, {tls}, {options.mode} mode, {signed}",
            several if options.concurrency > 1 else "one event at a time, in order",
        ]
        if self._probed is not None:
            lines.append(f"the receiver is there: it answers OPTIONS with {spelt(self._probed.status)}")
        return lines
