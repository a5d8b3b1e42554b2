"""The relay with a source, a memory and a broker made up for it: in order, over acknowledged rows only."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import pytest

from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.bridge.state import Progress
from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    OutboxFullError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Capabilities, Incoming, Outgoing, PublishError, Transport
from orthanc_events_bridge.transports.options import MemoryOptions

SHAPE: Final[dict[str, Any]] = {
    "source": "urn:x",
    "site": "main",
    "type_prefix": "t",
    "schema_base": "urn:s:",
    "tags": [],
    "metadata": [],
}


def fact(position: int, change: str = "NewInstance", seq: int | None = None) -> OutboxRow:
    level = "study" if change.endswith("Study") else "instance"
    return OutboxRow(
        position,
        change,
        level,
        f"r{position}",
        0,
        seq,
        None,
        f"e{position}",
        0,
        1,
        {"parents": {"study": "s"}},
    )


class Source:
    """An outbox that is a list."""

    def __init__(self, rows: Sequence[OutboxRow] = ()) -> None:
        self.recorder = "recorder"
        self.kept = list(rows)
        self.gone = 0
        self.reads: list[int] = []
        self.on_read: Callable[[int], None] = lambda after: None
        self.broken: Exception | None = None

    def rows(self, after: int, limit: int) -> list[OutboxRow]:
        self.reads.append(after)
        if self.broken is not None:
            raise self.broken
        found = [row for row in self.kept if row.position > after][:limit]
        self.on_read(after)
        return found

    def shape(self, number: int) -> Mapping[str, Any]:
        return SHAPE

    def detached(self) -> int:
        return self.gone

    def newest(self) -> int:
        return self.kept[-1].position if self.kept else 0

    def detach(self, last: int) -> None:
        self.gone = last
        self.kept = [row for row in self.kept if row.position > last]


class Memory:
    """A bridge.db that is a few lists."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress_kept = progress
        self.saved: list[Progress] = []
        self.gaps: list[tuple[int, int]] = []
        self.aside: list[tuple[int, str, str, str]] = []

    def progress(self, name: str, recorder: str, position: int) -> Progress:
        assert (name, recorder) == ("fake", "recorder")
        self.progress_kept = self.progress_kept or Progress(position, None, "", 0)
        return self.progress_kept

    def save(self, name: str, progress: Progress) -> None:
        self.saved.append(replace(progress))

    def gap(self, name: str, first: int, last: int) -> None:
        self.gaps.append((first, last))

    def set_aside(self, transport: str, position: int, event: str, type_name: str, reason: str) -> None:
        self.aside.append((position, event, type_name, reason))


class Fake(Transport):
    """A broker that does what its script says, and then keeps everything.

    :ivar script: for each call of publish: how many events are confirmed, what then goes wrong, and which events
        behind that are confirmed too.
    :ivar connects: for each call of connect: what goes wrong, if anything.
    """

    capabilities = Capabilities(
        durable=False,
        deduplicates=False,
        replayable=True,
        ordered=True,
        declares_topology=False,
        refuses_when_full=True,
        identifies_place=True,
        subscribable=False,
        has_inboxes=False,
        counts_deliveries=False,
        pipelined=True,
    )

    def __init__(self) -> None:
        super().__init__(MemoryOptions(type="memory", name="fake"))
        self.stored: list[str] = []
        self.batches: list[list[str]] = []
        self.script: deque[tuple[int, TransportError] | tuple[int, TransportError, set[int]] | None] = deque()
        self.connects: deque[TransportError | None] = deque()
        self.identity = "1"
        self.connected = False
        self.log: list[str] = []
        self.gate: asyncio.Event | None = None
        self.in_flight = 0
        self.on_publish: Callable[[], None] = lambda: None

    async def connect(self) -> str:
        if not self.connected:
            self.log.append("connect")
        error = self.connects.popleft() if self.connects else None
        if error is not None:
            raise error
        self.connected = True
        return self.identity

    async def publish(self, events: Sequence[Outgoing]) -> None:
        assert self.connected and not self.in_flight
        self.in_flight += 1
        try:
            self.batches.append([event.id for event in events])
            self.on_publish()
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            step = self.script.popleft() if self.script else None
            confirmed = len(events) if step is None else step[0]
            self.stored += [event.id for event in events[:confirmed]]
            if step is not None:
                behind = step[2] if len(step) == 3 else set()
                self.stored += [event.id for index, event in enumerate(events) if index in behind]
                raise PublishError(confirmed, step[1], behind)
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        self.log.append("close")
        self.connected = False

    async def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming, None]:
        nothing: list[Incoming] = []
        for incoming in nothing:
            yield incoming

    async def describe(self) -> list[str]:
        return []


