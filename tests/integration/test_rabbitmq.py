"""What bites with RabbitMQ (docs: section 5 of the design), against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiormq
import pytest

from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.errors import (
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer
from orthanc_events_bridge.testing.servers import free_port
from orthanc_events_bridge.transports.base import Outgoing, PublishError
from orthanc_events_bridge.transports.rabbitmq import RabbitTransport
from tests.contract.harness import connect, event, events, run
from tests.contract.link import Link
from tests.contract.rabbitmq_harness import administrate, read_stream
from tests.contract.rabbitmq_tools import check_refusal, rabbit_server, rabbit_transport, refusal, until, url
from tests.contract.relay_tools import Notebook, Rows, quickly

pytestmark = pytest.mark.integration

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    with rabbit_server(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


class Place:
    """An exchange and a history of a test's own on the server that tests share."""

    def __init__(self, server: RabbitServer) -> None:
        self.server = server
        self.exchange = f"orthanc.place{next(_numbers)}"
        self.history = f"{self.exchange}.history"

    def transport(self, *servers: RabbitServer | str, **options: Any) -> RabbitTransport:
        names = {"exchange": self.exchange, "history": self.history}
        return rabbit_transport(*(servers or (self.server,)), **names, **options)

    def ids(self) -> list[str]:
        return [json.loads(message.body)["id"] for message in read_stream(url(self.server), self.history)]

    def do(self, *work: Any) -> Any:
        return administrate(url(self.server), *work)

    def bind(self, queue: str, key: str = "#", **arguments: Any) -> str:
        """Make a queue of a consumer's, bound to the exchange; return its name."""
        name = f"{self.exchange}.{queue}"
        given = {"x-" + option.replace("_", "-"): value for option, value in arguments.items()}
        self.do(
            lambda channel: channel.queue_declare(name, durable=True, arguments=given),
            lambda channel: channel.queue_bind(name, self.exchange, key),
        )
        return name

    def take(self, queue: str) -> list[str]:
        """The ids of the events in a classic or quorum queue, which is empty then."""

        async def all_of_it(channel: Any) -> list[str]:
            found: list[str] = []
            while (message := await channel.basic_get(queue, no_ack=True)).body:
                found.append(json.loads(message.body)["id"])
            return found

        found: list[str] = self.do(all_of_it)
        return found


@pytest.fixture
def place(server: RabbitServer) -> Place:
    return Place(server)


def ids(sent: list[Outgoing]) -> list[str]:
    return [one.id for one in sent]


# Answers that must not be mixed up.


def test_two_sends_of_one_event_do_not_swap_their_results(place: Place) -> None:
    """Client libraries tell a returned message by its message id: with the event's own, it would be the wrong one."""
    routable, not_routable = event(0), event(1)._replace(id=event(0).id)
    place.do(
        lambda channel: channel.exchange_declare(place.exchange, exchange_type="topic", durable=True),
        lambda channel: channel.queue_declare(place.history, durable=True, arguments={"x-queue-type": "stream"}),
        lambda channel: channel.queue_bind(place.history, place.exchange, "main.study.#"),
    )

    async def main(sent: list[Outgoing]) -> PublishError:
        transport = place.transport(declare=False)
        await transport.connect()
        with pytest.raises(PublishError) as caught:
            await transport.publish(sent)
        await transport.close()
        return caught.value

    for sent, confirmed, stored in [
        ([routable, not_routable], 1, []),
        ([not_routable, routable], 0, [1]),
        ([routable, not_routable, routable, not_routable, routable], 1, [2, 4]),
    ]:
        error = run(main(sent))
        check_refusal(error, TransportConfigurationError)
        assert (error.confirmed, sorted(error.stored)) == (confirmed, stored)
    assert len(place.ids()) == 5


