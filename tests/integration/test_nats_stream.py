"""The JetStream stream: made as configured, full, changed, deleted, replaced; alone and in a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import nats
import pytest

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.testing.servers import NatsServer, free_port
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.nats import NatsTransport
from orthanc_events_bridge.transports.nats_options import NatsOptions
from tests.contract.harness import connect, event, events, run
from tests.contract.nats_tools import nats_server, nats_transport, refusal
from tests.contract.raw_nats import RawNats, ask, read_stream

pytestmark = pytest.mark.integration

STREAM = "ORTHANC_EVENTS"
DAY = 86400 * 1_000_000_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def server(shared: NatsServer) -> Iterator[NatsServer]:
    """A server without streams."""
    yield shared
    for name in ask(shared.port, "STREAM.NAMES")["streams"] or []:
        ask(shared.port, f"STREAM.DELETE.{name}")


def make(server: NatsServer, name: str = STREAM, **config: Any) -> None:
    """A stream that fits what `nats_transport` wants, but for what is given."""
    defaults: dict[str, Any] = {
        "name": name,
        "subjects": ["orthanc.events.>"],
        "retention": "limits",
        "discard": "new",
        "max_age": 30 * DAY,
        "max_bytes": 2**20,
        "storage": "file",
        "num_replicas": 1,
        "duplicate_window": DAY // 144,
    }
    ask(server.port, f"STREAM.CREATE.{name}", **(defaults | config))


def stored(server: NatsServer) -> list[bytes]:
    return [message.body for message in read_stream(server.port, STREAM)]


async def publish(transport: NatsTransport, sent: list[Any], *, close: bool = False) -> None:
    await transport.connect()
    await transport.publish(sent)
    if close:
        await transport.close()


# As configured.


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (
            {"max_bytes": "64KiB"},
            {"max_age": 30 * 86400, "max_bytes": 2**16, "max_msgs": -1, "duplicate_window": 600},
        ),
        (
            {"max_age": "36h", "max_messages": 1000, "duplicate_window": "90s", "max_bytes": "1MiB"},
            {"max_age": 36 * 3600, "max_bytes": 2**20, "max_msgs": 1000, "duplicate_window": 90},
        ),
        (
            {"max_age": 0, "max_bytes": 0, "storage": "memory"},
            {"max_age": 0, "max_bytes": -1, "max_msgs": -1, "duplicate_window": 600, "storage": "memory"},
        ),
        # Numbers that a binary fraction can't hold: what the server says must not look different.
        (
            {"max_age": 4.35, "duplicate_window": 1.1, "max_bytes": 0},
            {"max_age": 4.35, "max_bytes": -1, "max_msgs": -1, "duplicate_window": 1.1},
        ),
    ],
)
def test_the_stream_is_made_as_configured(server: NatsServer, limits: dict[str, Any], expected: dict[str, Any]) -> None:
    async def read_back() -> Any:
        client = await nats.connect(server.url)
        try:
            return (await client.jetstream().stream_info(STREAM)).config
        finally:
            await client.close()

    for _ in range(2):
        connect(nats_transport(server, limits=limits))
    found = run(read_back())
    whole = {
        "subjects": ["orthanc.events.>"],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": 1,
        "no_ack": False,
        "max_msgs_per_subject": -1,
    }
    for name, value in (whole | expected).items():
        assert getattr(found, name) == (pytest.approx(value) if isinstance(value, float) else value), name


def test_two_that_begin_at_the_same_moment_share_the_stream(server: NatsServer) -> None:
    async def main() -> None:
        transports = [nats_transport(server) for _ in range(8)]
        identities = await asyncio.gather(*(transport.connect() for transport in transports))
        assert len(set(identities)) == 1 and identities[0]
        await asyncio.gather(*(transport.close() for transport in transports))

    run(main())


def test_a_stream_for_which_the_server_has_no_room(server: NatsServer) -> None:
    text = refusal(nats_transport(server, limits={"max_bytes": "900000GiB"}), TransportConfigurationError)
    assert STREAM in text and "limits.max_bytes" in text


@pytest.mark.parametrize(
    ("subjects", "fits"),
    [
        (["orthanc.events.>"], True),
        (["orthanc.>"], True),
        (["orthanc.events.*.>"], True),
        (["else", "orthanc.*.*.*.*.*"], True),
        (["orthanc.events.*.*.*.*"], True),
        (["orthanc.events.main.>"], False),
        (["orthanc.events.*.*.*"], False),
        (["orthanc.events.*.*.*.*.>"], False),
        (["orthanc.event.>"], False),
        (["orthanc.events"], False),
        (["*"], False),
    ],
)
def test_a_stream_must_take_all_our_subjects(server: NatsServer, subjects: list[str], fits: bool) -> None:
    make(server, subjects=subjects)
    for declare in (True, False):
        transport = nats_transport(server, declare=declare)
        if fits:
            run(publish(transport, events(3), close=True))
        else:
            text = refusal(transport, TransportConfigurationError)
            assert str(subjects) in text and "orthanc.events.>" in text
    assert len(stored(server)) == (3 if fits else 0)


def test_another_stream_that_has_our_subjects_is_named(server: NatsServer) -> None:
    make(server, "ANOTHER")
    text = refusal(nats_transport(server), TransportConfigurationError)
    assert STREAM in text and "overlap" in text


def test_limits_are_the_operators_where_nothing_is_declared(server: NatsServer) -> None:
    make(server, max_bytes=2**22, max_age=0, storage="memory", duplicate_window=DAY)
    connect(nats_transport(server, declare=False))
    text = refusal(nats_transport(server), TransportConfigurationError)
    for name in ("max_bytes", "max_age", "storage", "duplicate_window"):
        assert name in text
    for different in ({"discard": "old"}, {"retention": "workqueue"}, {"no_ack": True}):
        ask(server.port, f"STREAM.DELETE.{STREAM}")
        make(server, **different)
        text = refusal(nats_transport(server, declare=False), TransportConfigurationError)
        assert next(iter(different)) in text


# Full, and too large.


@pytest.mark.parametrize("limits", [{"max_messages": 20}, {"max_bytes": 2**16}])
def test_a_full_stream_is_named_at_once_and_heals(server: NatsServer, limits: dict[str, int]) -> None:
    sent = events(60, size=3000)

    async def main() -> None:
        transport = nats_transport(server, limits={"max_bytes": 2**20} | limits, ack_timeout=10)
        await transport.connect()
        began = time.monotonic()
        with pytest.raises(PublishError) as caught:
            await transport.publish(sent)
        assert time.monotonic() - began < 1
        done = caught.value.confirmed
        assert type(caught.value.error) is RefusedError
        assert "stream is full" in str(caught.value) and "purge" in str(caught.value)
        assert 15 <= done <= 25
        assert stored(server) == [one.body for one in sent[:done]]
        ask(server.port, f"STREAM.PURGE.{STREAM}")
        await transport.publish(sent[done : done + 10])
        assert stored(server) == [one.body for one in sent[done : done + 10]]
        await transport.close()

    run(main())


def test_an_event_that_only_the_stream_finds_too_large(server: NatsServer) -> None:
    make(server, max_msg_size=2000)
    sent = [*events(300), event(300, size=2001), *events(200, start=301)]

    async def main() -> None:
        transport = nats_transport(server, declare=False)
        await transport.connect()
        with pytest.raises(PublishError) as caught:
            await transport.publish(sent)
        assert type(caught.value.error) is EventRejectedError
        assert caught.value.confirmed == 300
        assert "max_msg_size" in str(caught.value)
        await transport.publish(sent[301:])
        await transport.close()

    run(main())
    assert stored(server) == [one.body for one in sent if one is not sent[300]]


# Deleted, replaced, restarted.


def test_a_stream_that_another_one_has_replaced(server: NatsServer) -> None:
    """The new one confirms what we send; but it is not ours."""

    async def main() -> None:
        transport = nats_transport(server)
        await publish(transport, events(10))
        ask(server.port, f"STREAM.DELETE.{STREAM}")
        make(server, "ANOTHER")
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(10, start=10))
        assert type(caught.value.error) is NotConnectedError
        assert caught.value.confirmed == 0
        await transport.close()
        with pytest.raises(TransportConfigurationError, match="overlap"):
            await transport.connect()
        await transport.close()

    run(main())


def test_a_deleted_stream_is_noticed_although_someone_listens(server: NatsServer) -> None:
    """With a plain subscriber of the subjects NATS doesn't say that nobody took the event."""

    async def main() -> None:
        transport, listening = nats_transport(server, ack_timeout=0.5), nats_transport(server)
        first = await transport.connect()
        await listening.connect()
        async with contextlib.aclosing(listening.tail()) as subscription:
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0.2)
            ask(server.port, f"STREAM.DELETE.{STREAM}")
            began = time.monotonic()
            with pytest.raises(PublishError) as caught:
                await transport.publish(events(10))
            assert type(caught.value.error) is NotConnectedError
            assert time.monotonic() - began < 2
            assert (await waiting).body == events(1)[0].body
        await transport.close()
        assert await transport.connect() != first
        await transport.publish(events(10))
        await transport.close()
        await listening.close()

    run(main())
    assert stored(server) == [one.body for one in events(10)]