class Scene:
    """A relay with all that it needs; its waits take no time, and are written down."""

    def __init__(
        self,
        rows: Sequence[OutboxRow] = (),
        *,
        progress: Progress | None = None,
        size: int = 3,
        accepts: Callable[[str], bool] = lambda name: True,
        replay: bool = True,
        start: str = "oldest",
        make: Callable[[], Transport] | None = None,
    ) -> None:
        self.source, self.memory, self.broker = Source(rows), Memory(progress), Fake()
        self.waits: list[float] = []
        self.on_wait: Callable[[int], Awaitable[None] | None] = lambda count: None
        self.relay = Relay(
            "fake",
            make or (lambda: self.broker),
            "memory",
            size,
            accepts,
            self.source,
            self.memory,
            replay=replay,
            start=start,
            sleep=self._sleep,
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        assert len(self.waits) < 200, "it never comes to an end"
        found = self.on_wait(len(self.waits))
        if found is not None:
            await found
        await asyncio.sleep(0)

    async def _until_drained(self) -> None:
        self.relay.drain()
        await asyncio.wait_for(self.relay.run(), 10)

    def drain(self) -> None:
        """Send what is there, then end."""
        asyncio.run(self._until_drained())

    @property
    def positions(self) -> list[int]:
        return [progress.position for progress in self.memory.saved]


def ids(*positions: int) -> list[str]:
    return [f"e{position}" for position in positions]


def facts(count: int, first: int = 1) -> list[OutboxRow]:
    return [fact(position, seq=position + 100) for position in range(first, first + count)]


async def settle(until: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if until():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


# -- refusals, and where it begins ----------------------------------------------------------------------------


def test_behind_a_refusal_only_what_was_refused_is_sent_again_and_one_event_asks() -> None:
    scene = Scene(facts(10), size=8)
    full = RefusedError("a bound queue is refusing", "make room")
    # 1 and 2 are confirmed, 3 is refused, 4 and 7 went through, 5, 6 and 8 are refused.
    scene.broker.script.extend([(2, full, {3, 6}), (0, full), (0, full)])
    scene.drain()
    assert sorted(scene.broker.stored) == sorted(ids(*range(1, 11)))
    assert all(len(batch) == 1 for batch in scene.broker.batches[1:4])
    assert [batch for batch in scene.broker.batches[1:] if set(batch) & set(ids(1, 2, 4, 7))] == []
    assert scene.relay.position == 10


def test_behind_a_fault_in_which_nothing_was_confirmed_one_event_asks() -> None:
    """A queue that takes events and never confirms them holds up one event, of which the others get copies."""
    scene = Scene(facts(15), size=8)
    silent = NotConnectedError("no answer", "look at it")
    scene.broker.script.extend([(0, silent), (0, silent), (0, silent)])
    scene.drain()
    assert [len(batch) for batch in scene.broker.batches[:4]] == [8, 1, 1, 1]
    assert len(scene.broker.batches[-1]) > 1
    assert scene.broker.stored == ids(*range(1, 16))


def test_behind_a_fault_in_which_something_was_confirmed_it_goes_on_as_before() -> None:
    scene = Scene(facts(15), size=8)
    scene.broker.script.append((2, NotConnectedError("gone", "look at it")))
    scene.drain()
    assert [len(batch) for batch in scene.broker.batches] == [8, 8, 5]


def test_what_was_stored_behind_a_refusal_is_sent_again_to_a_place_that_was_made_again() -> None:
    scene = Scene(facts(4), size=4)
    scene.broker.script.append((0, RefusedError("full", "make room"), {1, 2, 3}))

    def again(count: int) -> None:
        scene.broker.identity = "2"
        scene.broker.stored.clear()

    scene.on_wait = again
    scene.drain()
    assert scene.broker.stored == ids(1, 2, 3, 4)


def test_a_new_transport_begins_with_the_next_event_if_it_is_told_so() -> None:
    scene = Scene(facts(5), start="now")
    scene.source.kept.append(fact(6))
    scene.drain()
    assert scene.broker.stored == ids(6)


def test_a_known_transport_goes_on_where_it_was_whatever_it_is_told() -> None:
    scene = Scene(facts(5), start="now", progress=Progress(2, None, "1", 2))
    scene.drain()
    assert scene.broker.stored == ids(3, 4, 5)


# -- the good case -------------------------------------------------------------------------------------------


def test_everything_goes_out_in_order_and_in_batches() -> None:
    scene = Scene(facts(8))
    scene.drain()
    assert scene.broker.stored == ids(*range(1, 9))
    assert [len(batch) for batch in scene.broker.batches] == [3, 3, 2]
    assert scene.waits == []


def test_position_seq_and_count_are_kept_behind_each_batch() -> None:
    scene = Scene(facts(5))
    scene.drain()
    kept = [(progress.position, progress.seq, progress.published) for progress in scene.memory.saved]
    assert kept == [(0, None, 0), (3, 103, 3), (5, 105, 5)]
    assert scene.memory.saved[0].identity == "1"
    assert scene.relay.position == 5


def test_it_goes_on_from_its_position() -> None:
    scene = Scene(facts(5), progress=Progress(3, 103, "1", 3))
    scene.drain()
    assert scene.broker.stored == ids(4, 5)


def test_positions_may_have_jumps() -> None:
    scene = Scene([fact(2), fact(1_000_003), fact(1_000_004)])
    scene.drain()
    assert scene.broker.stored == ids(2, 1_000_003, 1_000_004)


def test_empty_outbox_ends_at_once_when_drained() -> None:
    scene = Scene()
    scene.drain()
    assert scene.broker.batches == [] and scene.broker.log == ["connect", "close"]


def test_what_comes_while_the_last_batch_is_under_way_is_sent_before_it_ends() -> None:
    """The row of ORTHANC_STOPPED is written just before the bridge is told to end."""
    scene = Scene(facts(2))

    async def run() -> None:
        scene.broker.gate = asyncio.Event()
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: len(scene.source.reads) == 2)  # the next read found nothing
        scene.source.kept.append(fact(3))
        scene.relay.drain()
        scene.broker.gate.set()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())
    assert scene.broker.stored == ids(1, 2, 3)


