"""What Orthanc forgets and capture tells all the same: stable events, deletions that nobody saw, a log that lies."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.changes.walk import CALM
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.ledger import Event, Report
from orthanc_events_bridge.testing.line import Clients, Line

pytestmark = pytest.mark.fault

MakeLine = Callable[..., Line]


@pytest.fixture(params=["nats", pytest.param("kafka", marks=pytest.mark.slow)])
def broker(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def upload(line: Line, study: dicom.Study) -> None:
    for instance in study.instances:
        line.ledger.stored(line.orthanc.upload(instance.data))


def put_back(older: Path, database: Path) -> None:
    """Replace Orthanc's database and files, without the outbox in the same folder."""
    for path in database.iterdir():
        if path.is_dir() and path.name != "orthanc-events":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    shutil.copytree(older, database, dirs_exist_ok=True)


@contextmanager
def without_bridge(line: Line) -> Iterator[None]:
    """The same Orthanc on the same database, with nobody to listen."""
    orthanc = line.orthanc
    plugins, orthanc.config["Plugins"] = orthanc.config["Plugins"], []
    orthanc.start()
    try:
        yield
        orthanc.stop()
    finally:
        orthanc.config["Plugins"] = plugins


def wait_for(line: Line, kind: str, count: int, timeout: float = 60) -> list[Event]:
    """The events of a kind, once there are so many of them, and a while after."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if sum(event.kind == kind for event in line.events()) >= count:
            break
        time.sleep(0.5)
    time.sleep(2)
    return [event for event in line.events() if event.kind == kind]


@pytest.mark.parametrize("broker", ["nats", "kafka"])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_stable_events_that_a_stop_swallows_are_told_once(make_line: MakeLine, broker: str, how: str) -> None:
    """100 studies over several ends of Orthanc, each within StableAge."""
    line = make_line(broker=broker, stable_age=3)
    studies: list[dicom.Study] = []
    for _ in range(5):
        some = [dicom.make_study() for _ in range(20)]
        for study in some:
            upload(line, study)
        studies += some
        line.settle()
        line.orthanc.kill() if how == "kill" else line.orthanc.stop()
        line.orthanc.start()
    for kind, level in (("series.stable", "series"), ("study.stable", "study"), ("patient.stable", "patient")):
        wanted = {getattr(study.instances[0], level) for study in studies}
        found = Counter(event.resource for event in wait_for(line, kind, len(wanted)))
        assert found == dict.fromkeys(wanted, 1)
    line.report(kills=5).assert_clean()


def test_what_is_still_growing_is_not_told_to_be_stable(make_line: MakeLine) -> None:
    line = make_line(stable_age=3)
    study = dicom.make_study(instances=12)
    for number, instance in enumerate(study):
        line.ledger.stored(line.orthanc.upload(instance.data))
        if number == 3:
            line.settle()
            line.orthanc.kill()
            line.orthanc.start()
        time.sleep(0.7)
    last = time.time()
    (event,) = wait_for(line, "study.stable", 1)
    assert event.resource == study.id
    line.report(kills=1).assert_clean()
    assert time.time() - last >= 3


def test_deletions_that_a_kill_swallows_are_told(make_line: MakeLine, broker: str) -> None:
    """Deleted while capture wasn't there: by another Orthanc on the same database, without the bridge."""
    line = make_line(broker=broker)
    studies = [dicom.make_study(series=2) for _ in range(20)]
    for study in studies:
        upload(line, study)
    line.settle()
    line.orthanc.kill()
    with without_bridge(line):
        for study in studies[:10]:
            assert line.orthanc.delete("studies", study.id)
            line.ledger.deleted("studies", study.id)
        for study in studies[10:15]:
            assert line.orthanc.delete("series", study.instances[0].series)
            line.ledger.deleted("series", study.instances[0].series)
    line.orthanc.start()
    found = wait_for(line, "series.deleted", 25)
    assert len(found) == 25
    line.ledger.allow("instance.deleted")
    line.report(kills=1).assert_clean()
    line.orthanc.restart()
    line.settle()
    assert len([event for event in line.events() if event.kind == "series.deleted"]) == 25


def test_a_creation_of_what_was_there_proves_a_deletion(make_line: MakeLine) -> None:
    line = make_line()
    study = dicom.make_study(series=2)
    upload(line, study)
    line.settle()
    line.orthanc.kill()
    with without_bridge(line):
        assert line.orthanc.delete("studies", study.id)
        line.ledger.deleted("studies", study.id)
        upload(line, study)
    line.orthanc.start()
    line.report(kills=1).assert_clean()
    kinds = [event.kind for event in line.events() if event.resource == study.id and event.kind != "study.stable"]
    assert [kind for kind in kinds if kind != "study.instance-added"] == [
        "study.created",
        "study.deleted",
        "study.created",
    ]