def test_a_reader_of_old_events_is_told_when_the_stream_goes(server: NatsServer) -> None:
    async def main() -> None:
        transport = nats_transport(server)
        await publish(transport, events(10))
        async with contextlib.aclosing(transport.tail(oldest=True)) as subscription:
            for _ in range(10):
                await anext(subscription)
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0.1)
            ask(server.port, f"STREAM.DELETE.{STREAM}")
            with pytest.raises(NotConnectedError):
                await waiting
        with pytest.raises(NotConnectedError):
            async with contextlib.aclosing(transport.tail(oldest=True)) as subscription:
                await anext(subscription)
        await transport.close()

    run(main())


def test_identity_changes_only_with_the_stream(server: NatsServer) -> None:
    async def main() -> None:
        transport = nats_transport(server)
        first = await transport.connect()
        await transport.publish(events(10))
        ask(server.port, f"STREAM.PURGE.{STREAM}")
        await asyncio.to_thread(server.restart)
        await transport.close()
        assert await transport.connect() == first
        ask(server.port, f"STREAM.DELETE.{STREAM}")
        second = await transport.connect()
        assert second != first
        await transport.close()
        assert await transport.connect() == second
        await transport.close()

    run(main())


def test_duplicates_are_known_after_a_restart(server: NatsServer) -> None:
    async def main() -> None:
        transport = nats_transport(server)
        await publish(transport, events(50))
        server.kill()
        server.start()
        await transport.close()
        await publish(transport, events(60))
        await transport.close()

    run(main())
    assert stored(server) == [one.body for one in events(60)]


