"""``make demo``: from a DICOM file in a real Orthanc to a CloudEvent on a durable stream, and a count of both ends.

What is expected comes from Orthanc's own answers; what arrived, from a plain client of the broker.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import DeliverPolicy

import orthanc_events_bridge
from orthanc_events_bridge import status
from orthanc_events_bridge.cli_init import SHIM_NAME, shim_text
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.testing import dicom, mutants
from orthanc_events_bridge.testing.guard import scratch_folder
from orthanc_events_bridge.testing.processes import ServerError
from orthanc_events_bridge.testing.servers import MissingComponentError, NatsServer, OrthancServer

_CONFIGURATION = """\
source: urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e
transports:
  - type: nats
    servers: ["{url}"]
"""

Told = tuple[str, str]  # type without prefix and version, subject


class Subscriber:
    """A plain client of the broker: prints each event as it comes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.received: list[dict[str, str]] = []
        self.problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._subscribe())
        except Exception as error:  # told by the main thread, which waits for events
            self.problem = error

    async def _subscribe(self) -> None:
        client = Client()
        await client.connect(self._url)
        stream = client.jetstream()
        while not self._stop.is_set():
            try:
                await stream.stream_info("ORTHANC_EVENTS")
                break
            except nats.js.errors.NotFoundError:  # the bridge makes it
                await asyncio.sleep(0.05)
        subscription = await stream.subscribe(
            "orthanc.events.>", ordered_consumer=True, deliver_policy=DeliverPolicy.ALL
        )
        while not self._stop.is_set():
            try:
                message = await subscription.next_msg(timeout=0.2)
            except nats.errors.TimeoutError:
                continue
            event = json.loads(message.data)
            self.received.append(event)
            print(f"  {event['time']:<24}  {event['type']:<44}  {event.get('subject', '')}".rstrip(), flush=True)
        await client.close()

    def told(self) -> Counter[Told]:
        """How often each fact was told, by different ids."""
        facts = {event["id"]: (_short(event["type"]), event.get("subject", "")) for event in self.received}
        return Counter(facts.values())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)


def _short(event_type: str) -> str:
    return ".".join(event_type.rsplit(".", 3)[1:3])


class Expected:
    """What Orthanc's own answers promise."""

    def __init__(self) -> None:
        self.facts: Counter[Told] = Counter()
        self._seen: set[str] = set()

    def stored(self, answer: dict[str, str]) -> None:
        """The answer of an upload."""
        self.stored_instance(answer["ID"], answer["ParentSeries"], answer["ParentStudy"], answer["ParentPatient"])

    def stored_instance(self, instance: str, series: str, study: str, patient: str) -> None:
        self.facts["instance.created", f"instances/{instance}"] += 1
        for level, plural, resource in (
            ("series", "series", series),
            ("study", "studies", study),
            ("patient", "patients", patient),
        ):
            self.facts[f"{level}.instance-added", f"{plural}/{resource}"] += 1
            if resource not in self._seen:
                self._seen.add(resource)
                self.facts[f"{level}.created", f"{plural}/{resource}"] += 1

    def add(self, kind: str, subject: str = "") -> None:
        self.facts[kind, subject] += 1


