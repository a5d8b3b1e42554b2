"""What became of Orthanc's jobs, told by looking at its list of them again and again, where no callback tells it.

Orthanc keeps the last ten jobs that have ended (``JobsHistorySize``), so what comes and goes between two looks is not
seen. The facts are marked as inferred; the ids of their events are made with the job's own dates, as Orthanc spells
them, so that a second telling of the same fact has the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from orthanc_events_bridge.changes.log import date_to_ms
from orthanc_events_bridge.changes.model import Fact

_ENDS: Final = {"Success": "JobSuccess", "Failure": "JobFailure"}


class Jobs:
    """Used by capture's thread alone.

    :param snapshot: what of Orthanc's answer about a job an event may say.
    :param known: what `known` was when it was kept; none at the very first start: what is there then is no news.
    :ivar known: id of each job that was in the last list → when it ended, as Orthanc spells it, or nothing.
    :ivar missed: how many jobs were gone before their end was seen.
    """

    def __init__(
        self, snapshot: Callable[[Mapping[str, Any]], dict[str, Any]], known: Mapping[str, str] | None
    ) -> None:
        self._snapshot = snapshot
        self.known = None if known is None else dict(known)
        self.missed = 0

    def look(self, answers: Iterable[Mapping[str, Any]]) -> tuple[list[Fact], dict[str, str]]:
        """Compare Orthanc's list with the last one.

        :return: the facts, and what is to be handed to `done` once they are recorded.
        :raises LookupError: it is no list of Orthanc's jobs.
        :raises TypeError: likewise.
        """
        jobs = sorted(answers, key=lambda job: str(job["CreationTime"]))
        facts: list[Fact] = []
        seen: dict[str, str] = {}
        for job in jobs:
            number, end = str(job["ID"]), _ENDS.get(job["State"])
            seen[number] = str(job.get("CompletionTime") or job["State"]) if end else ""
            if self.known is None:
                continue
            if number not in self.known:
                facts.append(self._fact("JobSubmitted", job, str(job["CreationTime"])))
            if end and seen[number] != self.known.get(number):
                facts.append(self._fact(end, job, seen[number]))
        return facts, seen

    def done(self, seen: dict[str, str]) -> None:
        """What `look` gave is recorded."""
        self.missed += sum(not end and number not in seen for number, end in (self.known or {}).items())
        self.known = seen

    def _fact(self, change: str, job: Mapping[str, Any], date: str) -> Fact:
        extra = {"inferred": True, "job": self._snapshot(job)}
        return Fact(change, "job", str(job["ID"]), date_to_ms(date.partition(".")[0]), None, date, {}, extra)
