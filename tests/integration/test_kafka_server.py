"""Apache Kafka for tests: it starts, dies, keeps what it has confirmed, and can be reached through a proxy alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic
from aiokafka.errors import KafkaError

from orthanc_events_bridge.events.samples import message, orthanc_id
from orthanc_events_bridge.testing.brokers import make_broker
from orthanc_events_bridge.testing.brokers.kafka import TOPIC, KafkaBroker, KafkaServer, kafka_admin, kafka_cluster
from orthanc_events_bridge.testing.processes import ServerError
from orthanc_events_bridge.testing.programs import MissingComponentError, find_kafka, require
from tests.contract.link import Link

pytestmark = pytest.mark.integration


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[KafkaBroker]:
    require("kafka")
    broker = make_broker("kafka", tmp_path / "kafka")
    assert isinstance(broker, KafkaBroker)
    broker.start()
    try:
        yield broker
    finally:
        broker.server.close(kill=True)


def key(number: int) -> str:
    return orthanc_id(f"key-{number % 3}")


def body(number: int) -> bytes:
    return message("study.created", {"study": key(number)}, number=number + 1).body


@contextlib.asynccontextmanager
async def producing(url: str, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=url, acks="all", request_timeout_ms=10_000, **options)
    try:
        await producer.start()
        yield producer
    finally:
        await producer.stop()


async def make_topic(url: str, partitions: int = 3, replicas: int = 1) -> None:
    async with kafka_admin(url) as admin:
        await admin.create_topics([NewTopic(TOPIC, partitions, replicas)])


def store(url: str, numbers: range) -> None:
    async def send() -> None:
        async with producing(url) as producer:
            for number in numbers:
                await producer.send_and_wait(TOPIC, body(number), partition=number % 3)

    asyncio.run(send())


def test_what_was_confirmed_outlives_kills(kafka: KafkaBroker) -> None:
    assert kafka.stored() == 0 and kafka.read() == []
    asyncio.run(make_topic(kafka.url))
    store(kafka.url, range(30))
    kafka.kill()
    assert not kafka.running
    assert kafka.stored() == 0
    kafka.start()
    store(kafka.url, range(30, 40))
    kafka.stop()
    kafka.start()
    assert kafka.stored() == 40
    events = kafka.read()
    assert [event.sequence - 1 for event in events] == [n for partition in range(3) for n in range(partition, 40, 3)]
    assert {event.key for event in events} == {key(number) for number in range(3)}


def test_the_place_can_be_removed(kafka: KafkaBroker) -> None:
    asyncio.run(make_topic(kafka.url))
    store(kafka.url, range(3))
    kafka.remove_place()
    assert kafka.stored() == 0
    asyncio.run(make_topic(kafka.url))
    store(kafka.url, range(3, 6))
    assert [event.sequence - 1 for event in kafka.read()] == [3, 4, 5]


def test_frozen_it_answers_nothing(kafka: KafkaBroker) -> None:
    asyncio.run(make_topic(kafka.url))
    store(kafka.url, range(3))
    kafka.freeze()
    assert kafka.stored() == 0
    kafka.thaw()
    assert len(kafka.read()) == 3


def test_a_client_that_comes_through_a_proxy_stays_behind_it(tmp_path: Path) -> None:
    require("kafka")
    server = KafkaServer(tmp_path / "kafka")
    with ExitStack() as stack:
        link = stack.enter_context(contextlib.closing(Link(server.behind_port)))
        server.proxy_port = link.port
        stack.callback(server.close, kill=True)
        server.start()
        asyncio.run(make_topic(server.url))

        async def send() -> None:
            async with producing(f"127.0.0.1:{link.port}", metadata_max_age_ms=200) as producer:
                await producer.send_and_wait(TOPIC, body(0), partition=0)
                link.swallows = True
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(producer.send_and_wait(TOPIC, body(1), partition=1), 1)
                link.cut()
                link.swallows = False
                await producer.send_and_wait(TOPIC, body(2), partition=2)

        asyncio.run(send())
        store(server.url, range(3, 4))  # nobody else notices
        assert {event.sequence - 1 for event in KafkaBroker(server).read()} >= {0, 2, 3}


def test_its_options_are_read_at_each_start(kafka: KafkaBroker) -> None:
    server = kafka.server
    assert isinstance(server, KafkaServer)
    server.config = "auto.create.topics.enable=false\nnum.partitions=none"
    kafka.stop()
    with pytest.raises(ServerError, match=r"num\.partitions"):
        kafka.start()
    server.config = "auto.create.topics.enable=false"
    kafka.start()

    async def send() -> None:
        async with producing(kafka.url) as producer:
            await asyncio.wait_for(producer.send_and_wait(TOPIC, body(1), partition=0), 3)

    with pytest.raises((KafkaError, TimeoutError)):
        asyncio.run(send())


def test_users_with_scram(tmp_path: Path) -> None:
    require("kafka")
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    protocols = "CLIENT:SASL_PLAINTEXT,PROXY:PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"
    mechanisms = ("SCRAM-SHA-256", "SCRAM-SHA-512")
    server = KafkaServer(tmp_path / "kafka")
    server.scram = {"alice": "of-wonderland"}
    server.config = "\n".join(
        [
            f"listener.security.protocol.map={protocols}",
            f"sasl.enabled.mechanisms={','.join(mechanisms)}",
            *(f"listener.name.client.{one.lower()}.sasl.jaas.config={login}" for one in mechanisms),
        ]
    )
    try:
        server.start()
        asyncio.run(make_topic(f"127.0.0.1:{server.admin_port}"))

        async def send(mechanism: str, password: str) -> None:
            login = {"sasl_plain_username": "alice", "sasl_plain_password": password, "sasl_mechanism": mechanism}
            async with producing(server.url, security_protocol="SASL_PLAINTEXT", **login) as producer:
                await producer.send_and_wait(TOPIC, body(1), partition=0)

        for mechanism in mechanisms:
            asyncio.run(send(mechanism, "of-wonderland"))
            with pytest.raises(KafkaError):
                asyncio.run(send(mechanism, "of-oz"))
    finally:
        server.close(kill=True)


def test_a_cluster_outlives_its_leader(tmp_path: Path) -> None:
    require("kafka")
    servers = kafka_cluster(tmp_path, config="min.insync.replicas=2")
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close, kill=True)
            server.start(wait=False)
        for server in servers:
            server.wait_ready()
        asyncio.run(make_topic(servers[0].url, replicas=3))
        store(servers[1].url, range(9))
        servers[0].kill()
        store(servers[1].url, range(9, 18))
        assert KafkaBroker(servers[2]).stored() == 18
        servers[0].start()
        servers[1].kill()
        store(servers[2].url, range(18, 24))
        assert len(KafkaBroker(servers[2]).read()) == 24


def test_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_JARS", str(tmp_path))
    with pytest.raises(MissingComponentError, match="KAFKA_JARS names"):
        find_kafka()