def test_bell_wakes_it() -> None:
    scene = Scene()

    async def run() -> None:
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: bool(scene.source.reads))
        scene.source.kept.append(fact(1))
        scene.relay.wake()
        await settle(lambda: scene.broker.stored == ids(1))
        scene.source.kept.append(fact(2))
        scene.relay.wake()
        await settle(lambda: scene.broker.stored == ids(1, 2))
        scene.relay.drain()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())


def test_idle_connection_is_looked_at_now_and_then() -> None:
    scene = Scene(facts(2))

    async def run() -> None:
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: scene.broker.stored == ids(1, 2))
        scene.broker.identity = "2"  # deleted and made again, while nothing was sent
        for _ in range(20):  # each bell that brings no row is an idle look
            reads = len(scene.source.reads)
            scene.relay.wake()
            await settle(lambda reads=reads: len(scene.source.reads) > reads)  # type: ignore[misc]
        scene.relay.drain()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())
    assert scene.memory.saved[-1].identity == "2"
    assert scene.broker.stored == ids(1, 2, 1, 2)


def test_bell_while_it_reads_is_not_forgotten() -> None:
    scene = Scene()

    def ring(after: int) -> None:
        if not scene.source.kept:
            scene.source.kept.append(fact(1))
            scene.relay.wake()

    scene.source.on_read = ring

    async def run() -> None:
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: scene.broker.stored == ids(1))
        scene.relay.drain()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())


