"""Effects that are done once, on a store in memory and the kit's clock. On real stores: integration/test_stores.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from orthanc_events_bridge.consumers import Consumer, Event, Retry
from orthanc_events_bridge.consumers.once import Once, Turns
from orthanc_events_bridge.consumers.stores import Begun, Store, StoreError
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.moments import iso, seconds_of
from orthanc_events_bridge.testing.events import event

STUDY = event("study.stable", study="study-1")


def app(**options: Any) -> Consumer:
    return Consumer("one", **{"broker": "nats://127.0.0.1:1", "store": "broker", **options})


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_duplicate_is_told_from_a_first_time(kind: str) -> None:
    consumer, seen = app(), []

    async def coroutine(given: Event) -> None:
        async with consumer.once(given, "effect") as first:
            seen.append(first)

    def plain(given: Event) -> None:
        with consumer.once(given, "effect") as first:
            seen.append(first)

    consumer.on("study.*")(plain if kind == "sync" else coroutine)
    with consumer.test() as kit:
        kit.send(STUDY, STUDY, event("study.deleted", study="study-1"), STUDY)
        kit.assert_handled()
    assert seen == [True, False, True, False]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_failed_is_done_again(kind: str) -> None:
    consumer, attempts = app(), []

    def plain(given: Event) -> str:
        attempts.append(given.attempt)
        if given.attempt < 3:
            raise ValueError
        return "done"

    async def coroutine(given: Event) -> str:
        return plain(given)

    consumer.on("study.stable", once="effect")(plain if kind == "sync" else coroutine)
    with consumer.test() as kit:
        kit.send(STUDY)
        kit.finish()
        kit.send(STUDY)
        assert attempts == [1, 2, 3] and kit.results == ["done", None]
        kit.assert_retried(STUDY, 1, 2)  # at once: no lease is waited for
        assert kit.calls[0].handler.endswith("plain" if kind == "sync" else "coroutine")


def test_several_effects_of_one_event_are_apart() -> None:
    consumer, done = app(), []

    @consumer.on("study.stable")
    async def handler(given: Event) -> None:
        for effect in ("anonymize", "send"):
            async with consumer.once(given, effect) as first:
                if first:
                    done.append(effect)
                    if effect == "send" and given.attempt == 1:
                        raise ValueError

    with consumer.test() as kit:
        kit.send(STUDY)
        kit.finish()
        kit.assert_handled(STUDY)
    assert done == ["anonymize", "send", "send"]


def test_while_another_is_at_it_it_comes_again_when_the_lease_is_over() -> None:
    consumer, done = app(), []

    @consumer.on("study.stable", once="effect")
    async def handler(given: Event) -> None:
        done.append(given.attempt)

    with consumer.test() as kit:
        store = asyncio.run(consumer._turns.store())
        asyncio.run(store.begin(consumer._turns.key(STUDY, "effect"), "another", 45))
        kit.send(STUDY)
        kit.assert_retried(STUDY, 45)
        kit.advance(seconds=44)
        assert not done
        kit.advance(seconds=1)
        kit.assert_handled(STUDY)
    assert done == [2]


def test_an_effect_of_two_hours_outlasts_no_retry_policy() -> None:
    consumer, done = app(), []

    @consumer.on("study.stable", once="effect")
    async def handler(given: Event) -> None:
        done.append(given.attempt)

    with consumer.test() as kit:
        store = asyncio.run(consumer._turns.store())
        key = consumer._turns.key(STUDY, "effect")
        asyncio.run(store.begin(key, "another", 60))
        kit.send(STUDY)
        for _ in range(3 * 60):
            assert not kit.dead and not done
            asyncio.run(store.renew(key, "another", 60))
            kit.advance(seconds=20)
        assert len(kit.retried) < 20
        asyncio.run(store.finish(key, "another", 3600))
        kit.finish()
        kit.assert_handled(STUDY)
    assert not done


class Broken(Store):
    """A store that fails as often as it is told.

    :ivar fail: the names of what fails, once each.
    """

    def __init__(self, *fail: str) -> None:
        self.fail = list(fail)
        self.said: list[str] = []

    def _said(self, what: str) -> None:
        self.said.append(what)
        if what in self.fail:
            self.fail.remove(what)
            raise StoreError(f"no {what}", "wait")

    async def open(self) -> None:
        self._said("open")

    async def begin(self, key: str, owner: str, lease: float) -> Begun:
        self._said("begin")
        return Begun("mine")

    async def renew(self, key: str, owner: str, lease: float) -> bool:
        self._said("renew")
        return True

    async def finish(self, key: str, owner: str, keep: float) -> bool:
        self._said("finish")
        return True

    async def forget(self, key: str, owner: str) -> None:
        self._said("forget")

    async def recall(self, key: str) -> str | None:
        self._said("recall")
        return None

    async def swap(self, key: str, old: str | None, new: str, keep: float) -> bool:
        self._said("swap")
        return True

    async def close(self) -> None:
        self._said("close")


async def use(store: Store, effect: Callable[[], Any] = lambda: None) -> None:
    """One effect, with waits that are none."""

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)

    turns = Turns("one", lambda: store, sleep)
    async with Once(turns, STUDY, "effect", 60.0, 3600.0):
        effect()


@pytest.mark.parametrize("what", ["open", "begin"])
def test_nothing_is_begun_while_the_store_can_not_be_asked(what: str) -> None:
    done: list[int] = []
    with pytest.raises(StoreError):
        asyncio.run(use(Broken(what), lambda: done.append(1)))
    assert not done


def test_that_it_is_done_is_noted_as_soon_as_the_store_is_back() -> None:
    store = Broken("finish", "finish")
    asyncio.run(use(store))
    assert store.said.count("finish") == 3


def test_what_can_not_be_noted_as_failed_runs_out() -> None:
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(use(Broken("forget"), fail))


def test_a_lease_is_renewed_and_given_up_when_it_is_over_anyway(caplog: pytest.LogCaptureFixture) -> None:
    store = Broken("renew", "renew")

    async def main() -> None:
        asked = asyncio.Semaphore(0)

        async def sleep(seconds: float) -> None:
            assert seconds == 20
            await asked.acquire()

        turns = Turns("one", lambda: store, sleep)
        async with Once(turns, STUDY, "effect", 60.0, 3600.0):
            for number in range(1, 5):
                asked.release()
                for _ in range(5):
                    await asyncio.sleep(0)
                assert store.said.count("renew") == number
            store.fail = ["renew"] * 3 + ["finish"]
            for _ in range(4):
                asked.release()
                for _ in range(5):
                    await asyncio.sleep(0)
            assert store.said.count("renew") == 7  # for as long as it may hold, and no more

    with caplog.at_level(logging.WARNING), pytest.raises(StoreError):
        asyncio.run(main())


def test_the_key_names_no_patient_and_fits_every_store() -> None:
    turns = Turns("one", lambda: Broken())
    assert turns.key(STUDY, "effect") == f"one.effect.{STUDY.id}"
    foreign = Event("Doe^Jane *", "urn:other", "com.example.order", "com.example.order")
    key = turns.key(foreign, "effect")
    assert "Doe" not in key and key.replace(".", "").isalnum()
    assert key != turns.key(Event("Doe^Jane *", "urn:else", "com.example.order", "com.example.order"), "effect")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: app(store=None, broker="kafka://h:1").once(STUDY, "effect"), "is not said"),
        (lambda: app(store=None, broker="kafka://h:1").on("study.stable", once="effect"), "is not said"),
        (lambda: app().once(STUDY, "an effect"), "can't be the name"),
        (lambda: app().once(STUDY, "effect", lease=0), "lease=0"),
        (lambda: app().once(STUDY, "effect", keep=5), "keep=5"),
        (lambda: app(store="redis://h"), "no URL"),
        (lambda: app(store="sqlite://h/f"), "no URL"),
        (lambda: app(store="nats://user:hunter2@h:1"), "store.servers[0]: "),
        (lambda: app(store={"type": "kafka", "servers": ["h:1"]}), "kafka can't"),
        (lambda: app(broker="kafka://h:1"), "kafka can't"),
        (lambda: app().once(STUDY, "effect").__enter__(), "doesn't run"),
    ],
)
def test_a_mistake_is_said_at_once(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(BridgeError) as caught:
        wrong()
    assert words in str(caught.value)
    assert caught.value.remedy or isinstance(caught.value, ConfigError)  # each of its mistakes has its own
    assert "hunter2" not in str(caught.value)


def test_with_in_a_coroutine_function_is_refused() -> None:
    consumer = app()

    @consumer.on("study.stable")
    async def handler(given: Event) -> None:
        with consumer.once(given, "effect"):
            pass

    with consumer.test() as kit:
        kit.send(STUDY)
        assert "async with" in str(kit.retried[0].error)


def test_retry_is_what_another_worker_is_told() -> None:
    class Theirs(Broken):
        async def begin(self, key: str, owner: str, lease: float) -> Begun:
            return Begun("theirs", 10.0)

    async def delay(tried: float | None) -> float | None:
        first = "" if tried is None else iso(1000 * (1_800_000_000 - tried))
        # However many attempts there were: the store may have been away.
        given = Event(STUDY.id, STUDY.source, STUDY.type, STUDY.name, attempt=50, first_failure=first)
        turns = Turns("one", lambda: Theirs(), now=lambda: 1_800_000_000)
        with pytest.raises(Retry) as caught:
            async with Once(turns, given, "effect", 60.0, 3600.0):
                pass
        return caught.value.after

    assert [asyncio.run(delay(tried)) for tried in (None, -5, 3, 20, 40, 900)] == [10, 10, 10, 20, 40, 300]


def test_a_long_effect_of_another_outlasts_no_policy() -> None:
    """Its lease of a minute is renewed all the time, for an hour; the default policy has 20 attempts."""
    now, attempts = 0.0, 0

    class Theirs(Broken):
        async def begin(self, key: str, owner: str, lease: float) -> Begun:
            return Begun("theirs", 40.0)

    async def wait() -> float:
        first = iso(1000 * 1_800_000_000) if attempts else ""
        given = Event(STUDY.id, STUDY.source, STUDY.type, STUDY.name, attempt=attempts + 1, first_failure=first)
        with pytest.raises(Retry) as caught:
            async with Once(Turns("one", lambda: Theirs(), now=lambda: 1_800_000_000 + now), given, "effect", 60, 3600):
                pass
        return caught.value.after or 0.0

    while now < 3600:
        now, attempts = now + asyncio.run(wait()), attempts + 1
    assert attempts < 20


def test_a_handler_is_told_since_when_its_event_has_been_tried() -> None:
    consumer, told = app(), list[str]()

    @consumer.on("study.stable")
    async def handler(given: Event) -> None:
        told.append(given.first_failure)
        raise ValueError

    with consumer.test() as kit:
        kit.send(STUDY)
        kit.advance(seconds=10)
    assert told[0] == "" and len(told) > 2
    assert len(set(told[1:])) == 1 and seconds_of(told[1]) is not None
