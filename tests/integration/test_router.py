"""The router between real Orthancs, on every broker: everything where it belongs, once, whatever dies."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import time
from collections import defaultdict
from pathlib import Path

import httpx
import pytest

from orthanc_events_bridge.testing.dicom import Instance, Study, make_study
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.testing.programs import find_dicomweb_plugin, find_python_plugin, require
from tests.integration.commands import PATIENCE, wait_for
from tests.integration.routers import Receiver, Routers, gateway, ids, in_a_circle, running
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")
#: Of the studies of the large test: modality, and what else distinguishes them.
MODALITIES = ("CT", "MR", "US", "CR", "PT", "SR")
PARTS = ("KNEE", "HEAD", "CHEST")

RULES = """
destinations:
  pacs: {modality: pacs, concurrency: 4}
  archive: {peer: archive}
  research: {orthanc: "%(research)s"}
  export: {folder: "%(export)s"}
rules:
  - {name: everything, to: [archive]}
  - {name: ct, when: {tag: Modality, is: CT}, to: [pacs]}
  - {name: magnetic, when: {tag: Modality, glob: "M*"}, to: [pacs]}
  - {name: knees, when: [{tag: BodyPartExamined, is: KNEE}, {not: {tag: Modality, is: [SR, US]}}], to: [research]}
  - {name: heads, when: {all: [{tag: BodyPartExamined, regex: ^HE}, {tag: Modality, is: [PT, CT]}]}, to: [research]}
  - {name: ultrasound, when: {tag: Modality, is: US}, to: [export]}
  - {name: chest, when: {any: [{tag: BodyPartExamined, is: THORAX}, {tag: BodyPartExamined, is: CHEST}]}, to: [export]}
  - {name: by DICOM, when: {metadata: Origin, is: DicomProtocol}, to: [export, pacs, research]}
  - {name: old, when: {tag: StudyDate, below: 20000101}, to: [research, pacs]}
  - {name: nothing, when: {tag: Modality, exists: false}, to: [export]}