def test_a_frozen_server_is_no_order_to_stop(place: Place) -> None:
    """Its silence reaches a caller of the client library as a bare ``CancelledError``."""

    async def main() -> None:
        transport = place.transport(ack_timeout=1, connect_timeout=1)
        await transport.connect()
        place.server.freeze()
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(10))
        check_refusal(caught.value, NotConnectedError)
        task = asyncio.current_task()
        assert task is not None and not task.cancelling()
        await transport.close()
        with pytest.raises(NotConnectedError):
            await transport.connect()

    async def ordered() -> None:
        """And a real order is obeyed at once, in whatever it meets us."""
        for frozen_before in (False, True):
            transport = place.transport()
            if not frozen_before:
                await transport.connect()
            place.server.freeze()
            work = transport.connect() if frozen_before else transport.publish(events(10))
            task = asyncio.ensure_future(work)
            await asyncio.sleep(0.2)
            task.cancel()
            began = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await task
            await transport.close()
            assert time.monotonic() - began < 3
            place.server.thaw()

    try:
        run(main())
        place.server.thaw()
        run(ordered())
    finally:
        place.server.thaw()


def test_bodies_that_just_fill_their_frames(place: Place) -> None:
    """We write frames ourselves: a frame too many or too few, and the server ends the connection."""
    room = 131072 - 8  # RabbitMQ's frame_max, and a frame's own bytes
    sizes = [0, 1, room - 1, room, room + 1, 2 * room, 2 * room + 1, 5 * room, 3]
    sent = [event(number)._replace(body=os.urandom(size)) for number, size in enumerate(sizes)]

    async def main() -> None:
        transport = place.transport()
        await transport.connect()
        await transport.publish(sent)
        await transport.publish(sent)  # in one go: now it is known that large ones are taken
        await transport.close()

    run(main())
    found = [message.body for message in read_stream(url(place.server), place.history)]
    assert found == 2 * [one.body for one in sent]


# A server that takes nothing, a queue that takes nothing.


@pytest.mark.parametrize(
    ("on", "off", "word"),
    [
        (["set_vm_memory_high_watermark", "0"], ["set_vm_memory_high_watermark", "absolute", "2GB"], "memory"),
        (["set_disk_free_limit", "1000000GB"], ["set_disk_free_limit", "1MB"], "disk"),
    ],
)
def test_an_alarm_is_named_and_over_by_itself(place: Place, on: list[str], off: list[str], word: str) -> None:
    sent = events(60)

    async def main() -> None:
        transport = place.transport()
        await transport.connect()
        await transport.publish(sent[:20])
        await asyncio.to_thread(place.server.ctl, *on)
        done = 20
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(PublishError) as caught:
                await transport.publish(sent[done:])
            assert time.monotonic() - began < 10  # its patience is longer
            check_refusal(caught.value, RefusedError)
            assert f"alarm is on: low on {word}" in str(caught.value)
            done += caught.value.confirmed
        assert done < 40
        await transport.connect()
        await asyncio.to_thread(place.server.ctl, *off)
        end = time.monotonic() + 30
        while True:
            try:
                await transport.publish(sent[done:])
                break
            except PublishError as error:
                done += error.confirmed
                if not isinstance(error.error, RefusedError) or time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)
        await transport.close()

    try:
        run(main())
    finally:
        place.server.ctl(*off)
    found = place.ids()
    assert list(dict.fromkeys(found)) == ids(sent)
    assert len(found) <= len(sent) + 40  # one batch at most was under way when it began


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_one_full_queue_refuses_while_others_accept(place: Place, kind: str) -> None:
    count, room, batch = 300, 100, 10
    rows, notebook = Rows(count), Notebook()
    connect(place.transport())
    full = place.bind("full", queue_type=kind, max_length=room, overflow="reject-publish")
    other = place.bind("other")
    refusals: list[float] = []

    async def sleep(seconds: float) -> None:
        refusals.append(seconds)
        await quickly(seconds)

    async def main() -> None:
        relay = Relay("there", place.transport, "kind", batch, lambda name: True, rows, notebook, sleep=sleep)
        relay.drain()
        running = asyncio.create_task(relay.run())
        for rounds in (1, 2):
            enough = len(refusals) + 5
            await until(lambda enough=enough: len(refusals) > enough)
            status = relay.status()
            assert status["state"] == "refused" and "is refusing" in status["last_error"]["message"]
            # A quorum queue takes a few more than its limit.
            assert rounds * room <= relay.position < (rounds + 0.5) * room
            place.do(lambda channel: channel.queue_purge(full))
        await running

    run(main(), seconds=120)
    assert notebook.kept.position == count
    everything = place.ids()
    first = list(dict.fromkeys(everything))
    # The other queues have a copy of an event for each time that it was refused: of a whole batch once, then of one.
    copies = len(everything) - count
    assert len(first) == count and 10 < copies <= 2 * batch + len(refusals)
    assert sorted(place.take(other)) == sorted(everything)
    assert set(first[-room // 2 :]) <= set(place.take(full))


# Nobody takes it.


def test_a_history_that_was_unbound_is_bound_again(place: Place) -> None:
    async def main() -> None:
        transport = place.transport()
        first = await transport.connect()
        await transport.publish(events(10))
        place.do(lambda channel: channel.queue_unbind(place.history, place.exchange, "#"))
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(10, start=10))
        check_refusal(caught.value, NotConnectedError)
        assert caught.value.confirmed == 0 and "no queue" in str(caught.value)
        await transport.close()
        assert await transport.connect() == first
        await transport.publish(events(10, start=10))
        await transport.close()

    run(main())
    assert place.ids() == ids(events(20))


def test_a_history_that_is_deleted_while_another_queue_is_bound(place: Place) -> None:
    """Nothing comes back then, and every event is confirmed."""
    connect(place.transport())
    place.bind("other")

    async def main() -> None:
        transport = place.transport()
        first = await transport.connect()
        await transport.publish(events(10))
        place.do(lambda channel: channel.queue_delete(place.history))
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(10, start=10))
        check_refusal(caught.value, NotConnectedError)
        assert place.history in str(caught.value)
        await transport.close()
        assert await transport.connect() not in ("", first)
        await transport.publish(events(10, start=20))
        await transport.close()

    run(main())
    assert place.ids() == ids(events(10, start=20))


