"""The merge of callbacks and change log where Seq is neither the order of the commits nor gapless.

That is so in every database that several transactions write at once (PostgreSQL): a number is given before the commit,
so a row may appear below rows that were read already, and a transaction that is rolled back leaves its numbers unused.
`../../docs/decisions/0011-unordered-logs.md` has what was measured.

- A callback comes after its commit. So callbacks are drained first and the log is read second: each callback of a
  logged kind then finds the oldest row of its kind and resource that nobody has claimed yet; or its row is gone for
  good.
- What no callback of this process claims (changes of other Orthancs on the same database, callbacks that a kill took)
  is recorded from the log alone, after a grace period, or at once if it is older than this process.
- A number without a row is left open for that period: a transaction under way may still fill it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from orthanc_events_bridge.changes.log import PAGE, ChangeLog, Row
from orthanc_events_bridge.changes.merge import Anchor, Clock, MisalignedError, from_callback, from_row
from orthanc_events_bridge.changes.model import KNOWN_NAMES, NAMES, Callback, ChangeKind, Fact
from orthanc_events_bridge.changes.numbers import Gap, Numbers, rows_within
from orthanc_events_bridge.changes.runs import children_first, parents_of, running

#: Seconds that a number may stay without a row, and a row without its callback.
GRACE: Final = 10.0
#: How often what no callback has told is looked for, in seconds.
_LOOK: Final = 0.5
#: A gap that was given up is looked at once more, after so many times the grace period.
_SECOND_LOOK: Final = 3
#: Callbacks in a batch, at most.
_BATCH: Final = 1000
#: How far below the log's counter a first start looks for rows whose callbacks wait.
_WINDOW: Final = 3000
#: How far below the last acknowledged Seq one goes on where the mark was lost.
REREAD: Final = 3000
#: How long a new instance may wait for the callbacks that name its parents, in seconds.
_RUN_WAIT: Final = 0.050
#: How long a deletion waits for the next one of the same transaction, in seconds.
_DELETION_WAIT: Final = 0.003
#: Past that they don't come any more.
_RUN_LOST: Final = 1.0

#: What a row and its callback have in common: kind (empty: one of the future), level and id.
_Key = tuple[str, str, str]
_T = TypeVar("_T")


class _State(NamedTuple):
    """What a batch changes, so that it can be undone."""

    numbers: Numbers
    told: dict[_Key, list[float]]
    minted: dict[_Key, float]
    given_up: list[Gap]
    runs: int
    counts: tuple[int, int]


class Unordered:
    """Merges one queue of callbacks with one log that has no order. The interface is that of `Merge`.

    :param log: Orthanc's change log.
    :param queue: filled by OnChange, and drained here; may stay empty for ever.
    :param cursor: the low-water mark: every Seq up to it is settled.
    :param clock: time, so that tests need none.
    :param ahead: what was recorded above the mark, as `ahead` gave it.
    :param grace: seconds; longer than the longest transaction.
    :param began: when the queue began to be filled, seconds since the epoch: no older row has a callback there.
    :param counts: where ``passed`` is counted, how many numbers were given up without a row (rolled back, or gone
        before they were read), and ``late``, how many rows appeared there after all.
    :ivar cursor: the low-water mark of what the facts given out so far cover.
    """

    #: For `Merge`'s sake: here nobody can tell what vanished from what was rolled back.
    vanished = 0

    def __init__(
        self,
        log: ChangeLog,
        queue: deque[Callback],
        cursor: int,
        clock: Clock,
        *,
        ahead: str = "",
        grace: float = GRACE,
        began: float = float("inf"),
        counts: dict[str, int] | None = None,
    ) -> None:
        self._log = log
        self._queue = queue
        self._clock = clock
        self.grace = grace
        #: Rows up to this date are older than the queue (the log knows whole seconds), and those behind that one are
        #: younger: if no callback claims one of these, another Orthanc has made it.
        self._old, self._young = (began - 1) * 1000, (began + 1) * 1000
        self._numbers = Numbers(cursor, ahead, clock.now())
        self.cursor = cursor
        self.ahead = ahead
        self._counts = counts if counts is not None else {"passed": 0, "late": 0}
        self._uncounted = 0
        self._next_look = 0.0
        #: When the queue was last seen empty: what came before has been heard.
        self._heard = clock.now()
        #: Rows that were recorded from the log alone, whose callbacks may still come: key → until when, of each.
        self._told: dict[_Key, list[float]] = {}
        #: Callbacks whose row was gone: key → until when.
        self._minted: dict[_Key, float] = {}
        self._given_up: list[Gap] = []
        #: New instances whose three NewChildInstance have not been drained yet; and when there was a batch.
        self._runs = 0
        self._taken = clock.now()
        self._before = self._state()

    # -- the start -----------------------------------------------------------------------------------------------------

    def anchor(self) -> Anchor | None:
        """The log's counter: what is behind the cursor up to there is the backlog.

        :raises LogUnavailableError: the log can't be read; call again.
        :raises MisalignedError: the log ends before the cursor: it is another one.
        """
        tip = self._log.tip()
        if tip < self.cursor:
            raise MisalignedError(f"the log ends at {tip}, {self.cursor} is recorded")
        return Anchor(tip, "counter")

    def skip(self, through: int) -> None:
        """On a first start, pass over what is in the log, but for what has happened since the queue began.

        :raises LogUnavailableError: the log can't be read; call again.
        """
        self._numbers = Numbers(max(0, through - _WINDOW), "", self._clock.now())
        self._uncounted = through
        self._read_on()
        self._settle(seq for seq, held in list(self._numbers.held.items()) if held.row.at <= self._old)
        self._move()

    def backlog(self, through: int) -> Iterator[list[Fact]]:
        """What was logged before the queue began to be filled, from the log alone, page by page.

        :raises LogUnavailableError: the log can't be read; the cursor tells how far it came.
        """
        if not self.cursor and not self.ahead:  # nothing was ever read: what is missing was never ours to see
            self._uncounted = through
        self._numbers.read_gaps(self._log, self._clock.now())
        more = True
        while True:
            rows = [held.row for held in self._numbers.held.values() if held.row.at <= self._old]
            if rows:
                yield self._from_log(rows)
            if not more or self._numbers.high >= through:
                return
            more = self._numbers.read_on(self._log, self._clock.now())

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def take(self) -> list[Callback]:
        """Drain a batch. It may wait a moment for the rest of what one transaction tells, so that no run is cut in two:
        the parents of its last new instance, and what goes with a deletion.
        """
        self._before = self._state()
        batch: list[Callback] = []
        runs = self._runs
        started = last = self._clock.now()
        while len(batch) < _BATCH:
            if self._queue:
                callback = self._queue.popleft()
                batch.append(callback)
                runs = running(runs, callback)
                last = self._clock.now()
                if len(batch) >= PAGE and not runs:
                    break
                continue
            until = last + _DELETION_WAIT if batch and batch[-1].kind == ChangeKind.DELETED else last
            if runs:
                until = max(until, started + _RUN_WAIT)
            if self._clock.now() >= until or self._clock.wait(0.001):
                break
        self._taken = self._clock.now()
        if not self._queue:
            self._heard = self._taken
        return children_first(batch)

    def put_back(self, batch: Sequence[Callback]) -> None:
        """Undo `take`, `due` or `tail`, and what `facts` has made of a batch."""
        self._queue.extendleft(reversed(batch))
        self._restore(self._before)

    def facts(self, batch: Sequence[Callback]) -> list[Fact]:
        """Turn a batch of callbacks into facts: in their order, but that rows come in the order of their Seq.

        What was recorded from the log already is not told again, so there may be fewer facts than callbacks.

        :raises LogUnavailableError: the log can't be read now: put the batch back.
        """
        rows = self._claim(batch)
        claimed = {row.seq for row in rows if isinstance(row, Row)}
        left = self._left(claimed)
        waiting = deque(sorted(claimed | {row.seq for row in left}))
        parents, self._runs = parents_of(batch, self._runs)
        until = self._clock.now() + self.grace * _SECOND_LOOK * 2
        facts: list[Fact] = []
        for callback, row in zip(batch, rows, strict=True):
            if row is True:
                continue
            while waiting and (waiting[0] <= row.seq if isinstance(row, Row) else waiting[0] not in claimed):
                seq = waiting.popleft()
                if seq in claimed:
                    facts.append(from_row(self._numbers.held.pop(seq).row))
                else:
                    facts += self._alone([one for one in left if one.seq == seq])
            if row is None:
                facts.append(from_callback(callback, None))
                if callback.logged:
                    self._minted[_key_of(callback)] = until
        for fact in facts:
            if fact.change != "Deleted" and fact.resource in parents:
                fact.parents = dict(parents[fact.resource])
        self._move()
        return facts

    def _left(self, claimed: set[int]) -> list[Row]:
        """What an earlier process has left, by its date: it came before all that is told now.

        It was read before this batch was drained, and its callback is neither in the batch nor behind it.
        """
        if self._heard != self._taken:  # there is more in the queue
            return []
        return [
            one.row
            for seq, one in self._numbers.held.items()
            if one.row.at <= self._young and one.since < self._taken and seq not in claimed
        ]

    def _claim(self, batch: Sequence[Callback]) -> list[Row | bool | None]:
        """For each callback its row; none where there is none (any more); true where it is told already."""
        if any(callback.logged or callback.kind not in NAMES for callback in batch):
            self._read_on()
        rows = self._match(batch)
        if self._numbers.gaps and any(row is None and one.logged for one, row in zip(batch, rows, strict=True)):
            self._numbers.read_gaps(self._log, self._clock.now())
            rows = self._match(batch)
        now = self._clock.now()
        for callback, row in zip(batch, rows, strict=True):
            if row is True:
                times = self._told[_key_of(callback)]
                times[:] = [until for until in times if until >= now][1:]
            elif callback.kind == ChangeKind.DELETED:
                self._told = _without(callback.resource, self._told)
        return rows

    def _match(self, batch: Sequence[Callback]) -> list[Row | bool | None]:
        now = self._clock.now()
        told = {key: sum(until >= now for until in times) for key, times in self._told.items()}
        free: defaultdict[_Key, deque[Row]] = defaultdict(deque)
        for seq in sorted(self._numbers.held):
            row = self._numbers.held[seq].row
            free[_key(row)].append(row)
        rows: list[Row | bool | None] = []
        for callback in batch:
            key = _key_of(callback)
            if not callback.logged and callback.kind in NAMES:
                if callback.kind == ChangeKind.DELETED:  # what comes behind it is about another life
                    told = _without(callback.resource, told)
                rows.append(None)
            elif told.get(key):
                told[key] -= 1
                rows.append(True)
            else:
                rows.append(free[key].popleft() if free.get(key) else None)
        return rows

    # -- what no callback tells ----------------------------------------------------------------------------------------

    def due(self) -> list[Fact]:
        """What no callback has claimed within the grace period; and give up the gaps that are older.

        To be called now and then; it asks Orthanc twice a second at most.

        :raises LogUnavailableError: the log can't be read now; call again.
        """
        now = self._clock.now()
        if not self._queue:
            self._heard = now
            if now - self._taken > _RUN_LOST:
                self._runs = 0
        self._before = self._state()
        if now < self._next_look:
            return []
        self._next_look = now + min(_LOOK, self.grace / 2)
        self._look(now)
        ripe = [held for held in self._numbers.held.values() if held.since <= self._heard - self.grace]
        self._drop_gone([held.row for held in ripe if held.row.at > self._young])
        facts = [*self._alone([held.row for held in ripe]), *self._late(now)]
        self._told = {key: times for key, times in self._told.items() if times and times[-1] >= now}
        self._minted = {key: until for key, until in self._minted.items() if until >= now}
        return facts

    def tail(self) -> list[Fact]:
        """All that the log has and nobody has recorded, where no callback comes (any more).

        :raises LogUnavailableError: the log can't be read now; call again.
        """
        self._before = self._state()
        now = self._clock.now()
        self._look(now)
        self._numbers.read_gaps(self._log, now)
        return self._from_log([held.row for held in self._numbers.held.values()])

    def _look(self, now: float) -> None:
        """Read the log to its end, and give up the gaps that are older than the grace period, and still there."""
        counter = self._log.tip()
        self._read_on()
        numbers = self._numbers
        numbers.given(counter, now)
        if not numbers.gaps or numbers.gaps[0].since > now - self.grace:
            return
        numbers.read_gaps(self._log, now)
        for gap in numbers.give_up(now - self.grace):
            self._counts["passed"] += max(0, gap.last - max(gap.first - 1, self._uncounted))
            self._given_up.append(gap._replace(since=now + self.grace * _SECOND_LOOK))

    def _drop_gone(self, rows: Sequence[Row]) -> None:
        """Leave to the Orthanc that made it what is deleted by now: nobody could say any more whose child it was."""
        there = {row.seq for row in rows_within(self._log, [Gap(row.seq, row.seq, 0.0) for row in sorted(rows)])}
        gone = [row.seq for row in rows if row.seq not in there]
        self._counts["passed"] += len(gone)
        self._settle(gone)
        self._move()

    def _late(self, now: float) -> list[Fact]:
        """Rows that have appeared in gaps that were given up: found once, and told if no callback has told them."""
        due = [gap for gap in self._given_up if gap.since <= now]
        if not due:
            return []
        found = [row for row in rows_within(self._log, due) if any(gap.first <= row.seq <= gap.last for gap in due)]
        self._given_up = [gap for gap in self._given_up if gap.since > now]
        self._counts["late"] += len(found)
        return [from_row(row) for row in found if self._minted.get(_key(row), 0.0) < now]

    # -- inner works ---------------------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        while self._numbers.read_on(self._log, self._clock.now()):
            pass

    def _alone(self, rows: Sequence[Row]) -> list[Fact]:
        """Record what no callback of this process has told; should one come all the same, it is not told again."""
        rows = [row for row in rows if row.seq in self._numbers.held]
        until = self._clock.now() + self.grace
        for row in rows:
            self._told.setdefault(_key(row), []).append(until)
        facts = self._from_log(rows)
        for fact in facts:
            fact.foreign = fact.at > self._young
        return facts

    def _from_log(self, rows: Sequence[Row]) -> list[Fact]:
        ordered = sorted(rows)
        self._settle(row.seq for row in ordered)
        self._move()
        return [from_row(row) for row in ordered]

    def _settle(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            del self._numbers.held[seq]

    def _move(self) -> None:
        self.cursor, self.ahead = self._numbers.mark, self._numbers.ahead

    def _state(self) -> _State:
        told = {key: list(times) for key, times in self._told.items()}
        counts = self._counts["passed"], self._counts["late"]
        return _State(self._numbers.copy(), told, dict(self._minted), list(self._given_up), self._runs, counts)

    def _restore(self, state: _State) -> None:
        self._numbers, self._told, self._minted, self._given_up, self._runs, counts = state
        self._counts["passed"], self._counts["late"] = counts
        self._before = self._state()
        self._move()


def _key(row: Row) -> _Key:
    return row.change if row.change in KNOWN_NAMES else "", row.level, row.resource


def _key_of(callback: Callback) -> _Key:
    return NAMES.get(callback.kind, ""), callback.level_name, callback.resource


def _without(resource: str, told: dict[_Key, _T]) -> dict[_Key, _T]:
    return {key: value for key, value in told.items() if key[2] != resource}
