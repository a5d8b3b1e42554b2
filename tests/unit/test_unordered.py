"""The merge for logs without order: what is held open, matched, given up, and a simulated database of many writers."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

import pytest

from orthanc_events_bridge.changes.log import Row
from orthanc_events_bridge.changes.merge import Anchor, MisalignedError
from orthanc_events_bridge.changes.model import Callback, ChangeKind, Fact, ResourceLevel
from orthanc_events_bridge.changes.numbers import Numbers
from orthanc_events_bridge.changes.unlogged import Unlogged
from orthanc_events_bridge.changes.unordered import Unordered
from orthanc_events_bridge.errors import LogUnavailableError

K = ChangeKind
L = ResourceLevel
#: 2026-11-23, when the process of these tests began: old rows are older.
BEGAN: Final = 1_795_464_000.0
DATE: Final = "20261123T200627"
OLD: Final = "20251123T200627"
START: Final = "20261123T200000"
GRACE: Final = 10.0


def row(seq: int, resource: str | None = None, change: str = "NewInstance", date: str = DATE) -> Row:
    return Row(seq, date, change, "instance", resource if resource is not None else f"i{seq}")


def callback(resource: str, kind: int = K.NEW_INSTANCE, level: int = L.INSTANCE) -> Callback:
    return Callback(kind, level, resource, BEGAN + 1)


class Scene:
    """A log, a queue and a clock that moves only when somebody waits."""

    def __init__(self, *rows: Row, cursor: int = 0, ahead: str = "", grace: float = GRACE) -> None:
        self.rows = {one.seq: one for one in rows}
        self.counter: int | None = None
        self.queue: deque[Callback] = deque()
        self.time = 1000.0
        self.broken = False
        self.pages = 0
        self.counts = {"passed": 0, "late": 0}
        self.merge = self.join(cursor, ahead, grace)

    def join(self, cursor: int, ahead: str = "", grace: float = GRACE) -> Unordered:
        self.merge = Unordered(
            self, self.queue, cursor, self, ahead=ahead, grace=grace, began=BEGAN, counts=self.counts
        )
        return self.merge

    def page(self, since: int, limit: int) -> Sequence[Row]:
        if self.broken:
            raise LogUnavailableError("Orthanc is starting")
        self.pages += 1
        return [self.rows[seq] for seq in sorted(self.rows) if seq > since][:limit]

    def tip(self) -> int:
        return self.counter if self.counter is not None else max(self.rows, default=0)

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> bool:
        self.time += seconds
        return False

    def add(self, *rows: Row) -> None:
        self.rows |= {one.seq: one for one in rows}

    def heard(self, *callbacks: Callback) -> list[Fact]:
        """What a batch of these callbacks becomes."""
        self.queue.extend(callbacks)
        return self.merge.facts(self.merge.take())

    def later(self, seconds: float) -> list[Fact]:
        """What becomes due meanwhile."""
        facts: list[Fact] = []
        until = self.time + seconds
        while self.time < until:
            self.time += 0.5
            facts += self.merge.due()
        return facts


def told(facts: Sequence[Fact]) -> list[tuple[str | None, int | None]]:
    return [(fact.resource, fact.seq) for fact in facts]


# -- callbacks and rows --------------------------------------------------------------------------------------------


def test_a_callback_takes_its_row_at_once_though_a_number_below_is_missing() -> None:
    s = Scene(row(5))
    assert told(s.heard(callback("i5"))) == [("i5", 5)]
    assert s.merge.cursor == 0
    assert s.merge.ahead == "[5,[[1,4]]]"


def test_a_callback_without_a_row_is_told_without_a_number() -> None:
    s = Scene()
    (fact,) = s.heard(callback("gone"))
    assert (fact.seq, fact.date) == (None, None)


def test_a_number_that_is_filled_in_time_is_told_with_its_own() -> None:
    s = Scene(row(2))
    s.heard(callback("i2"))
    s.later(GRACE - 1)
    s.add(row(1))
    assert told(s.heard(callback("i1"))) == [("i1", 1)]
    assert s.merge.cursor == 2
    assert s.counts == {"passed": 0, "late": 0}


def test_a_number_that_is_not_filled_costs_the_grace_period_and_is_counted() -> None:
    s = Scene(row(3))
    s.heard(callback("i3"))
    assert s.later(GRACE - 1) == []
    assert s.merge.cursor == 0
    assert s.later(2) == []
    assert s.merge.cursor == 3
    assert s.counts["passed"] == 2


def test_numbers_at_the_end_without_any_row_are_given_up_too() -> None:
    s = Scene()
    s.counter = 3
    s.heard(callback("gone"))
    s.later(GRACE + 1)
    assert s.merge.cursor == 3
    assert s.counts["passed"] == 3


def test_before_a_number_is_given_up_it_is_looked_for_once_more() -> None:
    s = Scene(row(2))
    s.heard(callback("i2"))
    s.time += GRACE
    s.add(row(1))  # committed in time, and nobody has looked since
    assert told(s.merge.due()) == []  # it waits for its callback
    assert told(s.heard(callback("i1"))) == [("i1", 1)]
    assert s.counts["passed"] == 0


def test_first_in_first_out_for_equal_kind_and_resource() -> None:
    s = Scene(row(4, "a", "UpdatedMetadata"), row(7, "a", "UpdatedMetadata"))
    updated = callback("a", K.UPDATED_METADATA)
    assert told(s.heard(updated)) == [("a", 4)]
    assert told(s.heard(updated, updated)) == [("a", 7), ("a", None)]


def test_rows_are_told_in_the_order_of_their_numbers() -> None:
    s = Scene(row(1), row(2), row(3))
    assert told(s.heard(callback("i3"), callback("i1"), callback("i2"))) == [("i1", 1), ("i2", 2), ("i3", 3)]


def test_what_only_callbacks_show_keeps_its_place() -> None:
    s = Scene(row(2, "a"))
    facts = s.heard(callback("a", K.DELETED), callback("a"), callback("job", K.JOB_SUBMITTED, L.NONE))
    assert [fact.change for fact in facts] == ["Deleted", "NewInstance", "JobSubmitted"]


def test_what_an_earlier_process_may_have_left_comes_before_what_is_told_now() -> None:
    s = Scene(row(1, "s", "NewSeries", START), row(2), row(3, "t", "NewStudy", START), row(4, "u", "NewStudy"))
    list(s.merge.backlog(4))
    s.time += 1
    assert told(s.heard(callback("i2"))) == [("s", 1), ("i2", 2)]
    facts = s.heard(callback("gone"), callback("s", K.NEW_CHILD_INSTANCE, L.SERIES))
    assert told(facts) == [("t", 3), ("gone", None), ("s", None)]


def test_what_waits_in_the_queue_behind_a_batch_is_no_earlier_processs() -> None:
    s = Scene(*(row(seq, change="UpdatedMetadata", date=START) for seq in range(1, 301)))
    list(s.merge.backlog(300))
    s.time += 1
    s.queue.extend(callback(f"i{seq}", K.UPDATED_METADATA) for seq in reversed(range(1, 301)))
    assert len(s.merge.facts(s.merge.take())) == 200
    assert len(s.merge.facts(s.merge.take())) == 100
    assert s.merge.cursor == 300


def test_what_an_earlier_process_has_left_is_told_before_its_deletion() -> None:
    s = Scene(row(1, "a", date=START), row(2, "b", date=START))
    s.merge.due()
    s.time += 1
    del s.rows[1]
    facts = s.heard(callback("a", K.DELETED))
    assert [(fact.change, fact.seq) for fact in facts] == [("NewInstance", 1), ("NewInstance", 2), ("Deleted", None)]


def test_what_another_orthanc_has_created_and_is_gone_is_left_to_that_one() -> None:
    s = Scene(row(1, "a"), row(2, "b"))
    s.merge.due()
    del s.rows[1]
    assert [(fact.resource, fact.foreign) for fact in s.later(2 * GRACE)] == [("b", True)]
    assert (s.merge.cursor, s.counts["passed"]) == (2, 1)


def test_a_kind_of_the_future_is_told_once() -> None:
    s = Scene(row(1, "a", "FutureChange"))
    facts = s.heard(callback("a", 99), callback("b", 99))
    assert [(fact.change, fact.seq) for fact in facts] == [("FutureChange", 1), ("99", None)]


# -- the log alone ---------------------------------------------------------------------------------------------------


def test_what_no_callback_claims_is_told_after_the_grace_period() -> None:
    s = Scene(row(1), row(2))
    assert told(s.heard(callback("i2"))) == [("i2", 2)]
    assert s.later(GRACE - 1) == []
    assert told(s.later(2)) == [("i1", 1)]
    assert s.merge.cursor == 2


def test_a_callback_that_comes_after_that_is_not_told_again() -> None:
    s = Scene(row(1))
    assert told(s.later(GRACE + 2)) == [("i1", 1)]
    assert s.heard(callback("i1")) == []
    (fact,) = s.heard(callback("i1"))  # created a second time, and gone again
    assert fact.seq is None


def test_a_deletion_ends_what_a_late_callback_could_be_about() -> None:
    s = Scene(row(1, "a"))
    assert told(s.later(GRACE + 2)) == [("a", 1)]
    del s.rows[1]
    facts = s.heard(callback("a", K.DELETED), callback("a"), callback("a", K.DELETED))
    assert [fact.change for fact in facts] == ["Deleted", "NewInstance", "Deleted"]


def test_rows_whose_callbacks_wait_in_the_queue_are_not_taken_from_the_log() -> None:
    """However long capture could not write: what has not been drained may be the callback."""
    s = Scene(row(1))
    s.merge.due()
    s.queue.append(callback("i1"))
    assert s.later(5 * GRACE) == []
    assert told(s.heard()) == [("i1", 1)]


def test_a_row_that_comes_after_its_number_was_given_up_is_told_late() -> None:
    """A transaction of another Orthanc that took longer than the grace period."""
    s = Scene(row(2))
    s.heard(callback("i2"))
    s.later(GRACE + 1)
    s.add(row(1))
    assert told(s.later(4 * GRACE)) == [("i1", 1)]
    assert s.counts == {"passed": 1, "late": 1}


def test_a_late_row_whose_callback_was_told_is_not_told_again() -> None:
    s = Scene(row(2))
    s.heard(callback("i2"))
    s.later(GRACE + 1)
    s.add(row(1))
    assert told(s.heard(callback("i1"))) == [("i1", None)]
    assert s.later(4 * GRACE) == []
    assert s.counts["late"] == 1


def test_without_callbacks_all_that_is_there_is_told_at_once() -> None:
    s = Scene(row(1), row(3))
    assert told(s.merge.tail()) == [("i1", 1), ("i3", 3)]
    s.add(row(2), row(4))
    s.time += 1
    assert told(s.merge.tail()) == [("i2", 2), ("i4", 4)]
    assert s.merge.cursor == 4


def test_what_is_younger_than_the_process_and_claimed_by_nobody_is_another_orthancs() -> None:
    s = Scene(row(1, date=START), row(2))  # the first in the second of the start
    assert [(fact.seq, fact.foreign) for fact in s.later(2 * GRACE)] == [(1, False), (2, True)]
    s.add(row(3))
    assert [fact.foreign for fact in s.heard(callback("i3"))] == [False]


def test_a_hole_of_a_million_numbers_is_one_gap() -> None:
    s = Scene(row(1_000_000))
    s.heard(callback("i1000000"))
    assert s.merge.ahead == "[1000000,[[1,999999]]]"
    s.later(GRACE + 1)
    assert s.merge.cursor == 1_000_000
    assert s.pages < 40


# -- starts ----------------------------------------------------------------------------------------------------------


def test_what_is_older_than_the_process_is_told_at_once_and_the_rest_waits_for_its_callback() -> None:
    s = Scene(row(3, date=OLD), row(5, date=OLD), row(6), cursor=2)
    assert s.merge.anchor() == Anchor(6, "counter")
    assert [told(facts) for facts in s.merge.backlog(6)] == [[("i3", 3), ("i5", 5)]]
    assert told(s.heard(callback("i6"))) == [("i6", 6)]
    assert s.merge.cursor == 3


def test_what_was_recorded_above_the_mark_is_not_told_again() -> None:
    s = Scene(*(row(seq, date=OLD) for seq in range(1, 8) if seq != 4), cursor=2, ahead="[6,[[3,3],[4,4]]]")
    assert [told(facts) for facts in s.merge.backlog(7)] == [[("i3", 3)], [("i7", 7)]]
    assert (s.merge.cursor, s.merge.ahead) == (3, "[7,[[4,4]]]")


def test_what_is_missing_in_a_log_that_was_never_read_is_not_counted() -> None:
    s = Scene(row(3, date=OLD), row(5, date=OLD))
    assert [told(facts) for facts in s.merge.backlog(5)] == [[("i3", 3), ("i5", 5)]]
    s.later(GRACE + 1)
    assert (s.merge.cursor, s.counts["passed"]) == (5, 0)


def test_a_backlog_of_many_pages() -> None:
    s = Scene(*(row(seq, date=OLD) for seq in range(1, 1001)))
    pages = list(s.merge.backlog(1000))
    assert sum(map(len, pages)) == 1000 and len(pages) > 3
    assert (s.merge.cursor, s.merge.ahead) == (1000, "")


def test_a_first_start_passes_over_what_was_there() -> None:
    s = Scene(row(7, date=OLD), row(9, date=OLD), row(10))
    s.merge.skip(10)
    assert list(s.merge.backlog(10)) == []
    assert told(s.heard(callback("i10"))) == [("i10", 10)]
    s.add(row(8))  # was under way
    assert told(s.heard(callback("i8"))) == [("i8", 8)]
    s.later(2 * GRACE)
    assert s.merge.cursor == 10
    assert s.counts["passed"] == 0  # what was missing before the start was never ours


def test_a_log_that_ends_below_the_mark_is_another_one() -> None:
    s = Scene(row(1), cursor=5)
    with pytest.raises(MisalignedError, match="the log ends at 1, 5 is recorded"):
        s.merge.anchor()


# -- parents and runs ------------------------------------------------------------------------------------------------


def run_of(name: str) -> list[Callback]:
    """What a new instance of a new patient brings."""
    above = ((L.SERIES, K.NEW_SERIES, "s"), (L.STUDY, K.NEW_STUDY, "t"), (L.PATIENT, K.NEW_PATIENT, "p"))
    created = [callback(letter + name, kind, level) for level, kind, letter in above]
    grown = [callback(letter + name, K.NEW_CHILD_INSTANCE, level) for level, _, letter in above]
    return [callback("i" + name), *created, *grown]


def test_a_whole_run_names_the_parents() -> None:
    facts = {fact.resource: fact.parents for fact in Scene().heard(*run_of("1"))}
    assert facts["i1"] == {"series": "s1", "study": "t1", "patient": "p1"}
    assert facts["s1"] == {"study": "t1", "patient": "p1"}
    assert facts["t1"] == {"patient": "p1"}
    assert facts["p1"] is None


@pytest.mark.parametrize("seed", range(50))
def test_runs_that_cut_into_each_other_never_name_wrong_parents(seed: int) -> None:
    pick = random.Random(seed)
    waiting = [deque(run_of(str(number))) for number in range(20)]
    s, facts = Scene(), []
    running: list[deque[Callback]] = []
    while waiting or running:
        if waiting and (not running or pick.random() < 0.1):
            running.append(waiting.pop())
        one = pick.choice(running)
        s.queue.append(one.popleft())
        running = [run for run in running if run]
        if pick.random() < 0.1:
            facts += s.merge.facts(s.merge.take())
    facts += s.merge.facts(s.merge.take())
    assert len(facts) == 140
    for fact in facts:
        for level, parent in (fact.parents or {}).items():
            assert parent == {"series": "s", "study": "t", "patient": "p"}[level] + str(fact.resource)[1:]


def test_deletions_are_told_children_first() -> None:
    levels = (L.STUDY, L.PATIENT, L.SERIES, L.INSTANCE, L.INSTANCE)
    facts = Scene().heard(*(callback(f"{number}", K.DELETED, level) for number, level in enumerate(levels)))
    assert [(fact.level, fact.resource) for fact in facts] == [
        ("instance", "3"),
        ("instance", "4"),
        ("series", "2"),
        ("study", "0"),
        ("patient", "1"),
    ]


# -- undoing -----------------------------------------------------------------------------------------------------------


def test_what_could_not_be_written_is_told_again() -> None:
    s = Scene(row(1), row(4))
    s.queue.extend([callback("i1"), callback("i4"), callback("gone")])
    before = s.merge.cursor, s.merge.ahead
    for _ in range(3):
        batch = s.merge.take()
        assert told(s.merge.facts(batch)) == [("i1", 1), ("i4", 4), ("gone", None)]
        s.merge.put_back(batch)
        assert (s.merge.cursor, s.merge.ahead) == before
        assert len(s.queue) == 3


def test_what_was_due_and_could_not_be_written_is_due_again() -> None:
    s = Scene(row(1), row(3))
    s.later(GRACE)
    s.time += 1
    facts = s.merge.due()
    assert told(facts) == [("i1", 1), ("i3", 3)]
    counts = dict(s.counts)
    s.merge.put_back(())
    s.time += 1
    assert s.merge.due() == facts
    assert s.counts == counts
    assert s.merge.cursor == 3


def test_a_log_that_cannot_be_read_changes_nothing() -> None:
    s = Scene(row(1))
    s.queue.append(callback("i1"))
    s.broken = True
    batch = s.merge.take()
    with pytest.raises(LogUnavailableError):
        s.merge.facts(batch)
    s.merge.put_back(batch)
    s.broken = False
    assert told(s.heard()) == [("i1", 1)]


def test_numbers_come_back_as_they_were_kept() -> None:
    numbers = Numbers(10, "[20,[[12,13],[17,17]]]", 5.0)
    assert (numbers.mark, numbers.ahead) == (11, "[20,[[12,13],[17,17]]]")
    assert [gap.since for gap in numbers.gaps] == [5.0, 5.0]


# -- without the log -------------------------------------------------------------------------------------------------


def test_without_the_log_only_what_callbacks_alone_show_is_told() -> None:
    s = Scene(row(1), row(2))
    merge = Unlogged(s, s.queue, None)
    assert merge.anchor() == Anchor(2, "unlogged")
    merge.skip(2)
    s.queue.extend([callback("i3"), callback("i3", K.DELETED)])
    batch = merge.take()
    assert [fact.change for fact in merge.facts(batch)] == ["Deleted"]
    merge.put_back(batch)
    assert len(s.queue) == 2
    assert merge.cursor == 2
    again = Unlogged(s, s.queue, 1, ahead="[3,[[2,2]]]")
    assert again.anchor() == Anchor(1, "unlogged")
    assert (again.cursor, again.ahead) == (1, "[3,[[2,2]]]")


# -- a simulated database ------------------------------------------------------------------------------------------


class World(Scene):
    """Six writers of one database, two of them in another Orthanc, whose transactions take their time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pick = random.Random(seed)
        self.given = 0
        self.happened: Counter[tuple[str, str | None]] = Counter()  # what callbacks of ours have to tell
        self.foreign: Counter[tuple[str, str | None]] = Counter()
        self.open: list[tuple[float, list[Row], bool]] = []
        self.deliveries: list[tuple[float, Callback]] = []
        self.facts: list[Fact] = []
        self.kept: tuple[int, str] = (0, "")
        self.killed = 0

    def tip(self) -> int:
        return self.given

    def begin(self) -> None:
        """A transaction takes its numbers, and will end some time within the grace period."""
        name = f"r{self.pick.randrange(30)}" if self.pick.random() < 0.3 else f"r{self.given + 100}"
        rows = []
        for kind in ("NewInstance", "UpdatedMetadata")[: self.pick.randint(1, 2)]:
            self.given += 1
            rows.append(row(self.given, name, kind))
        self.open.append((self.time + self.pick.expovariate(1.0) % (GRACE - 1), rows, self.pick.random() < 0.3))

    def end(self) -> None:
        for one in [one for one in self.open if one[0] <= self.time]:
            self.open.remove(one)
            _, rows, foreign = one
            if self.pick.random() < 0.2:
                continue  # rolled back
            self.add(*rows)
            for each in rows:
                self.foreign[each.change, each.resource] += foreign
                if not foreign:
                    self.call(K.NEW_INSTANCE if each.change == "NewInstance" else K.UPDATED_METADATA, each.resource)
            if self.pick.random() < 0.2:
                self.delete(rows[0].resource)

    def delete(self, name: str) -> None:
        self.rows = {seq: each for seq, each in self.rows.items() if each.resource != name}
        self.call(K.DELETED, name)

    def call(self, kind: ChangeKind, name: str) -> None:
        delay = self.pick.expovariate(20.0)
        last = max((at for at, waiting in self.deliveries if waiting.resource == name), default=0.0)
        self.deliveries.append((max(last, self.time + delay), callback(name, kind)))
        self.happened[callback(name, kind).change, name] += 1

    def deliver(self) -> None:
        self.deliveries.sort(key=lambda one: one[0])
        while self.deliveries and self.deliveries[0][0] <= self.time:
            self.queue.append(self.deliveries.pop(0)[1])

    def record(self, facts: list[Fact], batch: Sequence[Callback]) -> None:
        if self.pick.random() < 0.05:
            self.merge.put_back(batch)
            return
        self.facts += facts
        self.kept = self.merge.cursor, self.merge.ahead

    def capture(self) -> None:
        if self.queue:
            batch = self.merge.take()
            self.record(self.merge.facts(batch), batch)
        self.record(self.merge.due(), ())

    def kill(self) -> None:
        """The process goes with its queue, its own transactions and its callbacks; the other one lives on."""
        self.killed += 1
        self.queue.clear()
        self.deliveries.clear()
        self.open = [one for one in self.open if one[2]]
        self.join(*self.kept)
        for facts in self.merge.backlog(self.tip()):
            self.record(facts, ())

    def step(self) -> None:
        self.time += self.pick.expovariate(20.0)
        for act, chance in ((self.begin, 0.5), (self.end, 1.0), (self.deliver, 0.7), (self.capture, 0.5)):
            if self.pick.random() < chance:
                act()

    def settle(self) -> None:
        for _ in range(400):
            self.time += 0.25
            for act in (self.end, self.deliver, self.capture):
                act()


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("kills", [0, 5])
def test_nothing_is_lost_told_twice_or_given_a_wrong_number(seed: int, kills: int) -> None:
    world = World(seed)
    for number in range(1500):
        world.step()
        if kills and number % 300 == 299:
            world.kill()
    world.settle()
    numbers = Counter(fact.seq for fact in world.facts if fact.seq is not None)
    assert [seq for seq, times in numbers.items() if times > 1] == []
    by_number = {fact.seq: fact for fact in world.facts}
    for seq, each in world.rows.items():  # what is there in the end was told with its number
        assert seq in by_number, each
        assert (by_number[seq].change, by_number[seq].resource) == (each.change, each.resource)
    count = Counter((fact.change, fact.resource) for fact in world.facts)
    for what, times in count.items():  # nothing that has not happened
        assert times <= world.happened[what] + world.foreign[what], what
    if not kills:
        for what, times in world.happened.items():
            assert count[what] >= times, what
    assert world.merge.cursor == world.merge._numbers.high
    assert world.counts["late"] == 0
