"""What is Kafka's own: the binding, the topic, the producer's numbers, and a cluster that loses servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import queue
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import ConsumerRecord
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary, from_structured, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer, kafka_cluster
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.transports import kafka_producer
from orthanc_events_bridge.transports.base import Outgoing, PublishError
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_subscription import KafkaSubscription
from tests.contract.harness import aside, connect, event, events, run
from tests.contract.kafka_tools import administrate, alter_topic, failing, kafka_server, kafka_transport, read_topic
from tests.contract.link import Link

pytestmark = pytest.mark.integration

KEYS = [f"study-{number}" for number in range(20)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with kafka_server(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return f"t{crc32(request.node.name.encode())}"


def read(server: KafkaServer, topic: str) -> list[ConsumerRecord]:
    return aside(read_topic(f"127.0.0.1:{server.admin_port}", topic))


def ids(records: Sequence[ConsumerRecord]) -> list[str]:
    return [dict(record.headers)["orthanc-event-id"].decode() for record in records]


def check(records: Sequence[ConsumerRecord], sent: Sequence[Outgoing]) -> Counter[str]:
    """Everything is there, the first of each in the order of its key; how often each is there."""
    found = ids(records)
    assert set(found) == {one.id for one in sent}
    first = list(dict.fromkeys(found))
    for key in {one.key for one in sent}:
        mine = [one.id for one in sent if one.key == key]
        members = set(mine)
        assert [one for one in first if one in members] == mine
    return Counter(found)


async def publish(transport: KafkaTransport, sent: Sequence[Outgoing]) -> None:
    await transport.connect()
    await transport.publish(sent)
    await transport.close()


async def taken_yet(transport: KafkaTransport, probes: Iterable[Outgoing]) -> list[Outgoing]:
    """Those of too large events that their leader takes, because it doesn't know yet of a limit that was lowered."""
    taken: list[Outgoing] = []
    for probe in probes:
        try:
            await publish(transport, [probe])
        except PublishError as error:
            await transport.close()
            if type(error.error) is not EventRejectedError:
                raise
            return taken
        taken.append(probe)
    return taken


# What is written.

SHAPE = {
    "source": "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
    "site": "north",
    "type_prefix": "io.orthanc-events",
    "schema_base": "https://example.org/schemas/",
}
STUDY = "0000000a-00000000-00000000-00000000-00000000"


def outgoing(*, binary: bool) -> Outgoing:
    extra = {"parents": {"study": STUDY, "patient": STUDY[::-1]}, "metadata": {"Much": "ä€😀"}}
    instance = f"{STUDY[:-1]}7"
    row = OutboxRow(7, "NewInstance", "instance", instance, 1_700_000_000_007, 7, "20231114T221320", None, 1, 1, extra)
    return to_outgoing(row, SHAPE, "8be797cd-5573-46b7-8097-bea664a99a80", binary=binary)


def test_both_modes_are_those_of_the_official_binding(server: KafkaServer, topic: str) -> None:
    run(publish(kafka_transport(server.port, topic=topic), [outgoing(binary=False), outgoing(binary=True)]))
    structured, binary = (KafkaMessage(dict(row.headers), row.key, row.value) for row in read(server, topic))
    ours = {"orthanc-event-id", "orthanc-site"}
    assert structured.headers["orthanc-site"] == binary.headers["orthanc-site"] == b"north"
    assert structured.key == binary.key == STUDY.encode()
    assert structured.headers.keys() == ours | {"content-type"}

    event = from_structured(structured, JSONFormat(), CloudEvent)
    assert from_binary(binary, JSONFormat(), CloudEvent).get_attributes() == event.get_attributes()
    for found, theirs in ((structured, to_structured), (binary, to_binary)):
        expected = theirs(event, JSONFormat())
        assert {name: value for name, value in found.headers.items() if name not in ours} == expected.headers
        assert json.loads(found.value) == json.loads(expected.value)
        assert isinstance(found.key, bytes) and found.key.decode() == expected.key
    assert event.get_id().encode() == structured.headers["orthanc-event-id"]


@pytest.mark.parametrize("partitions", [1, 3, 64])
def test_any_language_finds_the_partition_of_a_study(server: KafkaServer, topic: str, partitions: int) -> None:
    run(publish(kafka_transport(server.port, topic=topic, partitions=partitions), events(200, keys=KEYS)))
    records = read(server, topic)
    assert [row.partition for row in records] == [crc32(row.key) % 64 % partitions for row in records]
    check(records, events(200, keys=KEYS))