def _wait(what: str, condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            print(f"  (still waiting for {what} after {seconds:.0f} s: going on)")
            return
        time.sleep(0.05)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _ingest(orthanc: OrthancServer, expected: Expected, folder: Path) -> str:
    """Two studies by REST, one by C-STORE. Returns the study to delete."""
    _say("Storing two CT studies by REST (POST /instances):")
    studies = [dicom.make_study(series=2, instances=3) for _ in range(2)]
    for study in studies:
        for instance in study:
            expected.stored(orthanc.upload(instance.data))
    time.sleep(0.5)
    _say("Storing an MR study by C-STORE (DCMTK's storescu):")
    study = dicom.make_study(series=1, instances=4, modality="MR")
    sent = orthanc.store_scu(study.write(folder / "dicom"))
    for instance in study:
        if sent[folder / "dicom" / f"{instance.sop_uid}.dcm"]:
            expected.stored_instance(instance.id, instance.series, instance.study, instance.patient)
    everything = [("series", i) for i in orthanc.get("/series")] + [("studies", i) for i in orthanc.get("/studies")]
    everything += [("patients", i) for i in orthanc.get("/patients")]
    _say("Nothing comes for a while, so Orthanc calls them stable:")
    _wait("IsStable", lambda: all(orthanc.get(f"/{plural}/{i}")["IsStable"] for plural, i in everything))
    for plural, identifier in everything:
        level = {"studies": "study", "series": "series", "patients": "patient"}[plural]
        expected.add(f"{level}.stable", f"{plural}/{identifier}")
    return studies[0].id


def _delete(orthanc: OrthancServer, expected: Expected, study: str) -> None:
    _say("Deleting a study:")
    patient = orthanc.get(f"/studies/{study}")["ParentPatient"]
    instances = [found["ID"] for found in orthanc.get(f"/studies/{study}/instances")]
    series = [found["ID"] for found in orthanc.get(f"/studies/{study}/series")]
    if orthanc.delete("studies", study):
        for plural, level, identifiers in (
            ("instances", "instance", instances),
            ("series", "series", series),
            ("studies", "study", [study]),
            ("patients", "patient", [patient]),
        ):
            for identifier in identifiers:
                expected.add(f"{level}.deleted", f"{plural}/{identifier}")
    time.sleep(0.5)


def _run_job(orthanc: OrthancServer, expected: Expected) -> None:
    _say("Running a job (an archive of a study):")
    study = orthanc.get("/studies")[0]
    job = orthanc.post(f"/studies/{study}/archive", {"Asynchronous": True})["ID"]
    _wait("the job", lambda: orthanc.get(f"/jobs/{job}")["State"] in ("Success", "Failure"))
    expected.add("job.submitted", f"jobs/{job}")
    state = orthanc.get(f"/jobs/{job}")["State"]
    expected.add("job.succeeded" if state == "Success" else "job.failed", f"jobs/{job}")


def _summary(expected: Expected, subscriber: Subscriber, folder: Folder) -> int:
    """Print both ends of the way; the exit code."""
    _wait("the last events", lambda: not expected.facts - subscriber.told(), 10.0)
    told = subscriber.told()
    lost, more = expected.facts - told, told - expected.facts
    document = status.read(folder)
    print(f"\n{'acknowledged by Orthanc':<26}{expected.facts.total():>6} changes")
    print(f"{'captured in the outbox':<26}{document['outbox']['rows']:>6}")
    print(f"{'published to the stream':<26}{document['transports'][0]['published']:>6}")
    print(f"{'read back by a subscriber':<26}{told.total():>6}")
    print(f"{'told twice or unexpected':<26}{more.total():>6}")
    print(f"lost: {lost.total()}")
    for kind, subject in list(lost)[:10]:
        print(f"  lost: {kind} {subject}")
    for kind, subject in list(more)[:10]:
        print(f"  unexpected: {kind} {subject}")
    return 1 if lost or more else 0


def run(scratch: Path, *, keep: bool, fault: str) -> int:
    """The demonstration. Returns the exit code."""
    if fault not in ("", "drop"):
        print(f"DEMO_FAULT={fault} is not known; the one there is: drop", file=sys.stderr)
        return 2
    environment = {}
    if fault:
        environment = {"ORTHANC_EVENTS_PYTHON": str(mutants.wrapper(scratch)), mutants.VARIABLE: fault}
    config, shim = scratch / "orthanc-events.yaml", scratch / SHIM_NAME
    package = str(Path(orthanc_events_bridge.__file__).parent)
    expected = Expected()
    with NatsServer(scratch / "nats") as broker:
        print(f"NATS with JetStream runs at {broker.url}")
        config.write_text(_CONFIGURATION.format(url=broker.url), encoding="utf-8")
        shim.write_text(shim_text(sys.executable, package, str(config)), encoding="utf-8")
        with OrthancServer(scratch / "orthanc", script=shim, environment=environment) as orthanc:
            version = orthanc.get("/system")["Version"]
            print(f"Orthanc {version} runs at {orthanc.url}, with the bridge")
            expected.add("server.started")
            folder = Folder(orthanc.database / "orthanc-events")
            subscriber = Subscriber(broker.url)
            _say("The CloudEvents as a subscriber of the stream receives them (time, type, subject):")
            _wait("the first event", lambda: bool(subscriber.received))
            study = _ingest(orthanc, expected, scratch)
            _delete(orthanc, expected, study)
            _run_job(orthanc, expected)
            code = _summary(expected, subscriber, folder)
            if subscriber.problem is not None:
                print(f"the subscriber failed: {subscriber.problem!r}", file=sys.stderr)
                code = 1
            print(f"\nthe bridge's status: {orthanc.url}/orthanc-events/status")
            print(f"Orthanc Explorer:    {orthanc.url}/app/explorer.html")
            if keep:
                print("\nIt goes on running. Send it something; Ctrl-C ends it.", flush=True)
                while True:
                    time.sleep(1)
            subscriber.stop()
    print("(both were stopped; `make demo KEEP=1` leaves them running)")
    print("where to go on: README.md, 'Drop it into your Orthanc'")
    return code


def main() -> int:
    """Run the demonstration in a scratch folder, and leave nothing behind."""
    try:
        with scratch_folder() as scratch:
            return run(
                scratch,
                keep=os.environ.get("KEEP", "") not in ("", "0"),
                fault=os.environ.get("DEMO_FAULT", ""),
            )
    except (MissingComponentError, ServerError, OutboxError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nstopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
