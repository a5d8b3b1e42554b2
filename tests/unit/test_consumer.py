"""A consumer on a broker in memory: what becomes of each delivery."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest

from orthanc_events_bridge.consumers import Consumer, Event, Reject, Retry, RetryPolicy
from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.health import Health
from orthanc_events_bridge.consumers.worker import Worker
from orthanc_events_bridge.errors import BridgeError, NotConnectedError, OrthancError, RefusedError, TransportError
from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery, Outgoing
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport
from orthanc_events_bridge.transports.memory_subscription import MemoryDelivery
from orthanc_events_bridge.transports.options import MemoryOptions

QUICK = RetryPolicy(max_attempts=3, initial=0.0, maximum=0.0)


def outgoing(number: int, name: str = "study.stable", key: str = "study-1", body: bytes | None = None) -> Outgoing:
    level, _, verb = name.partition(".")
    event = {
        "specversion": "1.0",
        "id": f"id-{number}",
        "source": "urn:orthanc",
        "type": f"io.orthanc-events.{name}.v1",
        "time": "2026-11-27T08:00:00Z",
        "partitionkey": key,
        "data": {"change": "StableStudy", "level": level, "id": key, "parents": {"patient": "patient-1"}},
    }
    content = json.dumps(event).encode() if body is None else body
    return Outgoing(f"id-{number}", "main", level, verb, key, "00", "application/cloudevents+json", content)


def app(**options: Any) -> Consumer:
    return Consumer("one", broker={"type": "memory"}, start="oldest", **{"retry": QUICK, **options})


def run(consumer: Consumer, broker: Broker, until: Callable[[], bool]) -> None:
    """Let it work until something is so, and stop it."""

    async def main() -> None:
        transport = MemoryTransport(MemoryOptions(), broker)
        worker = Worker(transport, consumer._terms, consumer._routes, Clients(None), consumer.meter)
        working = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            while not until():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        worker.stop()
        await working

    asyncio.run(main())


def settled(broker: Broker) -> bool:
    """Is nothing left to be given?"""
    name = broker.names.get("one")
    return name is not None and name._position == len(broker.messages) and not name.held and not name._again


def test_each_event_is_handled_once_by_the_handlers_of_its_type() -> None:
    broker, consumer, seen = Broker(), app(), []

    @consumer.on("study.stable")
    async def one(event: Event) -> None:
        seen.append(("one", event.id))

    @consumer.on("*.stable", "job.*")
    def many(event: Event) -> None:
        seen.append(("many", event.id))

    for number, name in enumerate(["study.stable", "series.stable", "job.failed", "study.deleted"]):
        broker.store(outgoing(number, name))
    run(consumer, broker, lambda: settled(broker))
    assert sorted(seen) == [("many", "id-0"), ("many", "id-1"), ("many", "id-2"), ("one", "id-0")]
    assert consumer.meter.counts == {
        ("handled", "study.stable"): 1,
        ("handled", "series.stable"): 1,
        ("handled", "job.failed"): 1,
        ("ignored", "study.deleted"): 1,
    }


def test_what_fails_is_given_again_and_then_a_dead_letter_with_the_reason() -> None:
    broker, consumer, attempts = Broker(), app(), []

    @consumer.on("study.stable")
    async def fails(event: Event) -> None:
        attempts.append((event.attempt, event.operation))
        raise ValueError("Doe^Jane")

    sent = outgoing(0)
    broker.store(sent)
    run(consumer, broker, lambda: bool(broker.dead))
    assert attempts == [(1, ""), (2, "retry"), (3, "retry")]
    (letter,) = broker.dead["one"]
    assert letter.body == sent.body
    headers = letter.headers
    assert headers["orthanc-reason"] == "failed 3 times of 3"
    assert headers["orthanc-exception"] == "ValueError"
    assert headers["orthanc-attempts"] == "3"
    assert headers["orthanc-consumer"] == "one"
    assert headers["orthanc-address"] == sent.address
    assert headers["orthanc-first-failure"] <= headers["orthanc-last-failure"]
    assert headers["content-type"] == "application/cloudevents+json"
    assert "Doe" not in repr(headers)
    assert consumer.meter.total("dead") == 1 and consumer.meter.total("retried") == 2


def test_what_our_own_errors_say_is_in_the_reason() -> None:
    broker, consumer = Broker(), app()

    @consumer.on("study.stable")
    async def fails(event: Event) -> None:
        raise OrthancError("Orthanc knows no modality pacs", "add it")

    broker.store(outgoing(0))
    run(consumer, broker, lambda: bool(broker.dead))
    (letter,) = broker.dead["one"]
    assert letter.headers["orthanc-reason"] == "failed 3 times of 3: Orthanc knows no modality pacs (add it)"


def test_a_handler_says_again_or_never() -> None:
    broker, consumer, seen = Broker(), app(), []

    @consumer.on("study.stable")
    def again(event: Event) -> None:
        seen.append(event.attempt)
        if event.attempt == 1:
            raise Retry(after=0)

    @consumer.on("series.stable")
    def never(event: Event) -> None:
        raise Reject("no such modality")

    broker.store(outgoing(0))
    broker.store(outgoing(1, "series.stable"))
    run(consumer, broker, lambda: settled(broker))
    assert seen == [1, 2]
    (letter,) = broker.dead["one"]
    assert letter.headers["orthanc-reason"] == "no such modality"
    assert "orthanc-exception" not in letter.headers


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\x00", "it is no CloudEvent"),
        (b"[" * 100_000, "it is no CloudEvent"),
        (b"{}", "it is no CloudEvent"),
        (b'{"specversion": "1.0", "id": "5", "source": "s", "type": "a.study.stable.v1"} 5', "it is no CloudEvent"),
        (b'{"specversion": "1.0", "id": 5, "source": "s", "type": "t"}', "without id"),
        (b'{"specversion": "0.3", "id": "5", "source": "s", "type": "t"}', "another version"),
        (b'{"specversion": "1.0", "id": "5", "source": "s", "type": "io.study.stable.v2"}', "version v2"),
        (b'{"specversion": "1.0", "id": "5", "source": "s", "type": "com.example.order"}', "another kind"),
        (b'{"specversion": "1.0", "id": "5", "source": "s", "type": "a.study.stable.v1", "data": 5}', "no JSON object"),
        (b'{"specversion": "1.0", "id": "5", "source": "s", "type": "a.study.stable.v1", "time": "5"}', "time"),
    ],
)
def test_what_is_no_event_of_ours_is_a_dead_letter_and_stops_nobody(body: bytes, reason: str) -> None:
    broker, consumer, seen = Broker(), app(), []

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        seen.append(event.id)

    broker.store(outgoing(0, body=body))
    broker.store(outgoing(1))
    run(consumer, broker, lambda: settled(broker) and bool(seen))
    (letter,) = broker.dead["one"]
    assert letter.body == body and reason in letter.headers["orthanc-reason"]
    assert seen == ["id-1"]


def test_events_of_another_producer_can_be_asked_for_by_their_whole_type() -> None:
    broker, consumer, seen = Broker(), app(), []

    @consumer.on("com.example.order")
    async def handler(event: Event) -> None:
        seen.append((event.name, dict(event.data), event.ours))

    broker.store(
        outgoing(
            0,
            body=b'{"specversion": "1.0", "id": "5", "source": "s", "type": "com.example.order", "data": {"a": 1}}',
        )
    )
    run(consumer, broker, lambda: bool(seen))
    assert seen == [("com.example.order", {"a": 1}, False)]


def test_events_of_one_key_wait_for_each_other_and_others_do_not() -> None:
    broker, consumer = Broker(), app(concurrency=8)
    running: dict[str, int] = {}
    most: dict[str, int] = {}
    order: list[str] = []
    together = 0

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        nonlocal together
        running[event.key] = running.get(event.key, 0) + 1
        most[event.key] = max(most.get(event.key, 0), running[event.key])
        together = max(together, sum(running.values()))
        for _ in range(5):
            await asyncio.sleep(0)
        running[event.key] -= 1
        order.append(event.id)

    for number in range(40):
        broker.store(outgoing(number, key=f"study-{number % 4}"))
    run(consumer, broker, lambda: len(order) == 40)
    assert set(most.values()) == {1}
    assert together == 4
    for key in range(4):
        assert [one for one in order if int(one[3:]) % 4 == key] == [f"id-{n}" for n in range(40) if n % 4 == key]


def test_no_more_handlers_run_than_are_allowed() -> None:
    broker, consumer = Broker(), app(concurrency=3)
    running, most, lock, done = 0, 0, threading.Lock(), []
    gate = threading.Barrier(3)

    @consumer.on("study.stable")
    def handler(event: Event) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with suppress(threading.BrokenBarrierError):
            gate.wait(5)
        with lock:
            running -= 1
            done.append(event.id)

    for number in range(9):
        broker.store(outgoing(number, key=f"study-{number}"))
    run(consumer, broker, lambda: len(done) == 9)
    assert most == 3


def test_a_place_of_dead_letters_that_takes_nothing_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthanc_events_bridge.consumers.handling._AGAIN", 0.0)
    broker, consumer = Broker(), app()
    asked = 0

    def refuse() -> RefusedError | None:
        nonlocal asked
        asked += 1
        return RefusedError("full", "make room") if asked < 4 else None

    broker.refuse_dead = refuse

    @consumer.on("study.stable")
    def handler(event: Event) -> None:
        raise Reject("no")

    broker.store(outgoing(0))
    run(consumer, broker, lambda: settled(broker) and bool(broker.dead))
    assert asked == 4 and len(broker.dead["one"]) == 1


@pytest.mark.parametrize("error", [RefusedError("full", "wait"), NotConnectedError("lost", "wait")])
def test_a_dead_letter_waits_until_it_can_be_told(error: TransportError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the connection for publishing that is lost: that is not the one that holds the delivery."""
    monkeypatch.setattr("orthanc_events_bridge.consumers.handling._AGAIN", 0.0)
    broker, consumer = Broker(), app()
    reasons: list[str] = []

    async def told(event: Event, reason: str) -> None:
        reasons.append(reason)
        assert not broker.dead
        if len(reasons) < 4:
            raise error

    @consumer.on("study.stable", on_dead=told)
    def handler(event: Event) -> None:
        raise Reject("no")

    broker.store(outgoing(0))
    run(consumer, broker, lambda: settled(broker) and bool(broker.dead))
    assert reasons == ["no"] * 4 and len(broker.dead["one"]) == 1


