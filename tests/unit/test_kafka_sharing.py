"""What subscribers of Kafka do without a server: share partitions, note what is settled, choose delays, fetch."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from orthanc_events_bridge.transports.headers import DUE, due_text
from orthanc_events_bridge.transports.kafka_delays import STEPS, copy_of, step_for, waiting_time
from orthanc_events_bridge.transports.kafka_fetcher import Fetcher
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_partition import Partition, read_note, write_note
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata
from orthanc_events_bridge.transports.kafka_queue import Queue
from orthanc_events_bridge.transports.kafka_sharing import Claim, Place, share_out
from orthanc_events_bridge.transports.kafka_topic import Topic


@dataclass
class Record:
    offset: int
    timestamp: int = 0
    headers: list[tuple[str, bytes]] = field(default_factory=list)
    key: bytes = b"key"
    value: bytes = b"value"


# Sharing.


def settle(claims: dict[str, set[Place]], counts: dict[str, int], busy: frozenset[Place] = frozenset()) -> int:
    """Share out again and again, as members do, until nothing moves any more; return how many partitions moved."""
    moves = 0
    for _ in range(10):
        shares, more = share_out({m: Claim(frozenset(c), busy & c) for m, c in claims.items()}, counts)
        given = [place for share in shares.values() for place in share]
        assert len(given) == len(set(given)), "given twice"
        for member, share in shares.items():
            for other, held in claims.items():
                assert other == member or not share & held, "given away while another has it"
        moves += sum(len(share - claims[member]) for member, share in shares.items())
        before = {member: set(held) for member, held in claims.items()}
        for member, share in shares.items():
            claims[member] = share
        if not more and before == claims:
            return moves
    raise AssertionError("no end")


def test_partitions_are_shared_evenly_and_few_are_moved() -> None:
    chance = random.Random(5)
    for _ in range(100):
        counts = {f"topic-{number}": chance.choice([1, 3, 8, 64]) for number in range(chance.randint(1, 3))}
        everything = {(topic, number) for topic, count in counts.items() for number in range(count)}
        claims: dict[str, set[Place]] = {"a": set()}
        for step in range(12):
            if chance.random() < 0.7 or len(claims) == 1:
                claims[f"{chance.random()}-{step}"] = set()
            else:
                del claims[chance.choice(sorted(claims))]
            unowned = len(everything - set().union(*claims.values()))
            due = sum(count // len(claims) + 1 for count in counts.values())
            moves = settle(claims, counts)
            assert set().union(*claims.values()) == everything
            for topic, count in counts.items():
                sizes = [sum(place[0] == topic for place in held) for held in claims.values()]
                assert max(sizes) - min(sizes) <= 1
                assert sum(sizes) == count
            assert moves <= unowned + due, "moved without need"


def test_a_busy_partition_stays_if_it_can_be() -> None:
    everything = {("t", number) for number in range(8)}
    busy = frozenset({("t", 1), ("t", 6), ("t", 7)})
    claims: dict[str, set[Place]] = {"a": set(everything), "b": set()}
    settle(claims, {"t": 8}, busy)
    assert busy <= claims["a"]
    assert len(claims["a"]) == len(claims["b"]) == 4


def test_a_claim_is_read_as_it_was_written() -> None:
    claim = Claim(frozenset({("a", 1), ("a", 20), ("b", 0)}), frozenset({("b", 0)}))
    assert Claim.decode(claim.encode()) == claim
    assert Claim.decode(Claim().encode()) == Claim()


# Progress.


def test_what_is_settled_further_on_is_noted() -> None:
    chance = random.Random(6)
    for _ in range(300):
        low, gap = chance.randrange(10**6), chance.choice([3, 300, 10**5])
        unsettled = sorted({low, *(low + chance.randrange(gap) for _ in range(chance.randrange(30)))})
        high = unsettled[-1] + 1 + chance.randrange(gap)
        assert read_note(low, write_note(low, unsettled, high, 4096)) == (unsettled, high)
        # With too little room it forgets what is settled, never what is not.
        room = chance.randrange(40)
        note = write_note(low, unsettled, high, room)
        assert len(note) <= room
        found, until = read_note(low, note)
        assert found == [one for one in unsettled if one < until]
        assert until in (high, low, *unsettled)


@pytest.mark.parametrize("note", ["", "somebody else's", "1,-5", "1,,2", "1.5"])
def test_a_note_of_others_says_nothing(note: str) -> None:
    assert read_note(7, note) == ([], 7)


def take(one: Partition, offsets: range) -> list[int]:
    """Let records arrive; give all of them out."""
    one.arrived([Record(offset) for offset in offsets if offset >= one.wanted])
    one.wanted = offsets.stop
    given = []
    while one.records:
        record = one.records.popleft()
        one.given = record.offset + 1
        one.held[record.offset] = None
        given.append(record.offset)
    return given


def test_a_partition_goes_on_where_another_subscriber_left_it() -> None:
    first = Partition.begin(("t", 0), None, (10, ""))
    assert take(first, range(10, 20)) == list(range(10, 20))
    for offset in (10, 11, 13, 17, 19):
        del first.held[offset]
    stored = first.progress(4096)
    assert stored[0] == 12
    second = Partition.begin(("t", 0), None, stored)
    assert second.progress(4096) == stored, "nothing is changed by being here"
    assert take(second, range(12, 16)) == [12, 14, 15]
    second.held.clear()
    assert second.progress(4096)[0] == 16
    third = Partition.begin(("t", 0), None, second.progress(4096))
    assert take(third, range(16, 25)) == [16, 18, 20, 21, 22, 23, 24]
    third.held.clear()
    assert third.progress(4096) == (25, "")


def test_what_was_fetched_and_not_given_out_comes_again() -> None:
    one = Partition.begin(("t", 0), None, (0, ""))
    one.arrived([Record(offset) for offset in range(5)])
    one.wanted = 5
    one.records.popleft()
    one.given = 1
    one.drop()
    assert (one.wanted, list(one.records)) == (1, [])
    one.restart(40)  # retention has taken the rest
    assert one.progress(4096) == (40, "")


# Delays.


def test_the_step_of_a_delay_is_not_longer_than_it() -> None:
    assert [step_for(delay) for delay in (0.1, 1, 4.9, 5, 29, 30, 119, 3599, 3600, 10**6)] == [
        *(1, 1, 1, 5, 5, 30, 30, 600, 3600, 3600)
    ]


def delayed(offset: int, stored: float, due: float) -> Record:
    return Record(offset, round(stored * 1000), [(DUE, due_text(due).encode())])


def test_how_long_a_copy_waits_in_a_topic_of_delays() -> None:
    assert waiting_time(delayed(0, 100, 107.5), 5) == (105, 107.5)
    assert waiting_time(delayed(0, 100, 105.5), 5) == (105.5, 105.5), "less than the shortest step"
    assert waiting_time(delayed(0, 100, 100.3), 1) == (100.3, 100.3)
    assert waiting_time(delayed(0, 100, 101.3), 1) == (101, 101.3), "who comes behind may be due sooner"
    assert waiting_time(delayed(0, 100, 90), 5) == (90, 90)
    assert waiting_time(delayed(0, 1000, 107), 5)[0] == 107, "another clock"
    assert waiting_time(Record(0), 5)[1] == 0


def test_nobody_waits_for_a_second_longer_than_needed_however_delays_are_mixed() -> None:
    """A model of the topics of delays, with a clock of its own."""
    chance = random.Random(9)
    now = 1000.0
    topics: dict[int, deque[tuple[Any, float]]] = {step: deque() for step in STEPS}

    def put(due: float) -> None:
        topics[step_for(due - now)].append((delayed(0, now, due), due))

    waiting = 0
    late: list[float] = []
    for tick in range(200_000):
        now += 0.05
        if tick < 2000 and tick % 4 == 0:
            put(now + chance.choice([0.2, 1, 1.5, 4, 7, 29, 31, 59, 119, 121, 700, 3700]))
            waiting += 1
        for step, line in topics.items():
            while line:
                record, exact = line[0]
                ready, due = waiting_time(record, step)
                if ready > now:
                    break
                line.popleft()
                if due > now:
                    put(due)
                else:
                    late.append(now - exact)
                    waiting -= 1
        if tick > 2000 and not waiting:
            break
    assert not waiting
    assert min(late) >= 0
    assert max(late) < 1.1


def test_a_copy_keeps_what_is_not_changed() -> None:
    record = Record(0, headers=[("content-type", b"a/b"), ("ce_id", b"1"), (DUE, b"then")])
    copy = copy_of(record, "elsewhere", {DUE: "now"})
    assert (copy.topic, copy.key, copy.value) == ("elsewhere", b"key", b"value")
    assert list(copy.headers) == [("content-type", b"a/b"), ("ce_id", b"1"), (DUE, b"now")]


# Turns.


def test_partitions_take_turns_and_keep_their_order() -> None:
    called: list[None] = []
    queue = Queue(lambda: called.append(None))
    ones = [Partition.begin(("t", number), None, None) for number in range(3)]
    for one in ones:
        one.arrived([Record(offset) for offset in range(600)])
        assert queue.add(one)
        assert not queue.add(one)
    given: list[tuple[int, int]] = []
    while True:
        some = []
        taking = queue.take(0)
        for one, record, delay in taking:
            assert delay <= 0
            some.append((one.place[1], record.offset))
            if len(some) == 7:
                break
        taking.close()
        if not some:
            break
        given += some
    assert sorted(given) == [(number, offset) for number in range(3) for offset in range(600)]
    for number in range(3):
        assert [offset for mine, offset in given if mine == number] == list(range(600))
    assert {number for number, _ in given[:60]} == {0, 1, 2}
    assert called, "there was room again"
    assert queue.add(ones[0])


def test_a_partition_that_waits_for_a_time_holds_up_no_other() -> None:
    queue = Queue(lambda: None)
    waits, other = Partition.begin(("later", 0), 5, None), Partition.begin(("t", 0), None, None)
    waits.arrived([delayed(0, 100, 103), delayed(1, 100, 250), delayed(2, 100, 104)])
    other.arrived([Record(0)])
    queue.add(waits)
    queue.add(other)

    def taken(now: float) -> list[tuple[str, int, float]]:
        return [(one.place[0], record.offset, max(delay, 0)) for one, record, delay in queue.take(now)]

    assert taken(101) == [("t", 0, 0)]
    assert queue.next == 103
    assert taken(103) == [("later", 0, 0)]
    assert queue.next == 105
    assert taken(105.5) == [("later", 1, 144.5), ("later", 2, 0)]
    assert queue.next == float("inf")
    waits.leaving = True
    waits.arrived([delayed(3, 100, 100)])
    queue.add(waits)
    assert taken(200) == []


# Fetching.


class Node:
    """Answers a question with one record, just after `meanwhile` has happened."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self.fault = None

    async def node(self, number: int) -> Node:
        return self

    def check(self) -> None:
        pass

    def begin(self, request: Any) -> Any:
        return request

    async def wait(self, request: Any, seconds: float) -> Any:
        ((topic, ((number, offset, _),)),) = request.topics
        self._meanwhile()
        builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 10_000)
        builder.append(0, 0, b"key", b"value", [])
        batch = bytearray(builder.build())
        batch[:8] = offset.to_bytes(8)
        return SimpleNamespace(topics=[(topic, [(number, 0, bytes(batch))])])