def test_compressed_events_are_read_like_others(server: KafkaServer, topic: str) -> None:
    sent = events(300, keys=KEYS, size=2000)
    run(publish(kafka_transport(server.port, topic=topic, compression="gzip"), sent))
    records = read(server, topic)
    assert max(check(records, sent).values()) == 1
    assert sorted(record.value for record in records) == sorted(one.body for one in sent)
    kept = sum(path.stat().st_size for path in server.data.glob(f"{topic}-*/*.log"))
    assert 0 < kept < sum(len(one.body) for one in sent) / 4


# The topic.


def settings(server: KafkaServer, topic: str) -> dict[str, str]:
    async def work(admin: AIOKafkaAdminClient) -> dict[str, str]:
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        return {row[0]: row[1] for row in answer.resources[0][4]}

    return administrate(f"127.0.0.1:{server.admin_port}", work)


def test_the_topic_is_made_as_the_options_say(server: KafkaServer, topic: str) -> None:
    limits = {"max_age": "12h", "max_bytes": "8MiB"}
    lines = connect(kafka_transport(server.port, topic=topic, partitions=5, limits=limits))
    assert "5 partitions, 1 replicas" in lines[1]
    assert "age 12h, size of a partition 8MiB" in lines[2]
    found = settings(server, topic)
    assert found["retention.ms"] == "43200000"
    assert found["retention.bytes"] == "8388608"
    assert found["segment.bytes"] == "2097152"  # only whole ones are dropped
    assert (found["cleanup.policy"], found["min.insync.replicas"]) == ("delete", "1")
    assert found["unclean.leader.election.enable"] == "false"


def test_unlimited(server: KafkaServer, topic: str) -> None:
    lines = connect(kafka_transport(server.port, topic=topic, limits={"max_age": 0, "max_bytes": 0}))
    assert "age unlimited, size of a partition unlimited" in lines[2]
    assert (settings(server, topic)["retention.ms"], settings(server, topic)["retention.bytes"]) == ("-1", "-1")


def test_more_replicas_than_there_are_servers(server: KafkaServer, topic: str) -> None:
    transport = kafka_transport(server.port, topic=topic, limits={"replicas": 3})

    async def main() -> None:
        with failing(TransportConfigurationError) as caught:
            await transport.connect()
        assert "replica" in str(caught[0]).lower()
        await transport.close()

    run(main())


def test_a_topic_that_a_consumer_made_by_asking_for_it(server: KafkaServer, topic: str) -> None:
    """Kafka does that by default, with settings of its own."""

    async def main() -> None:
        transport = kafka_transport(server.port, topic=topic)
        first = await transport.connect()
        await transport.publish(events(10))

        async def delete(admin: AIOKafkaAdminClient) -> None:
            await admin.delete_topics([topic])
            while topic in await admin.list_topics():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.02)
            await admin.create_topics([NewTopic(topic, 1, 1)])

        administrate(f"127.0.0.1:{server.admin_port}", delete)
        with failing(NotConnectedError, confirmed=0):
            await transport.publish(events(10, start=10))
        await transport.close()
        with failing(TransportConfigurationError) as caught:
            await transport.connect()
        assert "partitions is 1, wanted 4" in str(caught[0])
        await transport.close()
        other = kafka_transport(server.port, topic=topic, declare=False)
        assert await other.connect() not in ("", first)
        await other.publish(events(10))
        await other.close()

    run(main())
    check(read(server, topic)[-10:], events(10))


# What can't be taken.


def test_a_limit_that_is_lowered_while_connected(server: KafkaServer, topic: str) -> None:
    sent = events(60, size=2000)
    large = sent[33] = event(33, size=30_000)
    transport = kafka_transport(server.port, topic=topic, declare=False)
    refusals: list[tuple[int, PublishError]] = []

    async def main() -> None:
        await publish(kafka_transport(server.port, topic=topic), [])
        await transport.connect()
        await transport.publish(sent[:3])
        alter_topic(f"127.0.0.1:{server.admin_port}", topic, max_message_bytes="20000")
        probes = (event(number, size=30_000) for number in itertools.count(1000))
        sent[3:3] = await taken_yet(kafka_transport(server.port, topic=topic, declare=False), probes)
        done = len(sent) - 57
        while done < len(sent):
            try:
                await transport.publish(sent[done:])
                done = len(sent)
            except PublishError as error:
                done += error.confirmed
                refusals.append((done, error))
                done += isinstance(error.error, EventRejectedError)
        await transport.close()

    run(main())
    assert {type(error.error) for _, error in refusals} == {EventRejectedError, RefusedError}
    assert [sent[place] for place, error in refusals if isinstance(error.error, EventRejectedError)] == [large]
    # Not one that was sent behind a refused batch has overtaken it.
    assert ids(read(server, topic)) == [one.id for one in sent if one is not large]


