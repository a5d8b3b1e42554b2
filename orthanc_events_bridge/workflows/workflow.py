"""How far each workflow is: a row of a database each, changed by compare and swap, so that any worker may go on.

A workflow is what is done with one content of one series. Its row holds Orthanc's ids, pseudonymous UIDs and reasons,
and no patient data; but it says which pseudonym belongs to which series, and so is kept where the memory is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.workflows.orders import Origin
from orthanc_events_bridge.workflows.tables import Tables, in_parts

#: What a workflow waits for, and how it can end; in this order.
STATES: Final = {
    "anonymizing": "its series is to be pseudonymised",
    "sending": "it is to be sent to the service",
    "waiting": "it was sent; its result has not come",
    "overdue": "its result has not come before its deadline; late, it still counts",
    "returning": "a result has come, and is to be given back its patient",
    "delivering": "a result is to be sent on",
    "done": "its results were sent on",
    "failed": "a step was given up; `reason` says why",
    "cancelled": "somebody has cancelled it; what comes is left alone",
    "superseded": "more images came before it was done: another workflow has all of them",
}
#: What comes for these is left alone, and they go on by nothing but a person's word.
STOPPED: Final = ("cancelled", "superseded")
#: Steps that are ordered, by the states in which they are due.
STEPS: Final = {
    "anonymizing": "anonymize",
    "sending": "send",
    "waiting": "watch",
    "returning": "return",
    "delivering": "deliver",
}
#: So many changes of state are kept of each.
_HISTORY: Final = 50

_CREATE: Final = (
    (
        "CREATE TABLE IF NOT EXISTS orthanc_events_workflows (id text PRIMARY KEY, consumer text NOT NULL,"
        " series text NOT NULL, study text NOT NULL, state text NOT NULL, version integer NOT NULL,"
        " begun double precision NOT NULL, document text NOT NULL)"
    ),
    "CREATE INDEX IF NOT EXISTS orthanc_events_workflows_series ON orthanc_events_workflows (series)",
    "CREATE INDEX IF NOT EXISTS orthanc_events_workflows_study ON orthanc_events_workflows (study)",
    # ``uid``: of a pseudonymised instance or series that it has sent.
    (
        "CREATE TABLE IF NOT EXISTS orthanc_events_workflow_uids"
        " (uid text NOT NULL, workflow text NOT NULL, PRIMARY KEY (uid, workflow))"
    ),
)
_COLUMNS: Final = "SELECT id, consumer, series, study, state, version, begun, document FROM orthanc_events_workflows"
_BEGIN: Final = (
    "INSERT INTO orthanc_events_workflows (id, consumer, series, study, state, version, begun, document)"
    " VALUES ({id}, {consumer}, {series}, {study}, {state}, 0, {begun}, {document}) ON CONFLICT (id) DO NOTHING"
)
_CHANGE: Final = (
    "UPDATE orthanc_events_workflows SET state = {state}, study = {study}, version = {version} + 1,"
    " document = {document} WHERE id = {id} AND version = {version} RETURNING 1"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A series of results.

    :ivar series: Orthanc's id of it, as it came.
    :ivar content: the same for the same instances.
    :ivar given: Orthanc's id of what was given back; empty: that is to be done.
    :ivar sent: whether that was sent on.
    :ivar meets: names of what is expected that it is.
    """

    series: str
    content: str
    given: str = ""
    sent: bool = False
    meets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Workflow:
    """How far one is.

    :ivar consumer: whose.
    :ivar series: Orthanc's id of the series.
    :ivar study: what stands for its StudyInstanceUID; empty: nothing yet.
    :ivar state: one of `STATES`.
    :ivar begun: when, in seconds of the epoch.
    :ivar origin: the event that it began with.
    :ivar original: Orthanc's id of the study.
    :ivar rule: by which.
    :ivar instances: how many it is about.
    :ivar run: how often it was begun again by a person.
    :ivar step: that was given up, or at which it was cancelled; of `STEPS`.
    :ivar reason: why it failed, or is overdue.
    :ivar anonymized: Orthanc's id of the pseudonymised series.
    :ivar uids: how many UIDs of it were sent: of the series, and of each instance.
    :ivar job: Orthanc's, that sends it, or has; empty: there is none.
    :ivar due: when its result is overdue, in seconds of the epoch.
    :ivar results: what came.
    :ivar history: states and when they began, in seconds of the epoch.
    """

    id: str
    consumer: str
    series: str
    origin: Origin
    original: str
    rule: str
    instances: int
    begun: float = field(default_factory=time.time)
    state: str = "anonymizing"
    study: str = ""
    run: int = 0
    step: str = ""
    reason: str = ""
    anonymized: str = ""
    uids: int = 0
    job: str = ""
    due: float = 0.0
    results: tuple[Outcome, ...] = ()
    history: tuple[tuple[str, float], ...] = ()
    version: int = 0

    def to(self, state: str, **more: Any) -> Workflow:
        """The same in another state."""
        assert state in STATES
        history = (*self.history, (state, time.time()))[-_HISTORY:]
        return replace(self, state=state, history=history, **more)

    @property
    def since(self) -> float:
        """When it came into its state, in seconds of the epoch."""
        return self.history[-1][1] if self.history else self.begun

    def result(self, series: str) -> Outcome | None:
        """What came as that series."""
        return next((one for one in self.results if one.series == series), None)

    def with_result(self, outcome: Outcome) -> Workflow:
        """The same with a result, in place of what came as that series before."""
        others = tuple(one for one in self.results if one.series != outcome.series)
        return replace(self, results=(*others, outcome))

    def shown(self) -> dict[str, Any]:
        """All of it for people and programs, times in RFC 3339."""
        found = asdict(self)
        origin = found.pop("origin")
        del found["version"]
        times = {name: iso(found[name] * 1000) if found[name] else None for name in ("begun", "due")}
        history = [{"state": state, "time": iso(at * 1000)} for state, at in self.history]
        return {**found, **times, "since": iso(self.since * 1000), "event": origin["event"], "history": history}


