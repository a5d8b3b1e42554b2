"""Each protection of consumers switched off: what the workers write down must then show the harm that it prevents."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.consumers import RetryPolicy
from orthanc_events_bridge.transports.options import TransportOptions
from tests.contract.harness import Harness
from tests.faults.consumers import QUICK, Group, cloud_event, dead, events, id_of, options, publish
from tests.faults.judging import judge

pytestmark = pytest.mark.mutant

_ATTEMPTS = 3
#: How the workers of a scenario are made: `Group`, with what is the same for all.
Make = Callable[..., Group]


def workers_are_killed(make: Make, broker: TransportOptions) -> int:
    sent = events(150)
    with make(busy=0.5) as group:
        group.start(2)
        publish(broker, sent)
        group.wait(lambda: {one.worker for one in group.notes()} == {0, 1}, 120)
        for number in (0, 1):
            group.send(number, signal.SIGKILL)
        group.start(2)
        group.quiet(lambda: len(group.ended()) == len(sent))
        return judge(sent, group.notes()).lost


def a_worker_is_frozen(make: Make, broker: TransportOptions) -> int:
    """It is at the first of two of one key; when it goes on, another is."""
    first, second = sent = [cloud_event(0, "one", takes=4.0), cloud_event(1, "one", takes=0.0)]
    with make(ordered=True, ack_wait=3.0) as group:
        group.start()
        publish(broker, sent)
        group.wait(lambda: len(group.notes()) == 1, 120, every=0.05)
        group.send(0, signal.SIGSTOP)
        group.start()
        group.wait(lambda: len(group.notes()) == 2, 120, every=0.05)
        group.send(0, signal.SIGCONT)
        group.wait(lambda: group.ended() == {first.id, second.id}, 120)
        group.wait(lambda: any(one.what == "end" and one.worker == 1 for one in group.notes()), 120)
        of_other = {one.what: one.at for one in group.notes() if one.id == first.id and one.worker == 1}
        began = min(one.at for one in group.notes() if one.id == second.id)
        return int(began < of_other["end"])


def workers_are_stopped_between_attempts(make: Make, broker: TransportOptions) -> int:
    most, lives = 3, 5
    with make(failing=1.0, retry=RetryPolicy(max_attempts=most, initial=1.0, maximum=1.0)) as group:
        publish(broker, events(1))
        for life in range(lives):
            group.start()
            before = len(group.notes())
            group.wait(lambda before=before: len(group.notes()) >= before + 2, 120, every=0.05)  # type: ignore[misc]
            group.send(life, signal.SIGTERM)
            group.workers[life].wait(60)
            if dead(broker, group.name):
                break
        return sum(one.what == "fail" for one in group.notes()) - most


def many_of_few_keys(make: Make, broker: TransportOptions) -> int:
    sent = events(60, keys=("one", "two", "three"))
    with make(busy=0.1) as group:
        group.start()
        publish(broker, sent)
        group.wait(lambda: len(group.ended()) == len(sent), 120)
        return judge(sent, group.notes()).together


def some_fail_in_order(make: Make, broker: TransportOptions) -> int:
    sent = events(60, keys=("one", "two", "three"))
    with make(failing=0.2, ordered=True) as group:
        group.start(2)
        publish(broker, sent)
        group.wait(lambda: len(group.ended()) == len(sent), 120)
        return judge(sent, group.notes()).overtaken


def dead_letters_have_no_room(make: Make, broker: TransportOptions) -> int:
    """More than there is room for, which is made while others wait."""
    sent = [cloud_event(number, f"study-{number}", poison=True) for number in range(200)]
    found: set[str] = set()

    def all_there() -> bool:
        found.update(id_of(one) for one in dead(broker, group.name, remove=True))
        return len(found) == len(sent)

    with make(concurrency=100, prefetch=200) as group:
        group.start()
        publish(broker, sent)
        group.wait(lambda: len(group.notes()) >= len(sent) // 2, 120)
        group.wait(lambda: "a dead letter can't be stored" in group.said(0), 120)
        group.quiet(all_there)
        return len(sent) - len(found)


def a_worker_is_stopped(make: Make, broker: TransportOptions) -> int:
    sent = [cloud_event(number, f"study-{number}", takes=2.0) for number in range(8)]
    with make(drain=60.0) as group:
        group.start()
        publish(broker, sent)
        group.wait(lambda: len(group.notes()) == len(sent), 120, every=0.05)
        group.stop()
        return judge(sent, group.notes()).cut


def a_handler_takes_long(make: Make, broker: TransportOptions) -> int:
    sent = [cloud_event(0, "one", takes=9.0)]
    with make(ack_wait=4.0) as group:
        group.start(2)
        publish(broker, sent)
        group.wait(lambda: bool(group.ended()), 120)
        return sum(one.what == "begin" for one in group.notes()) - 1


def two_are_given_the_same(make: Make, broker: TransportOptions) -> int:
    sent = [cloud_event(number, "one", takes=0.2) for number in range(10)]
    twice = [one._replace(dedupe=f"{one.id}:again") for one in sent]
    with make(lease=5.0, concurrency=1, prefetch=1) as group:
        group.start(2)
        publish(broker, [one for pair in zip(sent, twice, strict=True) for one in pair])
        group.wait(lambda: sum(one.what in ("end", "skip") for one in group.notes()) >= 2 * len(sent), 120)
        return judge(sent, group.notes()).again


#: What is switched off, what happens, and on which broker. Those that are not `slow` run in CI.
CASES: list[Any] = [
    pytest.param("return", workers_are_killed, "rabbitmq", id="return"),
    pytest.param("late", a_worker_is_frozen, "nats", id="late", marks=pytest.mark.slow),
    pytest.param("counts", workers_are_stopped_between_attempts, "nats", id="counts", marks=pytest.mark.slow),
    pytest.param("keys", many_of_few_keys, "kafka", id="keys", marks=pytest.mark.slow),
    pytest.param("waiting", some_fail_in_order, "nats", id="waiting", marks=pytest.mark.slow),
    pytest.param("stored", dead_letters_have_no_room, "nats", id="stored", marks=pytest.mark.slow),
    pytest.param("drain", a_worker_is_stopped, "nats", id="drain", marks=pytest.mark.slow),
    pytest.param("extend", a_handler_takes_long, "nats", id="extend", marks=pytest.mark.slow),
    pytest.param("claim", two_are_given_the_same, "nats", id="claim"),
    pytest.param("note", two_are_given_the_same, "nats", id="note", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("without", "scenario", "harness"), CASES, indirect=["harness"])
def test_the_workers_show_what_a_protection_prevents(
    harness: Harness, tmp_path: Path, without: str, scenario: Callable[[Make, TransportOptions], int]
) -> None:
    """With it nothing, and without it some harm; where that takes luck, in more than one attempt."""

    def run(name: str, broker: TransportOptions, switched_off: list[str]) -> int:
        def make(**settings: Any) -> Group:
            folder = tmp_path / name
            how = {"start": "oldest", "retry": QUICK, "ack_wait": 10.0, "store": f"sqlite:///{folder}/once.db"}
            return Group(folder, broker, name, **{**how, "without": switched_off, **settings})

        return scenario(make, broker)

    for attempt in range(_ATTEMPTS):
        with ThreadPoolExecutor(2) as pool:  # side by side, each in a place of its own
            running = []
            for name, switched_off in (("whole", []), ("mutant", [without])):
                harness.new_place()
                broker = options(harness)
                if "dead_max_bytes" in type(broker).model_fields:
                    broker = broker.model_copy(update={"dead_max_bytes": 2**16})
                running.append(pool.submit(run, f"{name}-{attempt}", broker, switched_off))
            whole, mutant = (one.result() for one in running)
        print(f"{without}: harm {whole}; without it {mutant}")
        assert whole == 0
        if mutant:
            return
    pytest.fail("nobody noticed")