# A cluster.


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NatsServer]]:
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
    servers = [
        nats_server(
            tmp_path_factory.mktemp("cluster"),
            f"server_name: n{number}\n"
            f'cluster {{ name: c, listen: "127.0.0.1:{port}", routes: [ {routes} ] }}\n'
            "http: 127.0.0.1:-1",
        )
        for number, port in enumerate(ports)
    ]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        limits = {"max_bytes": 2**24, "replicas": 3}
        transport = nats_transport(*servers, limits=limits, connect_timeout=0.5)
        end = time.monotonic() + 20
        while True:
            try:
                connect(transport)
                break
            except (NotConnectedError, TransportConfigurationError):
                assert time.monotonic() < end
                time.sleep(0.1)
        yield servers


def test_what_a_consumer_without_limits_makes_is_as_safe_as_the_stream_for_everybody(
    cluster: list[NatsServer],
) -> None:
    options = NatsOptions.model_validate({"servers": [node.url for node in cluster]}).for_consumer()

    async def main() -> None:
        transport = NatsTransport(options)
        await transport.connect()
        await transport.publish([event(0)])
        subscription = await transport.subscribe("router", oldest=True)
        (delivery,) = await subscription.receive(1, 30.0)
        await delivery.reject({"orthanc-reason": "no"})
        await subscription.close()
        await transport.close()

    run(main())
    with contextlib.closing(RawNats(cluster[0].port)) as client:
        for name in ("INBOX", "DEAD"):
            config = client.api(f"STREAM.INFO.{STREAM}_{name}")["config"]
            assert (config["num_replicas"], config["storage"]) == (3, "file")


