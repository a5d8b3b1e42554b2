"""Subscribers of RabbitMQ: those of one name share its queues.

RabbitMQ has no deadline for a delivery (but for ``consumer_timeout``, 30 minutes if nothing is said): what is not
settled comes again when its subscriber's channel is closed, and that is when its connection ends or is silent for two
heartbeats.

A message is never given back to be tried again: a copy is put into the inbox, or where it waits until then, and when
that is confirmed the original is acknowledged. How often it was tried is counted in our own header: RabbitMQ 4 drops
its ``x-death`` from what clients publish.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, Self

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import Delivery, Subscription
from orthanc_events_bridge.transports.rabbitmq_acks import Acks
from orthanc_events_bridge.transports.rabbitmq_asking import Asking, channel_closed, deleted, refused
from orthanc_events_bridge.transports.rabbitmq_beginning import Beginning, is_end
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_copies import Copies
from orthanc_events_bridge.transports.rabbitmq_dead import DeadPlace
from orthanc_events_bridge.transports.rabbitmq_delivery import RabbitDelivery
from orthanc_events_bridge.transports.rabbitmq_message import headers_of, retry_headers, seconds_left, unbegun_headers
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_queues import STEPS, Queues, open_queues
from orthanc_events_bridge.transports.rabbitmq_sending import Sending

#: Seconds between two looks for the exchange.
_WATCH: Final = 5.0
#: A message that is due in so many seconds waits here.
_SOON: Final = 0.25
#: So many deliveries RabbitMQ can be told to give at a time.
_MOST: Final = 65535
#: Seconds that closing may take, of which so many are left for the steps that follow the first, and the second.
_CLOSING: Final = 0.9
_LEFT: Final = (0.45, 0.2, 0.05)


class RabbitSubscription(Subscription):
    """Made by `open`."""

    def __init__(self, connection: Connection, options: RabbitOptions, queues: Queues, in_flight: int) -> None:
        self._connection = connection
        self._options = options
        self._queues = queues
        self._in_flight = in_flight
        self._sending = Sending(connection)
        self._copies = Copies(self._sending, options.ack_timeout)
        self._dead = DeadPlace(connection, self._sending, options, queues)
        self._channel: Channel | None = None
        self._beginning: Beginning | None = None
        self._task: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._consumers: dict[str, str] = {}  # by their queues
        self._left: list[str] = []  # queues whose consumers were cancelled before the end
        self._acks: Acks | None = None
        self._ends: list[int] = []  # of messages that say that the past is over
        self._came: deque[RabbitDelivery] = deque()
        self._held: dict[RabbitDelivery, None] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._news = asyncio.Event()
        self._fault: NotConnectedError | None = None
        self._closed = False

    @classmethod
    async def open(
        cls, connection: Connection, options: RabbitOptions, queues: Queues, *, oldest: bool, in_flight: int
    ) -> Self:
        """Find the name's queues and check them, or make them, and begin to receive.

        :raises NotConnectedError: RabbitMQ doesn't answer.
        :raises TransportConfigurationError: they can't be used, or not be made.
        """
        self = cls(connection, options, queues, in_flight)
        try:
            await self._open(oldest)
        except BaseException:
            await self.close()
            raise
        return self

    async def _open(self, oldest: bool) -> None:
        connection = self._connection
        beginning = Beginning(connection, self._options, self._queues, self._copies)
        if await open_queues(connection, self._options, self._queues, beginning.announce, oldest=oldest):
            self._beginning = beginning
        channel = self._channel = await connection.channel()
        self._acks = Acks(connection, channel)
        channel.on_fault = self._on_closed
        await connection.ask(channel.basic_qos(prefetch_count=min(self._in_flight, _MOST)))
        await self._consume(self._queues.inbox)
        await self._receive_published()
        if self._options.declare and not self._queues.inbox_only:
            self._watching = self._beside(self._watch())

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """What goes on by itself must not end by an error that nobody sees."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._connection.watched)
        return task

    async def _watch(self) -> None:
        """Nobody tells us that the exchange was deleted, and our queues' bindings with it."""
        asking = Asking(self._connection)
        while self._fault is None:
            await asyncio.sleep(_WATCH)
            with contextlib.suppress(TransportError):  # an alarm is on; or the connection is gone, and others say so
                if not await asking.leads(self._queues.live):
                    self._fail(
                        NotConnectedError(
                            f"the exchange {self._options.exchange} of RabbitMQ was deleted",
                            "what it has had since it was made again comes when subscribing",
                        )
                    )

    async def _receive_published(self) -> None:
        if self._queues.inbox_only:
            return
        if self._beginning is None:
            await self._consume(self._queues.live)
        else:
            self._task = self._beside(self._begin(self._beginning))

    async def _begin(self, beginning: Beginning) -> None:
        """What is published now comes when the past has come."""
        try:
            if await beginning.run():
                await self._past_received()
        except ClosedError as error:
            self._fail(
                NotConnectedError(f"RabbitMQ does not let us copy the history: {error.text}", "let the user read it")
            )
        except TransportError as error:
            self._fail(NotConnectedError(error.message, error.remedy))

    async def _past_received(self) -> None:
        self._settle_ends()
        await self._consume(self._queues.live)

    def _settle_ends(self) -> None:
        self._beginning = None
        while self._ends:
            self._settle(self._ends.pop())

    async def _consume(self, queue: str) -> None:
        def cancelled() -> None:
            self._fail(deleted(self._options, f"queue {queue} of RabbitMQ"))

        assert self._channel is not None
        try:
            consuming = self._channel.consume(queue, self._on_message, cancelled)
            self._consumers[queue] = await self._connection.ask(consuming)
        except ClosedError as error:
            raise refused(self._connection, queue, error) from error

    # Receiving.

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        if not self._came and self._acks is not None:
            self._acks.flush()  # they make room for more
            await asyncio.sleep(0)
        while True:
            self.check()
            found: list[Delivery] = []
            room = min(limit, self._in_flight - len(self._held))
            while self._came and len(found) < room:
                delivery = self._came.popleft()
                self._held[delivery] = None
                found.append(delivery)
            left = end - loop.time()
            if found or left <= 0:
                return found
            self._news.clear()
            with contextlib.suppress(TransportError):  # the check says it
                await self._connection.wait_for(self._news, left)

    def _on_message(self, raw: DeliveredMessage) -> None:
        if self._closed or self._acks is None:
            return  # it comes again
        tag = raw.delivery_tag or 0
        self._acks.given(tag)
        if is_end(raw):
            self._ends.append(tag)
            if self._beginning is not None:
                self._beginning.end_received()
            else:
                self._settle_ends()
            return
        left = seconds_left(raw)
        if left > _SOON:
            self._send(raw, headers_of(raw), left, functools.partial(self._settle, tag))
        elif left > 0:
            self._later(left, raw)
        else:
            self._ripe(raw)

    def _later(self, seconds: float, raw: DeliveredMessage) -> None:
        def ripe() -> None:
            self._timers.discard(timer)
            self._on_message(raw)

        timer = asyncio.get_running_loop().call_later(seconds, self._connection.guarded(ripe))
        self._timers.add(timer)

    def _ripe(self, raw: DeliveredMessage) -> None:
        self._came.append(RabbitDelivery(self, raw))
        self._news.set()

    # Settling.

    def acknowledge(self, delivery: RabbitDelivery) -> None:
        """Once; see `orthanc_events_bridge.transports.base.Delivery.ack`."""
        self.check()
        self._let_go(delivery)

    def _let_go(self, delivery: RabbitDelivery) -> None:
        if delivery in self._held:
            del self._held[delivery]
            self._news.set()  # there is room
            self._settle_delivery(delivery)

    def _settle_delivery(self, delivery: RabbitDelivery) -> None:
        self._settle(delivery.raw.delivery_tag or 0)

    def _settle(self, tag: int) -> None:
        if self._acks is not None:
            self._acks.settle(tag)

    async def give_back(self, delivery: RabbitDelivery, delay: float, more: Mapping[str, str]) -> None:
        """Once; see `orthanc_events_bridge.transports.base.Delivery.nack`."""
        self.check()
        if delivery not in self._held:
            return
        try:
            await self._copies.open()
            if delivery.retry is None:
                headers = retry_headers(delivery.raw, self._queues.name, delay, more)
                settle = functools.partial(self._let_go, delivery)
                delivery.retry = self._send(delivery.raw, headers, delay, settle)
            await self._copies.sent(delivery.retry)
        except NotConnectedError as error:
            # With the channel it comes again.
            self._fail(error)
            self.check()

    async def reject(self, delivery: RabbitDelivery, headers: Mapping[str, str]) -> None:
        """Once it is stored; see `orthanc_events_bridge.transports.base.Delivery.reject`."""
        self.check()
        if delivery not in self._held:
            return
        try:
            await self._dead.put(delivery, headers)
        except NotConnectedError as error:
            # With the channel it comes again.
            self._fail(error)
            raise
        self.acknowledge(delivery)

    def _send(
        self, raw: DeliveredMessage, headers: dict[str, Any], delay: float, settle: Callable[[], None]
    ) -> asyncio.Future[str]:
        """Put a copy where it waits; the original is settled as soon as that is confirmed, whoever waits for it."""
        queue = self._queues.inbox
        if delay > _SOON:  # else it waits with whom it is given to
            queue = self._queues.retry(max((step for step in STEPS if step <= delay), default=STEPS[0]))

        def confirmed(future: asyncio.Future[str]) -> None:
            if future.result():
                self._fail(self._copies.refusal(future))
            else:
                settle()

        future = self._copies.send(queue, headers, raw.body, raw.header.properties.content_type)
        future.add_done_callback(self._connection.guarded(confirmed))
        return future

    async def leave(self, back: Sequence[Delivery]) -> None:
        """See `orthanc_events_bridge.transports.base.Subscription.leave`. By copies, which go into the inbox: what is
        given back by ``basic.nack`` RabbitMQ gives to the same subscriber again; and where its consumer was cancelled
        before, 3.10 has ended the channel by which the others are to be settled, now and then.
        """
        self.check()
        if self._beginning is not None:
            self._beginning.stop()
        assert self._channel is not None
        try:
            for queue in [*self._consumers]:
                await self._connection.ask(self._channel.basic_cancel(self._consumers.pop(queue)))
                self._left.append(queue)
        except ClosedError as error:
            self._on_closed(error)
        self.check()
        ours = [*(one for one in self._held if one in back), *self._came]
        self._came.clear()
        for delivery in ours:
            self._held.pop(delivery, None)
            self._hand_over(delivery.raw)

    def _hand_over(self, raw: DeliveredMessage) -> None:
        def confirmed(future: asyncio.Future[str]) -> None:
            if not future.result():  # else it goes back with the channel
                self._settle(raw.delivery_tag or 0)

        headers = unbegun_headers(raw)
        future = self._copies.send(self._queues.inbox, headers, raw.body, raw.header.properties.content_type)
        future.add_done_callback(self._connection.guarded(confirmed))

    # Its end.

    def check(self) -> None:
        """Is it still there?

        :raises NotConnectedError: no.
        """
        if self._fault is None:
            try:
                self._connection.check()
            except TransportError as error:
                self._fail(NotConnectedError(error.message, error.remedy))
        if self._fault is not None:
            raise self._fault

    def _on_closed(self, fault: ClosedError) -> None:
        self._fail(channel_closed("a subscription", fault))

    def _fail(self, error: NotConnectedError) -> None:
        if self._fault is None:
            self._fault = error
        self._news.set()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        end = asyncio.get_running_loop().time() + _CLOSING
        work = [self._task] if self._task is not None else []
        leaving = [asyncio.ensure_future(one) for one in self._leave()]
        waiting: list[asyncio.Future[Any]] = []
        if self._fault is None:  # what is done by half would be done twice
            if self._beginning is not None:
                self._beginning.stop()
            waiting = [*self._copies.waiting, *self._dead.waiting, *work]
        await _wait([*waiting, *leaving], end - _LEFT[0])
        await asyncio.sleep(0)  # the originals of what was confirmed just now are settled then
        self._fail(NotConnectedError("the subscription to RabbitMQ is closed", "subscribe again"))
        for timer in self._timers:
            timer.cancel()
        stopped = [*work, *leaving, *(task for task in self._background if task is not None)]
        for task in stopped:
            task.cancel()
        if self._acks is not None:
            self._acks.close()
        ends = [asyncio.ensure_future(one) for one in (self._copies.end(), self._dead.close(), self._sending.close())]
        settling = asyncio.ensure_future(self._settle_all())
        await _wait([settling], end - _LEFT[1])
        if self._channel is not None:
            ends.append(asyncio.ensure_future(self._connection.end(self._channel)))
        await _wait([*ends, *stopped], end - _LEFT[2])
        for one in (settling, *ends):
            one.cancel()
        await _wait([settling, *ends, *stopped], end)
        self._held.clear()
        self._came.clear()

    def _leave(self) -> Iterable[Coroutine[Any, Any, None]]:
        """What else is to be done as soon as it ends."""
        return ()

    @property
    def _background(self) -> tuple[asyncio.Task[None] | None, ...]:
        """What goes on beside it."""
        return (self._watching,)

    async def _settle_all(self) -> None:
        """Wait until RabbitMQ has done what it was told: what it keeps back it forgets when the channel is closed."""
        channel = self._channel
        if channel is None or channel.fault is not None:
            return
        with contextlib.suppress(TransportError, ClosedError):
            await self._connection.ask(channel.basic_qos(prefetch_count=1))
            for queue in self._left:  # it is given something only where nobody else takes it
                consuming = channel.consume(queue, self._on_message, lambda: None, arguments={"x-priority": -1})
                self._consumers[queue] = await self._connection.ask(consuming)
            # A queue answers this behind all before it; what was kept back until then is sent to it before the second.
            for consumer in self._consumers.values():
                await self._connection.ask(channel.basic_cancel(consumer))
            await self._connection.ask(channel.queue_declare(self._queues.inbox, passive=True))


async def _wait(work: Sequence[asyncio.Future[Any]], end: float) -> None:
    if work:
        await asyncio.wait(work, timeout=max(0.0, end - asyncio.get_running_loop().time()))
