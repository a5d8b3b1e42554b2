"""Questions that Orthanc does not answer although it answers others: asked a few times, and then passed over.

While Orthanc is away or stops, whoever asks waits. But one resource that it can't describe (an entry of its index is
damaged, or a proxy in front of it refuses) must not hold up for ever what comes behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from orthanc_events_bridge.errors import LogUnavailableError, NotAnsweredError, PassedOverError

#: How often a question is asked; `Capture` and `Chore` leave a second in between.
TIMES: Final = 3
#: Seconds until a question that was passed over is asked again, once.
ASK_AGAIN: Final = 600.0
#: So many questions are passed over without an answer to any in between until further ones are asked only once: where
#: Orthanc can't describe anything any more, each of them would hold up recording for seconds.
IN_A_ROW: Final = 3
#: So many are remembered.
_REMEMBERED: Final = 10_000


class Unanswered:
    """Used by capture's thread alone.

    :param tip: the counter of Orthanc's log; raises `LogUnavailableError` where Orthanc answers nothing.
    :param now: seconds, monotonic.
    :param say: told what is wrong with each question that is passed over, once.
    """

    def __init__(self, tip: Callable[[], int], now: Callable[[], float], say: Callable[[str], None]) -> None:
        self._tip = tip
        self._now = now
        self._say = say
        self._refused: dict[str, int] = {}
        #: Question → when it may be asked again.
        self._passed_over: dict[str, float] = {}
        self._in_a_row = 0  # passed over since the last answer

    def check(self, question: str) -> None:
        """To be called before it is asked.

        :raises PassedOverError: it need not be asked.
        """
        if self._now() < self._passed_over.get(question, float("-inf")):
            raise PassedOverError("Orthanc has not answered this several times")

    def answered(self, question: str) -> None:
        """It was answered, if only by its resource's being gone."""
        self._in_a_row = 0
        self._refused.pop(question, None)
        self._passed_over.pop(question, None)

    def failed(self, question: str, error: LogUnavailableError) -> LogUnavailableError | PassedOverError:
        """It was not answered: what to raise.

        :raises LogUnavailableError: Orthanc can't answer anything: it is not about this question.
        """
        self._tip()
        now = self._now()
        known = question in self._passed_over
        if not known:
            count = self._refused[question] = self._refused.get(question, 0) + 1
            if count < TIMES and self._in_a_row < IN_A_ROW:
                return NotAnsweredError(error.message)
            self._in_a_row += 1
        self._refused.pop(question, None)
        self._passed_over.pop(question, None)  # to the end
        self._passed_over[question] = now + ASK_AGAIN
        if len(self._passed_over) > _REMEMBERED:
            del self._passed_over[next(iter(self._passed_over))]
        if not known:
            self._say(error.message)
        return PassedOverError(error.message)