def test_next_batch_is_read_while_one_is_under_way_and_never_sent_before_it_is_settled() -> None:
    scene = Scene(facts(6))

    async def run() -> None:
        scene.broker.gate = asyncio.Event()
        scene.relay.drain()
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: scene.source.reads == [0, 3])
        for _ in range(20):
            await asyncio.sleep(0)
        assert scene.broker.batches == [ids(1, 2, 3)] and scene.relay.position == 0
        scene.broker.gate.set()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())
    assert scene.broker.batches == [ids(1, 2, 3), ids(4, 5, 6)]


def test_cancelled_in_the_middle_it_closes_and_keeps_its_position() -> None:
    scene = Scene(facts(4))

    async def run() -> None:
        scene.broker.gate = asyncio.Event()
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: bool(scene.broker.batches) and len(scene.source.reads) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scene.broker.in_flight == 0

    asyncio.run(run())
    assert scene.broker.log == ["connect", "close"]
    assert scene.relay.position == 0


# -- filters -------------------------------------------------------------------------------------------------


def test_filter_passes_over_what_is_not_wanted() -> None:
    rows = [fact(1), fact(2, "NewStudy"), fact(3), fact(4, "StableStudy"), fact(5)]
    scene = Scene(rows, accepts=lambda name: name.startswith("study."))
    scene.drain()
    assert scene.broker.stored == ids(2, 4)
    assert scene.relay.position == 5


def test_filter_that_wants_nothing_still_moves_on() -> None:
    scene = Scene(facts(7), accepts=lambda name: False)
    scene.drain()
    assert scene.broker.batches == []
    assert scene.positions == [0, 3, 6, 7]
    assert scene.memory.saved[-1].seq == 107


def test_position_of_a_partly_filtered_batch_is_behind_the_confirmed_event() -> None:
    rows = [fact(1, "NewStudy"), fact(2), fact(3, "NewStudy"), fact(4, "NewStudy")]
    scene = Scene(rows, size=4, accepts=lambda name: name == "study.created")
    scene.broker.script.append((2, RefusedError("full")))
    scene.on_wait = lambda count: None
    scene.drain()
    assert scene.positions == [0, 3, 4]
    assert scene.broker.batches == [ids(1, 3, 4), ids(4)]


# -- refusals ------------------------------------------------------------------------------------------------


def test_partly_confirmed_batch_goes_on_behind_the_confirmed_ones() -> None:
    scene = Scene(facts(3))
    scene.broker.script.append((2, RefusedError("the stream is full", "make room")))
    scene.drain()
    assert scene.broker.batches == [ids(1, 2, 3), ids(3)]
    assert scene.broker.stored == ids(1, 2, 3)
    assert scene.positions == [0, 2, 3]
    assert [progress.published for progress in scene.memory.saved] == [0, 2, 3]


def test_seq_moves_with_whole_batches_only() -> None:
    scene = Scene(facts(3))
    scene.broker.script.append((2, RefusedError("full")))
    scene.drain()
    assert [progress.seq for progress in scene.memory.saved] == [None, None, 103]


def test_refusals_back_off_with_growing_waits_over_the_same_connection() -> None:
    scene = Scene(facts(1))
    scene.broker.script.extend([(0, RefusedError("full"))] * 10)
    scene.drain()
    assert scene.broker.log == ["connect", "close"]
    expected = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert len(scene.waits) == 10
    for wait, most in zip(scene.waits, expected, strict=True):
        assert most / 2 <= wait <= most


