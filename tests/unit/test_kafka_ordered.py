"""What subscribers of Kafka do without a server to keep an order, and where a name begins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports import kafka_beginning
from orthanc_events_bridge.transports.kafka_beginning import begin
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_ordered import Again, Kind, begun_as, was_begun_as
from orthanc_events_bridge.transports.kafka_partition import Partition
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata
from orthanc_events_bridge.transports.kafka_queue import Queue
from orthanc_events_bridge.transports.kafka_sharing import Place
from orthanc_events_bridge.transports.kafka_topic import Topic

PLACE = ("topic", 0)
MARK = "0123abcd:"
AGAIN = Again(7, 3, 1000.5, {"orthanc-first-failure": "2026-11-27T08:00:00.000Z"})


def record(offset: int) -> Any:
    return SimpleNamespace(offset=offset, timestamp=0, headers=[])


def ordered(*offsets: int, stored: tuple[int, str] | None = None) -> Partition:
    one = Partition.begin(PLACE, None, stored or (offsets[0], MARK), MARK, ordered=True)
    one.arrived([record(offset) for offset in offsets])
    return one


def taken(queue: Queue, now: float) -> list[int]:
    """Give out what is there, as a subscriber does; the offsets."""
    found = []
    for one, given, _ in queue.take(now):
        one.held[given.offset] = SimpleNamespace()  # type: ignore[assignment]  # stands for a delivery
        found.append(given.offset)
    return found


def test_one_is_given_out_when_the_one_before_is_settled() -> None:
    queue, one = Queue(lambda: None), ordered(7, 8, 9)
    other = Partition.begin(("other", 0), None, (0, ""))
    other.arrived([record(0), record(1)])
    queue.add(one)
    queue.add(other)
    assert taken(queue, 0) == [7, 0, 1]
    assert taken(queue, 0) == []
    one.arrived([record(10)])
    queue.add(one)  # something has come
    assert taken(queue, 0) == []
    for offset in (8, 9, 10):
        one.settled(offset - 1)
        assert queue.add(one)
        assert taken(queue, 0) == [offset]
        assert one.progress(100)[0] == offset


def test_what_is_given_back_comes_first_and_not_before_it_is_due() -> None:
    queue, one = Queue(lambda: None), ordered(7, 8)
    queue.add(one)
    assert taken(queue, 0) == [7]
    one.give_back(one_record := record(7), AGAIN)
    queue.add(one)
    assert taken(queue, 1000) == []
    assert queue.next == AGAIN.due
    assert one.again_of(one_record) is AGAIN
    assert taken(queue, 1001) == [7]
    assert one.again_of(one_record) is AGAIN  # it is told again where its subscriber dies
    one.settled(7)
    assert one.again is None
    queue.add(one)
    assert taken(queue, 1001) == [8]


@pytest.mark.parametrize("held", [False, True])
def test_another_subscriber_goes_on_with_what_was_given_back(held: bool) -> None:
    one = ordered(7, 8)
    queue = Queue(lambda: None)
    queue.add(one)
    taken(queue, 0)
    one.give_back(record(7), AGAIN)
    if held:
        queue.add(one)
        assert taken(queue, 2000) == [7]
    low, note = one.progress(4096)
    assert low == 7 and note.startswith(MARK)
    other = ordered(7, 8, stored=(low, note))
    assert other.again == AGAIN
    queue = Queue(lambda: None)
    queue.add(other)
    assert taken(queue, 1000) == []
    assert taken(queue, 1001) == [7]


def test_what_is_given_back_when_the_partition_goes_is_fetched_again_if_it_stays() -> None:
    one = ordered(7, 8, 9)
    queue = Queue(lambda: None)
    queue.add(one)
    taken(queue, 0)
    one.leaving = True
    one.drop()
    assert one.wanted == 8
    one.give_back(record(7), AGAIN)
    assert one.wanted == 7 and not one.records and not one.blocked
    assert one.progress(4096)[0] == 7


def test_a_note_tells_less_where_the_server_takes_no_longer_one() -> None:
    assert Again.read(7, AGAIN.write(4096)) == AGAIN
    without = Again.read(7, AGAIN.write(60))
    assert without == Again(7, 3, 1000.5, {})
    assert AGAIN.write(5) == ""


@pytest.mark.parametrize("note", ["", "1,2,3", "7", "[]", '{"attempts":1}', '{"attempts":1,"due":0,"headers":3}', "{"])
def test_a_note_of_others_says_nothing(note: str) -> None:
    assert Again.read(7, note) is None


# Beginning.


class Group:
    """Refuses places with these codes, one time after the other."""

    name = "name"

    def __init__(self, *codes: set[int], known: dict[Place, tuple[int, str]] | None = None) -> None:
        self._codes = [*codes, set[int]()]
        self._known = known or {}
        self.asked: list[dict[Place, tuple[int, str]]] = []

    async def stored(self, places: Iterable[Place] | None = None) -> dict[Place, tuple[int, str]]:
        return self._known

    async def store(self, places: dict[Place, tuple[int, str]], *, outside: bool) -> set[int]:
        self.asked.append(places)
        return self._codes.pop(0)


def beginning(monkeypatch: pytest.MonkeyPatch, group: Any, kind: Kind) -> None:
    async def ends(*ignored: object, oldest: bool) -> dict[int, int]:
        return {0: 0 if oldest else 7}

    monkeypatch.setattr(kafka_beginning, "offsets", ends)
    monkeypatch.setattr(kafka_beginning, "_LOOK", 0)
    options = KafkaOptions(name="kafka", servers=("127.0.0.1:9092",))
    topic = Topic("topic", TopicMetadata("0123abcd-4567", (1,), (1,)), {})
    cluster: Any = None
    asyncio.run(begin(group, cluster, options, topic, "inbox", oldest=False, kind=kind))


@pytest.mark.parametrize("kind", ["unordered", "ordered"])
@pytest.mark.parametrize(
    ("codes", "notes"),
    [
        ([], [MARK]),
        ([{14}, {16}], [MARK] * 3),  # the server that leads the group is loading it; another one leads it
        ([{12}], [MARK, ""]),  # the server takes no notes
        ([{25}], [MARK]),  # there are members
    ],
)
def test_where_a_new_name_begins_is_stored_before_it_does(
    monkeypatch: pytest.MonkeyPatch, codes: list[set[int]], notes: list[str], kind: Kind
) -> None:
    """Without a place it would begin with the oldest event."""
    group = Group(*codes)
    beginning(monkeypatch, group, kind)
    assert [rows[PLACE] for rows in group.asked] == [(7, note) for note in notes]
    said = begun_as(kind)
    assert [rows["inbox", 0] for rows in group.asked] == [(0, said if note else "") for note in notes]


@pytest.mark.parametrize("before", [None, "unordered", "ordered", "inbox"])
@pytest.mark.parametrize("kind", ["unordered", "ordered", "inbox"])
def test_a_name_is_ordered_or_not_as_it_has_begun(
    monkeypatch: pytest.MonkeyPatch, before: Kind | None, kind: Kind
) -> None:
    """One that has its inbox alone begins anew with what everybody gets; what it has settled of its inbox is kept."""
    settled = "1,2"
    note = settled if before is None else begun_as(before) + settled
    assert was_begun_as(note) == before
    group = Group(known={("inbox", 0): (5, note), PLACE: (9, MARK)})
    if {before, kind} == {"ordered", "unordered"}:
        with pytest.raises(TransportConfigurationError, match="is ordered" if before == "ordered" else "not ordered"):
            beginning(monkeypatch, group, kind)
        return
    beginning(monkeypatch, group, kind)
    said = {("inbox", 0): (5, begun_as(kind) + settled)}
    anew = {PLACE: (7, MARK)} if before == "inbox" else {}
    assert group.asked == ([] if before == kind else [{**said, **anew}])


@pytest.mark.parametrize(("before", "kind"), [("unordered", "inbox"), ("inbox", "ordered")])
def test_a_name_changes_only_when_nobody_subscribes_to_it(
    monkeypatch: pytest.MonkeyPatch, before: Kind, kind: Kind
) -> None:
    known = {("inbox", 0): (5, begun_as(before))}
    with pytest.raises(TransportConfigurationError, match="has members that subscribe to"):
        beginning(monkeypatch, Group({25}, known=known), kind)


def test_a_topic_that_was_made_again_is_begun_with_from_its_oldest_event(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(known={("inbox", 0): (5, begun_as("ordered"))})
    beginning(monkeypatch, group, "ordered")
    assert group.asked == [{("inbox", 0): (5, begun_as("ordered")), PLACE: (0, MARK)}]


def test_a_name_reads_one_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {("other", 3): (9, MARK), ("inbox", 0): (5, begun_as("unordered")), ("orthanc.retry.name.30", 0): (1, "")}
    with pytest.raises(TransportConfigurationError, match="name reads the topic other, and is to read topic"):
        beginning(monkeypatch, Group(known=other), "unordered")
    # Two that have begun at the same moment both go on: Kafka lets one of them in.
    beginning(monkeypatch, Group(known={**other, PLACE: (9, MARK)}), "unordered")
    with pytest.raises(TransportConfigurationError):  # another's steps
        beginning(monkeypatch, Group(known={("orthanc.retry.other.30", 0): (1, "")}), "unordered")
    # Who has its inbox alone reads none.
    beginning(monkeypatch, Group(known=other), "inbox")


def test_what_is_settled_in_the_inbox_is_noted_beside_it() -> None:
    mark = begun_as("unordered")
    one = Partition.begin(("inbox", 0), None, None, mark)
    one.arrived([record(0), record(1), record(2)])
    queue = Queue(lambda: None)
    queue.add(one)
    assert taken(queue, 0) == [0, 1, 2]
    one.settled(1)
    low, note = one.progress(100)
    assert low == 0 and was_begun_as(note) == "unordered"
    other = Partition.begin(("inbox", 0), None, (low, note), mark)
    other.arrived([record(0), record(1), record(2)])
    assert [row.offset for row in other.records] == [0, 2]
