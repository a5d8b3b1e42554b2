"""How events become batches of records that Kafka stores once, and in order.

A partition has one batch under way at a time: behind one that was refused, Kafka takes the next all the same, as
measured, where it does not know the producer yet. A batch carries its producer's id and a sequence number, of which
Kafka keeps the last few for each partition: what comes a second time is not stored again. So what was sent, and never
answered, is sent again as it was, over the next connection too. Where that can't be (the relay begins elsewhere, a
batch was refused, Kafka knows better), the producer takes a new id: one number never stands for two events.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.transports.headers import EVENT_ID, SITE

#: Bytes of a request, about, so that each is answered soon even on a slow line. A larger event has one of its own.
_REQUEST: Final = 256 * 1024
#: Bytes around a batch, and at most around an event and each of its headers.
_AROUND_A_BATCH: Final = 61
_AROUND_AN_EVENT: Final = 150
#: Sequence numbers begin again with 0 behind this one.
_NUMBERS: Final = 2**31

#: ``acks``: of all replicas in step; of nobody.
_ALL: Final = -1
_NOBODY: Final = 0


@dataclass(slots=True)
class Batch:
    """Events of one partition that are stored as a whole or not at all.

    :param first: its sequence number.
    :param indices: of its events, among those to publish.
    :param ids: theirs.
    :param again: it may be stored already.
    """

    partition: int
    first: int
    indices: list[int]
    ids: tuple[str, ...]
    again: bool = False


def size(event: Outgoing) -> int:
    """Bytes of the event as a record, at most."""
    return event.size + len(event.key) + len(event.id) + len(event.site) + len(event.content_type) + _AROUND_AN_EVENT


class Producer:
    """What outlives a connection: the producer's id, the next sequence numbers, and what was never answered.

    :param topic: its name.
    :param compression: as Kafka numbers its kinds.
    :param without: as in `orthanc_events_bridge.transports.kafka.KafkaTransport`.
    """

    def __init__(self, topic: str, compression: int, without: frozenset[str] = frozenset()) -> None:
        self._topic = topic
        self._without = without
        self._compression = compression
        self._id, self._epoch = -1, -1
        self._next: dict[int, int] = {}
        self._doubts: dict[int, Batch] = {}

    @property
    def ready(self) -> bool:
        """Whether it has an id."""
        return self._id >= 0 or "idempotence" in self._without

    def begin(self, identity: int, epoch: int) -> None:
        """Take an id that was never used."""
        self._id, self._epoch = identity, epoch
        self._next.clear()
        self._doubts.clear()

    def abandon(self) -> None:
        """Nothing is sent under this id any more."""
        if "rebuild" not in self._without:
            self._id = -1

    # Batches.

    def plan(self, events: Sequence[Outgoing], partitions: Sequence[int], largest: int) -> list[Batch] | None:
        """Cut events into batches, in the order of their first events.

        :param partitions: that of each event.
        :param largest: bytes of a batch, at most; a larger event has one of its own.
        :return: none where what was never answered can't be sent again as it was: a new id is needed.
        """
        mine: dict[int, list[int]] = {}
        for index, partition in enumerate(partitions):
            mine.setdefault(partition, []).append(index)
        batches: list[Batch] = []
        for partition, indices in mine.items():
            first = self._next.get(partition, 0)
            doubt = self._doubts.get(partition)
            if doubt is not None:
                again, indices = indices[: len(doubt.ids)], indices[len(doubt.ids) :]
                if tuple(events[index].id for index in again) != doubt.ids:
                    return None
                batches.append(Batch(partition, doubt.first, again, doubt.ids, again=True))
            for some in _cut(indices, events, min(largest, _REQUEST)):
                batches.append(Batch(partition, first, some, tuple(events[index].id for index in some)))
                first = (first + len(some)) % _NUMBERS
        batches.sort(key=lambda batch: batch.indices[0])
        return batches

    def requests(
        self, events: Sequence[Outgoing], batches: Sequence[Batch], timeout: float
    ) -> Iterator[tuple[Any, list[Batch]]]:
        """The requests that carry batches, in order; each has at most one batch of a partition.

        :param timeout: seconds that the replicas may take.
        """
        some: dict[int, Batch] = {}
        total = 0
        for batch in batches:
            length = sum(size(events[index]) for index in batch.indices)
            if batch.partition in some or (some and total + length > _REQUEST):
                yield self._request(events, some, timeout), list(some.values())
                some, total = {}, 0
            some[batch.partition] = batch
            total += length
        if some:
            yield self._request(events, some, timeout), list(some.values())

    def _request(self, events: Sequence[Outgoing], batches: dict[int, Batch], timeout: float) -> Any:
        rows = [
            (partition, self.encode([events[index] for index in batch.indices], batch.first))
            for partition, batch in batches.items()
        ]
        acks = _NOBODY if "confirm" in self._without else _ALL
        return ProduceRequest(None, acks, round(timeout * 1000), [(self._topic, rows)])

    def encode(self, events: Sequence[Outgoing], first: int = 0) -> bytes:
        """A batch as Kafka stores it."""
        if "idempotence" in self._without:
            first = -1
        builder = DefaultRecordBatchBuilder(
            magic=2,
            compression_type=self._compression,
            is_transactional=0,
            producer_id=self._id,
            producer_epoch=self._epoch,
            base_sequence=first,
            batch_size=2**30,
        )
        now = time.time_ns() // 1_000_000
        for offset, event in enumerate(events):
            headers = {
                "content-type": event.content_type,
                EVENT_ID: event.id,
                SITE: event.site,
            }
            if event.headers or event.attributes:
                headers |= dict(event.headers) | {f"ce_{name}": value for name, value in event.attributes}
            encoded = [(name, value.encode()) for name, value in headers.items()]
            builder.append(offset, now, event.key.encode(), event.body, encoded)
        return bytes(builder.build())

    # What became of them.

    def sent(self, batch: Batch) -> None:
        """It is on its way: until something is known of it, it may be stored or not."""
        if "idempotence" not in self._without:
            self._doubts[batch.partition] = batch
            self._next[batch.partition] = (batch.first + len(batch.ids)) % _NUMBERS

    def stored(self, batch: Batch) -> None:
        """It is there."""
        self._doubts.pop(batch.partition, None)


def _cut(indices: Sequence[int], events: Sequence[Outgoing], largest: int) -> Iterator[list[int]]:
    some: list[int] = []
    total = _AROUND_A_BATCH
    for index in indices:
        length = size(events[index])
        if some and total + length > largest:
            yield some
            some, total = [], _AROUND_A_BATCH
        some.append(index)
        total += length
    if some:
        yield some