@pytest.mark.parametrize("limits", [{}, {"max_age": "7d", "duplicate_window": "1m"}])
def test_what_a_consumer_makes_before_the_bridge(server: NatsServer, limits: dict[str, Any]) -> None:
    """Without limits it is what a bridge without limits makes; another one says what differs."""
    plain = {"servers": [server.url]}
    bridge = NatsTransport(NatsOptions.model_validate({**plain, "limits": limits}))
    if limits:  # the bridge first: its limits are those of the consumer's own streams too
        connect(bridge)

    async def main() -> None:
        consumer = NatsTransport(NatsOptions.model_validate(plain).for_consumer())
        await consumer.connect()
        await consumer.publish([event(0)])
        subscription = await consumer.subscribe("router", oldest=True)
        (delivery,) = await subscription.receive(1, 30.0)
        await delivery.reject({"orthanc-reason": "no"})
        await subscription.close()
        await consumer.close()

    run(main())
    connect(bridge)
    connect_inbox(bridge)
    other = NatsTransport(NatsOptions.model_validate({**plain, "limits": {"max_age": "1d"}}))
    assert "max_age is" in refusal(other, TransportConfigurationError, within=30)


def connect_inbox(transport: NatsTransport) -> None:
    """As a replay does it."""

    async def main() -> None:
        inbox = transport.inbox("router")
        await inbox.connect()
        await inbox.close()

    run(main())


def test_a_refusal_that_overtakes_confirmations_is_no_other_events(cluster: list[NatsServer]) -> None:
    """In a cluster the leader refuses before it has stored what came before; this must not be mixed up."""
    with contextlib.closing(RawNats(cluster[0].port)) as client:
        info = client.api(f"STREAM.INFO.{STREAM}")
        assert info["config"]["num_replicas"] == 3
        client.api(f"STREAM.UPDATE.{STREAM}", **(info["config"] | {"max_msg_size": 2000}))

    async def main() -> None:
        transport = nats_transport(*cluster, declare=False)
        await transport.connect()
        for start in range(0, 1000, 200):
            sent = [*events(150, start=start), event(start + 150, size=2001), *events(49, start=start + 151)]
            with pytest.raises(PublishError) as caught:
                await transport.publish(sent)
            assert type(caught.value.error) is EventRejectedError
            assert caught.value.confirmed == 150
            await transport.publish(sent[151:])
        await transport.close()

    run(main())


@pytest.mark.slow
def test_a_server_of_a_cluster_that_dies(cluster: list[NatsServer]) -> None:
    sent, failures = events(3000, start=10_000), set()

    async def main() -> None:
        transport, done, killed = nats_transport(*cluster, declare=False, connect_timeout=2), 0, False
        while done < len(sent):
            try:
                await transport.connect()
                while done < len(sent):
                    await transport.publish(sent[done : done + 100])
                    done += 100
                    if done >= 1000 and not killed:
                        killed = True
                        leader = ask(cluster[0].port, f"STREAM.INFO.{STREAM}")["cluster"]["leader"]
                        cluster[int(leader[1:])].kill()
            except PublishError as error:
                failures.add(type(error.error))
                done += error.confirmed
                await transport.close()
            except NotConnectedError:
                await transport.close()
                await asyncio.sleep(0.1)
        await transport.close()

    run(main())
    assert failures == {NotConnectedError}
    alive = next(one for one in cluster if one.running)
    bodies = [message.body for message in read_stream(alive.port, STREAM)][-len(sent) :]
    assert bodies == [one.body for one in sent]
