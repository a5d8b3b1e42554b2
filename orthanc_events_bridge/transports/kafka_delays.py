"""What is to be done again later: copies in topics of delays, one for each step, and in the consumer's inbox.

A copy says when it is due. In a topic of delays it waits for as long as the topic's step says, so that all of them
leave in the order in which they came, and is sent on to one of a shorter step if it is not due even then: nobody waits
behind another for longer than the shortest step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orthanc_events_bridge.transports.base import Incoming
from orthanc_events_bridge.transports.headers import ADDRESS, DUE, due_of

#: Seconds that an event waits in each topic of delays. Delays below the first wait there too, each for itself.
STEPS: Final = (1, 5, 30, 120, 600, 3600)

#: Bytes around a record, about.
_AROUND: Final = 128


def retry_topic(name: str, step: int) -> str:
    """The topic of a consumer's delays of so many seconds."""
    return f"orthanc.retry.{name}.{step}"


def is_retry_topic(name: str, topic: str) -> bool:
    """Whether it is one of a consumer's."""
    return topic in {retry_topic(name, step) for step in STEPS}


def step_for(delay: float) -> int:
    """The step of the topic in which so many seconds are waited for."""
    return max((step for step in STEPS if step <= delay), default=STEPS[0])


@dataclass(frozen=True, slots=True)
class Copy:
    """What is to be stored.

    :param headers: names and values, in order.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]

    @property
    def size(self) -> int:
        """Bytes, about."""
        names = sum(len(name) + len(value or b"") + 8 for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + names + _AROUND


def copy_of(record: Any, topic: str, changes: Mapping[str, str]) -> Copy:
    """A copy of a record, for another topic.

    :param changes: headers that are set, in place of those of the same name.
    """
    return Copy(topic, record.key, record.value, changed(record.headers, changes))


def changed(headers: Sequence[tuple[str, bytes | None]], changes: Mapping[str, str]) -> list[tuple[str, bytes | None]]:
    """Headers, with others in place of those of the same name, or behind them."""
    kept = [(name, value) for name, value in headers if name.lower() not in changes]
    return [*kept, *((name, text.encode()) for name, text in changes.items())]


def message_of(record: Any, topic: str, number: int) -> Incoming:
    """A record as a subscriber receives it; a copy says where it came from.

    :param number: of its partition.
    """
    headers = {name.lower(): (value or b"").decode("utf-8", "replace") for name, value in record.headers}
    return Incoming(headers.get(ADDRESS, topic), record.value or b"", headers, f"{number}:{record.offset}")


def waiting_time(record: Any, step: int) -> tuple[float, float]:
    """When a record has waited in a topic of delays for as long as it does there, and when it is due.

    What is left then is not waited for elsewhere if it is less than the shortest step. In the topic of that itself it
    is: those behind may be due much sooner.
    """
    due = 0.0
    for name, value in record.headers:
        if name == DUE:
            due = due_of({DUE: (value or b"").decode("utf-8", "replace")})
    over = min(due, record.timestamp / 1000 + step)
    return (due if due - over < STEPS[0] < step else over), due