def test_deletions_of_single_instances_are_told_by_option(make_line: MakeLine) -> None:
    """And with the UIDs that are allow-listed: what is gone can't be asked for them."""
    tags = "data:\n  tags: [SeriesInstanceUID, SOPInstanceUID]\n"
    line = make_line(settings=f"capture:\n  infer_instances: true\n{tags}")
    studies = [dicom.make_study(series=2, instances=5) for _ in range(4)]
    for study in studies:
        upload(line, study)
    line.settle()
    line.orthanc.kill()
    with without_bridge(line):
        for study in studies:
            assert line.orthanc.delete("instances", study.instances[0].id)
            line.ledger.deleted("instances", study.instances[0].id)
        assert line.orthanc.delete("studies", studies[0].id)
        line.ledger.deleted("studies", studies[0].id)
    line.orthanc.start()
    line.report(kills=1).assert_clean(unrecoverable=0)
    with contextlib.closing(OutboxReader(line.folder.outbox)) as outbox:
        told = {row.resource: row.extra for row in outbox.rows(0, 10_000) if row.change == "Deleted"}
    for study in studies:
        first = study.instances[0]
        assert told[first.id]["inferred"] is True
        assert told[first.id]["parents"] == {"series": first.series, "study": first.study, "patient": first.patient}
        assert told[first.id]["tags"] == {"SeriesInstanceUID": first.series_uid, "SOPInstanceUID": first.sop_uid}
    assert len([one for one in told if one in {instance.id for instance in studies[0]}]) == 10


def test_deletions_while_the_broker_is_away_are_told(make_line: MakeLine, broker: str) -> None:
    line = make_line(broker=broker)
    studies = [dicom.make_study() for _ in range(100)]
    for study in studies:
        upload(line, study)
    line.settle()
    line.broker.kill()
    for study in studies:
        assert line.orthanc.delete("studies", study.id)
        line.ledger.deleted("studies", study.id)
    line.wait(lambda document: document["transports"][0]["pending"] >= 400)
    line.broker.start()
    report = line.report()
    report.assert_clean()
    gone = Counter(event.resource for event in line.events() if event.kind == "study.deleted")
    assert gone == dict.fromkeys((study.id for study in studies), 1)


def test_an_emptied_log_is_announced_and_loses_nothing(make_line: MakeLine, broker: str) -> None:
    line = make_line(broker=broker)
    with Clients(line, adders=2, loopers=1):
        for _ in range(5):
            time.sleep(0.5)
            line.orthanc.client.delete("/changes").raise_for_status()
    line.report(kills=1).assert_clean()
    line.wait(lambda document: document["capture"]["discontinuities"])
    kills = 0
    while not kills or not remembered(line):  # where the last emptying was noticed since, nothing is known of the log
        if kills:
            line.orthanc.start()
        upload(line, dicom.make_study())
        line.settle()
        line.orthanc.kill()
        kills += 1
    with without_bridge(line):
        upload(line, dicom.make_study(series=2))
        line.orthanc.client.delete("/changes").raise_for_status()
    line.orthanc.start()
    line.settle()
    assert wait_for(line, "server.log-discontinuity", 1)
    line.ledger.allow("instance.created")
    line.report(kills=kills).assert_clean()
    said = discontinuities(line)[-1]
    assert said["reason"] == "emptied"
    assert said["recorded"] == said["continues"] < said["counter"]


def test_an_older_database_put_back_is_announced_and_compared(make_line: MakeLine, broker: str) -> None:
    line = make_line(broker=broker)
    kept, gone, back = (dicom.make_study(series=2) for _ in range(3))
    upload(line, kept)
    upload(line, back)
    line.settle()
    line.orthanc.stop()
    older = line.root / "older"
    database = line.orthanc.database
    shutil.copytree(database, older, ignore=shutil.ignore_patterns("orthanc-events"))
    line.orthanc.start()
    upload(line, gone)
    assert line.orthanc.delete("studies", back.id)
    line.ledger.deleted("studies", back.id)
    line.settle()
    line.orthanc.kill()
    put_back(older, database)
    line.ledger.deleted("studies", gone.id)
    for instance in back:
        line.ledger.stored_ids(instance.id, instance.series, instance.study, instance.patient)
    line.orthanc.start()
    assert len(wait_for(line, "server.log-discontinuity", 1)) == 1
    (said,) = discontinuities(line)
    assert said["reason"] == "counter-behind"
    assert said["counter"] < said["recorded"]
    wait_for(line, "study.deleted", 2)
    line.ledger.allow("instance.*", "*.instance-added")
    line.report(kills=1).assert_clean()


