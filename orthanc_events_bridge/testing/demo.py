"""``make demo``: from a DICOM file in a real Orthanc to a CloudEvent on a broker, a consumer that reacts, and a count.

What is expected comes from Orthanc's own answers; what arrived, from a plain client of the broker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import BROKERS, Broker
from orthanc_events_bridge.testing.brokers.events import Event
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.reacting import Reacting
from orthanc_events_bridge.testing.showing import go_on, shown

#: Seconds between two looks at the broker.
_LOOK: Final = 0.3


class Subscriber:
    """A plain client of the broker: prints each event as it comes. Used as a context manager."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.problem: BaseException | None = None
        self.seen = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        try:
            while not self._stop.wait(_LOOK):
                self._look()
        except Exception as error:  # told by the main thread, which waits for events
            self.problem = error

    def _look(self) -> None:
        if self._broker.stored() <= self.seen:
            return
        events = sorted(self._broker.read(), key=lambda event: event.sequence)
        for event in events[self.seen :]:
            print(f"  {event.time:<24}  {event.type:<44}  {event.subject}".rstrip(), flush=True)
        self.seen = len(events)

    def catch_up(self, enough: Callable[[list[Event]], bool], seconds: float = 15.0) -> list[Event]:
        """Wait until what was read is enough, or so many seconds have passed; return it."""
        _wait("the last events", lambda: enough(self._broker.read()), seconds)
        events = self._broker.read()
        _wait("the subscriber", lambda: self.seen >= len(events) or self.problem is not None)
        return events


