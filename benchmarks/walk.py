"""What repair's look at everything costs behind a start: time, questions, Orthanc's processor, and ingest beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Row, Section, say
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.servers import scratch_folder

#: Series in a study: a million of them are in 200,000 studies.
_SERIES = 5
#: Counts what is asked, for `/test/asked`.
_COUNTING = """\
    import orthanc
    from orthanc_events_bridge.plugin.lookup import Lookup
    def counting(self, path, ask=Lookup._ask, count=[0]):
        count[0] += bool(path)
        return ask(self, path) if path else count[0]
    Lookup._ask = counting
    def asked(output, uri, **request):
        output.AnswerBuffer(str(counting(None, "")), "text/plain")
    globals()["asked"] = asked
    orthanc.RegisterRestCallback("/test/asked", asked)
"""
_BEHIND = "    from orthanc_events_bridge.plugin import start\n"


@dataclass(slots=True)
class Looked:
    """One look at everything.

    :ivar seconds: from the start of Orthanc on.
    :ivar questions: to its REST API.
    :ivar processor: seconds of Orthanc's process, capture included.
    :ivar ingest: instances that were stored per second beside it; 0 where nothing was.
    """

    seconds: float
    questions: int
    processor: float
    ingest: float


def run(*, quick: bool) -> Section:
    """Fill Orthanc through its own API, and start it several times."""
    studies = 400 if quick else 20_000
    with scratch_folder() as scratch, Line(scratch, orthanc={"SyncStorageArea": False}, stable_age=1) as line:
        shim = line.orthanc.shim_path
        shim.write_text(shim.read_text("utf-8").replace(_BEHIND, _BEHIND + _COUNTING), "utf-8")
        filled = _fill(line, studies)
        gone = _delete_unseen(line, studies // 200)
        quiet = _look(line)
        told = line.status()["capture"]["inferred"].get("Deleted", 0)
        say(f"walk: {quiet.seconds:.0f} s, {quiet.questions} questions, {quiet.processor:.1f} s of processor time")
        busy = _look(line, ingest=True)
        with Clients(line, adders=2, size=5) as clients:
            before, began = clients.acknowledged, time.monotonic()
            time.sleep(3 if quick else 15)
            alone = (clients.acknowledged - before) / (time.monotonic() - began)
        say(f"walk: ingest {busy.ingest:.0f}/s beside it, {alone:.0f}/s without")
    return _section(studies, filled, quiet, busy, alone, gone, told)


def _fill(line: Line, studies: int) -> float:
    """Store that many studies; instances per second."""
    began = time.monotonic()

    def store(number: int) -> None:
        for instance in dicom.make_study(series=_SERIES, rows=1):
            line.orthanc.upload(instance.data)
        if number % 2000 == 0:
            say(f"walk: {number} of {studies} studies stored")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store, range(studies)))
    seconds = time.monotonic() - began
    line.settle(600)
    return studies * _SERIES / seconds


def _delete_unseen(line: Line, studies: int) -> int:
    """Delete some while nobody listens; how many series, studies and patients that were."""
    orthanc = line.orthanc
    orthanc.stop()
    plugins, orthanc.config["Plugins"] = orthanc.config["Plugins"], []
    orthanc.start()
    for study in orthanc.get(f"/studies?since=0&limit={studies}"):
        orthanc.delete("studies", study)
    orthanc.stop()
    orthanc.config["Plugins"] = plugins
    return studies * (_SERIES + 2)


def _look(line: Line, *, ingest: bool = False) -> Looked:
    """Start Orthanc, and wait until everything was looked at."""
    orthanc = line.orthanc
    orthanc.stop()
    began = time.monotonic()
    orthanc.start()
    line.wait(lambda document: document["capture"]["state"] == "following")
    used = _processor(orthanc.pid)
    with Clients(line, adders=2 if ingest else 0, size=5) as clients:
        line.wait(lambda document: not document["capture"]["repairing"], 3600)
        seconds, stored = time.monotonic() - began, clients.acknowledged
    questions = int(orthanc.client.get("/test/asked").text)
    return Looked(seconds, questions, _processor(orthanc.pid) - used, stored / seconds)


def _processor(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _section(studies: int, filled: float, quiet: Looked, busy: Looked, alone: float, gone: int, told: int) -> Section:
    lines: list[Sequence[str]] = [
        ("", "seconds", "questions", "of Orthanc's processor, s", "instances stored per second"),
        (
            "nothing else to do",
            f"{quiet.seconds:.0f}",
            f"{quiet.questions:,}",
            f"{quiet.processor:.1f}",
            "-",
        ),
        ("beside two clients that store", f"{busy.seconds:.0f}", f"{busy.questions:,}", "-", f"{busy.ingest:.0f}"),
        ("the same clients without it", "-", "-", "-", f"{alone:.0f}"),
    ]
    factor = 200_000 / studies
    return Section(
        "Looking for what Orthanc forgot",
        [
            (
                f"Orthanc with {studies * _SERIES:,} series of one small instance each in {studies:,} studies, stored"
                f" through its REST API by four clients ({filled:.0f}/s, with SyncStorageArea off). {gone:,} series,"
                " studies and patients are deleted by an Orthanc without the bridge. Then Orthanc is started, and it is"
                " waited until capture has looked at everything; once with nothing else to do and once beside two"
                " clients that store as fast as they can."
            )
        ],
        [
            Row("deletions that nobody saw: told / were", "all", f"{told:,} / {gone:,}", told == gone),
            Row(
                "questions for each study",
                "≤ 1.1",
                f"{quiet.questions / studies:.2f}",
                quiet.questions <= 1.1 * studies,
            ),
            Row(
                "share of Orthanc's time, with nothing else to do",
                "≤ 0.25",
                f"{quiet.processor / quiet.seconds:.2f}",
                quiet.processor <= 0.25 * quiet.seconds,
                "capture itself is counted as well.",
            ),
            Row("ingest beside it / without it", "-", f"{busy.ingest / alone:.2f}"),
        ],
        [lines],
        [
            (
                "A million series in 200,000 studies would take, on paper,"
                f" {factor * quiet.seconds / 60:.0f} minutes behind each start, and {factor * quiet.processor:.0f} s of"
                " Orthanc's processor."
            )
        ],
    )