def test_an_exchange_that_is_deleted_in_mid_stream(place: Place) -> None:
    sent = events(4000)

    async def main() -> None:
        transport = place.transport()
        await transport.connect()
        deleting = asyncio.create_task(asyncio.to_thread(place.do, delete))
        with pytest.raises(PublishError) as caught:
            await publish_for_ever(transport)
        check_refusal(caught.value, NotConnectedError)
        await deleting
        await transport.close()
        await transport.connect()
        await transport.publish(sent[:100])
        await transport.close()

    async def publish_for_ever(transport: RabbitTransport) -> None:
        for first in itertools.cycle(range(0, len(sent), 100)):
            await transport.publish(sent[first : first + 100])

    def delete(channel: Any) -> Any:
        return channel.exchange_delete(place.exchange)

    run(main())
    assert place.ids()[-100:] == ids(sent[:100])


@pytest.mark.parametrize("declare", [True, False])
def test_a_history_that_was_there_before_us_is_deleted_and_gets_everything_again(place: Place, declare: bool) -> None:
    make = (
        lambda channel: channel.queue_declare(place.history, durable=True, arguments={"x-queue-type": "stream"}),
        lambda channel: channel.queue_bind(place.history, place.exchange, "#"),
    )
    connect(place.transport())
    rows, notebook = Rows(100), Notebook()

    async def main() -> None:
        def another() -> RabbitTransport:
            return place.transport(declare=declare)

        relay = Relay("there", another, "kind", 50, lambda name: True, rows, notebook, sleep=quickly)
        running = asyncio.create_task(relay.run())
        await until(lambda: relay.position == 100)
        await asyncio.to_thread(
            place.do, lambda channel: channel.queue_delete(place.history), *(() if declare else make)
        )
        rows.all.append(Rows(101).all[100])
        relay.drain()
        await running

    run(main(), seconds=60)
    assert len(place.ids()) == 101


# A place that can't be used as it is.


def test_a_history_that_is_somebody_elses_exclusive_queue(place: Place) -> None:
    async def main() -> None:
        other = await aiormq.connect(url(place.server))
        channel = await other.channel()
        await channel.queue_declare(place.history, exclusive=True)
        transport = place.transport()
        with pytest.raises(TransportConfigurationError) as caught:
            await transport.connect()
        check_refusal(caught.value, TransportConfigurationError)
        assert place.history in str(caught.value) and "exclusive" in str(caught.value)
        await other.close()
        assert await transport.connect()
        await transport.publish(events(3))
        await transport.close()

    run(main())