@pytest.mark.parametrize(("asked", "waited"), [(120.0, 120.0), (5000.0, 3600.0), (0.0, 0.05), (None, 0.05)])
def test_broker_that_asks_to_be_left_alone_is_left_alone_for_an_hour_at_most(
    asked: float | None, waited: float
) -> None:
    scene = Scene(facts(1))
    scene.broker.script.append((0, RefusedError("too many requests", retry_after=asked)))
    scene.drain()
    assert scene.broker.stored == ids(1)
    assert waited / 2 <= scene.waits[0] <= waited
    assert asked != 120.0 or scene.waits == [120.0]


def test_progress_makes_the_waits_short_again() -> None:
    scene = Scene(facts(2))
    scene.broker.script.extend([*[(0, RefusedError("full"))] * 6, (1, RefusedError("full"))])
    scene.drain()
    assert scene.waits[5] >= 0.8
    assert scene.waits[6] <= 0.05


def test_lost_connection_is_closed_and_made_again() -> None:
    scene = Scene(facts(4))
    scene.broker.script.extend([None, (0, NotConnectedError("gone"))])
    scene.broker.connects.extend([None, NotConnectedError("still gone"), None])
    scene.drain()
    assert scene.broker.log == ["connect", "close", "connect", "close", "connect", "close"]
    assert scene.broker.stored == ids(1, 2, 3, 4)
    assert len(scene.waits) == 2


def test_configuration_errors_are_tried_slower_and_slower() -> None:
    scene = Scene(facts(1))
    scene.broker.connects.extend([TransportConfigurationError("wrong password", "mend it")] * 14)
    scene.drain()
    assert scene.broker.stored == ids(1)
    assert max(scene.waits) > 14.9 and max(scene.waits) <= 30.0
    assert scene.waits[-1] >= 15.0


def test_client_that_is_not_installed_is_asked_for_again() -> None:
    made: list[Fake] = []
    broker = Fake()

    def make() -> Transport:
        made.append(broker)
        if len(made) < 3:
            raise TransportConfigurationError("nats-py is missing", 'pip install "…[nats]"')
        return broker

    scene = Scene(facts(1), make=make)
    scene.drain()
    assert len(made) == 3 and broker.stored == ids(1)


def test_defect_of_a_transport_does_not_end_the_relay() -> None:
    scene = Scene(facts(2))
    calls: list[int] = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("a defect")

    scene.broker.on_publish = fail_once
    scene.drain()
    assert scene.broker.stored == ids(1, 2)
    assert scene.relay.status()["last_error"]["message"] == "ZeroDivisionError: a defect"


def test_outbox_that_can_not_be_read_is_asked_again_and_the_connection_stays() -> None:
    scene = Scene(facts(2))
    scene.source.broken = OutboxFullError("the disk fails", "replace it")

    def mend(count: int) -> None:
        if count == 3:
            scene.source.broken = None

    scene.on_wait = mend
    scene.drain()
    assert scene.broker.stored == ids(1, 2)
    assert scene.broker.log == ["connect", "close"]
    assert scene.relay.status()["last_error"]["remedy"] == "replace it"


def test_read_that_fails_loses_nothing_of_the_batch_under_way() -> None:
    scene = Scene(facts(6))

    def fail(after: int) -> None:
        if after == 3 and scene.source.reads.count(3) == 1:
            raise OutboxFullError("the disk fails")

    scene.source.on_read = fail
    scene.drain()
    assert scene.broker.stored == ids(*range(1, 7))


# -- set aside -----------------------------------------------------------------------------------------------


def test_event_that_can_never_be_taken_is_set_aside_and_the_rest_goes_on() -> None:
    scene = Scene(facts(4), size=4)
    scene.broker.script.append((1, EventRejectedError("too large", "allow more")))
    scene.drain()
    assert scene.broker.stored == ids(1, 3, 4)
    assert scene.memory.aside == [(2, "e2", "instance.created", "too large (allow more)")]
    assert scene.positions == [0, 4]
    assert scene.memory.saved[-1].published == 3
    assert scene.waits == []


def test_several_are_set_aside_also_at_the_ends() -> None:
    scene = Scene(facts(3))
    scene.broker.script.extend([(0, EventRejectedError("a")), (1, EventRejectedError("b"))])
    scene.drain()
    assert scene.broker.stored == ids(2)
    assert [position for position, *_ in scene.memory.aside] == [1, 3]
    assert scene.relay.position == 3


