"""Each protection switched off: the ledger must then report the harm that it prevents, or the tests prove nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.bridged import BridgedOrthanc
from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.brokers.webhook import WebhookBroker
from orthanc_events_bridge.testing.ledger import Report
from orthanc_events_bridge.testing.line import Clients, Line
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.remote import RemoteLine
from tests.faults.test_damage import put_an_older_copy_back, remove_the_outbox
from tests.faults.test_power import cut_behind_a_second_life, cut_several_times
from tests.faults.test_repair import hold_callbacks_up, put_back, without_bridge
from tests.faults.test_replay import backfill_while_receiving

pytestmark = pytest.mark.mutant

_ATTEMPTS = 3


def kill_the_broker(line: Line) -> Report:
    with Clients(line, adders=2, loopers=1):
        for _ in range(3):
            time.sleep(0.5)
            line.broker.freeze()  # so that something is on its way for certain
            time.sleep(0.5)
            line.broker.kill()
            time.sleep(0.3)
            line.broker.start()
    return line.report()


def freeze_the_broker(line: Line) -> Report:
    with Clients(line, adders=2, loopers=1):
        for _ in range(3):
            time.sleep(0.5)
            line.broker.freeze()
            line.wait(lambda document: document["transports"][0]["state"] == "not connected")
            line.broker.thaw()
            line.wait(lambda document: document["transports"][0]["state"] == "connected")
        time.sleep(0.5)
    return line.report()


def kill_the_bridge(line: Line) -> Report:
    with Clients(line, adders=2):
        for _ in range(3):
            pid = line.bridge_pid()
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            line.wait(lambda document, pid=pid: document["bridge"]["pid"] not in (None, pid))
    return compare_when_quiet(line)


def compare_when_quiet(line: Line, kills: int = 0, forgotten: Sequence[tuple[str, str]] = ()) -> Report:
    """Without a position or a cursor that is kept, the line never says that it is at rest."""
    seen, since = line.broker.stored(), time.monotonic()
    while time.monotonic() - since < 3:
        time.sleep(0.1)
        if (stored := line.broker.stored()) != seen:
            seen, since = stored, time.monotonic()
    return line.ledger.compare(line.events(), kills=kills, existing=line.orthanc.existing(), forgotten=forgotten)


def kill(line: Line, kills: int, loopers: int) -> None:
    with Clients(line, adders=2, loopers=loopers):
        for _ in range(kills):
            time.sleep(random.uniform(0.2, 0.8))
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(0.5)


def kill_orthanc_without_cursor(line: Line) -> Report:
    kill(line, kills=3, loopers=0)
    return compare_when_quiet(line, kills=3)


def kill_orthanc(line: Line) -> Report:
    kill(line, kills=6, loopers=2)
    return line.report(kills=6)


def hammer_orthanc(line: Line) -> Report:
    kill(line, kills=20, loopers=4)
    return compare_when_quiet(line, kills=20)  # with a wrong anchor it need never be at rest


def delete_the_place(line: Line) -> Report:
    with Clients(line, adders=1):
        time.sleep(1)
        line.broker.remove_place()
        time.sleep(1)
    return line.report()


def refuse_for_a_while(line: Line) -> Report:
    broker = line.broker
    assert isinstance(broker, WebhookBroker)
    with Clients(line, adders=1):
        time.sleep(0.5)
        broker.server.control(always={"status": 503})
        time.sleep(1)
        broker.server.control(always=None)
        time.sleep(0.5)
    return line.report()


def store_again_unseen(line: Line) -> Report:
    study = dicom.make_study()
    for _ in range(2):
        line.ledger.stored(line.orthanc.upload(study.instances[0].data))
        line.settle()
        line.orthanc.kill()
        with without_bridge(line):
            line.orthanc.delete("studies", study.id)
            line.ledger.deleted("studies", study.id)
            line.ledger.stored(line.orthanc.upload(study.instances[0].data))
        line.orthanc.start()
        line.settle()
        line.orthanc.delete("studies", study.id)
        line.ledger.deleted("studies", study.id)
    return line.report(kills=2)


def store_unseen(line: Line) -> Report:
    line.orthanc.kill()
    with without_bridge(line):
        upload(line)
    line.orthanc.start()
    return line.report(kills=1)


def delete_unseen(line: Line) -> Report:
    study = dicom.make_study()
    line.ledger.stored(line.orthanc.upload(study.instances[0].data))
    line.settle()
    line.orthanc.kill()
    with without_bridge(line):
        line.orthanc.delete("studies", study.id)
        line.ledger.deleted("studies", study.id)
    line.ledger.allow("instance.deleted")
    line.orthanc.start()
    return line.report(kills=1)


def end_within_stable_age(line: Line) -> Report:
    study = upload(line)
    line.settle()
    line.orthanc.kill()
    line.orthanc.start()
    report = line.report(kills=1)
    if ("study.stable", study.id) not in {(event.kind, event.resource) for event in line.events()}:
        report.add("lost", f"study.stable {study.id}")
    return report


def delete_with_callbacks_held_up(line: Line) -> Report:
    return hold_callbacks_up(line, studies=20, seconds=0.3)


def put_an_older_database_back(line: Line) -> Report:
    kept = dicom.make_study()
    line.ledger.stored(line.orthanc.upload(kept.instances[0].data))
    line.settle()
    line.orthanc.stop()
    older, database = line.root / "older", line.orthanc.database
    shutil.copytree(database, older, ignore=shutil.ignore_patterns("orthanc-events"))
    for _ in range(2):
        line.orthanc.start()
        for _ in range(5):
            line.ledger.deleted("studies", upload(line).id)  # it will be
        line.orthanc.delete("studies", kept.id)
        line.ledger.deleted("studies", kept.id)
        line.settle()
        line.orthanc.kill()
        put_back(older, database)
        one = kept.instances[0]
        line.ledger.stored_ids(one.id, one.series, one.study, one.patient)
    line.orthanc.start()
    line.ledger.allow("instance.*", "*.instance-added")
    return compare_when_quiet(line, kills=2)


def upload(line: Line) -> dicom.Study:
    study = dicom.make_study()
    line.ledger.stored(line.orthanc.upload(study.instances[0].data))
    return study


def cut_the_power_often(line: Line) -> Report:
    forgotten = cut_several_times(line, (1.0, 1.0, 1.0))
    return compare_when_quiet(line, kills=3, forgotten=forgotten)


def record_twice(line: Line) -> Report:
    environment = {"ORTHANC_EVENTS_OUTBOX": str(line.folder.path)}
    other = BridgedOrthanc(line.root / "other", yaml=line.config.read_text("utf-8"), environment=environment)
    shutil.copy(line.orthanc.shim_path, other.shim_path)
    with other, Clients(line, adders=1):
        for _ in range(20):
            other.upload(dicom.make_study().instances[0].data)
        time.sleep(2)
        other.kill()
    return compare_when_quiet(line)


#: The broker, what is switched off, the fault, and where the harm must show. Those that are not `slow` run in CI.
CASES: list[Any] = [
    pytest.param("nats", ["confirm"], kill_the_broker, "lost", id="confirm"),
    pytest.param("rabbitmq", ["confirm"], kill_the_broker, "lost", id="confirm-rabbitmq", marks=pytest.mark.slow),
    pytest.param(
        "kafka", ["confirm", "idempotence"], kill_the_broker, "lost", id="confirm-kafka", marks=pytest.mark.slow
    ),
    pytest.param("webhook", ["confirm"], refuse_for_a_while, "lost", id="confirm-webhook", marks=pytest.mark.slow),
    pytest.param("nats", ["replay"], kill_the_broker, "lost", id="replay", marks=pytest.mark.slow),
    pytest.param("nats", ["minting"], freeze_the_broker, "repeated", id="minting", marks=pytest.mark.slow),
    pytest.param("nats", ["log"], store_unseen, "lost", id="log"),
    pytest.param("nats", ["repair"], delete_unseen, "unrecoverable", id="repair", marks=pytest.mark.slow),
    pytest.param("nats", ["stable"], end_within_stable_age, "lost", id="stable", marks=pytest.mark.slow),
    pytest.param(
        "nats", ["doubt", "late"], delete_with_callbacks_held_up, "repeated", id="doubt", marks=pytest.mark.slow
    ),
    pytest.param(
        "nats", ["continuity"], put_an_older_database_back, "unrecoverable", id="continuity", marks=pytest.mark.slow
    ),
    pytest.param(
        "nats", ["strangers"], put_an_older_database_back, "unrecoverable", id="strangers", marks=pytest.mark.slow
    ),
    pytest.param(
        "nats", ["other-logs"], put_an_older_database_back, "unrecoverable", id="other-logs", marks=pytest.mark.slow
    ),
    pytest.param(
        "nats", ["published"], cut_behind_a_second_life, "out_of_order", id="published", marks=pytest.mark.slow
    ),
    # An outbox that is older than what was delivered of it is told from the one before, too: either is enough here.
    pytest.param("nats", ["jump", "renew"], cut_the_power_often, "unexpected lost", id="jump", marks=pytest.mark.slow),
    pytest.param("nats", ["outbox-lock"], record_twice, "unexpected lost", id="outbox-lock", marks=pytest.mark.slow),
    pytest.param("nats", ["look"], remove_the_outbox, "lost", id="look", marks=pytest.mark.slow),
    pytest.param("nats", ["salvage"], remove_the_outbox, "lost", id="salvage", marks=pytest.mark.slow),
    pytest.param("nats", ["renew"], put_an_older_copy_back, "unexpected lost", id="renew", marks=pytest.mark.slow),
    pytest.param("nats", ["rebirth"], store_again_unseen, "unrecoverable", id="rebirth", marks=pytest.mark.slow),
    pytest.param("nats", ["announced"], backfill_while_receiving, "repeated", id="announced", marks=pytest.mark.slow),
    pytest.param("nats", ["dedupe"], freeze_the_broker, "duplicated", id="dedupe", marks=pytest.mark.slow),
    pytest.param(
        "kafka", ["idempotence"], freeze_the_broker, "duplicated out_of_order", id="idempotence", marks=pytest.mark.slow
    ),
    pytest.param("nats", ["position", "dedupe"], kill_the_bridge, "duplicated", id="position", marks=pytest.mark.slow),
    pytest.param(
        "nats",
        ["cursor", "dedupe"],
        kill_orthanc_without_cursor,
        "unexpected duplicated",
        id="cursor",
        marks=pytest.mark.slow,
    ),
    pytest.param("nats", ["identity"], delete_the_place, "lost", id="identity", marks=pytest.mark.slow),
    pytest.param("rabbitmq", ["identity"], delete_the_place, "lost", id="identity-rabbitmq", marks=pytest.mark.slow),
    pytest.param("kafka", ["identity"], delete_the_place, "lost", id="identity-kafka", marks=pytest.mark.slow),
    pytest.param("nats", ["anchor"], hammer_orthanc, "lost repeated unexpected", id="anchor", marks=pytest.mark.slow),
    pytest.param("nats", ["rules"], hammer_orthanc, "lost repeated unexpected", id="rules", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("broker", "without", "fault", "harm"), CASES)
def test_the_ledger_reports_what_a_protection_prevents(
    make_line: Callable[..., Line], broker: str, without: list[str], fault: Callable[[Line], Report], harm: str
) -> None:
    """Where the harm takes luck, in more than one attempt."""
    for attempt in range(_ATTEMPTS):
        line = make_line(f"line-{attempt}", broker=broker, transport=BROKERS[broker].impatient, without=without)
        report = fault(line)
        print(report)
        # Under kills, far more than what can wait in memory is harm as well (tests/faults/test_capture.py).
        beyond = report.kills and report.unrecoverable > report.kills * 400
        if beyond or sum(getattr(report, category) for category in harm.split()):
            return
    pytest.fail(f"nobody noticed\n{report}")


def delete_far_away(line: RemoteLine) -> None:
    study = dicom.make_study()
    line.store(study)
    # It is looked once at a start in any case.
    line.wait(lambda document: document["log"]["cursor"] >= 4 and document["capture"]["rounds"] >= 1)
    line.orthanc.delete("studies", study.id)
    line.ledger.deleted("studies", study.id)


def put_an_older_database_back_far_away(line: RemoteLine) -> None:
    """And give the numbers that were read to others before anybody looks."""
    line.orthanc.stop()
    shutil.copytree(line.orthanc.database, line.root / "older")
    line.orthanc.start()
    gone = dicom.make_study()
    line.store(gone)
    line.wait(lambda document: document["log"]["cursor"] >= 4)
    line.bridge.freeze()
    line.orthanc.kill()
    shutil.rmtree(line.orthanc.database)
    shutil.copytree(line.root / "older", line.orthanc.database)
    line.ledger.deleted("studies", gone.id)
    line.orthanc.start()
    line.store(dicom.make_study(series=2))
    line.bridge.thaw()


@pytest.mark.parametrize(
    ("without", "fault"), [("rounds", delete_far_away), ("recognition", put_an_older_database_back_far_away)]
)
def test_the_ledger_reports_what_protects_an_orthanc_without_the_plugin(
    tmp_path: Path, without: str, fault: Callable[[RemoteLine], None]
) -> None:
    require("orthanc")
    reports = []
    for name, switched_off in (("mutant", [without]), ("whole", [])):
        with RemoteLine(tmp_path / name, without=switched_off) as line:
            line.ledger.allow("instance.deleted")
            fault(line)
            if switched_off:
                time.sleep(5)
                rows, there = line.orthanc.changes(), line.orthanc.existing()
                reports.append(line.ledger.compare(line.events(), existing=there, log=rows))
            else:
                reports.append(line.report())
    print(*reports, sep="\n")
    assert reports[0].lost and reports[1].ok, f"{reports[0]}\n{reports[1]}"