@pytest.mark.parametrize("leaves", [False, True])
def test_what_comes_for_a_partition_that_is_leaving_is_fetched_again_if_it_stays(leaves: bool) -> None:
    """Whoever gives out has taken it off the line; nobody would put it there again."""
    one = Partition.begin(("topic", 0), None, (7, ""))
    one.leader = 1
    told: list[Partition] = []

    def meanwhile() -> None:
        one.leaving, one.leader = leaves, 2  # the latter ends it

    node: Any = Node(meanwhile)
    options = KafkaOptions(name="kafka", servers=("127.0.0.1:9092",))
    fetcher = Fetcher(node, node, options, Topic("topic", TopicMetadata("", (1,), (1,)), {}), told.append)
    fetcher.use([one])
    asyncio.run(fetcher._follow(1))
    assert [record.offset for record in one.records] == ([] if leaves else [7])
    assert one.wanted == (7 if leaves else 8)
    assert told == ([] if leaves else [one])


def test_a_connection_that_was_closed_meanwhile_is_made_again() -> None:
    """As Kafka closes one that is idle: of a node whose partitions all have enough nothing is asked."""
    one = Partition.begin(("topic", 0), None, (0, ""))
    one.leader = 1

    class Nodes(Node):
        """Each connection takes one question."""

        opened = 0

        async def node(self, number: int) -> Node:
            self.opened += 1
            return Node(self._meanwhile)

    def meanwhile() -> None:
        if one.wanted == 1:
            one.leader = 2  # ends it

    nodes: Any = Nodes(meanwhile)
    options = KafkaOptions(name="kafka", servers=("127.0.0.1:9092",))
    fetcher = Fetcher(nodes, nodes, options, Topic("topic", TopicMetadata("", (1,), (1,)), {}), lambda one: None)
    fetcher.use([one])
    asyncio.run(fetcher._follow(1))
    assert [record.offset for record in one.records] == [0, 1]
    assert nodes.opened == 2


