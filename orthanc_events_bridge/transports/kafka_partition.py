"""One partition in a subscriber's hands: what has come, what was given out, what is settled.

Kafka stores one offset for a group and partition, below which everything is done. What is settled above it is kept in
the note that goes with the offset: `Partition.progress`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.transports.kafka_ordered import Again

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.kafka_delivery import KafkaDelivery
    from orthanc_events_bridge.transports.kafka_sharing import Place

#: Bytes of a note that every server takes, unless its offset.metadata.max.bytes was lowered.
NOTE: Final = 4096
#: What notes of ours can begin with.
_MARK: Final = re.compile(r"[0-9a-f]{8}:|(un)?ordered:|inbox:")
#: So many events of a partition wait here before no more are fetched.
_ENOUGH: Final = 500


def write_note(low: int, unsettled: list[int], high: int, room: int) -> str:
    """Put into a note which offsets from the stored one on are not settled.

    :param low: the stored offset, which is the first of them.
    :param unsettled: they, in order.
    :param high: all from here on are not settled either.
    :param room: bytes of the note; with too few of them the note tells less, and what it doesn't tell comes again.
    """
    gaps = [later - earlier for earlier, later in zip([low, *unsettled], [*unsettled, high], strict=False)]
    text = ",".join(map(str, gaps))
    return text if len(text) <= room else text[: max(0, text.rfind(",", 0, room))]


def read_note(low: int, note: str) -> tuple[list[int], int]:
    """The reverse: the offsets that are not settled, and that from which on nothing is.

    A note of others' says nothing.
    """
    offsets: list[int] = []
    offset = low
    try:
        for gap in note.split(","):
            if int(gap) < 0:
                return [], low
            offset += int(gap)
            offsets.append(offset)
    except ValueError:
        return [], low
    return offsets[:-1], offsets[-1]


def mark_of(topic: str) -> str:
    """With what a note begins that is on this very topic.

    Where the topic is deleted and made again, an offset of before is another event's, and nothing of those below it
    may have been settled. Kafka forgets offsets with their topic, but takes new ones by its name.

    :param topic: its id; empty where the cluster has none.
    """
    return f"{topic[:8]}:" if topic else ""


@dataclass(slots=True, eq=False)
class Partition:
    """A partition that is ours.

    :ivar place: topic and number.
    :ivar step: for a topic of delays: for how many seconds an event waits in it.
    :ivar leader: the node to fetch from; -1: to be found out.
    :ivar wanted: the offset to fetch next.
    :ivar given: the offset behind the last one that was given out.
    :ivar rest: offsets below ``high`` that the group has not settled, as the stored note says.
    :ivar held: what was given out and is not settled; none stands for what is sent on to another topic.
    :ivar records: what has come and was not given out.
    :ivar leaving: it goes to another member, as soon as nothing is held.
    :ivar gone: it is not ours any more.
    :ivar queued: it stands in line with what it has.
    :ivar stored: what Kafka keeps of our progress.
    :ivar mark: with what its notes begin: `mark_of`, and `orthanc_events_bridge.transports.kafka_ordered.begun_as`.
    :ivar ordered: nothing is given out while something is held.
    :ivar again: where it is ordered: what was given back and is not settled.
    """

    place: Place
    step: int | None
    leader: int
    wanted: int
    given: int
    stored: tuple[int, str] | None
    rest: frozenset[int] = frozenset()
    high: int = 0
    held: dict[int, KafkaDelivery | None] = field(default_factory=dict)
    records: deque[Any] = field(default_factory=deque)
    leaving: bool = False
    gone: bool = False
    queued: bool = False
    mark: str = ""
    ordered: bool = False
    again: Again | None = None

    @classmethod
    def begin(
        cls,
        place: Place,
        step: int | None,
        stored: tuple[int, str] | None,
        mark: str = "",
        *,
        ordered: bool = False,
    ) -> Partition:
        """Begin where the group has got to; with the oldest event where it has never begun with this topic.

        An offset that an administrator has set, without a mark, counts.
        """
        marked = _MARK.match(stored[1]) if stored else None
        if marked and mark and marked[0] != mark:
            stored = None
        offset, note = stored or (0, "")
        note = note[len(marked[0]) :] if marked else note
        rest, high = read_note(offset, note)
        again = Again.read(offset, note) if ordered else None
        rows = frozenset(rest)
        return cls(place, step, -1, offset, offset, stored, rows, high, mark=mark, ordered=ordered, again=again)

    def arrived(self, records: Iterable[Any]) -> None:
        """Take what was fetched, but for what is settled already."""
        if self.wanted < self.high:
            self.records.extend(one for one in records if one.offset >= self.high or one.offset in self.rest)
        else:
            self.records.extend(records)

    @property
    def hungry(self) -> bool:
        """Whether more of it is to be fetched."""
        return len(self.records) < _ENOUGH and not self.leaving

    @property
    def blocked(self) -> bool:
        """Whether what is held comes first."""
        return self.ordered and bool(self.held)

    @property
    def due(self) -> float:
        """When the next may be given out, as a time of the epoch."""
        again = self.again_of(self.records[0])
        return again.due if again else 0.0

    def again_of(self, record: Any) -> Again | None:
        """What is known of a record that was given back."""
        return self.again if self.again is not None and self.again.offset == record.offset else None

    def settled(self, offset: int) -> None:
        """It is not held any more, and never will be."""
        self.held.pop(offset, None)
        if self.again is not None and self.again.offset == offset:
            self.again = None

    def give_back(self, record: Any, again: Again) -> None:
        """What is held is to be given out again, before all others."""
        self.held.pop(record.offset, None)
        self.again = again
        self.given = record.offset
        if self.leaving:
            self.wanted = record.offset
        else:
            self.records.appendleft(record)

    def put_back(self, offsets: Iterable[int]) -> None:
        """What is held was not begun, and is for whoever has the partition next: nothing else is given out here."""
        back = set(offsets)
        if not back:
            return
        self.rest = frozenset(back | {one for one in self.rest if one >= self.given})
        self.high = max(self.high, self.given)
        self.given = min(back)
        for offset in back:
            self.held.pop(offset, None)

    def restart(self, offset: int) -> None:
        """Go on elsewhere: what we wanted is not there."""
        self.records.clear()
        self.wanted = self.given = offset
        self.rest, self.high = frozenset(), offset

    def drop(self) -> None:
        """Forget what was not given out."""
        self.records.clear()
        self.wanted = self.given

    def progress(self, room: int) -> tuple[int, str]:
        """What Kafka is to store: the offset below which all is settled, and the note.

        :param room: for the note, in bytes.
        """
        unsettled = sorted(self.held)
        if self.given < self.high:
            unsettled = sorted({*self.held, *(offset for offset in self.rest if offset >= self.given)})
        high = max(self.given, self.high)
        mark = self.mark if len(self.mark) <= room else ""
        low, room = unsettled[0] if unsettled else high, room - len(mark)
        if self.again is not None and self.again.offset == low:
            return low, mark + self.again.write(room)
        return low, mark + (write_note(low, unsettled, high, room) if unsettled else "")