"""


def belongs(modality: str, part: str) -> set[str]:
    """Where a study goes, said once more in other words."""
    found = {"archive"}
    if modality in ("CT", "MR"):
        found.add("pacs")
    if (part == "KNEE" and modality in ("CT", "MR", "CR", "PT")) or (part == "HEAD" and modality in ("PT", "CT")):
        found.add("research")
    if modality == "US" or part == "CHEST":
        found.add("export")
    return found


def mixed(count: int) -> list[tuple[Study, set[str]]]:
    """Studies, and where each belongs."""
    made = []
    for number in range(count):
        modality, part = MODALITIES[number % 6], PARTS[number // 6 % 3]
        study = make_study(modality=modality, series=1 + number % 2, instances=2, canary={"BodyPartExamined": part})
        made.append((study, belongs(modality, part)))
    return made


@pytest.mark.parametrize(
    ("studies", "kills"),
    [pytest.param(18, 4, id="18-studies"), pytest.param(200, 20, id="200-studies", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_study_is_where_it_belongs_once_whoever_is_killed(
    tmp_path: Path, kind: str, studies: int, kills: int
) -> None:
    broker_or_skip(kind)
    chance = random.Random(11)
    pacs, archive, research = (Receiver(tmp_path / name) for name in ("pacs", "archive", "research"))
    export = tmp_path / "export"
    export.mkdir()
    rules = RULES % {"research": research.url, "export": export}
    with (
        running(pacs, archive, research),
        gateway(tmp_path / "line", kind, modalities=[pacs], peers=[archive], JobsHistorySize=10 * studies) as line,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        began = time.monotonic()
        routers.start(1)
        wanted: dict[str, list[Instance]] = defaultdict(list)
        kills_left = kills
        for number, (study, places) in enumerate(mixed(studies)):
            for instance in study:
                line.orthanc.upload(instance.data)
            for goal in places:
                wanted[goal] += study
            if number == studies // 4:
                routers.start(3)
            if number == studies * 3 // 4:
                for _ in range(len(routers) - 1):
                    routers.kill()
            if kills_left > kills // 2 and chance.random() < kills / studies:
                routers.kill(chance.randrange(len(routers)))
                routers.start()
                kills_left -= 1
        orders = sum(len({one.study for one in wanted[name]}) for name in wanted)
        while kills_left:  # each in the midst of what is left
            done = len(routers.audit())
            step = max(1, (orders - done) // (kills_left + 1))
            wait_for(lambda done=done, step=step: len(routers.audit()) >= min(done + step, orders), "progress")
            routers.kill()
            routers.start()
            kills_left -= 1

        def exported() -> set[str]:
            return {path.stem for path in export.rglob("*.dcm")}

        receivers = {"pacs": pacs, "archive": archive, "research": research}
        for name, place in receivers.items():
            wait_for(lambda name=name, place=place: place.has() >= ids(wanted[name]), name, 4 * PATIENCE)
        wait_for(lambda: exported() >= {one.sop_uid for one in wanted["export"]}, "export")
        # What was sent by one that died is said by its successor.
        wait_for(lambda: len(routers.audit()) >= orders, "audit")
        assert routers.stop() == [0]
        lost = sum(len(ids(wanted[name]) - place.has()) for name, place in receivers.items())
        wrong = sum(len(place.has() - ids(wanted[name])) for name, place in receivers.items())
        # Nothing else submits jobs there, and each order to these two is one, unless it was carried out again.
        line.settle()
        jobs = {one.resource for one in line.events() if one.change == "JobSubmitted"}
        again = len(jobs) - sum(len({one.study for one in wanted[name]}) for name in ("pacs", "archive"))
        print(
            f"{kind}: {studies} studies, {orders} orders, {kills} kills, {time.monotonic() - began:.0f} s: "
            f"lost {lost}, wrong {wrong}, jobs done again {again}, noted as sent again {len(routers.audit()) - orders}"
        )
        assert again == 0  # Orthanc knows all jobs still, so that each is known again
        for name, place in receivers.items():
            assert place.has() == ids(wanted[name])
            if name != "research":  # file by file: what a killed one was at is sent again
                assert place.taken() == len(place.has())
        assert exported() == {one.sop_uid for one in wanted["export"]}
        said = {(one["destination"], one["id"]) for one in routers.audit()}
        assert said == {(name, one.study) for name in wanted for one in wanted[name]}
        assert not list(export.rglob(".*.part")) or kills
        shutil.rmtree(export)


@pytest.mark.parametrize("kind", KINDS)
def test_a_destination_that_is_down_holds_up_only_itself(tmp_path: Path, kind: str) -> None:
    broker_or_skip(kind)
    up, down = Receiver(tmp_path / "up"), Receiver(tmp_path / "down")
    rules = """
destinations:
  up: {modality: up}
  down: {modality: down, concurrency: 1, retry: {initial: 1s, maximum: 2s}}
rules:
  - {name: all, to: [up, down]}
