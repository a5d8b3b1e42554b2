"""The plain client of RabbitMQ: aio-pika, and aiormq beneath it."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

import aio_pika
import aiormq

from benchmarks.raw import Confirmed, Raw, Way
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

#: Events under way, as many as our transport's default.
_WINDOW = 500

#: Routing key, and what is sent.
_Message = tuple[str, aio_pika.Message]


class RawRabbit(Raw[_Message]):
    """To the exchange, persistent, mandatory and confirmed."""

    ways: ClassVar = {"aio-pika": Way("aio-pika"), "aiormq": Way("aiormq, which aio-pika is made of")}
    how = (
        f"aio-pika, its `publish` gathered over {_WINDOW} events at a time (2000, or a sliding window, were no faster),"
        " and aiormq's `basic_publish` in the same way, which need not wait for the socket event by event"
    )
    options: RabbitOptions

    def __init__(self, options: RabbitOptions) -> None:
        super().__init__(options)
        self._mark, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)

    def prepare(self, event: Outgoing) -> _Message:
        return f"{event.site}.{event.level}.{event.verb}.{event.partition}", aio_pika.Message(
            event.body,
            content_type=event.content_type,
            headers={"orthanc-event-id": event.id},
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=f"{self._mark}.{next(self._numbers)}",
        )

    async def send(self, way: str, messages: Sequence[_Message], confirmed: Confirmed) -> None:
        if way == "aiormq":
            await self._by_aiormq(messages, confirmed)
            return
        async with await aio_pika.connect(self.options.servers[0]) as connection:
            exchange = await self._exchange(connection)
            await _in_windows(messages, lambda one: exchange.publish(one[1], one[0], mandatory=True), confirmed)

    async def send_one(self, message: _Message) -> None:
        routing_key, content = message
        async with await aio_pika.connect(self.options.servers[0]) as connection:
            await (await self._exchange(connection)).publish(content, routing_key, mandatory=True)

    async def _exchange(self, connection: aio_pika.abc.AbstractConnection) -> aio_pika.abc.AbstractExchange:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        return await channel.get_exchange(self.options.exchange, ensure=False)

    async def _by_aiormq(self, messages: Sequence[_Message], confirmed: Confirmed) -> None:
        connection = await aiormq.connect(self.options.servers[0])
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        assert isinstance(channel, aiormq.Channel)

        async def publish(message: _Message) -> None:
            routing_key, content = message
            await channel.basic_publish(
                content.body,
                exchange=self.options.exchange,
                routing_key=routing_key,
                properties=content.properties,
                mandatory=True,
                wait=False,
            )

        await _in_windows(messages, publish, confirmed)
        await connection.close()


async def _in_windows(
    messages: Sequence[_Message], publish: Callable[[_Message], Awaitable[object]], confirmed: Confirmed
) -> None:
    for first in range(0, len(messages), _WINDOW):
        window = messages[first : first + _WINDOW]
        await asyncio.gather(*map(publish, window))
        confirmed(first + len(window))