@pytest.mark.parametrize(
    ("exchange", "queue", "words"),
    [
        ({"exchange_type": "direct"}, None, ["type is direct, wanted topic"]),
        ({"durable": False}, None, ["durable is false, wanted true"]),
        ({"internal": True}, None, ["internal is true, wanted false"]),
        ({"auto_delete": True}, None, ["auto_delete is true, wanted false"]),
        (None, {}, ["is none, wanted"]),
        (None, {"x-queue-type": "quorum"}, ["is none, wanted"]),
        (None, {"x-max-length-bytes": 1000}, ["x-max-length-bytes is 1000, wanted 10737418240"]),
        (None, {"x-max-age": "1h"}, ["x-max-age is 1h, wanted 30D"]),
        (
            None,
            {"x-stream-max-segment-size-bytes": 1000},
            ["x-stream-max-segment-size-bytes is 1000, wanted 104857600"],
        ),
        ({"exchange_type": "fanout"}, {"x-max-age": "1h"}, ["type is fanout", "x-max-age is 1h"]),
    ],
)
def test_a_place_with_other_settings(
    place: Place, exchange: dict[str, Any] | None, queue: dict[str, Any] | None, words: list[str]
) -> None:
    stream = {"x-queue-type": "stream", "x-max-age": "30D", "x-max-length-bytes": 10 * 2**30}
    stream["x-stream-max-segment-size-bytes"] = 100 * 2**20
    if exchange is not None:
        settings = {"exchange_type": "topic", "durable": True} | exchange
        place.do(lambda channel: channel.exchange_declare(place.exchange, **settings))
    if queue is not None:
        arguments = stream | queue if queue and "x-queue-type" not in queue else queue
        place.do(lambda channel: channel.queue_declare(place.history, durable=True, arguments=arguments))
    transport = place.transport()
    for _ in range(2):
        text = refusal(transport, TransportConfigurationError)
        for word in words:
            assert word in text
    place.do(
        lambda channel: channel.exchange_delete(place.exchange), lambda channel: channel.queue_delete(place.history)
    )
    connect(transport)


def test_limits_are_written_as_rabbitmq_spells_them(place: Place) -> None:
    connect(place.transport(limits={"max_age": "36h", "max_bytes": 0, "segment_bytes": "1MiB"}))
    place.do(
        lambda channel: channel.queue_declare(
            place.history,
            durable=True,
            arguments={"x-queue-type": "stream", "x-max-age": "36h", "x-stream-max-segment-size-bytes": 2**20},
        )
    )
    lines = connect(place.transport(declare=False))
    assert "0 events" in lines[1]


# Several servers, and one that stops.


def test_a_dead_server_among_several(place: Place) -> None:
    dead = f"amqp://127.0.0.1:{free_port()}"
    transport = place.transport(dead, place.server, dead)

    async def main() -> None:
        first = await transport.connect()
        await transport.publish(events(3))
        await transport.close()
        assert await transport.connect() == first
        await transport.close()

    run(main())
    text = refusal(place.transport(dead, dead), NotConnectedError)
    assert f"{dead} can't be reached: Connection refused (start RabbitMQ" in text
    for servers in ((place.server, dead), (dead, place.server)):
        transport = place.transport(*servers, user="guest", password="wrong")
        assert "credentials" in refusal(transport, TransportConfigurationError)


def test_a_silent_server_among_several(place: Place) -> None:
    """It takes connections and answers nothing, when we come and while we are there: the next one is tried."""
    dead = f"amqp://127.0.0.1:{free_port()}"

    async def come(transport: RabbitTransport) -> None:
        await transport.connect()
        await transport.publish(events(3))
        await transport.close()

    async def be_there(transport: RabbitTransport, link: Link) -> None:
        await transport.connect()
        await transport.publish(events(3, start=3))
        link.swallows = True
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(3, start=6))
        assert type(caught.value.error) is NotConnectedError
        await transport.close()
        await transport.connect()
        await transport.publish(events(3, start=6))
        await transport.close()

    with contextlib.closing(Link(place.server.port)) as link:
        silent = f"amqp://127.0.0.1:{link.port}"
        link.swallows = True
        run(come(place.transport(dead, silent, place.server, connect_timeout=1.0)))
        link.swallows = False
        run(be_there(place.transport(silent, dead, place.server, connect_timeout=1.0, ack_timeout=1.0), link))
    sent = [one.id for one in events(9)]
    assert [one for number, one in enumerate(place.ids()) if one not in place.ids()[:number]] == sent