def test_a_clock_that_is_far_ahead_sets_nothing_aside(
    server: KafkaServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka 4 refuses what comes from more than an hour ahead."""
    ahead = SimpleNamespace(time_ns=lambda: time.time_ns() + 2 * 3600 * 10**9)

    async def main() -> None:
        transport = kafka_transport(server.port, topic=topic)
        await transport.connect()
        with monkeypatch.context() as patch:
            patch.setattr(kafka_producer, "time", ahead)
            for count in (10, 1):
                with failing(TransportConfigurationError, confirmed=0) as caught:
                    await transport.publish(events(count))
                assert "clock" in str(caught[0])
                await transport.close()
                await transport.connect()
        await transport.publish(events(10))
        await transport.close()

    run(main())
    assert max(check(read(server, topic), events(10)).values()) == 1


def test_a_quota_that_is_used_up_is_waited_for(server: KafkaServer, topic: str) -> None:
    """Kafka says for how long it will answer nothing: that is no fault, and may be longer than every deadline."""
    command = ["kafka.admin.ConfigCommand", "--bootstrap-server", f"127.0.0.1:{server.admin_port}", "--alter"]
    command += ["--entity-type", "clients", "--entity-name", "orthanc-events-bridge-modest"]
    limits = "producer_byte_rate=20000,consumer_byte_rate=20000"
    subprocess.run([*server._java_command(), *command, "--add-config", limits], check=True, capture_output=True)
    sent = events(271, keys=KEYS, size=1000)

    async def main() -> list[float]:
        transport = kafka_transport(server.port, topic=topic, name="modest", connect_timeout=1, ack_timeout=1)
        await transport.connect()
        for first in range(0, 270, 45):
            await transport.publish(sent[first : first + 45])
        subscription = await transport.subscribe(topic, oldest=True)
        assert isinstance(subscription, KafkaSubscription)
        found = 0
        for count in (270, 271):
            if count > 270:
                await transport.publish(sent[270:])
            while found < count:
                for one in await subscription.receive(100, 1):
                    found += 1
                    await one.ack()
        assert transport._cluster is not None
        clusters = (transport._cluster, subscription._clusters[2])
        muted = [max(one.muted for one in cluster._connections.values()) for cluster in clusters]
        await transport.close()
        return muted

    assert min(run(main(), seconds=180)) > 0, "it was never used up"
    assert max(check(read(server, topic), sent).values()) == 1


# The producer's numbers.


class Careless(KafkaTransport):
    without = frozenset({"idempotence"})


class OneWay(Link):
    """Passes on what the client says, and, while it is deaf, no answer."""

    deaf = False

    def _read(self, source: socket.socket, chunks: queue.Queue[tuple[float, bytes]], is_client: bool) -> None:
        if is_client:
            super()._read(source, chunks, is_client)
            return
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.deaf:
                    chunks.put((0.0, data))
        chunks.put((0.0, b""))


@pytest.mark.parametrize(("kind", "copies"), [(KafkaTransport, 1), (Careless, 2)])
def test_what_was_stored_and_not_answered_is_not_stored_again(
    server: KafkaServer, topic: str, kind: type[KafkaTransport], copies: int
) -> None:
    sent = events(200, keys=KEYS)
    options = KafkaOptions.model_validate(
        {
            "servers": [f"127.0.0.1:{server.proxy_port}"],
            "topic": topic,
            "partitions": 4,
            "connect_timeout": 20,
            "ack_timeout": 3,
        }
    )

    async def main() -> None:
        transport = kind(options)
        with closing(OneWay(server.behind_port, port=server.proxy_port)) as link:
            await transport.connect()
            link.deaf = True
            with failing(NotConnectedError, confirmed=0):
                await transport.publish(sent)
            await transport.close()
            link.deaf = False
            await transport.connect()
            await transport.publish(sent)
            await transport.publish(events(20, start=200, keys=KEYS))
            await transport.close()

    run(main())
    counted = check(read(server, topic), events(220, keys=KEYS))
    assert {counted[one.id] for one in sent} == {copies}


@pytest.mark.parametrize("trouble", ["gap", "fenced"])
def test_a_producer_that_kafka_does_not_accept_any_more(server: KafkaServer, topic: str, trouble: str) -> None:
    async def main() -> None:
        transport = kafka_transport(server.port, topic=topic)
        await transport.connect()
        producer = transport._publisher._producer
        if trouble == "fenced":  # as if another had taken over, with a later epoch
            producer.begin(producer._id, 5)
        await transport.publish(events(10))
        if trouble == "fenced":
            producer._epoch = 3
        else:
            producer._next = {partition: number + 7 for partition, number in producer._next.items()}
        with failing(NotConnectedError, confirmed=0) as caught:
            await transport.publish(events(10, start=10))
        assert "lost the count" in str(caught[0])
        await transport.close()
        await transport.connect()
        await transport.publish(events(10, start=10))
        await transport.close()

    run(main())
    assert max(check(read(server, topic), events(20)).values()) == 1


def test_a_cluster_that_was_made_anew_takes_no_event_for_anothers(tmp_path: Path, topic: str) -> None:
    """It gives the producers' ids of before a second time."""
    require("kafka")
    server = KafkaServer(tmp_path / "kafka")

    async def main() -> None:
        others = [kafka_transport(server.port, topic=topic) for _ in range(6)]
        ours = kafka_transport(server.port, topic=topic)
        await ours.connect()
        await ours.publish(events(1, start=100))
        await ours.close()
        identity = ours._publisher._producer._id
        await asyncio.to_thread(server.close, kill=True)
        shutil.rmtree(server.data)
        server.cluster = "AAAAAAAAAAAAAAAAAAAAAA"
        await asyncio.to_thread(server.start)
        await ours.connect()
        for other in others:  # until one has the id that was ours
            await other.connect()
            if other._publisher._producer._id == identity:
                break
        await other.publish(events(1))
        await ours.publish(events(1, start=1))
        await other.publish(events(1, start=2))
        for transport in (ours, *others):
            await transport.close()

    try:
        server.start()
        run(main(), seconds=180)
        assert ids(read(server, topic)) == [one.id for one in events(3)]
    finally:
        server.close(kill=True)


# Several servers.


def test_a_dead_server_among_several(server: KafkaServer, topic: str) -> None:
    with closing(Link(1)) as dead:
        nobody = dead.port
    run(publish(kafka_transport(nobody, server.port, topic=topic), events(3)))
    check(read(server, topic), events(3))


def test_of_several_refusals_that_is_told_which_a_person_can_mend(server: KafkaServer, topic: str) -> None:
    with closing(Link(1)) as dead:
        nobody = dead.port
    login = {"sasl": "plain", "user": "a", "password": "b"}

    async def main() -> None:
        transport = kafka_transport(server.port, nobody, topic=topic, **login)
        with failing(TransportConfigurationError):
            await transport.connect()
        await transport.close()

    run(main())


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[KafkaServer]]:
    require("kafka")
    found = kafka_cluster(tmp_path_factory.mktemp("cluster"))
    with ExitStack() as stack:
        for node in found:
            stack.callback(node.close, kill=True)
            node.start(wait=False)
        for node in found:
            node.wait_ready()
        yield found


