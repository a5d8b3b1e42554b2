"""Relay and transport together: whatever happens to the broker, all arrives once, each key in its order."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from functools import partial
from typing import Any

import pytest

from orthanc_events_bridge.bridge.relay import Relay
from tests.contract.harness import Harness, run
from tests.contract.relay_tools import Notebook, Rows, quickly, reached, wait_for


def relay_for(harness: Harness, rows: Rows, notebook: Notebook, **options: Any) -> Relay:
    options = {"sleep": quickly} | options
    room = options.pop("room", 0)
    return Relay(
        "there",
        lambda: harness.transport(room=room, impatient=True),
        "kind",
        100,
        lambda name: True,
        rows,
        notebook,
        **options,
    )


def check(harness: Harness, count: int, without: frozenset[int] = frozenset()) -> None:
    """Everything once; each key in order: by the broker's own order and the events' own sequence.

    Where the broker removes no copies, the first of each counts.
    """
    sequences: dict[str, list[int]] = {}
    seen: set[str] = set()
    for stored in harness.read():
        document = json.loads(stored.body)
        assert document["id"] == stored.dedupe_key
        if document["id"] in seen and not harness.transport().capabilities.deduplicates:
            continue
        seen.add(document["id"])
        sequences.setdefault(document["partitionkey"], []).append(int(document["sequence"]))
    assert sorted(number for numbers in sequences.values() for number in numbers) == [
        number for number in range(1, count + 1) if number not in without
    ]
    assert [key for key, numbers in sequences.items() if numbers != sorted(numbers)] == []


@pytest.mark.parametrize(
    ("seed", "times"),
    [(1, 2), *(pytest.param(seed, 8, marks=pytest.mark.slow) for seed in range(2, 6))],
)
def test_a_broker_that_dies_and_freezes_in_between(harness: Harness, seed: int, times: int) -> None:
    count, chance = 2500 * times, random.Random(seed)
    moments = sorted(chance.sample(range(count - 200), 2 * times))
    faults = [harness.kill, harness.freeze] * times
    chance.shuffle(faults)
    rows, notebook = Rows(count), Notebook()

    async def main() -> None:
        relay = relay_for(harness, rows, notebook)
        done: list[str] = []

        def disturb() -> None:
            for moment, fault in zip(moments, faults, strict=True):
                wait_for(partial(reached, relay, moment))
                fault()
                time.sleep(chance.choice([0.05, harness.deadline + 0.3]))
                if fault == harness.kill:
                    harness.start()
                else:
                    harness.thaw()
                done.append(fault.__name__)

        disturbing = threading.Thread(target=disturb, daemon=True)
        disturbing.start()
        relay.drain()
        await relay.run()
        await asyncio.to_thread(disturbing.join)
        assert len(done) == len(moments)
        if relay.position == count and not harness.read():  # the last kill took all, and nobody was there to notice
            relay = relay_for(harness, rows, notebook)
            relay.drain()
            await relay.run()

    run(main(), seconds=600)
    assert notebook.kept.position == count
    assert not notebook.aside
    check(harness, count)


def test_a_bridge_that_is_killed_in_between(harness: Harness) -> None:
    """The relay goes away in the middle of batches, and begins again from what it had written down."""
    rows, notebook, chance = Rows(3000), Notebook(), random.Random(7)

    async def main() -> None:
        longest = 0.06
        while notebook.kept.position < len(rows.all):
            before = notebook.kept.position
            relay = relay_for(harness, rows, notebook)
            relay.drain()
            running = asyncio.create_task(relay.run())
            await asyncio.wait([running], timeout=chance.uniform(0.01, longest))
            running.cancel()
            await asyncio.wait([running])
            ended.append(notebook.kept.position)
            if notebook.kept.position == before:  # a batch takes longer than that here
                longest *= 1.2

    ended: list[int] = []
    run(main())
    assert len(ended) >= 3
    check(harness, 3000)


def test_what_can_never_be_taken_is_set_aside_and_the_rest_goes_on(harness: Harness) -> None:
    large = frozenset({1, 2, 50, 250, 299, 300})
    rows, notebook = Rows(300, large=large), Notebook()

    async def main() -> None:
        relay = relay_for(harness, rows, notebook)
        relay.drain()
        await relay.run()

    run(main())
    assert {position for position, _, _ in notebook.aside} == large
    assert notebook.kept.position == 300
    check(harness, 300, without=large)


@pytest.mark.needs("refuses_when_full")
def test_a_full_place_holds_up_and_loses_nothing(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    rows, notebook = Rows(1000), Notebook()
    taken: list[str] = []

    async def main() -> None:
        relay = relay_for(harness, rows, notebook, room=350)
        running = asyncio.create_task(relay.run())
        for _ in range(3):
            wanted = min(relay.position + 350, 1000)
            await asyncio.to_thread(wait_for, partial(reached, relay, wanted))
            await asyncio.sleep(0.5)  # several attempts
            assert relay.position == wanted
            assert relay.status()["state"] == ("refused" if wanted < 1000 else "connected")
            taken.extend(json.loads(stored.body)["sequence"] for stored in harness.read())
            harness.make_room()
        relay.drain()
        await running

    with caplog.at_level(logging.INFO, logger="orthanc_events_bridge"):
        run(main())
    assert [int(sequence) for sequence in taken] == list(range(1, 1001))
    # Refused twice, well again twice; not a line for each attempt.
    assert len(caplog.records) <= 5, [record.message for record in caplog.records]


@pytest.mark.needs("declares_topology")
@pytest.mark.parametrize("replay", [True, False])
def test_a_place_that_is_deleted_underneath_gets_everything_again(harness: Harness, replay: bool) -> None:
    rows, notebook = Rows(1000), Notebook()
    later = rows.all[600:]
    del rows.all[600:]

    async def main() -> None:
        relay = relay_for(harness, rows, notebook, replay=replay)
        running = asyncio.create_task(relay.run())
        await asyncio.to_thread(wait_for, lambda: relay.position == 600)
        await asyncio.to_thread(harness.remove_place)
        rows.all.extend(later)
        relay.wake()
        relay.drain()
        await running

    run(main())
    check(harness, 1000, without=frozenset() if replay else frozenset(range(1, 601)))


def test_a_broker_that_is_not_there_yet(harness: Harness) -> None:
    async def main() -> None:
        relay = relay_for(harness, Rows(0), Notebook())
        harness.kill()
        running = asyncio.create_task(relay.run())
        await asyncio.sleep(0.3)
        state = relay.status()
        assert state["state"] == "not connected"
        assert state["last_error"]["remedy"]
        await asyncio.to_thread(harness.start)
        # Although nothing is there to be sent.
        await asyncio.to_thread(wait_for, lambda: relay.status()["state"] == "connected", 5)
        relay.drain()
        await running

    run(main())
