"""Apache Kafka for tests: what an administrator does to it, and a plain client that reads it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from orthanc_events_bridge.testing.brokers.base import Broker
from orthanc_events_bridge.testing.brokers.events import Event, decode
from orthanc_events_bridge.testing.kafka_server import KafkaServer, kafka_cluster

__all__ = ["TOPIC", "KafkaBroker", "KafkaServer", "kafka_admin", "kafka_cluster", "read_kafka"]

#: The topic's name in the wire contract.
TOPIC: Final = "orthanc.events"
#: Kafka's number for settings that a topic has of its own.
_OF_THE_TOPIC: Final = 1


@contextlib.asynccontextmanager
async def kafka_admin(url: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A client for administrators.

    :raises KafkaError: the server can't be reached; an `OSError` or a `TimeoutError` too.
    """
    host, _, port = url.partition(":")
    async with asyncio.timeout(2):  # aiokafka waits long for a frozen server
        (await asyncio.open_connection(host, int(port)))[1].close()
    admin = AIOKafkaAdminClient(bootstrap_servers=url, request_timeout_ms=5000)
    try:
        await asyncio.wait_for(admin.start(), 10)
        yield admin
    finally:
        await admin.close()


@contextlib.asynccontextmanager
async def _reader(url: str, topic: str) -> AsyncIterator[tuple[AIOKafkaConsumer, dict[TopicPartition, int]]]:
    """A consumer without a group, and the end of each partition; of none where there is no such topic."""
    async with kafka_admin(url) as admin:
        # Asking for a topic by its name would make it.
        there = topic in await admin.list_topics()
        found = await admin.describe_topics([topic]) if there else []
    partitions = [TopicPartition(topic, one["partition"]) for each in found for one in each["partitions"]]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=url, enable_auto_commit=False, auto_offset_reset="earliest", request_timeout_ms=5000
    )
    try:
        await asyncio.wait_for(consumer.start(), 10)
        if partitions:
            consumer.assign(partitions)
        yield consumer, await consumer.end_offsets(partitions) if partitions else {}
    finally:
        await consumer.stop()


async def _read(url: str, topic: str) -> list[Event]:
    found: dict[TopicPartition, list[Event]] = {}
    async with _reader(url, topic) as (consumer, ends):
        if not ends:
            return []
        # All of them at once: a change of partitions waits for the requests under way, half a second each.
        await consumer.seek_to_beginning(*ends)
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for partition, messages in (await consumer.getmany(timeout_ms=1000)).items():
                events = [decode(one.value or b"", topic, one.offset) for one in messages]
                found.setdefault(partition, []).extend(one for one in events if one.position < ends[partition])
    return [event for partition in sorted(found) for event in found[partition]]


async def _stored(url: str, topic: str) -> int:
    async with _reader(url, topic) as (_, ends):
        return sum(ends.values())


def read_kafka(url: str, *, topic: str = TOPIC, timeout: float = 60.0) -> list[Event]:
    """Read everything that a topic holds now, one partition after the other: in order for each key, as all events of a
    key are in one partition; not across keys.

    :param timeout: in seconds, for all of it.
    :raises TimeoutError: it took longer.
    :raises MalformedEventError: a message is not an event.
    """
    return asyncio.run(asyncio.wait_for(_read(url, topic), timeout))


class KafkaBroker(Broker):
    """One node; the place is the topic."""

    kind = "kafka"
    title = "Kafka"
    # A Java machine on a busy computer pauses for a second now and then.
    impatient = ("ack_timeout: 3s", "connect_timeout: 3s")
    can_be_full = False

    def __init__(self, server: KafkaServer) -> None:
        super().__init__(server)
        self.server: KafkaServer = server

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def _admin(self) -> str:
        """Where nobody is asked for a password."""
        return f"127.0.0.1:{self.server.admin_port}"

    def options(self, *, port: int | None = None) -> list[str]:
        return [f'servers: ["127.0.0.1:{port or self.port}"]']

    def read(self) -> list[Event]:
        return read_kafka(self._admin)

    def stored(self) -> int:
        try:
            return asyncio.run(asyncio.wait_for(_stored(self._admin, TOPIC), 20))
        except (KafkaError, OSError, TimeoutError):
            return 0

    def remove_place(self) -> None:
        async def remove() -> None:
            async with kafka_admin(self._admin) as admin:
                await admin.delete_topics([TOPIC])
                while TOPIC in await admin.list_topics():  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.02)

        asyncio.run(asyncio.wait_for(remove(), 30))

    @property
    def proxied_port(self) -> int:
        return self.server.behind_port

    def stand_behind(self, port: int) -> None:
        self.server.proxy_host, self.server.proxy_port = "127.0.0.1", port

    def demand(self, password: str) -> None:
        module = "org.apache.kafka.common.security.plain.PlainLoginModule"
        self.server.config = (
            "listener.security.protocol.map=CLIENT:SASL_PLAINTEXT,PROXY:PLAINTEXT,INTERNAL:PLAINTEXT,"
            "CONTROLLER:PLAINTEXT\n"
            "listener.name.client.sasl.enabled.mechanisms=PLAIN\n"
            f'listener.name.client.plain.sasl.jaas.config={module} required user_orthanc="{password}";\n'
        )
        if self.running:  # it asks once for each connection, and reads passwords when it starts
            self.server.kill()
            self.server.start()

    def login(self, password_file: Path) -> list[str]:
        return ["sasl: plain", "user: orthanc", f"password_file: {password_file}"]

    @contextlib.contextmanager
    def small(self, size: int) -> Iterator[None]:
        self._largest(size)
        yield
        self._largest(2**20)

    def _largest(self, size: int) -> None:
        async def change() -> None:
            async with kafka_admin(self._admin) as admin:
                topic = ConfigResource(ConfigResourceType.TOPIC, TOPIC)
                ((*_, entries),) = (await admin.describe_configs([topic]))[0].resources
                # What isn't said again goes back to the server's default.
                configs = {name: value for name, value, _, source, *_ in entries if source == _OF_THE_TOPIC}
                configs["max.message.bytes"] = str(size)
                await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, TOPIC, configs=configs)])

        asyncio.run(asyncio.wait_for(change(), 30))