@pytest.fixture
def cluster(nodes: list[KafkaServer]) -> Iterator[list[KafkaServer]]:
    yield nodes
    for node in nodes:
        if not node.running:
            node.start(wait=False)
    for node in nodes:
        node.wait_ready()


def replicated(nodes: Sequence[KafkaServer], topic: str, needed: int = 2, *, ack_timeout: float = 5) -> KafkaTransport:
    limits = {"replicas": 3, "min_insync_replicas": needed}
    ports = [node.port for node in nodes]
    return kafka_transport(*ports, topic=topic, partitions=6, limits=limits, ack_timeout=ack_timeout, connect_timeout=5)


async def relay(
    transport: KafkaTransport, following: Callable[[], Sequence[Outgoing]], problems: list[TransportError]
) -> list[Outgoing]:
    """Publish as the relay does; what comes to be sent is asked for until there is nothing; give all of it."""
    everything: list[Outgoing] = []
    left: list[Outgoing] = []
    while True:
        try:
            await transport.connect()
            while True:
                if not left:
                    left = list(following())
                    everything += left
                if not left:
                    await transport.close()
                    return everything
                await transport.publish(left)
                left = []
        except PublishError as error:
            left = [one for i, one in enumerate(left) if i >= error.confirmed and i not in error.stored]
            problems.append(error.error)
        except TransportError as error:
            problems.append(error)
        if not isinstance(problems[-1], RefusedError):
            await transport.close()
        await asyncio.sleep(0.1)


