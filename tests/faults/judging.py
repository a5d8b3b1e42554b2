"""What came of the events that were sent, by what the workers wrote down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Effects:
    """What came of effects that are to be done once.

    :ivar lost: never done.
    :ivar skipped: taken for done before anybody had done it.
    :ivar overlapping: begun while another was at it, who was alive, and had not stood still for longer than its lease.
    :ivar repeated: begun again behind the note that it is done, or while who had done it lived on to note it.
    :ivar twice: done by a worker that was killed before it could note that. No store can prevent it.
    :ivar late: begun while another was at it, who had stood still for longer than its lease, and said so, or never came
        to its end.
    """

    lost: int
    skipped: int
    overlapping: int
    repeated: int
    twice: int
    late: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in asdict(self).items())

    @property
    def as_promised(self) -> bool:
        """Whether it is what docs/once.md promises."""
        return not (self.lost or self.skipped or self.overlapping or self.repeated)


def judge_effects(
    sent: Sequence[Outgoing], notes: Sequence[Note], killed: Mapping[int, float], said: Collection[tuple[int, str]]
) -> Effects:
    """Compare.

    :param killed: when a worker was certainly dead.
    :param said: workers, and events of which they said that their lease was lost.
    """
    found: dict[str, int] = dict.fromkeys(("skipped", "overlapping", "repeated", "twice", "late"), 0)
    running: dict[str, set[int]] = defaultdict(set)
    noted: dict[str, dict[int, bool]] = defaultdict(dict)  # whether it is, for those that came to its end
    for one in notes:
        at_it, done = running[one.id], noted[one.id]
        if one.what == "begin":
            dead = {worker for worker in at_it if killed.get(worker, one.at) < one.at}
            for worker in at_it - dead:
                gone = one.id not in _ends(notes, worker)  # killed later, or failed: it has nothing to say
                found["late" if gone or (worker, one.id) in said else "overlapping"] += 1
            for worker, is_noted in done.items():
                if is_noted or killed.get(worker, one.at) >= one.at:
                    found["late" if (worker, one.id) in said else "repeated"] += 1
                else:
                    found["twice"] += 1
            running[one.id] = (at_it - dead) | {one.worker}
        elif one.what == "noted":
            done[one.worker] = True
        elif one.what == "skip":
            found["skipped"] += not done
        else:
            at_it.discard(one.worker)
            if one.what == "end":
                done[one.worker] = False
    return Effects(lost=sum(not noted[one.id] for one in sent), **found)


def _ends(notes: Sequence[Note], worker: int) -> set[str]:
    return {one.id for one in notes if one.worker == worker and one.what == "end"}