def test_dead_letters_that_can_not_be_stored_hold_up_nobody_as_long_as_there_is_room() -> None:
    broker, consumer, seen = Broker(), app(concurrency=1, prefetch=4), []
    broker.refuse_dead = lambda: RefusedError("full", "make room")

    @consumer.on("study.stable")
    async def never(event: Event) -> None:
        raise Reject("no")

    @consumer.on("series.stable")
    async def handler(event: Event) -> None:
        seen.append(event.id)

    async def main() -> None:
        transport = MemoryTransport(MemoryOptions(), broker)
        worker = Worker(transport, consumer._terms, consumer._routes, Clients(None), consumer.meter)
        consumer._worker = worker
        health = Health([consumer])
        working = asyncio.create_task(worker.run())

        async def until(so: Callable[[], bool]) -> None:
            async with asyncio.timeout(10):
                while not so():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

        for number in range(3):
            broker.store(outgoing(number))
        for number in range(3, 10):
            broker.store(outgoing(number, "series.stable", f"series-{number}"))
        await until(lambda: len(seen) == 7)  # although its only handler would wait three times
        assert consumer.meter.waiting == 3
        assert health.answer("GET", "/health/ready")[0] == 200
        broker.store(outgoing(10))
        await until(lambda: worker.stuck)
        status, _, text = health.answer("GET", "/health/ready")
        assert status == 503 and b"dead letters" in text
        broker.refuse_dead = lambda: None
        await until(lambda: len(broker.dead.get("one", [])) == 4)
        await until(lambda: not worker.stuck)
        worker.stop()
        await working

    asyncio.run(main())
    assert consumer.meter.waiting == 0 and consumer.meter.total("dead") == 4