def test_what_was_stored_behind_one_that_is_set_aside_is_not_sent_again() -> None:
    scene = Scene(facts(6), size=6)
    scene.broker.script.extend([(1, EventRejectedError("a"), {2, 4}), (1, EventRejectedError("b"))])
    scene.drain()
    assert scene.broker.batches == [ids(1, 2, 3, 4, 5, 6), ids(4, 6)]
    assert [(position, event) for position, event, *_ in scene.memory.aside] == [(2, "e2"), (6, "e6")]
    assert sorted(scene.broker.stored) == ids(1, 3, 4, 5)
    assert scene.relay.position == 6 and scene.memory.saved[-1].published == 4


def test_refusal_behind_a_set_aside_one_begins_behind_it() -> None:
    scene = Scene(facts(3))
    scene.broker.script.extend([(1, EventRejectedError("too large")), (0, RefusedError("full"))])
    scene.drain()
    assert scene.broker.batches == [ids(1, 2, 3), ids(3), ids(3)]
    assert scene.positions == [0, 2, 3]


# -- gaps, and places that were made again -------------------------------------------------------------------


def test_detached_rows_are_a_gap_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(facts(9), progress=Progress(2, 102, "1", 2))
    scene.source.detach(5)
    scene.drain()
    assert scene.memory.gaps == [(3, 5)]
    assert scene.broker.stored == ids(6, 7, 8, 9)
    assert scene.positions[0] == 5
    assert "has lost its place" in caplog.text


def test_detached_before_the_position_is_no_gap() -> None:
    scene = Scene(facts(9), progress=Progress(5, 105, "1", 5))
    scene.source.detach(5)
    scene.drain()
    assert scene.memory.gaps == []


def test_gap_begins_behind_what_was_confirmed_not_behind_what_was_read() -> None:
    """Rows go while a batch is under way, and the batch fails: its rest is lost too."""
    scene = Scene(facts(9))
    scene.broker.script.append((1, NotConnectedError("gone")))
    scene.broker.on_publish = lambda: scene.source.detach(6) if not scene.source.gone else None
    scene.drain()
    assert scene.memory.gaps == [(2, 6)]
    assert scene.broker.stored == ids(1, 7, 8, 9)


def test_gap_behind_a_batch_that_was_confirmed() -> None:
    scene = Scene(facts(9))
    scene.broker.on_publish = lambda: scene.source.detach(6) if not scene.source.gone else None
    scene.drain()
    assert scene.memory.gaps == [(4, 6)]
    assert scene.broker.stored == ids(1, 2, 3, 7, 8, 9)


def test_rows_that_go_between_two_reads_are_never_missed_in_silence() -> None:
    """The writer deletes what is about to be read, just as it is read."""
    scene = Scene(facts(9))
    original = scene.source.rows

    def rows(after: int, limit: int) -> list[OutboxRow]:
        if after == 3 and not scene.source.gone:
            scene.source.detach(7)
        return original(after, limit)

    scene.source.rows = rows  # type: ignore[method-assign]
    scene.drain()
    assert scene.memory.gaps == [(4, 7)]
    assert scene.broker.stored == ids(1, 2, 3, 8, 9)


def test_place_that_was_made_again_gets_everything_that_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(facts(5)[2:], progress=Progress(4, 104, "old", 4))
    scene.drain()
    assert scene.broker.stored == ids(3, 4, 5)
    assert scene.memory.saved[0] == Progress(0, 104, "1", 4)
    assert "deleted and made again" in caplog.text


def test_replay_is_no_gap_though_rows_were_given_up_long_ago() -> None:
    scene = Scene(facts(9), progress=Progress(8, 108, "old", 8))
    scene.source.detach(5)
    scene.drain()
    assert scene.memory.gaps == []
    assert scene.broker.stored == ids(6, 7, 8, 9)


