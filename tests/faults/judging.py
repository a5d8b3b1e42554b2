"""What came of the events that were sent, by what the workers wrote down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from orthanc_events_bridge.transports.base import Outgoing


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker wrote down of an event.

    It is ``begin``; then ``end``, ``fail``, ``reject``, or ``cut`` where it was cancelled; and ``noted`` when a store
    knows that it is done, or ``skip`` where it knew so before.

    :ivar at: seconds on the machine's clock, the same for all workers.
    """

    at: float
    worker: int
    what: str
    id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Handled:
    """What came of what was sent.

    :ivar lost: never handled.
    :ivar unexpected: handled, and never sent.
    :ivar again: handled more than once.
    :ivar overtaken: first handled to its end before an earlier one of its key had been.
    :ivar together: begun while the same worker was at another of its key.
    :ivar cut: begun, and cancelled or left by a worker that nobody has killed.
    """

    lost: int
    unexpected: int
    again: int
    overtaken: int
    together: int
    cut: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in asdict(self).items())


def judge(
    sent: Sequence[Outgoing], notes: Sequence[Note], settled: Sequence[str] = (), killed: Collection[int] = ()
) -> Handled:
    """Compare.

    :param settled: ids of those that were settled otherwise, as dead letters.
    :param killed: workers that were.
    """
    ends: dict[str, int] = defaultdict(int)
    order: dict[str, list[int]] = defaultdict(list)
    by_id = {one.id: one for one in sent}
    running: dict[tuple[int, str], set[str]] = defaultdict(set)
    together = cut = 0
    for note in notes:
        if note.what in ("begin", "end", "fail", "reject", "cut") and note.id in by_id:
            now = running[note.worker, by_id[note.id].key]
            if note.what == "begin":
                together += bool(now)
                now.add(note.id)
            else:
                now.discard(note.id)
        cut += note.what == "cut"
        if note.what == "end":
            if note.id in by_id and not ends[note.id]:
                order[by_id[note.id].key].append(int(note.id[:8]))
            ends[note.id] += 1
    overtaken = sum(before > after for found in order.values() for before, after in pairwise(found))
    done = {*ends, *settled}
    return Handled(
        lost=len(by_id.keys() - done),
        unexpected=len(ends.keys() - by_id.keys()),
        again=sum(count - 1 for count in ends.values() if count > 1),
        overtaken=overtaken,
        together=together,
        cut=cut + sum(len(left) for (worker, _), left in running.items() if worker not in killed),
    )
