"""What is Kafka's own in subscribing: partitions that move, delays in topics, and what may differ at a server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from operator import sub
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer, kafka_admin
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.transports.base import Delivery, Subscription
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from tests.contract.harness import event, events, run
from tests.contract.kafka_tools import alter_topic, kafka_server

pytestmark = pytest.mark.integration

KEYS = [f"study-{number}" for number in range(40)]
PATIENCE = 90.0


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with kafka_server(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A name for a topic, and for a consumer, that no other test uses."""
    return str(request.node.name).replace("[", "-").replace("]", "")[:100]


def make(kafka: KafkaServer, topic: str, **options: Any) -> KafkaTransport:
    return KafkaTransport(
        KafkaOptions.model_validate(
            {"servers": [kafka.url], "topic": topic, "partitions": 8, "connect_timeout": 20, "ack_timeout": 20}
            | options
        )
    )


@contextlib.asynccontextmanager
async def connected(kafka: KafkaServer, topic: str, **options: Any) -> AsyncIterator[KafkaTransport]:
    transport = make(kafka, topic, **options)
    try:
        await transport.connect()
        yield transport
    finally:
        await transport.close()


async def receive(
    subscription: Subscription, enough: Callable[[list[Delivery]], bool], *, ack: bool = False
) -> list[Delivery]:
    found: list[Delivery] = []
    end = time.monotonic() + PATIENCE
    while not enough(found):
        assert time.monotonic() < end, f"only {len(found)} came"
        some = await subscription.receive(100, 0.5)
        for one in some if ack else ():
            await one.ack()
        found += some
    return found


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return sorted(one.message.body for one in deliveries)


async def read(kafka: KafkaServer, topic: str) -> list[Any]:
    """What a topic holds, by a plain client."""
    async with kafka_admin(kafka.url) as admin:
        (found,) = await admin.describe_topics([topic])
    partitions = [TopicPartition(topic, one["partition"]) for one in found["partitions"]]
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.url, auto_offset_reset="earliest")
    rows: list[Any] = []
    try:
        await consumer.start()
        consumer.assign(partitions)
        count = sum((await consumer.end_offsets(partitions)).values())
        while len(rows) < count:
            rows += [row for some in (await consumer.getmany(timeout_ms=500)).values() for row in some]
    finally:
        await consumer.stop()
    return rows


async def stored(kafka: KafkaServer, group: str, topic: str) -> dict[int, OffsetAndMetadata]:
    """Where a group has got to, by a plain client."""
    async with kafka_admin(kafka.url) as admin:
        found = await admin.list_consumer_group_offsets(group)
    return {place.partition: row for place, row in found.items() if place.topic == topic}


async def share(count: int, *subscriptions: Subscription) -> list[list[Delivery]]:
    """Let subscribers work until they have settled so many; what each of them was given."""
    found: list[list[Delivery]] = [[] for _ in subscriptions]
    end = time.monotonic() + PATIENCE
    while sum(map(len, found)) < count:
        assert time.monotonic() < end, f"only {[len(mine) for mine in found]} came"
        for subscription, mine in zip(subscriptions, found, strict=True):
            for one in await subscription.receive(5, 0.05):
                await one.ack()
                mine.append(one)
    return found


# Sharing.


def test_who_joins_gets_a_share_and_what_is_in_hand_stays(kafka: KafkaServer, topic: str) -> None:
    sent = events(600, keys=KEYS)

    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish(sent)
            first = await transport.subscribe(topic, oldest=True)
            held = await receive(first, lambda found: len(found) >= 200)
            assert len({one.message.position.split(":")[0] for one in held}) == 8
            second = await transport.subscribe(topic)
            for _ in range(15):  # so many heartbeats, in which nothing is taken away
                assert await second.receive(100, 0.1) == []
                for one in held:
                    await one.extend()
            for one in held:
                await one.ack()
            shares = await share(len(sent) - len(held), first, second)
            assert all(shares)
            assert bodies([*held, *shares[0], *shares[1]]) == sorted(one.body for one in sent)

    run(main(), seconds=3 * PATIENCE)