class Workflows(Tables):
    """See the module's text.

    :param consumer: whose they are.
    """

    CREATE = _CREATE

    def __init__(self, store: SecretStr | Path, consumer: str) -> None:
        super().__init__(store)
        self._consumer = consumer

    async def begin(self, new: Workflow) -> Workflow:
        """Begin one, or find it, where there is one of this id; older ones of this series that are not done are
        superseded by a new one."""
        new = replace(new, history=((new.state, new.begun),))
        await self._run((_BEGIN, {"begun": new.begun, **_row(new)}))
        found = await self.find(new.id)
        assert found is not None
        for other in await self._select("series = {series}", {"series": new.series}):
            if other.id != found.id and other.begun <= found.begun:
                await self.change(
                    other.id, lambda one: one.to("superseded") if one.state not in ("done", *STOPPED) else None
                )
        return found

    async def find(self, identifier: str) -> Workflow | None:
        """The one of that id."""
        found = await self._select("id = {id}", {"id": identifier})
        return found[0] if found else None

    async def matching(self, identifier: str) -> list[Workflow]:
        """Those whose id begins so, or that are about this series of Orthanc's, or its study."""
        return [
            one
            for one in await self.all()
            if one.id.startswith(identifier) or identifier in (one.series, one.original, one.anonymized)
        ]

    async def all(self, states: Collection[str] = ()) -> list[Workflow]:
        """All of them, or those in some states; the oldest first."""
        return [one for one in await self._select("1 = 1", {}) if not states or one.state in states]

    async def of_study(self, study: str) -> list[Workflow]:
        """Those of a pseudonymised study.

        :param study: its UID.
        """
        return await self._select("study = {study}", {"study": study})

    async def has_study(self, study: str) -> bool:
        """Whether anybody's is of a pseudonymised study: this consumer's, or another's in the same store.

        :param study: its UID.
        """
        text = "SELECT 1 FROM orthanc_events_workflows WHERE study = {study} LIMIT 1"
        return bool(await self._run((text, {"study": study})))

    async def change(self, identifier: str, new: Callable[[Workflow], Workflow | None]) -> Workflow:
        """Change one, whatever others do at the same time.

        :param new: gives what becomes of it as it is now, and is asked again when that has changed meanwhile; none: it
            stays.
        :return: how it is then.
        """
        while True:
            found = await self.find(identifier)
            assert found is not None  # none is ever deleted
            wanted = new(found)
            if wanted is None:
                return found
            if await self._run((_CHANGE, {"version": found.version, **_row(wanted)})):
                return replace(wanted, version=found.version + 1)

    async def note_uids(self, identifier: str, uids: Sequence[str]) -> None:
        """Note what is sent, by which results will be known."""
        for _, given in in_parts(sorted(uids)):
            rows = ", ".join(f"({{{name}}}, {{workflow}})" for name in given)
            text = f"INSERT INTO orthanc_events_workflow_uids VALUES {rows} ON CONFLICT (uid, workflow) DO NOTHING"
            await self._run((text, {"workflow": identifier, **given}))

    async def referred_to(self, uids: Collection[str], study: str) -> Workflow | None:
        """The workflow that a result is of: the one of whose images it names the largest part, of several such the one
        with the most, then the newest. Where it names none of any, the only one of its study.

        :param uids: that are in the result.
        :param study: the UID of the pseudonymised study that it is of.
        """
        counts: dict[str, int] = {}
        for names, given in in_parts(sorted(uids)):
            text = f"SELECT workflow FROM orthanc_events_workflow_uids WHERE uid IN ({names})"
            for (identifier,) in await self._run((text, given)):
                counts[identifier] = counts.get(identifier, 0) + 1
        candidates = [(one, counts.get(one.id, 0)) for one in await self.of_study(study)]
        named = [(one, count) for one, count in candidates if count]
        if named:
            return max(named, key=lambda each: (each[1] / max(each[0].uids, 1), each[1], each[0].begun))[0]
        return candidates[0][0] if len(candidates) == 1 else None

    async def _select(self, where: str, given: Mapping[str, Any]) -> list[Workflow]:
        text = f"{_COLUMNS} WHERE consumer = {{consumer}} AND {where} ORDER BY begun, id"
        return [_workflow(row) for row in await self._run((text, {"consumer": self._consumer, **given}))]


def _row(one: Workflow) -> dict[str, Any]:
    document = asdict(one)
    named = {name: document.pop(name) for name in ("id", "consumer", "series", "study", "state")}
    del document["version"], document["begun"]
    return {**named, "document": json.dumps(document)}


def _workflow(row: tuple[Any, ...]) -> Workflow:
    identifier, consumer, series, study, state, version, begun, document = row
    found = json.loads(document)
    found["origin"] = Origin(**found["origin"])
    found["results"] = tuple(Outcome(**{**one, "meets": tuple(one["meets"])}) for one in found["results"])
    found["history"] = tuple((name, at) for name, at in found["history"])
    return Workflow(
        id=identifier,
        consumer=consumer,
        series=series,
        study=study,
        state=state,
        version=version,
        begun=begun,
        **found,
    )
