"""The merge of Orthanc's callbacks and its change log into one ordered list of facts.

The fact that makes it exact: with SQLite, callbacks form one total order, and every logged change takes
exactly one consecutive Seq. So the i-th callback of a logged kind has ``Seq = o + i``; the hard part is the
anchor ``o``. `../../docs/decisions/0002-merge.md` has the reasons and the runs that showed it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from orthanc_events_bridge.changes.log import PAGE, ChangeLog, Row
from orthanc_events_bridge.changes.model import KNOWN_NAMES, NAMES, Callback, ChangeKind, Fact
from orthanc_events_bridge.errors import BridgeError

#: How far back candidates for the anchor are looked for, in rows.
_CANDIDATES: Final = 3000
#: How many waiting callbacks are compared with the log for each candidate: enough to tell any two apart.
_COMPARED: Final = 500
_POLL: Final = 0.005
#: Callbacks in a batch, at most: deletions have no row that would bound it.
_BATCH: Final = 1000
#: For so many looks (50 ms) the log must not have grown. Looks and not time: a process that stood still for a
#: while has not heard its callbacks either.
_QUIET: Final = 10
_GIVE_UP: Final = 1.0
#: How long a new instance may wait for the callbacks that name its parents. They come at once, unless the machine
#: stands still; and who goes on without them asks Orthanc, where the instance may be gone by then.
_RUN_WAIT: Final = 1.0


class MisalignedError(BridgeError):
    """A row of the log is not the one that its callback promised: anchor again."""


class Clock(Protocol):
    """Time, and waiting that a stop interrupts."""

    def now(self) -> float:
        """Seconds, monotonic."""

    def wait(self, seconds: float) -> bool:
        """Wait; true when we have been told to stop."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where the callbacks join the log.

    :param seq: ``o``: the first waiting logged callback has the Seq behind it.
    :param rule: ``proof``, ``content``, ``quiet`` or ``guess``; ``overlap`` where callbacks of rows that are
        recorded already were dropped first.
    """

    seq: int
    rule: str


class Merge:
    """Merges one queue of callbacks with one log.

    :param log: Orthanc's change log.
    :param queue: filled by OnChange, and drained here.
    :param cursor: the last Seq that is recorded.
    :param clock: time, so that tests need none.
    :ivar cursor: the last Seq that the facts given out so far cover.
    :ivar vanished: how many logged changes vanished before anyone saw them.
    """

    #: What of the log is recorded above the cursor: here nothing ever is.
    ahead: Final = ""
    #: A seam for `make test-mutants`: rules of the anchor that are left out.
    without_rules: frozenset[str] = frozenset()

    def __init__(self, log: ChangeLog, queue: deque[Callback], cursor: int, clock: Clock) -> None:
        self._log = log
        self._queue = queue
        self._clock = clock
        self.cursor = cursor
        self.vanished = 0
        self._before = cursor

    # -- the anchor ------------------------------------------------------------------------------------------

    def anchor(self) -> Anchor | None:
        """Find where the waiting callbacks join the log. The queue is looked at, not drained.

        :return: none when told to stop.
        :raises LogUnavailableError: the log can't be read; call again.
        :raises MisalignedError: the log ends before the cursor: it is another one.
        """
        started = self._clock.now()
        highest: int | None = None
        last_tip: int | None = None
        unchanged = 0
        rows: dict[int, Row] = {}
        while True:
            waiting = self._waiting()  # before the query: each of them has its row, or had it
            tip = self._log.tip()
            if tip < self.cursor:
                raise MisalignedError(f"the log ends at {tip}, {self.cursor} is recorded")
            last_tip, unchanged = tip, unchanged + 1 if tip == last_tip else 0
            highest = tip - len(waiting) if highest is None else min(highest, tip - len(waiting))
            quiet = unchanged >= _QUIET and "quiet" not in self.without_rules
            late = self._clock.now() - started >= _GIVE_UP
            if highest < self.cursor:
                # The first of them are of rows that are recorded: an earlier anchor was a guess, and too far.
                if quiet or late:
                    self._skip(self.cursor - highest)
                    return Anchor(self.cursor, "overlap")
                if self._clock.wait(_POLL):
                    return None
                continue
            if highest == self.cursor and "proof" not in self.without_rules:
                return Anchor(self.cursor, "proof")
            if waiting and "content" not in self.without_rules:
                found, matched = self._by_content(waiting, highest, rows)
                if len(found) == 1 and matched:
                    return Anchor(found[0], "content")
            if quiet:
                return Anchor(highest, "quiet")
            if late:
                found, _ = self._by_content(waiting, highest, rows)
                return Anchor(found[-1] if found else highest, "guess")
            if self._clock.wait(_POLL):
                return None

    def _waiting(self) -> list[Callback]:
        while True:
            try:
                return [callback for callback in self._queue.copy() if callback.logged]
            except RuntimeError:  # appended to while it was copied
                continue

    def _skip(self, count: int) -> None:
        """Drop the first logged callbacks of the queue; the others keep their order."""
        kept: list[Callback] = []
        while count:
            callback = self._queue.popleft()
            if callback.logged:
                count -= 1
            else:
                kept.append(callback)
        self._queue.extendleft(reversed(kept))

    def _by_content(self, waiting: Sequence[Callback], highest: int, rows: dict[int, Row]) -> tuple[list[int], bool]:
        """The anchors that no live row contradicts, ascending; and whether one spoke for the last of them."""
        compared = waiting[:_COMPARED]
        lowest = max(self.cursor, highest - _CANDIDATES)
        since, through = max(rows, default=lowest), highest + len(compared)
        while since < through and (page := self._log.page(since, PAGE)):
            rows.update((row.seq, row) for row in page)
            since = page[-1].seq
        found: list[int] = []
        matched = False
        for candidate in range(lowest, highest + 1):
            matches = 0
            for index, callback in enumerate(compared, start=candidate + 1):
                row = rows.get(index)
                if row is None:
                    continue
                if not _same(row, callback):
                    break
                matches += 1
            else:
                found.append(candidate)
                matched = matches > 0
        return found, matched

    # -- facts -----------------------------------------------------------------------------------------------

    def skip(self, through: int) -> None:
        """On a first start, pass over what is in the log already."""
        self.cursor = through

    def backlog(self, through: int) -> Iterator[list[Fact]]:
        """The rows behind the cursor up to ``through``, from the log alone, page by page.

        :raises LogUnavailableError: the log can't be read; the cursor tells how far it came.
        """
        while self.cursor < through:
            page = [row for row in self._log.page(self.cursor, PAGE) if row.seq <= through]
            last = page[-1].seq if page else through
            self.vanished += last - self.cursor - len(page)
            self.cursor = last
            if page:
                yield [from_row(row) for row in page]

    def tail(self) -> list[Fact]:
        """What the log has gained behind the cursor, for the time after ORTHANC_STOPPED without callbacks."""
        self._before = self.cursor
        page = self._log.page(self.cursor, PAGE)
        if page:
            self.vanished += page[-1].seq - self.cursor - len(page)
            self.cursor = page[-1].seq
        return [from_row(row) for row in page]

    def due(self) -> list[Fact]:
        """What is to be recorded although no callback has told it: here nothing, each change has its callback."""
        self._before = self.cursor
        return []

    def take(self) -> list[Callback]:
        """Drain a batch: hardly more logged callbacks than a page has rows, and no run cut in two."""
        self._before = self.cursor
        batch: list[Callback] = []
        logged = 0
        while self._queue and logged < PAGE and len(batch) < _BATCH:
            callback = self._queue.popleft()
            logged += _may_have_row(callback)
            batch.append(callback)
        self._complete_run(batch)
        return batch

    def put_back(self, batch: Sequence[Callback]) -> None:
        """Undo `take`, `due` or `tail`, and what `facts` has made of a batch."""
        self._queue.extendleft(reversed(batch))
        self.cursor = self._before

    def _complete_run(self, batch: list[Callback]) -> None:
        """Wait a moment for the parents of a new instance at the end; past that they are looked up."""
        start = max((i for i, c in enumerate(batch) if c.kind == ChangeKind.NEW_INSTANCE), default=None)
        if start is None or any(callback.kind not in _RUN_KINDS for callback in batch[start + 1 :]):
            return
        until = self._clock.now() + _RUN_WAIT
        while len(_run_parents(batch, start)) < 3 and len(batch) - start < _RUN_LENGTH:
            if self._queue:
                if self._queue[0].kind not in _RUN_KINDS:
                    return
                batch.append(self._queue.popleft())
            elif self._clock.now() >= until or self._clock.wait(0.001):
                return

    def facts(self, batch: Sequence[Callback]) -> list[Fact]:
        """Turn a batch of callbacks into facts, in their order, with one page of the log.

        :raises MisalignedError: a row is not the one its callback promised. Nothing has moved: put the batch
            back.
        :raises LogUnavailableError: likewise.
        """
        expected = sum(map(_may_have_row, batch))
        rows = {row.seq: row for row in self._log.page(self.cursor, expected)} if expected else {}
        cursor = self.cursor
        facts: list[Fact] = []
        for callback in batch:
            row = rows.get(cursor + 1)
            if callback.logged:
                if row is not None and not _same(row, callback):
                    raise MisalignedError(
                        f"Seq {row.seq} is {row.change} of {row.resource}, its callback was {callback.change}"
                        f" of {callback.resource}"
                    )
                cursor += 1
                facts.append(from_row(row) if row is not None else from_callback(callback, cursor))
            elif callback.kind not in NAMES and row is not None and _may_be(row, callback):
                cursor += 1  # a kind of the future, and a logged one
                facts.append(from_row(row))
            else:
                facts.append(from_callback(callback, None))
        _fill_parents(batch, facts)
        self.cursor = cursor
        return facts


def _may_have_row(callback: Callback) -> bool:
    return callback.logged or callback.kind not in NAMES


def _same(row: Row, callback: Callback) -> bool:
    return row.resource == callback.resource and row.change == callback.change


def _may_be(row: Row, callback: Callback) -> bool:
    return row.change not in KNOWN_NAMES and row.resource == callback.resource


def from_row(row: Row) -> Fact:
    """A fact as the log tells it."""
    return Fact(row.change, row.level, row.resource, row.at, row.seq, row.date)


def from_callback(callback: Callback, seq: int | None) -> Fact:
    """A fact that only the callback shows, or whose row was gone when the log was read."""
    resource = callback.resource or None
    return Fact(callback.change, callback.level_name, resource, int(callback.at * 1000), seq)


#: NewInstance, NewSeries, NewStudy, NewPatient, and three times NewChildInstance.
_RUN_LENGTH: Final = 7
_CHILD_LEVELS: Final = {2: "series", 1: "study", 0: "patient"}
_PARENT_LEVELS: Final[dict[str, tuple[str, ...]]] = {
    "instance": ("series", "study", "patient"),
    "series": ("study", "patient"),
    "study": ("patient",),
    "patient": (),
}
_RUN_KINDS: Final = frozenset(
    {ChangeKind.NEW_SERIES, ChangeKind.NEW_STUDY, ChangeKind.NEW_PATIENT, ChangeKind.NEW_CHILD_INSTANCE}
)


def _run_parents(batch: Sequence[Callback], start: int) -> dict[str, str]:
    """Level → id, as the run of callbacks that begins with a NewInstance names them."""
    parents: dict[str, str] = {}
    for callback in batch[start + 1 : start + _RUN_LENGTH]:
        if callback.kind not in _RUN_KINDS:
            break
        if callback.kind == ChangeKind.NEW_CHILD_INSTANCE and callback.level in _CHILD_LEVELS:
            parents[_CHILD_LEVELS[callback.level]] = callback.resource
    return parents


def _fill_parents(batch: Sequence[Callback], facts: Sequence[Fact]) -> None:
    """Give the facts of each complete run their parents; the others' are looked up by capture."""
    for start, callback in enumerate(batch):
        if callback.kind != ChangeKind.NEW_INSTANCE:
            continue
        ids = _run_parents(batch, start)
        if len(ids) < 3:
            continue
        facts[start].parents = ids
        for fact in facts[start + 1 : start + _RUN_LENGTH]:
            if fact.level not in _PARENT_LEVELS or ids.get(fact.level) != fact.resource:
                break
            fact.parents = {level: ids[level] for level in _PARENT_LEVELS[fact.level]}