def test_what_is_held_for_too_long_goes_with_its_partition(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            sent = events(80, keys=KEYS)
            await transport.publish(sent)
            first = await transport.subscribe(topic, oldest=True, ack_wait=0.5)
            held = await receive(first, lambda found: len(found) == len(sent))
            second = await transport.subscribe(topic, ack_wait=0.5)
            again = await receive(second, lambda found: len(found) > 0)
            (late,) = [one for one in held if one.message.position == again[0].message.position]
            for settle in (late.extend, late.ack, late.nack):
                with pytest.raises(NotConnectedError, match="too late for an event from Kafka"):
                    await settle()
            settled = 0
            for one in held:  # of the partitions that stay
                with contextlib.suppress(NotConnectedError):
                    await one.ack()
                    settled += 1
            assert settled
            assert await first.receive(100, 0) == [], "and it goes on"

    run(main(), seconds=2 * PATIENCE)


def test_a_member_that_was_thrown_out_is_told(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport, connected(kafka, topic) as another:
            await transport.publish(events(20, keys=KEYS))
            subscription = await transport.subscribe(topic, oldest=True)
            held = await receive(subscription, lambda found: len(found) == 20)
            async with kafka_admin(kafka.url) as admin:
                (answer,) = await admin.describe_consumer_groups([topic])
            ((member, *_),) = answer.groups[0][5]
            another._behind[topic] = {member}  # on another's list of the dead
            heir = await another.subscribe(topic)
            with pytest.raises(NotConnectedError, match="has given our share"):
                await receive(subscription, lambda found: False)
            with pytest.raises(NotConnectedError):
                await held[0].ack()
            assert len(await receive(heir, lambda found: len(found) == 20, ack=True)) == 20

    run(main(), seconds=2 * PATIENCE)


def test_who_comes_back_does_not_wait_for_its_own_session_to_end(tmp_path: Path, topic: str) -> None:
    """Kafka was gone, and couldn't be told that we leave."""
    require("kafka")
    server = KafkaServer(tmp_path / "kafka")
    try:
        server.start()

        async def main() -> None:
            transport = make(server, topic)
            await transport.connect()
            await transport.publish(events(20, keys=KEYS))
            first = await transport.subscribe(topic, oldest=True, ack_wait=600)
            await receive(first, lambda found: len(found) == 20)
            await asyncio.to_thread(server.kill)
            with pytest.raises(NotConnectedError):
                await receive(first, lambda found: False)
            await transport.close()
            await asyncio.to_thread(server.start)
            await transport.connect()
            second = await transport.subscribe(topic, ack_wait=600)
            assert len(await receive(second, lambda found: len(found) == 20, ack=True)) == 20
            await transport.close()

        run(main(), seconds=3 * PATIENCE)
    finally:
        server.close(kill=True)


def test_a_group_of_another_program(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            other = AIOKafkaConsumer(topic, bootstrap_servers=kafka.url, group_id=topic)
            try:
                await other.start()
                with pytest.raises(TransportConfigurationError, match="another program has a consumer group"):
                    await transport.subscribe(topic)
            finally:
                await other.stop()
            assert await (await transport.subscribe(topic)).receive(1, 0) == []

    run(main(), seconds=2 * PATIENCE)


def test_an_ack_wait_that_the_server_does_not_allow(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            with pytest.raises(TransportConfigurationError, match=r"group\.max\.session\.timeout\.ms"):
                await transport.subscribe(topic, ack_wait=86400)

    run(main(), seconds=PATIENCE)


# Places.


def test_a_new_name_begins_where_it_was_first_asked_for(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish(events(80, keys=KEYS))
            await (await transport.subscribe(topic)).close()
            begun = await stored(kafka, topic, topic)
            assert sum(row.offset for row in begun.values()) == 80
            assert len(begun) == 8
            await (await transport.subscribe(f"{topic}-2", oldest=True)).close()
            assert {row.offset for row in (await stored(kafka, f"{topic}-2", topic)).values()} == {0}

    run(main(), seconds=2 * PATIENCE)


def test_what_retention_has_dropped_is_passed_over(kafka: KafkaServer, topic: str) -> None:
    sent = events(50)  # one key, so that they are in one partition

    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish(sent[:40])
            subscription = await transport.subscribe(topic, oldest=True, in_flight=5)
            held = await receive(subscription, lambda found: len(found) == 5)
            place = TopicPartition(topic, int(held[0].message.position.split(":")[0]))
            await subscription.close()
            async with kafka_admin(kafka.url) as admin:
                await admin.delete_records({place: RecordsToDelete(before_offset=30)})
            subscription = await transport.subscribe(topic)
            await transport.publish(sent[40:])
            found = await receive(subscription, lambda found: len(found) == 20, ack=True)
            assert [one.message.body for one in found] == [one.body for one in sent[30:]]

    run(main(), seconds=2 * PATIENCE)


def test_a_topic_that_is_deleted_meanwhile(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            subscription = await transport.subscribe(topic)
            async with kafka_admin(kafka.url) as admin:
                await admin.delete_topics([topic])
            with pytest.raises(NotConnectedError, match="was deleted"):
                await receive(subscription, lambda found: False)

    run(main(), seconds=2 * PATIENCE)


async def go_on(subscription: Subscription, held: list[Delivery]) -> None:
    """Settle what is in hand, and receive for ever."""
    for one in held:
        await one.ack()
    await receive(subscription, lambda found: False)


@pytest.mark.parametrize("slow", [False, True])
def test_of_a_topic_that_is_made_again_nothing_is_passed_over(kafka: KafkaServer, topic: str, slow: bool) -> None:
    """Kafka forgets where the name was, and takes what is settled of the old topic for the new one.

    Who is slow fetches nothing meanwhile, and hears of it last.
    """
    sent = events(1000)  # one key, so that they are in one partition

    async def main() -> None:
        async with connected(kafka, topic) as transport, connected(kafka, topic) as another:
            await transport.publish(sent[:700])
            subscription = await transport.subscribe(topic, oldest=True, in_flight=10 if slow else 1000)
            count = 10 if slow else 700
            held = await receive(subscription, lambda found: len(found) == count)
            async with kafka_admin(kafka.url) as admin:
                await admin.delete_topics([topic])
                while topic in await admin.list_topics():  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.01)
            await another.close()
            await another.connect()  # it is there again
            await another.publish(sent)
            with pytest.raises(NotConnectedError, match="was deleted"):
                await go_on(subscription, held)
            await transport.close()
        async with connected(kafka, topic) as transport:
            subscription = await transport.subscribe(topic)
            found = await receive(subscription, lambda found: len(found) >= 1000, ack=True)
            assert bodies(found) == sorted(one.body for one in sent)

    run(main(), seconds=3 * PATIENCE)


@pytest.mark.parametrize(
    ("note", "count"), [("", 5), ("what ever: 7,1", 5), ("00000000:0,3", 20)], ids=["none", "words", "another"]
)
def test_the_place_in_a_topic_is_an_administrators_and_not_that_in_another_topic(
    kafka: KafkaServer, topic: str, note: str, count: int
) -> None:
    """What is settled of a topic that was deleted may be stored behind that: then the note names the old one."""

    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish(events(20))
            subscription = await transport.subscribe(topic, oldest=True)
            (first, *_) = await receive(subscription, lambda found: len(found) == 20, ack=True)
            await subscription.close()
            place = TopicPartition(topic, int(first.message.position.split(":")[0]))
            consumer = AIOKafkaConsumer(bootstrap_servers=kafka.url, group_id=topic, enable_auto_commit=False)
            try:
                await consumer.start()
                consumer.assign([place])
                await consumer.commit({place: OffsetAndMetadata(15, note)})
            finally:
                await consumer.stop()
            subscription = await transport.subscribe(topic)
            assert len(await receive(subscription, lambda found: len(found) == count, ack=True)) == count
            assert await subscription.receive(10, 1) == []

    run(main(), seconds=2 * PATIENCE)


def test_what_others_transactions_leave_behind_is_passed_over(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic, partitions=1) as transport:
            await transport.publish(events(5))
            producer = AIOKafkaProducer(bootstrap_servers=kafka.url, transactional_id=topic)
            await producer.start()
            async with producer.transaction():
                await producer.send_and_wait(topic, b"another's", partition=0)
            await producer.stop()
            subscription = await transport.subscribe(topic, oldest=True)
            await receive(subscription, lambda found: len(found) == 6, ack=True)
            async with contextlib.aclosing(transport.tail(oldest=True)) as tail:
                for _ in range(6):
                    await anext(tail)
                following = asyncio.ensure_future(anext(tail))
                (reader,) = transport._readers
                asked = [one._correlation_id for one in reader._connections.values()]
                await asyncio.sleep(1)
                # A question waits half a second for its answer, if there is nothing.
                assert max(map(sub, [one._correlation_id for one in reader._connections.values()], asked)) < 20
                await transport.publish(events(1, start=5))
                assert (await following).body == event(5).body
                assert len(await receive(subscription, lambda found: len(found) == 1, ack=True)) == 1

    run(main(), seconds=2 * PATIENCE)


def test_notes_that_the_server_finds_too_long(tmp_path: Path, topic: str) -> None:
    """Then what is settled behind something that is not comes again; nothing is lost, and nobody waits."""
    require("kafka")
    server = KafkaServer(tmp_path / "kafka", config="offset.metadata.max.bytes=20")
    sent = events(100)
    try:
        server.start()

        async def main() -> None:
            async with connected(server, topic) as transport:
                await transport.publish(sent)
                subscription = await transport.subscribe(topic, oldest=True)
                held = await receive(subscription, lambda found: len(found) == 100)
                for one in held[::2]:
                    await one.ack()
                await asyncio.sleep(1)
                await subscription.close()
                subscription = await transport.subscribe(topic)
                wanted = {one.message.body for one in held[1::2]}
                found = await receive(subscription, lambda found: wanted <= {*bodies(found)}, ack=True)
                assert len(found) < 100

        run(main(), seconds=3 * PATIENCE)
    finally:
        server.close(kill=True)


# Delays.


def test_a_copy_waits_in_one_topic_after_the_other(kafka: KafkaServer, topic: str) -> None:
    (sent,) = events(1)
    delay = 7.4

    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish([sent])
            subscription = await transport.subscribe(topic, oldest=True)
            (first,) = await receive(subscription, lambda found: len(found) == 1)
            began = time.time()
            await first.nack(delay)
            (second,) = await receive(subscription, lambda found: len(found) == 1)
            assert time.time() - began >= delay
            assert (second.attempt, second.message.body, second.message.address) == (2, sent.body, topic)
            await second.nack()
            (third,) = await receive(subscription, lambda found: len(found) == 1)
            assert third.attempt == 3
            await third.ack()
            await subscription.close()
            steps = {step: await read(kafka, f"orthanc.retry.{topic}.{step}") for step in (5, 1)}
            # The last of the shortest waits is spared where a busy machine has lost that time on the way.
            assert (len(steps[5]), len(steps[1]) in (2, 3)) == (1, True)
            (inbox,) = await read(kafka, f"orthanc.inbox.{topic}")
            (original,) = await read(kafka, topic)
            copies = [*steps[5], *steps[1], inbox]
            assert {(row.key, row.value, row.partition) for row in copies} == {
                (original.key, original.value, original.partition)
            }
            for row in copies:
                headers = {name: value.decode() for name, value in row.headers}
                assert len(headers) == len(row.headers)
                assert headers.items() >= {name: value.decode() for name, value in original.headers}.items()
                assert headers["orthanc-operation"] == "retry"
                assert headers["orthanc-consumer"] == headers["orthanc-address"] == topic
                assert headers["orthanc-attempts"] == ("2" if row is inbox else "1")
            dues = {dict(row.headers)["orthanc-due"].decode() for row in copies[:-1]}
            assert len(dues) == 1
            assert dues.pop() >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(began + delay))

    run(main(), seconds=2 * PATIENCE)


def test_many_are_given_back_at_once(kafka: KafkaServer, topic: str) -> None:
    sent = events(1000, keys=KEYS)

    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish(sent)
            subscription = await transport.subscribe(topic, oldest=True, in_flight=1000)
            held = await receive(subscription, lambda found: len(found) == 1000)
            await asyncio.gather(*(one.nack(0.2 + number % 3) for number, one in enumerate(held)))
            again = await receive(subscription, lambda found: len(found) == 1000, ack=True)
            assert bodies(again) == sorted(one.body for one in sent)
            assert {one.attempt for one in again} == {2}

    run(main(), seconds=2 * PATIENCE)


def test_many_are_given_back_at_once_to_topics_that_take_little(kafka: KafkaServer, topic: str) -> None:
    sent = events(200, size=2000)  # of one partition

    async def main() -> None:
        limits = {"max_age": "7d", "max_bytes": 0}  # as Kafka sets what is left out when a topic is altered
        async with connected(kafka, topic, limits=limits) as transport:
            await transport.publish(sent)
            subscription = await transport.subscribe(topic, oldest=True, in_flight=1000)
            held = await receive(subscription, lambda found: len(found) == 200)
            await asyncio.gather(*(one.nack() for one in held))
            again = await receive(subscription, lambda found: len(found) == 200, ack=True)
            assert bodies(again) == sorted(one.body for one in sent)

    async def prepare() -> None:
        async with connected(kafka, topic):
            pass

    run(prepare(), seconds=PATIENCE)
    alter_topic(kafka.url, topic, max_message_bytes="20000")
    run(main(), seconds=2 * PATIENCE)


def test_an_event_as_large_as_the_topic_takes_can_be_given_back(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            largest = event(1, size=1_048_000)
            await transport.publish([largest])
            subscription = await transport.subscribe(topic, oldest=True)
            for _ in range(3):
                (one,) = await receive(subscription, lambda found: len(found) == 1)
                assert one.message.body == largest.body
                await one.nack()

    run(main(), seconds=2 * PATIENCE)


def test_topics_that_are_not_to_be_made(kafka: KafkaServer, topic: str) -> None:
    async def main() -> None:
        async with connected(kafka, topic) as transport:
            await transport.publish(events(1))
        async with connected(kafka, topic, declare=False) as transport:
            with pytest.raises(TransportConfigurationError, match=f"no topic orthanc.inbox.{topic}, and declare"):
                await transport.subscribe(topic, oldest=True)

    run(main(), seconds=2 * PATIENCE)


def test_who_has_its_inbox_alone_and_who_gets_everything_keep_each_other_out(kafka: KafkaServer, topic: str) -> None:
    """Members of one group that know different topics would each be given what the other alone can read."""

    async def main() -> None:
        async with connected(kafka, topic) as transport:
            for first in (False, True):
                holder = await transport.subscribe(topic, inbox_only=first)
                with pytest.raises(TransportConfigurationError, match="has members that subscribe to"):
                    await transport.subscribe(topic, inbox_only=not first)
                await holder.close()
            sent = events(3)
            subscription = await transport.subscribe(topic)
            await transport.publish(sent)
            found = await receive(subscription, lambda some: len(some) >= 3, ack=True)
            assert bodies(found) == sorted(one.body for one in sent)
            await subscription.close()

    run(main(), seconds=PATIENCE)