"""
    with (
        running(up),
        gateway(tmp_path / "line", kind, modalities=[up, down]) as line,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        routers.start()
        studies = [make_study(modality="CT") for _ in range(8)]
        for study in studies:
            for instance in study:
                line.orthanc.upload(instance.data)
        everything = {instance.id for study in studies for instance in study}
        wait_for(lambda: up.has() == everything, "what is up")
        assert not routers.audit(destination="down")
        with running(down):
            wait_for(lambda: down.has() == everything, "what was down")
            wait_for(lambda: len(routers.audit(destination="down")) == len(studies), "audit")
            assert up.taken() == down.taken() == len(everything)
            assert routers.stop() == [0]


def test_what_is_sent_by_dicomweb_is_there_although_workers_are_killed_in_the_midst(tmp_path: Path) -> None:
    """Through Orthanc's own plugin, to one that takes it with the same plugin."""
    broker_or_skip("nats")
    require("orthanc-dicomweb")
    plugin = str(find_dicomweb_plugin())
    cloud = Receiver(tmp_path / "cloud", Plugins=[plugin], DicomWeb={"Enable": True})
    rules = """
destinations:
  cloud: {dicomweb: cloud, concurrency: 2, retry: {initial: 1s, maximum: 2s}}
rules:
  - {name: all, to: [cloud]}
"""
    known = {"Enable": True, "Servers": {"cloud": [f"{cloud.url}/dicom-web/"]}}
    with (
        running(cloud),
        gateway(tmp_path / "line", "nats", Plugins=[str(find_python_plugin()), plugin], DicomWeb=known) as line,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        done = routers.run("--check")
        assert done.returncode == 0, done.stderr
        assert "destination cloud: dicomweb cloud\n" in done.stdout

        def jobs(*states: str) -> int:
            found = line.orthanc.get("/jobs?expand")
            return sum(one["Type"] == "DicomWebStowClient" and one["State"] in states for one in found)

        routers.start()
        studies = [make_study(modality="CT", series=1 + number % 2, instances=3) for number in range(6)]
        for study in studies[:2]:
            for instance in study:
                line.orthanc.upload(instance.data)
        wait_for(lambda: len(routers.audit(destination="cloud")) == 2, "the first")
        cloud.freeze()
        for study in studies[2:]:
            for instance in study:
                line.orthanc.upload(instance.data)
        wait_for(lambda: jobs("Running"), "a job that sends")
        routers.kill()
        routers.start(2)
        wait_for(lambda: jobs("Running", "Pending") > 2, "jobs of another worker")
        routers.kill()
        cloud.thaw()
        everything = {instance.id for study in studies for instance in study}
        wait_for(lambda: cloud.has() == everything, "what was sent")
        wait_for(lambda: len(routers.audit(destination="cloud")) == len(studies), "audit")
        assert {one["id"] for one in routers.audit(destination="cloud")} == {study.id for study in studies}
        assert all(one["job"] for one in routers.audit(destination="cloud"))
        assert routers.stop() == [0]
        routers.path.write_text(routers.path.read_text().replace("dicomweb: cloud", "dicomweb: clouds"))
        done = routers.run("--check")
        assert done.returncode == 1 and "Orthanc knows no DICOMweb server clouds (add it there)" in done.stderr


def test_nothing_goes_round_in_circles(tmp_path: Path) -> None:
    """A router that sends to where it came from, and to its own Orthanc, which takes everything again as new."""
    broker_or_skip("nats")
    with in_a_circle(tmp_path, instances=3) as (routers, line, study):
        wait_for(lambda: routers.audit("not sent", destination="source", why="it has come from there"), "source")
        # By itself it is stored once more, as if it were new, and is stable again.
        wait_for(lambda: routers.audit("not sent", destination="itself", why="it was sent already"), "the second round")
        more = make_study(modality="CT", patient_id=study.patient_id, study_uid=study.study_uid)
        for instance in more:
            line.orthanc.upload(instance.data)
        wait_for(lambda: len(routers.audit(destination="itself")) == 2, "what was added is sent")
        wait_for(lambda: len(routers.audit("not sent", destination="itself")) == 2, "and that once")
        assert [one["instances"] for one in routers.audit(destination="itself")] == [3, 4]
        assert routers.stop() == [0]


def test_a_dry_run_sends_nothing_and_takes_nothing_from_those_that_work(tmp_path: Path) -> None:
    broker_or_skip("nats")
    goal = Receiver(tmp_path / "goal")
    rules = "destinations:\n  goal: {modality: goal}\nrules:\n  - {name: all, to: [goal]}\n"
    with (
        running(goal),
        gateway(tmp_path / "line", "nats", modalities=[goal]) as line,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        routers.start(1, "--dry-run")
        wait_for(lambda: "the consumer router-dry-run receives events" in routers.log(), "the dry run")
        study = make_study(modality="CT")
        for instance in study:
            line.orthanc.upload(instance.data)
        wait_for(lambda: "goal by all" in routers.log(), "a decision")
        assert routers.stop() == [0]
        assert not goal.has() and not routers.audit()
        routers.start()
        wait_for(lambda: goal.has() == ids(study.instances), "what was only looked at")
        assert routers.stop() == [0]


def two_ports() -> tuple[int, int]:
    """That nobody listens on, the one behind the other."""
    while True:
        first = free_port()
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", first + 1))
            return first, first + 1


def test_each_worker_tells_of_all_its_consumers_at_a_port_of_its_own(tmp_path: Path) -> None:
    broker_or_skip("nats")
    goal = tmp_path / "goal"
    goal.mkdir()
    rules = f"""
destinations:
  goal: {{folder: "{goal}"}}
  nowhere: {{modality: nowhere}}
rules:
  - {{name: all, to: [goal]}}
"""
    with (
        gateway(tmp_path / "line", "nats") as line,
        Routers(tmp_path / "routers", line, rules) as routers,
    ):
        ports = two_ports()
        places = [f"http://127.0.0.1:{port}" for port in ports]
        routers.start(1, "--workers", "2", "--http", f"127.0.0.1:{ports[0]}")

        def ready(place: str) -> bool:
            try:
                return httpx.get(f"{place}/health/ready").status_code == 200
            except httpx.HTTPError:
                return False

        for place in places:
            wait_for(lambda place=place: ready(place), place)
        studies = [make_study(modality="CT") for _ in range(6)]
        for study in studies:
            for instance in study:
                line.orthanc.upload(instance.data)

        def metrics() -> str:
            return "".join(httpx.get(f"{place}/metrics").text for place in places)

        def handled(consumer: str, event: str) -> float:
            label = f'orthanc_consumer_handled_total{{consumer="{consumer}",type="{event}"}}'
            return sum(float(one.rpartition(" ")[2]) for one in metrics().splitlines() if one.startswith(label))

        wait_for(lambda: handled("router-goal", "transfer.ordered") == len(studies), "orders")
        assert handled("router", "study.stable") == len(studies)
        # Senders get orders alone: of what everybody gets they don't even pass anything over.
        ignored = {one for one in metrics().splitlines() if one.startswith("orthanc_consumer_ignored_total")}
        assert ignored and all('consumer="router"' in one for one in ignored)
        assert 'orthanc_consumer_in_flight{consumer="router-nowhere"} 0.0' in metrics()
        assert routers.stop() == [0]


def test_it_explains_checks_and_says_what_is_missing(tmp_path: Path) -> None:
    broker_or_skip("nats")
    known = Receiver(tmp_path / "known")
    rules = """
destinations:
  known: {modality: known}
rules:
  - {name: mr, when: [{tag: Modality, is: MR}, {tag: SliceThickness, exists: false}], to: [known]}
"""
    with running(known), gateway(tmp_path / "line", "nats", modalities=[known]) as line:
        routers = Routers(tmp_path / "routers", line, rules)
        done = routers.run("--check")
        assert done.returncode == 0, done.stderr
        assert f"destination known: modality known, KNOWN at 127.0.0.1:{known.dicom_port}\n" in done.stdout
        study = make_study(modality="CT")
        for instance in study:
            line.orthanc.upload(instance.data)
        for name in (study.id, study.study_uid):
            done = routers.run("--explain", name)
            assert done.returncode == 0, done.stderr
            assert "no  rule mr, to known\n  no  tag Modality is 'MR'; there is 'CT'\n  yes tag Slice" in done.stdout
            assert done.stdout.endswith("it goes to nobody\n")
        found = json.loads(routers.run("--explain", study.id, "--json").stdout)
        assert (found["id"], found["to"], found["rules"][0]["fits"]) == (study.id, {}, False)
        done = routers.run("--explain", "1.2.3")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "orthanc-events: Orthanc has no study 1.2.3 (give its Orthanc id or its UID)\n"
        right = routers.path.read_text()
        routers.path.write_text(right.replace("tag: Modality", "tag: Modalty"))
        assert "DICOM knows no attribute Modalty (did you mean Modality?)\n" in routers.run("--check").stdout
        routers.path.write_text(right.replace("modality: known", "modality: unknown"))
        done = routers.run("--check")
        assert done.returncode == 1 and "(add the modality unknown to Orthanc's DicomModalities)" in done.stderr
        routers.path.write_text(routers.path.read_text().replace("to: [known]", "to: [knwon]"))
        done = routers.run()
        assert done.returncode == 2 and "'knwon' is no destination" in done.stderr
        assert "Traceback" not in done.stderr
