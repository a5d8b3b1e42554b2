"""How far the repeating of something is: one note in the consumer's store for each thing that jobs do.

It belongs to the newest event about that. So a failure knows whether another came behind it, which then goes on from
there; and whoever looks at the same failure again counts nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Final, Self

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.event import Event


@dataclass(frozen=True, slots=True)
class Progress:
    """What is noted.

    :ivar recorder: of the newest event; with `sequence` its place among all of an outbox.
    :ivar at: when that event happened, in milliseconds: for events of two outboxes.
    :ivar failures: in a row, whoever repeated it between them.
    :ivar submitted: how often we have submitted it again since it last succeeded.
    :ivar answered: whether that was done for the newest failure.
    """

    recorder: str
    sequence: str
    at: int
    failures: int = 0
    submitted: int = 0
    answered: bool = False

    @classmethod
    def of(cls, event: Event) -> Self:
        """Nothing has failed at the time of this event."""
        at = 0 if event.time is None else round(event.time.timestamp() * 1000)
        return cls(event.attributes.get("recorder", ""), event.attributes.get("sequence", ""), at)

    @classmethod
    def read(cls, text: str) -> Self:
        """What `text` has written."""
        return cls(*json.loads(text))

    @property
    def text(self) -> str:
        """As it is stored."""
        return json.dumps(astuple(self), separators=(",", ":"))

    def compare(self, event: Event) -> int:
        """Above 0: it belongs to a later event; 0: to this one; below: to an earlier one.

        By the order in which capture saw them, and not by any clock, as far as one outbox has recorded both.
        """
        other = Progress.of(event)
        if self.recorder == other.recorder:
            return (self.sequence > other.sequence) - (self.sequence < other.sequence)
        return 1 if self.at > other.at else -1


#: What is to be noted in place of what is, if anything; the same: nothing.
Change = Callable[[Progress | None], Progress]
#: Seconds for which an end is kept of what has not failed: its failure may come later, as events of several jobs do.
_AHEAD: Final = 86400.0


class Notes:
    """The notes of one consumer.

    :param keep: seconds for which each is kept behind its last change.
    """

    def __init__(self, app: Consumer, keep: float) -> None:
        self._app = app
        self._keep = keep

    async def _change(self, name: str, change: Change) -> Progress:
        """Change a note; again where another worker has changed it meanwhile.

        :return: what is noted then.
        :raises BridgeError: the store can't be asked.
        """
        while True:
            old = await self._app.recall(name)
            before = None if old is None else Progress.read(old)
            after = change(before)
            keep = self._keep if after.failures or before is not None else _AHEAD
            if after == before or await self._app.swap(name, old, after.text, keep):
                return after

    async def failed(self, name: str, event: Event) -> Progress:
        """Count a failure, once. What is returned may belong to a later event."""

        def count(before: Progress | None) -> Progress:
            if before is None:
                return replace(Progress.of(event), failures=1)
            if before.compare(event) >= 0:
                return before
            return replace(Progress.of(event), failures=before.failures + 1, submitted=before.submitted)

        return await self._change(name, count)

    async def answer(self, name: str, event: Event) -> None:
        """Count that it is submitted again for this failure, once."""

        def count(before: Progress | None) -> Progress:
            if before is None:  # the store was lost meanwhile
                return replace(Progress.of(event), failures=1, submitted=1, answered=True)
            if before.compare(event) or before.answered:
                return before
            return replace(before, submitted=before.submitted + 1, answered=True)

        await self._change(name, count)

    async def came_to_nothing(self, name: str, event: Event) -> Progress:
        """What was submitted for this failure has left no trace: that counts as another failure."""

        def count(before: Progress | None) -> Progress:
            if before is None:
                return replace(Progress.of(event), failures=1)
            if before.compare(event) or not before.answered:
                return before
            return replace(before, failures=before.failures + 1, answered=False)

        return await self._change(name, count)

    async def over(self, name: str, event: Event, *, only_counted: bool = False) -> None:
        """With this event it has come to an end: further failures are counted from 1.

        :param only_counted: note it only where there was a failure.
        """
        if only_counted and await self._app.recall(name) is None:
            return

        def end(before: Progress | None) -> Progress:
            return before if before is not None and before.compare(event) > 0 else Progress.of(event)

        await self._change(name, end)

    async def begin_anew(self, name: str, event: Event) -> None:
        """Count this failure as the first, unless it is answered already, or another came behind it."""

        def first(before: Progress | None) -> Progress:
            if before is not None and (before.compare(event) > 0 or before.answered):
                return before
            return replace(Progress.of(event), failures=1)

        await self._change(name, first)

    async def submitted(self, event: Event, job: str, name: str) -> None:
        """Note for what a job was submitted: when it is told how it ended, Orthanc may have forgotten it."""
        key = _of_job(event.source, job)
        await self._app.swap(key, await self._app.recall(key), name, self._keep)

    async def submitted_for(self, event: Event) -> str | None:
        """For what we have submitted the job of an event; none where it isn't ours."""
        return await self._app.recall(_of_job(event.source, str(event.job_id)))

    async def is_followed(self, event: Event) -> bool:
        """Whether the failure that a job was submitted for is still looked after."""
        name = await self.submitted_for(event)
        text = None if name is None else await self._app.recall(name)
        return text is not None and Progress.read(text).answered


def _of_job(source: str, job: str) -> str:
    return f"submitted\n{source}\n{job}"