class Idle(Link):
    """A server that lets everybody in, and never does anything with an event."""

    def _read(self, source: socket.socket, chunks: Any, is_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_client and b"orthanc-event-id" in data:
                    source.recv(65536)  # until the client gives up
                    break
                chunks.put((0.0, data))
        chunks.put((0.0, b""))


def test_a_server_that_lets_us_in_and_does_no_work_is_left_for_the_next(place: Place) -> None:
    """As one in the lesser part of a cluster that is torn apart."""
    idle = Idle(place.server.port)
    rows, notebook = Rows(50), Notebook()

    async def main() -> None:
        def make() -> RabbitTransport:
            return place.transport(f"amqp://127.0.0.1:{idle.port}", place.server, ack_timeout=2)

        relay = Relay("there", make, "kind", 10, lambda name: True, rows, notebook, sleep=quickly)
        relay.drain()
        await relay.run()

    try:
        run(main(), seconds=60)
    finally:
        idle.close()
    assert len(place.ids()) == 50


def test_a_name_whose_first_address_swallows_everything(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an IPv6 address does where packets to it are dropped: it must not take all the time that there is."""
    port = place.server.port
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
        for _ in range(3):  # its queue is full: nothing that comes now is answered
            waiting = stack.enter_context(contextlib.closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())

        async def main() -> None:
            loop = asyncio.get_running_loop()
            ask = loop.getaddrinfo

            async def addresses(host: str, *arguments: Any, **options: Any) -> list[Any]:
                known = ["127.0.0.2", "127.0.0.1"] if host == "rabbit.test" else [host]
                return [found for one in known for found in await ask(one, *arguments, **options)]

            monkeypatch.setattr(loop, "getaddrinfo", addresses)
            transport = place.transport(f"amqp://rabbit.test:{port}")
            await transport.connect()
            await transport.publish(events(3))
            await transport.close()

        run(main())
    assert place.ids() == ids(events(3))


def test_a_server_that_is_stopped_has_not_lost_its_history(tmp_path: Path) -> None:
    """Its consumers are told of an end as they are of a deletion."""

    async def main(server: RabbitServer) -> None:
        transport = rabbit_transport(server)
        first = await transport.connect()
        await transport.publish(events(100))
        for _ in range(2):
            stopping = asyncio.create_task(asyncio.to_thread(server.restart))
            with contextlib.suppress(PublishError):
                while not stopping.done():
                    await transport.publish(events(1, start=1000))
            await transport.close()
            await stopping
            assert await transport.connect() == first
        await transport.publish(events(100, start=100))
        await transport.close()

    with rabbit_server(tmp_path) as server:
        run(main(server), seconds=120)
        found = [json.loads(message.body)["id"] for message in read_stream(url(server), "orthanc.events.history")]
    assert [one for one in found if one != event(1000).id] == ids(events(200))


# Protections, and what they prevent.


def test_events_outlast_a_restart_in_a_classic_queue_too(server: RabbitServer) -> None:
    """Streams and quorum queues keep everything; a classic one, durable as it may be, what is marked as persistent."""
    found = {}
    for without in ((), ("persistent",)):
        place = Place(server)
        connect(place.transport())
        queue = place.bind("classic")

        async def main(place: Place = place, without: tuple[str, ...] = without) -> None:
            transport = place.transport()
            transport.without = frozenset(without)
            await transport.connect()
            await transport.publish(events(10))
            await transport.close()

        run(main())
        found[without] = place, queue
    server.restart()
    assert {without: len(place.take(queue)) for without, (place, queue) in found.items()} == {
        (): 10,
        ("persistent",): 0,
    }


@pytest.mark.parametrize("without", [(), ("mandatory",)])
def test_an_event_that_no_queue_takes_is_not_lost_in_silence(place: Place, without: tuple[str, ...]) -> None:
    async def main() -> PublishError | None:
        transport = place.transport()
        transport.without = frozenset(without)
        await transport.connect()
        place.do(lambda channel: channel.queue_unbind(place.history, place.exchange, "#"))
        try:
            await transport.publish(events(3))
        except PublishError as error:
            return error
        finally:
            await transport.close()
        return None

    error = run(main())
    assert place.ids() == []
    assert (error is None) == bool(without)