def test_replay_with_a_gap_tells_the_gap() -> None:
    scene = Scene(facts(9), progress=Progress(2, 102, "old", 2))
    scene.source.detach(5)
    scene.drain()
    assert scene.memory.gaps == [(3, 5)]


def test_place_that_was_made_again_is_gone_on_with_if_so_wished() -> None:
    scene = Scene(facts(5), progress=Progress(4, 104, "old", 4), replay=False)
    scene.drain()
    assert scene.broker.stored == ids(5)
    assert scene.memory.saved[-1].identity == "1"


def test_place_that_is_made_again_between_two_connections() -> None:
    scene = Scene(facts(4))
    scene.broker.script.extend([None, (0, NotConnectedError("gone"))])

    def recreate(count: int) -> None:
        scene.broker.identity = "2"
        scene.broker.stored.clear()

    scene.on_wait = recreate
    scene.drain()
    assert scene.broker.stored == ids(1, 2, 3, 4)


def test_first_place_is_remembered_and_is_none_that_was_made_again(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(facts(1))
    scene.drain()
    assert scene.memory.saved[0].identity == "1"
    assert "made again" not in caplog.text


def test_broker_that_can_not_tell_is_none_that_was_made_again() -> None:
    scene = Scene(facts(3), progress=Progress(2, 102, "known", 2))
    scene.broker.identity = ""
    scene.drain()
    assert scene.broker.stored == ids(3)
    assert scene.memory.saved[-1].identity == "known"


def test_place_that_was_found_and_gets_an_identity_was_made_again() -> None:
    """RabbitMQ doesn't tell when a queue was made: one that was there before us has no name until it is another one."""
    scene = Scene(facts(4))
    scene.broker.identity = ""
    scene.broker.script.extend([None, (0, NotConnectedError("gone"))])

    def recreate(count: int) -> None:
        scene.broker.identity = "2"
        scene.broker.stored.clear()

    scene.on_wait = recreate
    scene.drain()
    assert scene.broker.stored == ids(1, 2, 3, 4)


def test_place_that_was_found_is_made_again_while_we_are_away() -> None:
    scene = Scene(facts(3), progress=Progress(0, None, "", 0))
    scene.broker.identity = ""
    scene.drain()
    later = Scene(facts(4), progress=scene.memory.saved[-1])
    later.drain()
    assert later.broker.stored == ids(1, 2, 3, 4)


# -- status and log ------------------------------------------------------------------------------------------


def test_status_of_a_well_one() -> None:
    scene = Scene(facts(5))
    assert scene.relay.status()["state"] == "connecting"
    scene.drain()
    status = scene.relay.status()
    assert status.keys() == {"type", "state", "since", "rate", "last_error"}
    assert (status["type"], status["state"], status["rate"]) == ("memory", "connected", 0.5)
    assert status["last_error"] is None
    assert json.dumps(status)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NotConnectedError("a", "b"), "not connected"),
        (RefusedError("a", "b"), "refused"),
        (TransportConfigurationError("a", "b"), "needs attention"),
    ],
)
def test_status_says_what_is_wrong_how_often_and_what_to_do(error: TransportError, state: str) -> None:
    scene = Scene(facts(1))
    scene.broker.script.extend([(0, error)] * 3)
    seen: list[dict[str, Any]] = []
    scene.on_wait = lambda count: seen.append(scene.relay.status())
    scene.drain()
    assert [status["state"] for status in seen] == [state] * 3
    assert [status["last_error"]["count"] for status in seen] == [1, 2, 3]
    assert (seen[0]["last_error"]["message"], seen[0]["last_error"]["remedy"]) == ("a", "b")
    status = scene.relay.status()
    assert status["state"] == "connected"
    assert status["last_error"]["message"] == "a"  # the last one stays to be seen


def test_state_stays_faulty_until_an_event_is_confirmed() -> None:
    """A broker that takes connections and no events would else be well every few seconds."""
    scene = Scene(facts(1))
    scene.broker.script.extend([(0, RefusedError("full"))] * 4)
    states: list[str] = []
    scene.broker.on_publish = lambda: states.append(scene.relay.status()["state"])
    scene.drain()
    assert states == ["connected", "refused", "refused", "refused", "refused"]


