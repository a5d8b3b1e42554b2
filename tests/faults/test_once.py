"""What is to be done once, by workers that are killed, frozen and stopped at random, on every kind of store."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.consumers import RetryPolicy
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.programs import require
from tests.contract.harness import Harness
from tests.faults.consumers import Group, dead, events, options, publish, trouble
from tests.faults.judging import judge_effects

pytestmark = pytest.mark.fault

#: What is asked of a store: its URL, and what kills it and starts it again, if anything.
Kind = tuple[str, Callable[[], None]]


@pytest.fixture
def store(request: pytest.FixtureRequest, harness: Harness, tmp_path: Path) -> Iterator[Kind]:
    with ExitStack() as stack:
        if request.param == "broker":

            def restart() -> None:
                harness.kill()
                harness.start()

            yield "broker", restart
        elif request.param == "postgresql":
            require("postgres")
            postgres = PostgresServer(tmp_path / "postgres")
            stack.callback(postgres.close, kill=True)
            postgres.start()

            def restart() -> None:
                postgres.kill()
                postgres.start()

            yield f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres", restart
        else:
            yield f"sqlite:///{tmp_path}/once.db", lambda: None


@pytest.mark.parametrize(
    ("count", "seconds", "freeze"),
    [
        pytest.param(300, 7, 2.0, id="short"),
        # Some stand still for longer than their lease.
        pytest.param(4000, 90, 9.0, id="long", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("harness", "store"),
    [("nats", "broker"), ("rabbitmq", "postgresql"), ("kafka", "sqlite")],
    indirect=True,
)
def test_effects_are_done_once_when_workers_come_and_go(
    harness: Harness, store: Kind, tmp_path: Path, count: int, seconds: float, freeze: float
) -> None:
    """But for those whose worker is killed between the effect and the note, as docs/once.md says.

    Every third event comes twice, as by a replay.
    """
    url, restart = store
    broker, sent, chance = options(harness), events(count), random.Random(count)
    settings: dict[str, Any] = {
        "start": "oldest",
        "store": url,
        "lease": 6.0,
        "retry": RetryPolicy(max_attempts=100, initial=0.1, maximum=1.0),
        "ack_wait": 1.5,
        "concurrency": 8,
        "drain": 2.0,
    }
    busy = 40 * seconds / count  # so that there is something to do for as long as workers come and go
    with Group(tmp_path / "workers", broker, "one", busy=busy, failing=0.05, **settings) as group:
        group.start(3)
        twice = [one._replace(dedupe=f"{one.id}:again") for one in sent[::3]]
        publish(broker, sorted([*sent, *twice], key=lambda one: one.id))
        trouble(group, chance, seconds / 2, 3, freeze)
        restart()
        trouble(group, chance, seconds / 2, 3, freeze)
        if not group.alive:
            group.start()
        group.wait(lambda: group.ended() >= {one.id for one in sent}, 240)
        group.quiet(lambda: False, 2.0)  # what is to come again has come
        group.stop()
        said = {
            (number, identifier)
            for number in range(len(group.workers))
            for identifier in re.findall(r"([0-9a-f-]{36}).*it may be done twice", group.said(number))
        }
        found = judge_effects(sent, group.notes(), group.killed, said)
        again = sum(one.attempt > 1 for one in group.notes() if one.what in ("begin", "skip"))
        print(f"{harness.title}, {url.partition(':')[0]}: {found}; {len(group.workers)} workers, {again} came again")
    assert found.as_promised
    assert not dead(broker, "one")
