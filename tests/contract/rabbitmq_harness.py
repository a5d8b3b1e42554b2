"""RabbitMQ for the contract suite."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import aiormq
from aiormq import spec
from aiormq.abc import AbstractChannel, DeliveredMessage

from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer, rabbit_messages
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.transports.base import Transport
from orthanc_events_bridge.transports.rabbitmq import RabbitTransport
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.transports.rabbitmq_topology import WATCH
from tests.contract.harness import SECRET, Harness, Stored, aside, server


def administrate(url: str, *work: Callable[[AbstractChannel], Awaitable[Any]]) -> Any:
    """Do something by a plain client; return the last answer."""

    async def main() -> Any:
        async with asyncio.timeout(30):
            connection = await aiormq.connect(url)
            try:
                channel = await connection.channel()
                return [await one(channel) for one in work][-1]
            finally:
                await connection.close()

    return aside(main())


def there(url: str, queue: str) -> bool:
    """Whether there is such a queue; waits for a stream that a server has not found again since it was started."""

    def asked() -> bool:
        try:
            administrate(url, lambda channel: channel.queue_declare(queue, passive=True))
        except aiormq.exceptions.ChannelNotFoundEntity as error:
            return f"no queue '{queue}'" in str(error)
        found.append(queue)
        return True

    found: list[str] = []
    assert wait_until(asked, 30, every=0.1)
    return bool(found)


def read_stream(url: str, queue: str) -> list[DeliveredMessage]:
    """Everything that a stream queue holds now, by a plain client; nothing where there is none."""

    return aside(asyncio.wait_for(rabbit_messages(url, queue), 60)) if there(url, queue) else []


def take_all(url: str, queue: str) -> list[DeliveredMessage]:
    """Everything that a queue holds now, which stays there."""

    async def work(channel: AbstractChannel) -> list[DeliveredMessage]:
        found: list[DeliveredMessage] = []
        while True:
            answer = await channel.basic_get(queue)
            if not isinstance(answer.delivery, spec.Basic.GetOk):
                return found  # the end of the connection gives all of them back
            found.append(answer)

    messages: list[DeliveredMessage] = administrate(url, work)
    return messages


def stored(message: DeliveredMessage) -> Stored:
    properties = message.header.properties
    headers = {name: str(value) for name, value in dict(properties.headers or {}).items()}
    return Stored(
        message.routing_key or "",
        message.body,
        properties.content_type or "",
        headers["orthanc-event-id"],
        headers,
    )


class RabbitHarness(Harness):
    title = "RabbitMQ"
    deadline = 0.8
    #: What the server takes.
    largest: ClassVar = 65536
    #: Killed sooner after its first stream ever, RabbitMQ 3.10 finds no stream again.
    settling: ClassVar = 6.0
    #: Tests that share a server.
    tests: ClassVar = 20

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folders = (folder / f"server{number}" for number in itertools.count())
        self._renew()

    def _renew(self) -> None:
        """Begin with an empty server.

        Each start takes longer with the queues of each consumer; and 3.10 makes no more of them where many are deleted.
        """
        self._tests = itertools.count(1)
        login = f"default_user = contract\ndefault_pass = {SECRET}"
        self._server = server("rabbitmq", next(self._folders), config=f"{login}\nmax_message_size = {self.largest}")
        self._server.start()
        self._settled = time.monotonic() + self.settling
        administrate(
            self.url,
            lambda channel: channel.queue_declare("first", durable=True, arguments={"x-queue-type": "stream"}),
            lambda channel: channel.queue_delete("first"),
        )

    def new_place(self) -> None:
        super().new_place()
        self.exchange, self.history = f"orthanc.{self.place}", f"orthanc.{self.place}.history"
        self.inboxes, self.dead = f"orthanc.inbox.{self.place}", f"orthanc.dead.{self.place}"

    def tidy(self) -> None:
        super().tidy()
        if next(self._tests) == self.tests:
            self._server.close(kill=True)
            self._renew()
            return
        self._server.thaw()
        if not self._server.running:
            self._server.start()
        self.remove_place()

    @property
    def url(self) -> str:
        return f"amqp://contract:{SECRET}@127.0.0.1:{self.port}/"

    def transport(
        self, *, declare: bool = True, room: int = 0, port: int | None = None, impatient: bool = False
    ) -> Transport:
        assert not room, "the history drops old events"
        deadline = self.deadline if impatient else self.patience
        return RabbitTransport(
            RabbitOptions.model_validate(
                {
                    "servers": [f"amqp://127.0.0.1:{port or self.port}"],
                    "exchange": self.exchange,
                    "history": self.history,
                    "inbox_prefix": self.inboxes,
                    "dead_prefix": self.dead,
                    "declare": declare,
                    "user": "contract",
                    "password": SECRET,
                    "connect_timeout": deadline,
                    "ack_timeout": deadline,
                    "limits": {"max_bytes": 2**27},
                }
            )
        )

    def read(self) -> list[Stored]:
        return [stored(message) for message in read_stream(self.url, self.history)]

    def read_inbox(self, consumer: str) -> list[Stored]:
        queue = f"{self.inboxes}.{consumer}"
        if not there(self.url, queue):
            return []
        return [stored(message) for message in take_all(self.url, queue)]

    def remove_inbox(self, consumer: str) -> None:
        administrate(self.url, lambda channel: channel.queue_delete(f"{self.inboxes}.{consumer}"))

    def left_of(self, consumer: str) -> list[str]:
        live = f"orthanc.consumer.{consumer}"
        possible = (live, f"{live}.00", f"{live}.63", f"orthanc.beginning.{consumer}")
        return [queue for queue in possible if there(self.url, queue)]

    def make_other_inbox(self, consumer: str) -> list[str]:
        queue = f"{self.inboxes}.{consumer}"
        administrate(self.url, lambda channel: channel.queue_declare(queue, durable=True))
        return [queue, "x-queue-type", "quorum"]

    def too_large(self) -> int:
        return self.largest + 1

    def make_room(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        time.sleep(max(0.0, self._settled - time.monotonic()))
        self._server.kill()

    def start(self) -> None:
        self._server.start()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()

    def remove_place(self) -> None:
        there(self.url, self.history)
        administrate(
            self.url,
            lambda channel: channel.queue_delete(self.history),
            lambda channel: channel.exchange_delete(self.exchange),
        )

    def make_place(self, **different: Any) -> list[str]:
        arguments: dict[str, Any] = {
            "x-queue-type": "stream",
            "x-max-age": "30D",
            "x-max-length-bytes": 2**27,
            "x-stream-max-segment-size-bytes": 2**27 // 10,
        }
        arguments |= {name: value for name, value in different.items() if name.startswith("x-")}
        kind = different.get("type", "topic")
        administrate(
            self.url,
            lambda channel: channel.exchange_declare(self.exchange, exchange_type=kind, durable=True),
            lambda channel: channel.queue_declare(self.history, durable=True, arguments=arguments),
            lambda channel: channel.queue_bind(self.history, self.exchange, "#"),
        )
        return [*different, *(str(value) for value in different.values())]

    def different(self) -> list[dict[str, Any]]:
        return [{"type": "fanout"}, {"x-max-age": "1h"}]

    def settled(self, consumer: str) -> None:
        # 3.10 writes down only after seconds what it could find a queue's leader by.
        assert isinstance(self._server, RabbitServer)
        self._server.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def traces(self) -> int:
        """Consumers but for the transports' own eyes on the history, and queues that the server has named."""
        assert isinstance(self._server, RabbitServer)
        consumers = self._server.ctl("list_consumers", "consumer_tag").split()
        queues = self._server.ctl("list_queues", "name").split()
        tags = [tag for tag in consumers if tag not in ("consumer_tag", WATCH)]
        return len(tags) + len([name for name in queues if name.startswith("amq.")])

    @property
    def port(self) -> int:
        return self._server.port

    def close(self) -> None:
        self._server.close()