@pytest.mark.parametrize("error", [RefusedError("full"), NotConnectedError("gone")])
def test_fault_that_repeats_is_one_line_and_its_end_another(
    error: TransportError, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scene = Scene(facts(2))
    scene.broker.script.extend([(0, error)] * 100)
    scene.drain()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2, lines
    assert lines[0] == f"transport fake: {error}"
    assert "well again" in lines[1]


def test_another_kind_of_fault_is_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(facts(1))
    gone, wrong = NotConnectedError("gone"), TransportConfigurationError("wrong password")
    scene.broker.connects.extend([gone, gone, wrong, wrong, gone])
    scene.drain()
    lines = [record.message for record in caplog.records]
    assert lines[:2] == ["transport fake: gone", "transport fake: wrong password"]
    assert len(lines) == 3 and "well again" in lines[2]


def test_fault_with_nothing_to_send_ends_with_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.broker.connects.extend([NotConnectedError("gone")] * 3)
    scene.drain()
    assert scene.relay.status()["state"] == "connected"
    assert len(caplog.records) == 2


def test_no_line_tells_data_of_an_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    row = fact(1)._replace(extra={"parents": {}, "tags": {"PatientName": "CANARY"}})
    scene = Scene([row, fact(2)])
    scene.broker.script.extend([(0, EventRejectedError("too large")), (0, RefusedError("full"))])
    scene.drain()
    assert "CANARY" not in caplog.text + json.dumps(scene.relay.status()) + str(scene.memory.aside)


def test_mutant_without_replay_loses_what_was_not_confirmed() -> None:
    scene = Scene(facts(3))
    scene.relay.without = frozenset({"replay"})
    scene.broker.script.append((1, RefusedError("full")))
    scene.drain()
    assert scene.broker.stored == ids(1)


# -- leaving -------------------------------------------------------------------------------------------------


def test_it_leaves_behind_the_batch_that_is_under_way() -> None:
    scene = Scene(facts(10), size=3)

    async def run() -> None:
        scene.broker.gate = asyncio.Event()
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: scene.broker.in_flight == 1)
        assert scene.relay.leave() is True
        scene.broker.gate.set()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())
    assert scene.broker.stored == ids(1, 2, 3)
    assert scene.relay.position == 3
    assert scene.broker.log[-1] == "close"


def test_with_nothing_under_way_it_can_be_cancelled_at_once() -> None:
    scene = Scene(facts(3), size=3)

    async def run() -> None:
        task = asyncio.create_task(scene.relay.run())
        await settle(lambda: scene.relay.position == 3)
        for _ in range(3):  # until it is idle for certain
            reads = len(scene.source.reads)
            scene.relay.wake()
            await settle(lambda reads=reads: len(scene.source.reads) > reads)  # type: ignore[misc]
        scene.source.kept.append(fact(4))
        assert scene.relay.leave() is False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert scene.broker.stored == ids(1, 2, 3)


def test_it_leaves_behind_a_fault_of_the_batch_under_way() -> None:
    scene = Scene(facts(6), size=3)
    scene.broker.script.append((1, NotConnectedError("gone", "start it")))

    def leave() -> None:
        scene.relay.leave()

    scene.broker.on_publish = leave
    asyncio.run(asyncio.wait_for(scene.relay.run(), 10))
    assert scene.broker.stored == ids(1)
    assert (scene.relay.position, scene.waits) == (1, [])


def test_a_new_transport_has_no_gap_of_what_was_given_up_before_it_was_there() -> None:
    scene = Scene(facts(6))
    scene.source.detach(3)
    later = Scene(facts(6))
    later.source.detach(3)
    later.relay = Relay(
        "fake", lambda: later.broker, "memory", 3, lambda name: True, later.source, Memory(), sleep=later._sleep
    )
    later.drain()
    scene.drain()
    assert later.broker.stored == scene.broker.stored == ids(4, 5, 6)
    assert (len(scene.memory.gaps), later.memory.gaps) == (1, [])
