"""What the Kafka tests share: transports to a server, what an administrator does, and a plain client's reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import ConsumerRecord

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer, kafka_admin
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from tests.contract.harness import aside, check_text, run

_T = TypeVar("_T")

#: Kafka's own module for the login by a password, for its configuration.
PLAIN: Final = "org.apache.kafka.common.security.plain.PlainLoginModule required"


@contextmanager
def kafka_server(folder: Path, config: str = "") -> Iterator[KafkaServer]:
    """A server with this configuration, killed in the end: nothing of it is needed, and that takes less time."""
    require("kafka")
    server = KafkaServer(folder, config=config)
    try:
        server.start()
        yield server
    finally:
        server.close(kill=True)


def kafka_transport(*ports: int, **options: Any) -> KafkaTransport:
    """A transport to servers, patient by default."""
    defaults: dict[str, Any] = {"partitions": 4, "connect_timeout": 20, "ack_timeout": 20}
    servers = [f"127.0.0.1:{port}" for port in ports]
    return KafkaTransport(KafkaOptions.model_validate({"servers": servers, **defaults, **options}))


@contextmanager
def failing(kind: type[TransportError], confirmed: int | None = None) -> Iterator[list[TransportError]]:
    """As `tests.contract.harness.failing`."""
    caught: list[TransportError] = []
    with pytest.raises(TransportError) as raised:
        yield caught
    error = raised.value
    if isinstance(error, PublishError):
        assert confirmed in (None, error.confirmed), f"{error.confirmed} confirmed: {error}"
        error = error.error
    assert type(error) is kind, repr(error)
    assert error.remedy, f"doesn't say what to do: {error}"
    assert "kafka" in str(error).lower(), f"doesn't name the broker: {error}"
    check_text(raised.value)
    caught.append(error)


def refusal(transport: KafkaTransport, kind: type[TransportError], *, within: float = 10.0) -> str:
    """The text of the error with which connecting must fail soon. Closes the transport, at once."""

    async def main() -> str:
        began = time.monotonic()
        with failing(kind) as caught:
            await transport.connect()
        assert time.monotonic() - began < within
        began = time.monotonic()
        await transport.close()
        assert time.monotonic() - began < 1
        return str(caught[0])

    return run(main())


def administrate(url: str, work: Callable[[AIOKafkaAdminClient], Coroutine[Any, Any, _T]]) -> _T:
    """Do something as an administrator."""

    async def connected() -> _T:
        async with kafka_admin(url) as admin:
            return await work(admin)

    return aside(connected())


def alter_topic(url: str, topic: str, **settings: str) -> None:
    """Change settings of a topic; a dot in a name is written ``_``. Its other settings are Kafka's defaults then."""
    configs = {name.replace("_", "."): value for name, value in settings.items()}

    async def work(admin: AIOKafkaAdminClient) -> None:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=configs)])

    administrate(url, work)


async def read_topic(url: str, topic: str) -> list[ConsumerRecord]:
    """Everything that a topic holds now, one partition after the other."""
    async with kafka_admin(url) as admin:
        if topic not in await admin.list_topics():  # asking for it by its name would make it
            return []
        (found,) = await admin.describe_topics([topic])
    partitions = [TopicPartition(topic, one["partition"]) for one in found["partitions"]]
    consumer = AIOKafkaConsumer(bootstrap_servers=url, enable_auto_commit=False, auto_offset_reset="earliest")
    rows: list[ConsumerRecord] = []
    try:
        await consumer.start()
        consumer.assign(partitions)
        ends = {partition: end for partition, end in (await consumer.end_offsets(partitions)).items() if end}
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for some in (await consumer.getmany(timeout_ms=500)).values():
                rows += some
    finally:
        await consumer.stop()
    return sorted(rows, key=lambda row: (row.partition, row.offset))