def test_leaders_that_are_lost_under_publishing(cluster: list[KafkaServer], topic: str) -> None:
    problems: list[TransportError] = []

    async def main() -> list[Outgoing]:
        number = 0

        def following() -> list[Outgoing]:
            nonlocal number
            if losing.done():
                return []
            number += 100
            return events(100, start=number - 100, keys=KEYS)

        def lose() -> None:
            for node in cluster:  # each leads some partitions
                moment = number
                while number < moment + 500:
                    time.sleep(0.02)
                node.kill()
                node.start()

        losing = asyncio.get_running_loop().run_in_executor(None, lose)
        sent = await relay(replicated(cluster, topic), following, problems)
        await losing
        return sent

    sent = run(main(), seconds=300)
    assert problems  # somebody has noticed
    assert {type(problem) for problem in problems} <= {NotConnectedError, RefusedError}
    copies = max(check(read(cluster[0], topic), sent).values())
    # With a leader its count of what a producer has sent may go: then a new producer sends again what was under way.
    assert copies == 1 or (copies == 2 and any("has lost the count" in problem.message for problem in problems))


def test_the_event_that_is_too_large_is_named_and_no_other(cluster: list[KafkaServer], topic: str) -> None:
    """Each leader answers for itself, and what was to go to another may not have been sent by then."""
    before: list[Outgoing] = []
    sent: list[Outgoing] = []
    rejected: list[Outgoing] = []

    async def main() -> None:
        transport = replicated(cluster, topic)
        await transport.connect()
        assert transport._topic is not None
        leaders = transport._topic.metadata.leaders
        led_by = {key: leaders[crc32(key.encode()) % 64 % len(leaders)] for key in KEYS}
        mine = [key for key in KEYS if led_by[key] == led_by[KEYS[0]]]
        another = next(key for key in KEYS if led_by[key] != led_by[KEYS[0]])
        sent.extend([*events(200, keys=mine, size=4000), event(200, another, size=30_000)])
        alter_topic(f"127.0.0.1:{cluster[0].admin_port}", topic, max_message_bytes="20000", min_insync_replicas="2")
        probes = (event(number, another, size=30_000) for number in itertools.count(1000))
        before.extend(await taken_yet(kafka_transport(cluster[0].port, topic=topic, declare=False), probes))
        left = list(sent)
        while left:
            try:
                await transport.publish(left)
                left = []
            except PublishError as error:
                left = [one for i, one in enumerate(left) if i >= error.confirmed and i not in error.stored]
                if isinstance(error.error, EventRejectedError):
                    rejected.append(left.pop(0))
        await transport.close()

    run(main(), seconds=120)
    assert [one.id for one in rejected] == [sent[-1].id]
    check(read(cluster[0], topic), [*before, *sent[:-1]])


def test_what_a_replica_has_not_stored_in_time_is_not_stored_again(cluster: list[KafkaServer], topic: str) -> None:
    sent: list[Outgoing] = []

    async def main() -> None:
        transport = replicated(cluster, topic, ack_timeout=2)
        await transport.connect()
        assert transport._topic is not None
        leaders = transport._topic.metadata.leaders
        mine = [key for key in KEYS if leaders[crc32(key.encode()) % 64 % len(leaders)] != cluster[-1].node]
        sent.extend(events(200, keys=mine))
        await transport.publish(sent[:100])
        cluster[-1].freeze()
        try:
            # Not "refused": the relay would go on with one event then, and what was sent is known as a whole only.
            with failing(NotConnectedError):
                await transport.publish(sent[100:])
        finally:
            cluster[-1].thaw()
        await transport.close()
        batches = iter([sent[100:], []])
        await relay(transport, lambda: next(batches), [])

    run(main(), seconds=180)
    assert max(check(read(cluster[0], topic), sent).values()) == 1