# Leaving.


def test_who_leaves_keeps_nothing_but_what_is_being_handed_over() -> None:
    counts = {"events": 6}
    held = {name: frozenset({("events", one), ("events", one + 1)}) for name, one in (("a", 0), ("b", 2), ("c", 4))}
    claims = {name: Claim(places, frozenset(), name == "a") for name, places in held.items()}
    shares, more = share_out(claims, counts)
    assert shares["a"] == set() and more  # the others wait until it has let go
    assert Claim.decode(claims["a"].encode()) == claims["a"]
    del claims["a"]
    shares, more = share_out(claims, counts)
    assert sorted(map(len, shares.values())) == [3, 3] and not more


def test_if_all_leave_nothing_moves() -> None:
    held = {name: frozenset({("events", one)}) for name, one in (("a", 0), ("b", 1))}
    shares, more = share_out({name: Claim(places, leaves=True) for name, places in held.items()}, {"events": 2})
    assert {name: frozenset(share) for name, share in shares.items()} == held and not more


def test_what_is_put_back_is_not_settled_and_what_lies_between_is() -> None:
    one = Partition.begin(("events", 0), None, (0, ""))
    one.given = 10
    one.held = dict.fromkeys([2, 5, 7, 9])  # the others of the ten are settled
    one.put_back([5, 9])
    assert read_note(*one.progress(4096)) == ([2, 5, 7, 9], 10)
    one.settled(2)
    one.settled(7)
    assert read_note(*one.progress(4096)) == ([5, 9], 10)
