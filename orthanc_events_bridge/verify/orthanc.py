"""What Orthanc has, and what its log says, against what the outbox has recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from orthanc_events_bridge.changes.log import OrthancLog, Row, date_to_ms
from orthanc_events_bridge.changes.model import Resource
from orthanc_events_bridge.errors import GoneError
from orthanc_events_bridge.orthanc_api import OrthancApi
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.verify import EXTRA, MISSING, Difference, Findings, Show

_PLURALS: Final = {"patient": "patients", "study": "studies", "series": "series", "instance": "instances"}
_LEVELS: Final = ("patient", "study", "series")
#: Studies, entries and rows that are asked for at once.
_PAGE: Final = 200
_ROWS: Final = 1000
#: Seconds behind which what Orthanc has committed has been called back for, while capture keeps up.
_CALM: Final = 2.0
_POLL: Final = 0.2

_TABLES: Final = """
CREATE TABLE existing (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE recorded (seq INTEGER PRIMARY KEY);
CREATE TABLE candidates (
    what TEXT, level TEXT, id TEXT, seq INTEGER, identity TEXT, UNIQUE (what, level, id, seq)
);
"""


class OrthancCheck:
    """Compares once.

    :param api: of Orthanc.
    :param outbox: to be read.
    :param findings: what is found goes there.
    :param show: how far it is.
    :param wait: seconds that capture may take to record what Orthanc has logged by now.
    :param sleep: so that tests need not wait.
    """

    def __init__(
        self,
        api: OrthancApi,
        outbox: OutboxReader,
        findings: Findings,
        show: Show,
        *,
        wait: float,
        sleep: Callable[[float], object] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._outbox = outbox
        self._findings = findings
        self._show = show
        self._wait = wait
        self._sleep = sleep
        self._now = now
        self._log = OrthancLog(api.get)
        self._db = findings.scratch
        self._db.executescript(_TABLES)
        self._resources = outbox.resources()
        self._oldest_seq: int | None = None
        self._read_to = 0

    def run(self) -> None:
        """Compare.

        :raises BridgeError: Orthanc can't be asked, or the outbox not be read.
        """
        self._api.json("/system")  # what is wrong with the address or the login is said as such
        self._began = int(self._outbox.meta().get("began", 0)) // 1000 * 1000  # LastUpdate has whole seconds
        self._collect()
        # Twice: what comes and goes meanwhile can look wrong at any single look, but not in the same way.
        for last in (False, True):
            if self._candidates():
                behind = self._settle()
                self._look_again(behind if last else "", last=last)

    # -- what looks wrong ----------------------------------------------------------------------------------------

    def _collect(self) -> None:
        for level, one in self._existing():
            self._db.execute("INSERT OR IGNORE INTO existing VALUES (?)", (one,))
            if self._resources.find(one) is None:
                self._suspect(MISSING, level, one)
        self._findings.checked["resources"] = self._count("existing")
        entries = 0
        for level in _LEVELS:
            after = ""
            while page := self._resources.page(level, after, _PAGE):
                for entry in page:
                    if not self._db.execute("SELECT 1 FROM existing WHERE id = ?", (entry.id,)).fetchone():
                        self._suspect(EXTRA, entry.level, entry.id)
                entries, after = entries + len(page), page[-1].id
                self._show("what was announced", entries, 0)
        self._findings.checked["announced"] = entries
        rows = 0
        self._read_rows()
        for row in self._rows_of_log():
            rows += 1
            self._show("Orthanc's log", rows, 0)
            if self._is_beyond(row):
                self._findings.notes["rows of Orthanc's log from before what the outbox keeps"] += 1
            elif not self._is_recorded(row.seq):
                self._suspect(MISSING, row.level, row.resource, row.seq)
        self._findings.checked["log"] = rows

    def _existing(self) -> Iterator[tuple[str, str]]:
        of = int(self._api.json("/statistics").get("CountStudies", 0))
        since = 0
        # What comes while we look is not waited for: it could come for ever.
        while since < of and (page := self._api.json(f"/studies?since={since}&limit={_PAGE}&expand")):
            for study in page:
                yield "patient", str(study["ParentPatient"])
                yield "study", str(study["ID"])
                for series in study["Series"]:
                    yield "series", str(series)
            since += len(page)
            self._show("studies of Orthanc", since, of)

    def _rows_of_log(self) -> Iterator[Row]:
        since, tip = 0, self._log.tip()
        while since < tip and (page := self._log.page(since, _ROWS)):
            yield from page
            since = page[-1].seq

    def _read_rows(self) -> None:
        """The numbers of the log that the outbox has, as far as they are not read yet."""
        last = self._outbox.extent()[2]
        while self._read_to < last and (page := self._outbox.numbers(self._read_to, 10 * _ROWS)):
            self._db.executemany("INSERT OR IGNORE INTO recorded VALUES (?)", [(s,) for _, s in page if s is not None])
            self._read_to = page[-1][0]
            self._show("rows of the outbox", self._read_to, 0)
        if self._oldest_seq is None:
            self._oldest_seq = self._db.execute("SELECT min(seq) FROM recorded").fetchone()[0]

    def _is_recorded(self, seq: int) -> bool:
        return self._db.execute("SELECT 1 FROM recorded WHERE seq = ?", (seq,)).fetchone() is not None

    def _is_beyond(self, row: Row) -> bool:
        """Whether it is of a time that the outbox says nothing about: before recording began, or not kept any more."""
        if self._oldest_seq is None:
            return row.seq <= int(self._outbox.meta().get("cursor") or 0)
        return row.seq < self._oldest_seq

    def _suspect(self, what: str, level: str, one: str, seq: int | None = None) -> None:
        self._db.execute("INSERT OR IGNORE INTO candidates VALUES (?,?,?,?,NULL)", (what, level, one, seq))

    def _candidates(self) -> int:
        return self._count("candidates")

    def _count(self, table: str) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    # -- looking again -------------------------------------------------------------------------------------------

    def _settle(self) -> str:
        """Wait until everything that Orthanc has logged by now is recorded.

        :return: why it is not; empty where it is.
        """
        tip, until = self._log.tip(), self._now() + self._wait
        self._sleep(_CALM)
        while True:
            meta = self._outbox.meta()
            cursor, state = int(meta.get("cursor") or 0), self._capture(meta)
            if cursor >= tip and not state.get("waiting"):
                return ""
            if self._now() >= until:
                return f"not recorded yet: capture is at Seq {cursor} of {tip}, and {state.get('state', 'not running')}"
            self._show("waiting for capture", cursor, tip)
            self._sleep(_POLL)

    @staticmethod
    def _capture(meta: Mapping[str, Any]) -> dict[str, Any]:
        return dict(json.loads(meta.get("note.capture", "{}")))

    def _look_again(self, behind: str, *, last: bool) -> None:
        """Drop what is right by now; say what is wrong in the same way as before.

        :param behind: why capture is behind; empty where it isn't.
        """
        self._read_rows()
        meta = self._outbox.meta()
        remembering = json.loads(meta.get("note.repair", "{}")).get("remembered") is not None
        repairing = bool(self._capture(meta).get("repairing"))
        number, of = 0, self._candidates()
        while rows := self._db.execute(
            "SELECT rowid, what, level, id, seq, identity FROM candidates WHERE rowid > ? ORDER BY rowid LIMIT 500",
            (number,),
        ).fetchall():
            for number, what, level, one, seq, before in rows:
                self._show("looking again", number, of)
                identity, why = self._identity(what, level, one, seq)
                if why and not last:
                    self._findings.notes[why] += 1
                elif identity is not None and not last:
                    self._db.execute("UPDATE candidates SET identity = ? WHERE rowid = ?", (identity, number))
                    continue
                elif identity is not None and identity == before:
                    subject = (
                        f"Seq {seq} of Orthanc's log ({_PLURALS.get(level, level)}/{one})"
                        if seq
                        else (f"{_PLURALS[level]}/{one}")
                    )
                    if remembering and seq is None and what == MISSING:
                        self._findings.notes["its entry was lost with a damaged outbox, and is looked for"] += 1
                    elif what == EXTRA:
                        reason = "gone in Orthanc, and no deletion was recorded" + (
                            ": repair is at work" if repairing else ""
                        )
                        self._findings.add(Difference(EXTRA, "outbox", subject, behind or reason))
                    else:
                        self._findings.add(Difference(MISSING, "outbox", subject, behind or "never recorded"))
                self._db.execute("DELETE FROM candidates WHERE rowid = ?", (number,))

    def _identity(self, what: str, level: str, one: str, seq: int | None) -> tuple[str | None, str]:
        """What shows that it is wrong, in a word that changes with it; none where it is right by now.

        And why it is no difference, where it is none.
        """
        if seq is not None:
            rows = self._log.page(seq - 1, 1)
            wrong = rows and rows[0].seq == seq and not self._is_recorded(seq)
            return (rows[0].date if wrong else None), ""
        entry: Resource | None = self._resources.find(one)
        answer = self._ask(level, one)
        if what == EXTRA:
            return (f"{entry.born}" if entry is not None and answer is None else None), ""
        if entry is not None or answer is None:
            return None, ""
        changed = str(answer.get("LastUpdate", ""))
        if date_to_ms(changed) <= self._began:
            return None, "resources of Orthanc from before recording began"
        return changed, ""

    def _ask(self, level: str, one: str) -> dict[str, Any] | None:
        try:
            return dict(self._api.json(f"/{_PLURALS[level]}/{one}"))
        except GoneError:
            return None