@pytest.mark.parametrize(("needed", "down"), [(3, 1), (2, 2)])
def test_too_few_servers(cluster: list[KafkaServer], topic: str, needed: int, down: int) -> None:
    problems: list[TransportError] = []
    sent = events(300, keys=KEYS)

    def noticed() -> bool:
        if down == 2:  # nobody is there to say what is missing
            return len(problems) >= 3
        return any("min.insync.replicas" in one.message for one in problems if isinstance(one, RefusedError))

    async def main() -> None:
        transport = replicated(cluster, topic, needed)
        await transport.connect()
        await transport.publish(sent[:100])
        for node in cluster[:down]:
            node.kill()
        batches = iter([sent[100:200], sent[200:], []])
        relaying = asyncio.create_task(relay(transport, lambda: next(batches), problems))
        while not noticed():  # nobody tells
            assert not relaying.done()
            await asyncio.sleep(0.05)
        for node in cluster[:down]:
            await asyncio.to_thread(node.start, wait=False)
        await relaying

    try:
        run(main(), seconds=300)
    except TimeoutError:
        told = Counter(f"{type(one).__name__}: {one.message}" for one in problems)
        pytest.fail(f"too few servers went unnoticed, or for ever; what was told: {told.most_common()}")
    assert {type(problem) for problem in problems} <= {NotConnectedError, RefusedError}
    for problem in problems:
        assert "Kafka" in problem.message and problem.remedy
    check(read(cluster[-1], topic), sent)


def test_what_a_consumer_without_limits_makes_is_as_safe_as_the_topic_for_everybody(
    cluster: list[KafkaServer], topic: str
) -> None:
    consumer = kafka_transport(*(node.port for node in cluster), topic=topic)
    given = consumer._options.model_dump(exclude_unset=True, exclude={"limits", "partitions"})
    options = KafkaOptions.model_validate(given).for_consumer()
    assert options.limits_as_found

    async def main() -> None:
        bridge = replicated(cluster, topic)
        await bridge.connect()
        await bridge.publish([event(0)])
        await bridge.close()
        transport = KafkaTransport(options)
        await transport.connect()
        subscription = await transport.subscribe(topic, oldest=True)
        while not (found := await subscription.receive(1, 1.0)):
            pass
        await found[0].reject({"orthanc-reason": "no"})
        await subscription.close()
        await transport.close()

    run(main(), seconds=180)
    for name in (f"orthanc.inbox.{topic}", f"orthanc.dead.{topic}"):
        assert settings_of(cluster[0], name) == (3, "2"), name


def settings_of(node: KafkaServer, topic: str) -> tuple[int, str]:
    """Replicas, and how many must be in step."""

    async def main(admin: AIOKafkaAdminClient) -> tuple[int, str]:
        (found,) = await admin.describe_topics([topic])
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        configs = {row[0]: row[1] for row in answer.resources[0][4]}
        return len(found["partitions"][0]["replicas"]), configs["min.insync.replicas"]

    return administrate(f"127.0.0.1:{node.admin_port}", main)


def test_a_dead_letter_where_servers_are_missing(cluster: list[KafkaServer], topic: str) -> None:
    """It is refused, and held, until they are back."""
    sent, dead = event(0), f"orthanc.dead.{topic}"
    problems: list[str] = []

    async def make_dead(admin: AIOKafkaAdminClient) -> None:
        configs = {"cleanup.policy": "compact", "min.insync.replicas": "3"}
        await admin.create_topics([NewTopic(dead, 1, 3, topic_configs=configs)])

    async def rejected(transport: KafkaTransport) -> None:
        subscription = await transport.subscribe(topic, oldest=True)
        while not (found := await subscription.receive(1, 1.0)):
            pass
        with failing(RefusedError):
            await found[0].reject({"orthanc-reason": "no"})
        await asyncio.to_thread(cluster[0].start, wait=False)
        while True:
            with contextlib.suppress(RefusedError):
                await found[0].reject({"orthanc-reason": "no"})
                return
            await found[0].extend()
            await asyncio.sleep(0.1)

    async def main() -> None:
        transport = replicated(cluster, topic)
        await transport.connect()
        await (await transport.subscribe(topic, oldest=True)).close()  # makes the inbox
        await transport.publish([sent])
        await asyncio.to_thread(cluster[0].kill)
        while True:
            try:
                await transport.connect()
                await rejected(transport)
                break
            except NotConnectedError as error:
                problems.append(str(error))
                await transport.close()
                await asyncio.sleep(0.1)
        (letter,) = [one async for one in (await transport.dead_letters(topic)).read()]
        assert letter.message.body == sent.body
        await transport.close()

    administrate(f"127.0.0.1:{cluster[1].admin_port}", make_dead)
    try:
        run(main(), seconds=180)
    except TimeoutError:
        pytest.fail(f"what was told: {Counter(problems).most_common()}")
