"""Who of a name's subscribers is there, and which of them is to have which partition.

RabbitMQ tells no client who else consumes a queue. So those of an ordered name tell each other, by an exchange of their
own: when they have come, every few seconds, and when they go. What they make of it is only a wish: that a partition is
one's at a time, and that somebody has it, is the work of its queue (single active consumer), whatever they believe.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Collection
from typing import Final

from aiormq.abc import DeliveredMessage

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.rabbitmq_acks import Acks
from orthanc_events_bridge.transports.rabbitmq_asking import deleted, refused
from orthanc_events_bridge.transports.rabbitmq_connection import Channel, ClosedError, Connection
from orthanc_events_bridge.transports.rabbitmq_copies import DELETED, Copies
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_queues import Queues
from orthanc_events_bridge.transports.rabbitmq_sending import Sending
from orthanc_events_bridge.transports.subscriptions import PARTITIONS

#: Seconds between two words of one that is there, and after which one that is silent is taken for gone.
_BEAT: Final = 2.0
_SILENT: Final = 7.0


def owners(workers: Collection[str]) -> list[str]:
    """Which worker is to have each of the partitions: as many each as can be, and few others when one comes or goes.

    Rendezvous hashing (Thaler and Ravishankar, 1998), with room for a share only: by the hash alone one of 8 workers
    would have less than 4 or more than 16 of 64 in every fourth case.
    """
    least, more = divmod(PARTITIONS, len(workers))
    loads = dict.fromkeys(workers, 0)
    found: list[str] = []
    for number in range(PARTITIONS):
        with_room = [one for one in workers if loads[one] < least + bool(more)]
        best = max(with_room, key=lambda one: _score(one, number))
        loads[best] += 1
        if loads[best] > least:
            more -= 1
        found.append(best)
    return found


def _score(worker: str, number: int) -> bytes:
    return hashlib.blake2b(f"{worker} {number}".encode(), digest_size=8).digest()


class Roster:
    """One subscriber's view of it.

    :param changed: called when somebody has come or gone.
    :param past_heard: called when another says that it receives a past.
    :ivar me: how it is called.
    :ivar past: whether it receives one itself.
    :ivar fault: why it can't go on.
    """

    def __init__(
        self,
        connection: Connection,
        sending: Sending,
        options: RabbitOptions,
        queues: Queues,
        changed: Callable[[], None],
        past_heard: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._options = options
        self._exchange = queues.workers
        self._changed = changed
        self._past_heard = past_heard
        self._copies = Copies(sending, options.ack_timeout)
        self._channel: Channel | None = None
        self._acks: Acks | None = None
        self._seen: dict[str, float] = {}
        self._said = 0  # so many words
        self._saying: asyncio.Future[str] | None = None
        self._heard = 0  # the last of our own words that came to us
        self._unheard = 0.0  # since when one is under way to us
        self._beating: asyncio.Task[None] | None = None
        self.me = uuid.uuid4().hex
        self.past = False
        self.fault: NotConnectedError | None = None

    @property
    def workers(self) -> list[str]:
        """All that are there, this one among them."""
        return sorted({self.me, *self._seen})

    async def open(self) -> None:
        """Begin to listen.

        :raises NotConnectedError: RabbitMQ doesn't answer.
        :raises TransportConfigurationError: it does not permit it.
        """
        connection, exchange = self._connection, self._exchange
        channel = self._channel = await connection.channel()
        self._acks = Acks(connection, channel)
        try:
            declare = self._options.declare
            await connection.ask(
                channel.exchange_declare(exchange, exchange_type="fanout", durable=True, passive=not declare)
            )
            queue = (await connection.ask(channel.queue_declare(exclusive=True, auto_delete=True))).queue or ""
            await connection.ask(channel.queue_bind(queue, exchange))
            await connection.ask(channel.consume(queue, self._on_message, self._on_deleted))
        except ClosedError as error:
            raise refused(connection, exchange, error, "exchange") from error
        await self._copies.open()

    def come(self) -> None:
        """Tell the others that we are there, from now on."""
        self._beating = asyncio.create_task(self._beat())
        self._beating.add_done_callback(self._connection.watched)

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # While an alarm is on nothing is answered: words would pile up.
            if self._saying is None or self._saying.done():
                self._say(there=True)
            await asyncio.sleep(_BEAT)
            # It goes with the exchange, also where that is made again at once; and a binding can't be asked for.
            deaf = self._unheard and loop.time() - self._unheard > _SILENT
            if deaf or self._copies.fault is not None:
                self._lose(f"exchange {self._exchange} of RabbitMQ")
                return
            gone = [one for one, last in self._seen.items() if loop.time() - last > _SILENT]
            for one in gone:
                del self._seen[one]
            if gone:
                self._changed()

    def _say(self, *, there: bool) -> None:
        self._said += 1
        body = json.dumps({"worker": self.me, "there": there, "number": self._said, "past": self.past}).encode()
        self._saying = self._copies.send("", {}, body, "application/json", exchange=self._exchange)
        self._saying.add_done_callback(functools.partial(self._on_said, self._said))

    def _on_said(self, number: int, future: asyncio.Future[str]) -> None:
        answered = not future.result() or future.result().endswith(DELETED)  # then it was led nowhere
        if answered and self._heard < number and not self._unheard:
            self._unheard = asyncio.get_running_loop().time()

    def _on_message(self, message: DeliveredMessage) -> None:
        if self._acks is None:
            return
        tag = message.delivery_tag or 0
        self._acks.given(tag)
        self._acks.settle(tag)
        try:
            said = json.loads(message.body)
            worker, there, number = str(said["worker"]), bool(said["there"]), int(said.get("number", 0))
        except (ValueError, KeyError, TypeError):  # somebody else's
            return
        if worker == self.me:
            self._heard, self._unheard = number, 0.0
            return
        if said.get("past") and not self.past:
            self._past_heard()
        known = worker in self._seen
        if there:
            self._seen[worker] = asyncio.get_running_loop().time()
            if not known and self._beating is not None:
                self._say(there=True)  # they shall know us as soon
        else:
            self._seen.pop(worker, None)
        if known != there:
            self._changed()

    def _on_deleted(self) -> None:
        self._lose(f"exchange {self._exchange} of RabbitMQ, or a queue that was bound to it,")

    def _lose(self, what: str) -> None:
        self.fault = deleted(self._options, what)
        self._changed()

    async def close(self) -> None:
        """Tell the others that we are gone. Never raises."""
        if self._beating is not None:
            self._beating.cancel()
            self._say(there=False)
        if self._acks is not None:
            self._acks.close()
        try:
            if self._channel is not None:
                with contextlib.suppress(TransportError):
                    await self._connection.end(self._channel)
            if self._saying is not None:
                await asyncio.wait({self._saying})
        finally:
            await self._copies.end()