def remembered(line: Line) -> int:
    """How many rows of the log are kept to know it again by."""
    with contextlib.closing(sqlite3.connect(f"file:{line.folder.outbox}?mode=ro", uri=True)) as outbox:
        return int(outbox.execute("SELECT count(*) FROM tail").fetchone()[0])


def discontinuities(line: Line) -> list[dict[str, Any]]:
    """What the events say of the log, oldest first."""
    with contextlib.closing(OutboxReader(line.folder.outbox)) as outbox:
        return [row.extra["log"] for row in outbox.rows(0, 1_000_000) if row.change == "LogDiscontinuity"]


def test_an_older_database_put_back_under_load_is_followed_at_once(make_line: MakeLine, broker: str) -> None:
    """More than the remembered rows ago, so that the two logs have nothing in common, and while changes come in."""
    line = make_line(broker=broker)
    before = [dicom.make_study(instances=3) for _ in range(5)]
    for study in before:
        upload(line, study)
    line.settle()
    line.orthanc.stop()
    older, database = line.root / "older", line.orthanc.database
    shutil.copytree(database, older, ignore=shutil.ignore_patterns("orthanc-events"))
    line.orthanc.start()
    gone = [dicom.make_study(instances=10) for _ in range(20)]
    for study in gone:
        upload(line, study)
    line.settle()
    line.orthanc.kill()
    put_back(older, database)
    for study in gone:
        line.ledger.deleted("studies", study.id)
    with Clients(line, adders=2, loopers=1):
        line.orthanc.start()
        time.sleep(2)
    line.report(kills=1).assert_clean(unrecoverable=400)
    assert [one["reason"] for one in discontinuities(line)] == ["counter-behind"]
    assert {study.id for study in gone} <= {event.resource for event in line.events() if event.kind == "study.deleted"}


def test_the_same_database_put_back_twice_tells_two_stories(make_line: MakeLine) -> None:
    """What comes back a second time is no copy of the first: its ids are others."""
    line = make_line()
    study = dicom.make_study()
    upload(line, study)
    line.settle()
    line.orthanc.stop()
    older, database = line.root / "older", line.orthanc.database
    shutil.copytree(database, older, ignore=shutil.ignore_patterns("orthanc-events"))
    line.orthanc.start()
    for times in (1, 2):
        upload(line, dicom.make_study())
        assert line.orthanc.delete("studies", study.id)
        wait_for(line, "study.deleted", 2 * times - 1)
        line.settle()
        line.orthanc.kill()
        put_back(older, database)
        line.orthanc.start()
        line.settle()
    told = [event for event in line.events() if event.resource == study.id and event.kind == "study.created"]
    assert len({event.id for event in told}) == len(told) == 3


#: Orthanc's own thread of callbacks is held up at each deletion, as another plugin can do; and it is looked for what is
#: gone a second later than it would be, when something is.
_HELD_UP = """\
    import time
    import orthanc
    def register_slow(callback, register=orthanc.RegisterOnChangeCallback):
        def slow(kind, level, resource):
            if kind == orthanc.ChangeType.DELETED:
                time.sleep({seconds})
            callback(kind, level, resource)
        register_slow.kept = slow
        register(slow)
    orthanc.RegisterOnChangeCallback = register_slow
    from orthanc_events_bridge.changes.repair import Repair
    def begin_later(self, begin=Repair.begin):
        time.sleep(1)
        begin(self)
    Repair.begin = begin_later
"""
_BEHIND = "    from orthanc_events_bridge.plugin import start\n"


def hold_callbacks_up(line: Line, studies: int, seconds: float) -> Report:
    """Delete studies while it is looked for what is gone, and let Orthanc say so late."""
    text = line.orthanc.shim_path.read_text("utf-8")
    line.orthanc.shim_path.write_text(text.replace(_BEHIND, _BEHIND + _HELD_UP.format(seconds=seconds)), "utf-8")
    stored = [dicom.make_study() for _ in range(studies)]
    for study in stored:
        upload(line, study)
    line.settle()
    line.orthanc.kill()
    line.orthanc.start()
    for study in stored:
        assert line.orthanc.delete("studies", study.id)
        line.ledger.deleted("studies", study.id)
    time.sleep(studies * 4 * seconds)  # for so long they are held up
    return line.report(kills=1)


@pytest.mark.parametrize(("studies", "seconds"), [(20, 0.3), (1, 3.0)])
def test_deletions_that_orthanc_tells_late_are_told_once(make_line: MakeLine, studies: int, seconds: float) -> None:
    """Slowly, so that there is never silence; and so late that they are inferred by then."""
    line = make_line()
    report = hold_callbacks_up(line, studies, seconds)
    inferred = line.status()["capture"]["inferred"].get("Deleted", 0)
    print(report, f"{inferred} inferred")
    report.assert_clean(unrecoverable=0)
    assert bool(inferred) == (seconds > CALM)
