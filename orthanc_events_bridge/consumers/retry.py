"""What becomes of an event that a handler could not handle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from orthanc_events_bridge.errors import BridgeError


class Retry(Exception):  # noqa: N818 -- not an error: what a handler asks for
    """Raised by a handler: give me the event again later.

    It is an attempt like any other: `RetryPolicy.max_attempts` and `RetryPolicy.max_age` hold.

    :param after: in so many seconds; none: as the policy says.
    """

    def __init__(self, after: float | None = None) -> None:
        if after is not None and not 0 <= after < math.inf:
            raise ValueError(f"Retry(after={after!r}): give a number of seconds, 0 or more")
        super().__init__("the handler asks for the event again later")
        self.after = after


class Reject(Exception):  # noqa: N818 -- not an error: what a handler asks for
    """Raised by a handler: this event can never be handled. It goes among the dead letters at once.

    :param reason: for who looks at them. No patient data: it is stored beside the event and logged.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = str(reason)


@dataclass(frozen=True, slots=True)
class Again:
    """Give it again.

    :ivar delay: in so many seconds.
    """

    delay: float


@dataclass(frozen=True, slots=True)
class Dead:
    """It goes among the dead letters.

    :ivar reason: for who looks at them.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and when, an event is given again that a handler could not handle.

    The default tries for about three hours: after 1, 2, 4 … 512 seconds, then every 15 minutes.

    :ivar max_attempts: deliveries in all; behind the last one it goes among the dead letters. None: no limit.
    :ivar backoff: ``exponential``: each wait is twice the one before; ``constant``: all are `initial`.
    :ivar initial: the first wait, in seconds.
    :ivar maximum: the longest wait, in seconds.
    :ivar jitter: up to this part of a wait is added at random, so that what failed together doesn't come together.
    :ivar max_age: seconds from the first failure, behind which it is not given again. None: no limit.
    :raises BridgeError: a value makes no sense.
    """

    max_attempts: int | None = 20
    backoff: Literal["exponential", "constant"] = "exponential"
    initial: float = 1.0
    maximum: float = 900.0
    jitter: float = 0.1
    max_age: float | None = 7 * 86400.0

    def __post_init__(self) -> None:
        for name in ("max_attempts", "initial", "maximum", "jitter", "max_age"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) or (value is None and name.startswith("max_"))):
                raise BridgeError(f"RetryPolicy: {name}={value!r} is no number", _RIGHT[name])
        for name, right in (
            ("max_attempts", self.max_attempts is None or self.max_attempts >= 1),
            ("backoff", self.backoff in ("exponential", "constant")),
            ("initial", 0 <= self.initial < math.inf),
            ("maximum", self.initial <= self.maximum < math.inf),
            ("jitter", 0 <= self.jitter <= 1),
            ("max_age", self.max_age is None or self.max_age > 0),
        ):
            if not right:
                raise BridgeError(f"RetryPolicy: {name}={getattr(self, name)!r} makes no sense", _RIGHT[name])

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """Seconds to wait behind a failed attempt.

        :param attempt: its number, from 1.
        :param random: gives 0 to 1.
        """
        wait = self.initial
        if self.backoff == "exponential":
            wait *= 2.0 ** min(attempt - 1, 64)
        return min(wait, self.maximum) * (1 + self.jitter * random())

    @property
    def longest(self) -> float:
        """Seconds from the first failure to the last attempt, if each is immediate; infinite without `max_attempts`."""
        if self.max_attempts is None:
            return math.inf
        return sum(self.delay(attempt, lambda: 1.0) for attempt in range(1, self.max_attempts))

    def after(self, attempt: int, age: float, random: Callable[[], float], asked: float | None = None) -> Again | Dead:
        """What is to be done behind a failed attempt.

        :param attempt: its number, from 1.
        :param age: seconds since the first failure.
        :param random: gives 0 to 1.
        :param asked: the delay that the handler asked for.
        """
        if self.max_attempts is not None and attempt >= self.max_attempts:
            return Dead(f"failed {attempt} times of {self.max_attempts}")
        delay = self.delay(attempt, random) if asked is None else asked
        if self.max_age is not None and age + delay > self.max_age:
            return Dead(f"failed for {age:.0f} s, and max_age is {self.max_age:g} s")
        return Again(delay)


_RIGHT = {
    "max_attempts": "give 1 or more, or None for no limit",
    "backoff": "it is 'exponential' or 'constant'",
    "initial": "give seconds, 0 or more",
    "maximum": "give seconds, at least as many as initial",
    "jitter": "give a part of the wait: 0 to 1",
    "max_age": "give seconds, more than 0, or None for no limit",
}
