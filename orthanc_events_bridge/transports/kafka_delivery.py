"""An event that a subscriber of Kafka was given."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orthanc_events_bridge.transports.base import NO_HEADERS, Delivery
from orthanc_events_bridge.transports.headers import (
    ADDRESS,
    ATTEMPTS,
    CONSUMER,
    DUE,
    OPERATION,
    attempts_before,
    due_text,
)
from orthanc_events_bridge.transports.kafka_delays import (
    Copy,
    copy_of,
    message_of,
    retry_topic,
    step_for,
)
from orthanc_events_bridge.transports.kafka_ordered import Again
from orthanc_events_bridge.transports.kafka_partition import Partition
from orthanc_events_bridge.transports.subscriptions import boot_time

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.kafka_subscription import KafkaSubscription


class KafkaDelivery(Delivery):
    """Settled here; Kafka is told a moment later."""

    def __init__(self, subscription: KafkaSubscription, partition: Partition, record: Any, name: str) -> None:
        """:param name: of the consumer whose delivery it is."""
        message = message_of(record, *partition.place)
        attempts = attempts_before(message.headers, name)
        self._said: Mapping[str, str] = NO_HEADERS
        if (again := partition.again_of(record)) is not None:
            attempts, self._said = again.attempts, again.headers
            told = {OPERATION: "retry", ATTEMPTS: str(attempts)}
            message = replace(message, headers={**message.headers, **self._said, **told})
        super().__init__(message, attempts + 1)
        self._name = name
        self.subscription = subscription
        self.partition = partition
        self.record = record
        self.since = boot_time()
        self.lost = False

    @cached_property
    def letter(self) -> bytes:
        """The key as a dead letter: however often it is tried to store it, it is one."""
        return uuid.uuid4().bytes

    async def ack(self) -> None:
        """See `orthanc_events_bridge.transports.base.Delivery.ack`.

        It is stored within a tenth of a second. What dies or is lost before that comes again.
        """
        if self.subscription.take_back(self):
            self.subscription.settle(self.partition, self.record.offset)

    async def nack(self, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        await self.subscription.retry(self, delay, headers)

    async def reject(self, headers: Mapping[str, str]) -> None:
        await self.subscription.bury(self, headers)

    async def extend(self) -> None:
        self.subscription.check(self)
        self.since = boot_time()

    def again(self, delay: float, headers: Mapping[str, str]) -> Again:
        """What its partition waits for.

        :param delay: in seconds.
        :param headers: to be added.
        """
        due = time.time() + max(0.0, delay)
        return Again(self.record.offset, self.attempt, due, {**self._said, **headers})

    def copy_for_later(self, inbox: str, delay: float, headers: Mapping[str, str]) -> Copy:
        """A copy that is given to the consumer again.

        :param inbox: the consumer's topic, where it goes if there is no delay.
        :param delay: in seconds.
        :param headers: to be added.
        """
        topic = inbox if delay <= 0 else retry_topic(self._name, step_for(delay))
        due = due_text(time.time() + max(0.0, delay))
        return copy_of(self.record, topic, {**headers, **self._told(), OPERATION: "retry", DUE: due})

    def dead_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """With what it is put among the dead letters.

        :param headers: to be added.
        """
        return {**self._said, **headers, **self._told()}

    def _told(self) -> dict[str, str]:
        """What a copy says of where it comes from."""
        return {ATTEMPTS: str(self.attempt), CONSUMER: self._name, ADDRESS: self.message.address}