def _wait(what: str, condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            print(f"  (still waiting for {what} after {seconds:.0f} s: going on)")
            return
        time.sleep(0.05)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _ingest(line: Line) -> str:
    """Two studies by REST, one by C-STORE. Returns the study to delete."""
    orthanc, ledger, folder = line.orthanc, line.ledger, line.root / "dicom"
    _say("Storing two CT studies by REST (POST /instances):")
    studies = [dicom.make_study(series=2, instances=3) for _ in range(2)]
    for study in studies:
        for instance in study:
            ledger.stored(orthanc.upload(instance.data))
    time.sleep(0.5)
    _say("Storing an MR study by C-STORE (DCMTK's storescu):")
    study = dicom.make_study(series=1, instances=4, modality="MR")
    sent = orthanc.store_scu(study.write(folder))
    for instance in study:
        if sent[folder / f"{instance.sop_uid}.dcm"]:
            ledger.stored_ids(instance.id, instance.series, instance.study, instance.patient)
    everything = [(level, one) for level in ("series", "studies", "patients") for one in orthanc.get(f"/{level}")]
    _say("Nothing comes for a while, so Orthanc calls them stable:")
    _wait("IsStable", lambda: all(orthanc.get(f"/{level}/{one}")["IsStable"] for level, one in everything))
    for level, one in everything:
        ledger.expect(f"{ {'studies': 'study', 'patients': 'patient'}.get(level, level) }.stable", one)
    return studies[0].id


def _delete(line: Line, study: str) -> None:
    _say("Deleting a study:")
    if line.orthanc.delete("studies", study):
        line.ledger.deleted("studies", study)
    time.sleep(0.5)


def _run_job(line: Line) -> None:
    _say("Running a job (an archive of a study):")
    orthanc = line.orthanc
    study = orthanc.get("/studies")[0]
    job = orthanc.post(f"/studies/{study}/archive", {"Asynchronous": True})["ID"]
    _wait("the job", lambda: orthanc.get(f"/jobs/{job}")["State"] in ("Success", "Failure"))
    line.ledger.expect("job.submitted", job)
    succeeded = orthanc.get(f"/jobs/{job}")["State"] == "Success"
    line.ledger.expect("job.succeeded" if succeeded else "job.failed", job)


def _summary(line: Line, subscriber: Subscriber) -> int:
    """Print both ends of the way; the exit code."""
    events = subscriber.catch_up(lambda events: line.ledger.compare(events).lost == 0)
    report = line.ledger.compare(events, existing=line.orthanc.existing(), log=line.orthanc.changes())
    document: dict[str, Any] = line.status()
    more = report.repeated + report.unexpected
    print(f"\n{'acknowledged by Orthanc':<30}{report.required:>6} changes")
    print(f"{'captured in the outbox':<30}{document['outbox']['rows']:>6}")
    print(f"{'published to the broker':<30}{document['transports'][0]['published']:>6}")
    print(f"{'read back by a subscriber':<30}{report.received:>6}")
    print(f"{'told twice or unexpected':<30}{more:>6}")
    print(f"{'out of order':<30}{report.out_of_order:>6}")
    print(f"lost: {report.lost}")
    for category in ("lost", "repeated", "unexpected", "out_of_order"):
        for example in report.examples.get(category, []):
            print(f"  {category.replace('_', ' ')}: {example}")
    return 0 if report.ok else 1


def _reacted(line: Line, consumer: Reacting) -> bool:
    """Say what the consumer has handled; whether that is all."""
    stable = {event.subject.rpartition("/")[2] for event in line.broker.read() if ".study.stable." in event.type}
    _wait("the consumer", lambda: stable <= set(consumer.studies) or consumer.problem is not None)
    print(f"a consumer has reacted to {len(set(consumer.studies))} of {len(stable)} stable studies")
    if consumer.problem is not None:
        print(f"the consumer failed: {consumer.problem}", file=sys.stderr)
    return stable <= set(consumer.studies)


def run(scratch: Path, kind: str, *, keep: bool, fault: str) -> int:
    """The demonstration. Returns the exit code."""
    if kind not in BROKERS:
        print(f"BROKER={kind} is not known; there are: {', '.join(BROKERS)}", file=sys.stderr)
        return 2
    if fault not in ("", "drop"):
        print(f"DEMO_FAULT={fault} is not known; the one there is: drop", file=sys.stderr)
        return 2
    print(f"Starting {BROKERS[kind].title}, and Orthanc with the bridge …", flush=True)
    with Line(scratch, broker=kind, without=[fault] if fault else []) as line:
        print(f"{line.broker.title} runs at {line.broker.url}")
        orthanc = line.orthanc
        print(f"Orthanc {orthanc.get('/system')['Version']} runs at {orthanc.url}, with the bridge")
        line.ledger.expect("server.started")
        # A webhook has no consumers: its receiver is told.
        reacting = nullcontext() if kind == "webhook" else Reacting(line.broker, orthanc.url)
        with Subscriber(line.broker) as subscriber, reacting as consumer:
            _say("The CloudEvents as a plain client of the broker reads them (time, type, subject):")
            _wait("the first event", lambda: bool(subscriber.seen))
            study = _ingest(line)
            _delete(line, study)
            _run_job(line)
            code = _summary(line, subscriber)
            if consumer is not None and not _reacted(line, consumer):
                code = 1
            if subscriber.problem is not None:
                print(f"the subscriber failed: {subscriber.problem!r}", file=sys.stderr)
                code = 1
            print(f"\nthe bridge's status: {orthanc.url}/orthanc-events/status")
            print(f"Orthanc Explorer:    {orthanc.url}/app/explorer.html")
            if keep:
                go_on()
    print("(both were stopped; `make demo KEEP=1` leaves them running)")
    others = ", ".join(one for one in BROKERS if one != kind)
    print(f"other brokers: make demo BROKER={others.replace(', ', '|')}")
    print("where to go on: README.md, 'Drop it into your Orthanc'")
    return code


def main() -> int:
    """See `shown`."""
    fault = os.environ.get("DEMO_FAULT", "")
    return shown("demo", lambda scratch, kind, keep: run(scratch, kind, keep=keep, fault=fault))


if __name__ == "__main__":
    sys.exit(main())