def test_a_retry_that_can_not_be_stored_is_held_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthanc_events_bridge.consumers.handling._AGAIN", 0.0)
    broker, consumer, attempts = Broker(), app(), []
    refused: list[int] = []
    nack = MemoryDelivery.nack

    async def refuse(self: MemoryDelivery, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        if len(refused) < 3:
            refused.append(self.attempt)
            raise RefusedError("full", "make room")
        await nack(self, delay, headers)

    monkeypatch.setattr(MemoryDelivery, "nack", refuse)

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        attempts.append(event.attempt)
        if event.attempt == 1:
            raise ValueError

    broker.store(outgoing(0))
    run(consumer, broker, lambda: settled(broker) and len(attempts) == 2)
    assert attempts == [1, 2] and refused == [1, 1, 1]
    assert consumer.meter.total("retried") == 1 and consumer.meter.waiting == 0


def test_dead_letters_that_can_not_be_stored_do_not_hold_up_the_end() -> None:
    broker, consumer = Broker(), app(drain=60.0)
    broker.refuse_dead = lambda: RefusedError("full", "make room")

    @consumer.on("study.stable")
    async def never(event: Event) -> None:
        raise Reject("no")

    broker.store(outgoing(0))
    run(consumer, broker, lambda: consumer.meter.waiting == 1)
    assert len(broker.names["one"].held) == 1 and not broker.dead  # it is the next one's


def test_what_one_event_sets_in_its_context_another_does_not_find() -> None:
    broker, consumer, seen = Broker(), app(concurrency=1), []
    mine: ContextVar[str] = ContextVar("mine", default="nothing")

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        seen.append(mine.get())
        mine.set(event.id)
        await asyncio.sleep(0)
        assert mine.get() == event.id

    for number in range(4):
        broker.store(outgoing(number, key=f"study-{number}"))
    run(consumer, broker, lambda: settled(broker) and len(seen) == 4)
    assert seen == ["nothing"] * 4 and not broker.dead


def test_a_cut_connection_is_made_again_and_what_was_held_comes_again() -> None:
    broker, consumer, seen = Broker(), app(), []

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        seen.append(event.attempt)
        if len(seen) == 1:
            broker.cut()
            await asyncio.sleep(0.05)

    broker.store(outgoing(0))
    run(consumer, broker, lambda: len(seen) == 2 and settled(broker))
    assert seen == [1, 2]
    assert consumer.meter.total("handled") == 2


def test_what_has_not_begun_when_it_stops_is_anothers_at_once_and_no_attempt_is_counted() -> None:
    broker, consumer, ended = Broker(), app(concurrency=1, prefetch=10), []

    async def main() -> None:
        begun, rest = asyncio.Event(), asyncio.Event()

        @consumer.on("study.stable")
        async def handler(event: Event) -> None:
            begun.set()
            await rest.wait()
            ended.append(event.id)

        for number in range(5):
            broker.store(outgoing(number, key=f"study-{number}"))
        transport = MemoryTransport(MemoryOptions(), broker)
        worker = Worker(transport, consumer._terms, consumer._routes, Clients(None), consumer.meter)
        working = asyncio.create_task(worker.run())
        await begun.wait()
        worker.stop()
        other = MemoryTransport(MemoryOptions(), broker)
        await other.connect()
        subscription = await other.subscribe("one")
        found: list[Delivery] = []
        async with asyncio.timeout(10):
            while len(found) < 4:
                found += await subscription.receive(10, 0.01)
        assert ended == [] and not working.done()  # it still runs
        assert [(one.message.headers["orthanc-event-id"], one.attempt) for one in found] == [
            (f"id-{number}", 1) for number in range(1, 5)
        ]
        rest.set()
        await working
        assert ended == ["id-0"]
        assert await subscription.receive(10, 0) == []

    asyncio.run(main())


def test_handlers_that_do_not_end_are_given_back() -> None:
    broker, consumer, begun, cancelled = Broker(), app(drain=0.0), asyncio.Event(), []

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(event.id)
            raise

    broker.store(outgoing(0))
    run(consumer, broker, begun.is_set)
    assert cancelled == ["id-0"] and len(broker.names["one"].held) == 1 and not broker.dead


def test_what_killed_its_workers_is_not_begun_again() -> None:
    broker, consumer, seen = Broker(), app(), []

    @consumer.on("study.stable")
    async def handler(event: Event) -> None:
        seen.append(event.attempt)

    broker.store(outgoing(0))

    async def die() -> None:
        for _ in range(23):  # three are allowed, and twenty more whose workers stopped before they began
            transport = MemoryTransport(MemoryOptions(), broker)
            await transport.connect()
            subscription = await transport.subscribe("one", oldest=True)
            assert len(await subscription.receive(1, 0)) == 1
            await subscription.close()

    asyncio.run(die())
    run(consumer, broker, lambda: bool(broker.dead))
    assert seen == []
    assert "kills its workers" in broker.dead["one"][0].headers["orthanc-reason"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Consumer("a b", broker="nats://h"), "can't be the name"),
        (lambda: Consumer("a", broker="http://h"), "no URL of a broker"),
        (lambda: Consumer("a", broker=""), "is empty"),
        (lambda: Consumer("a", broker={"type": "nats", "servres": []}), "servres"),
        (lambda: Consumer("a", broker="nats://h", concurrency=0), "concurrency: '0' is out of range"),
        (lambda: Consumer("a", broker="nats://h", start="old"), "start: 'old' is none of the choices"),  # type: ignore[arg-type]
        (lambda: Consumer("a", broker="nats://h", ordered=True, retry=RetryPolicy(maximum=301)), "would hold up"),
        (lambda: RetryPolicy(max_attempts=0), "max_attempts=0"),
        (lambda: RetryPolicy(initial=5, maximum=1), "maximum=1"),
        (lambda: app().on("study.stabel")(print), "study.stabel"),
        (lambda: app().on()(print), "no event"),
    ],
)
def test_a_mistake_is_said_at_once(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(BridgeError) as caught:
        make()
    assert words in str(caught.value) and (caught.value.remedy or "; " in str(caught.value))


def test_a_handler_that_can_not_be_called_is_refused() -> None:
    def handler(a: int, b: int, c: int) -> None: ...

    with pytest.raises(BridgeError, match="handler"):
        app().on("study.stable")(handler)


def test_waits_grow_to_the_longest_and_end_with_the_age() -> None:
    policy = RetryPolicy(max_attempts=None, initial=1, maximum=60, jitter=0.5, max_age=3600)
    assert [policy.delay(n, lambda: 0.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert policy.delay(2, lambda: 1.0) == 3
    assert policy.after(99, 3599, lambda: 0.0, asked=0.5).delay == 0.5  # type: ignore[union-attr]
    assert "max_age" in policy.after(99, 3599, lambda: 0.0, asked=2).reason  # type: ignore[union-attr]
    constant = RetryPolicy(backoff="constant", initial=7, maximum=7, jitter=0)
    assert [constant.delay(n, lambda: 0.9) for n in (1, 5, 2000)] == [7, 7, 7]
    assert policy.delay(10**6, lambda: 0.0) == 60
