"""The AI dispatch among real servers: a PACS, a gateway with the bridge, a broker, and the service of examples/."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

from orthanc_events_bridge.testing.phantoms import Phantom
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.ring import Ring
from tests.integration.anonymized import as_dataset, elements, files, memory
from tests.integration.commands import PATIENCE, wait_for
from tests.integration.dispatches import Dispatches, Sent
from tests.integration.routers import Receiver, stored
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")


def sent(ring: Ring, count: int) -> list[Sent]:
    """So many series, CT and MR in turn, two of each patient."""
    made = []
    for number in range(count):
        if number % 2 == 0:
            phantom = Phantom(patient_name=f"Zwetschgenmann^{number}")
        made.append(Sent(ring, phantom, phantom.mr(slices=4) if number % 2 else phantom.ct(slices=4)))
    return made


def check_results(ring: Ring, everything: list[Sent], refused: set[str]) -> None:
    """In the PACS: of each series a segmentation and a report, of its patient and study, about its images; once each.

    :param refused: series of which there are none.
    """
    for study, phantom in {one.study: one.phantom for one in everything}.items():
        own = [one for one in everything if one.study == study]
        images = {uid for one in own for uid in one.uids}
        results = [one for one in map(as_dataset, files(ring.pacs, study)) if str(one.SOPInstanceUID) not in images]
        about: Counter[tuple[str, str]] = Counter()
        made = {str(one.SOPInstanceUID) for one in results} | {str(one.SeriesInstanceUID) for one in results}
        for result in results:
            assert (result.PatientID, result.PatientName) == (phantom.patient_id, phantom.patient_name)
            assert result.StudyInstanceUID == phantom.study_uid
            assert (result.AccessionNumber, result.StudyDate) == ("A1", "20240102")
            named = {str(each.value) for each in elements(result) if each.keyword == "ReferencedSOPInstanceUID"}
            (source,) = [one for one in own if named & one.uids]
            assert named - made == source.uids
            series = {str(each.value) for each in elements(result) if each.keyword == "SeriesInstanceUID"}
            assert series - made <= {str(source.images[0].SeriesInstanceUID)}
            about[source.series, str(result.Modality)] += 1
        wanted = {(one.series, modality) for one in own if one.series not in refused for modality in ("SEG", "SR")}
        assert about == dict.fromkeys(wanted, 1)


@pytest.mark.parametrize(
    ("series", "kills"),
    [pytest.param(6, 2, id="6-series"), pytest.param(20, 8, id="20-series", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_under_the_original_patient_once_whoever_is_killed_late_or_refused(
    tmp_path: Path, kind: str, series: int, kills: int
) -> None:
    """The service dies over some, answers late over others, and refuses one for good; workers are killed."""
    broker_or_skip(kind)
    require("orthanc-dicomweb")
    chance = random.Random(5)
    pacs = Receiver(tmp_path / "pacs")
    ring = Ring(
        tmp_path,
        kind,
        pacs,
        fault_crash="2",
        fault_crash_sent="4",
        fault_late="3,5",
        fault_late_seconds=6,
        fault_refuse="1",
    )
    service = "dicomweb: ai, deadline: 4s, retry: {max_attempts: 10, initial: 1s, maximum: 1s}"
    with (
        memory(tmp_path, kind) as store,
        ring.running(),
        Dispatches(tmp_path / "dispatch", ring, service, store) as dispatch,
    ):
        began = time.monotonic()
        dispatch.start(2)
        everything = sent(ring, series)
        crashes = 0

        def states() -> Counter[str]:
            nonlocal crashes
            if not ring.service.running:  # as its own keeper would
                assert ring.service.died() == 70
                ring.service.start()
                crashes += 1
            return dispatch.states()

        for _ in range(kills):
            until = time.monotonic() + chance.uniform(0.3, 1.5)
            while time.monotonic() < until:
                states()
                time.sleep(0.1)
            dispatch.kill(chance.randrange(len(dispatch)))
            dispatch.start()
        wait_for(lambda: states() == {"done": series - 1, "failed": 1}, "all but one are done", 3 * PATIENCE)
        wait_for(lambda: len(pacs.has()) >= sum(len(one.images) for one in everything) + 2 * (series - 1), "results")
        # All that it causes is looked at, and causes nothing more.
        ring.line.settle()
        shown = dispatch.shown()
        results = [result for one in shown for result in one["results"]]
        looked = {f"subject='series/{result[name]}')" for result in results for name in ("series", "given")}
        wait_for(lambda: all(text in dispatch.log() for text in looked), "its own results are looked at")
        assert dispatch.states() == {"done": series - 1, "failed": 1}
        assert crashes == 2

        (failed,) = [one for one in shown if one["state"] == "failed"]
        assert {one["series"] for one in shown} == {one.series for one in everything}
        # An attempt in which a worker was killed counts too.
        assert failed["step"] == "send" and re.search("failed [0-9]+ times of 10: job .+ has failed", failed["reason"])
        check_results(ring, everything, {failed["series"]})
        assert set(stored(ring.gateway).values()) == {1}  # nothing was made twice
        assert set(stored(pacs).values()) == {1}
        overdue = [one for one in shown if "overdue" in [each["state"] for each in one["history"]]]
        assert len(overdue) >= 2 and {one["state"] for one in overdue} <= {"done"}
        said = dispatch.audit("sending")
        assert {one["id"] for one in said} == {one.series for one in everything}
        print(
            f"{kind}: {series} series, {kills} kills, {time.monotonic() - began:.0f} s: sent {len(said)} times,"
            f" {len(overdue)} overdue, {crashes} crashes of the service"
        )
        # Nobody learns who they are, nor which pseudonym is whose, from what is written and told.
        written = dispatch.log() + json.dumps(shown) + dispatch.audit_file.read_text("utf-8")
        told = [event for event in ring.line.events() if event.producer]
        for one in everything:
            assert one.phantom.patient_id not in written and one.phantom.study_uid not in written
        assert "Zwetschgenmann" not in written and "Traceback" not in dispatch.log()
        received = [event for event in told if event.kind == "result.received"]
        assert {event.resource for event in received} == {result["given"] for result in results}
        assert not any(event.cause for event in received)
        # One that was given up while the service was down, although it had the series, is done by its result.
        given_up = {one["series"] for one in shown if "failed" in [each["state"] for each in one["history"]]}
        assert {event.resource for event in told if event.kind == "transfer.failed"} == given_up

        dead = json.loads(dispatch.dead_letters("watch").stdout)
        assert len({one["id"] for one in dead}) >= len(overdue)
        assert all("no result came within 4 s" in one["reason"] for one in dead)

        # And a person goes on with the one that has failed.
        done = dispatch.workflow("list", "--state", "failed")
        assert failed["id"] in done.stdout and done.stdout.count("\n") == 2
        ring.service.close(kill=True)
        del ring.service.environment["AI_SERVICE_FAULT_REFUSE"]
        ring.service.start()
        done = dispatch.workflow("retry", failed["id"][:8])
        assert (done.returncode, done.stdout) == (0, f"workflow {failed['id']} is sending again\n"), done.stderr
        wait_for(lambda: dispatch.states() == {"done": series}, "the last one")
        check_results(ring, everything, set())
        assert dispatch.stop() == [0, 0]


def receiver(folder: Path) -> Receiver:
    return Receiver(folder / "pacs")


def test_what_is_cancelled_gets_nothing_and_goes_on_when_a_person_says_so(tmp_path: Path) -> None:
    """Its result comes meanwhile, and is left alone; sent again, that one is found."""
    broker_or_skip("nats")
    require("orthanc-dicomweb")
    ring = Ring(tmp_path, "nats", receiver(tmp_path), fault_late="1", fault_late_seconds=3)
    with ring.running(), Dispatches(tmp_path / "dispatch", ring) as dispatch:
        assert dispatch.workflow("list").stdout == "consumer dispatch: no workflows\n"
        dispatch.start(1, "--dry-run")
        wait_for(lambda: "the consumer dispatch-dry-run receives events" in dispatch.log(), "the dry run")
        phantom = Phantom()
        one = Sent(ring, phantom, phantom.ct(slices=4))
        wait_for(lambda: "to the service, by for-the-service" in dispatch.log(), "a decision")
        assert dispatch.stop() == [0]
        assert not dispatch.states()
        dispatch.start()
        wait_for(lambda: dispatch.states() == {"waiting": 1}, "it is sent")
        done = dispatch.workflow("cancel", one.series)
        (shown,) = dispatch.shown()
        assert (done.returncode, done.stdout) == (0, f"workflow {shown['id']} is cancelled\n"), done.stderr
        assert (shown["state"], shown["step"]) == ("cancelled", "watch")
        wait_for(lambda: len(dispatch.audit("not given back", why="its workflow is cancelled")) == 2, "its results")
        assert len(ring.pacs.get("/instances")) == 4
        assert dispatch.workflow("retry", shown["id"]).stdout == f"workflow {shown['id']} is sending again\n"
        wait_for(lambda: dispatch.states() == {"done": 1}, "an end")
        check_results(ring, [one], set())
        assert set(stored(ring.gateway).values()) == {1}

        # What there is to be seen, and what can't be meant.
        (shown,) = dispatch.shown()
        done = dispatch.workflow("show", shown["id"][:6])
        assert done.stdout.startswith(f"workflow {shown['id']}: done, its results were sent on\n"), done.stderr
        assert done.stdout.count("sent on\n") == 3 and "  run: 1\n" in done.stdout
        assert json.loads(dispatch.workflow("show", one.study, "--json").stdout)["state"] == "done"
        header, row = dispatch.workflow("list", "--state", "done").stdout.splitlines()
        assert header.split() == ["ID", "STATE", "SINCE", "RULE", "SERIES", "RESULTS", "REASON"]
        assert row.startswith(f"{shown['id']}  done") and "2 of 2" in row
        for arguments, code, said in (
            (("show", "nothing"), 1, "there is no workflow nothing (see orthanc-events workflow list)"),
            (("retry", shown["id"]), 1, f"workflow {shown['id']} is done: there is nothing to be done again"),
            (("cancel", shown["id"]), 1, f"workflow {shown['id']} is done: there is nothing to be cancelled"),
            (("list", "--state", "finished"), 2, "there is no state finished (the states are: anonymizing, "),
        ):
            done = dispatch.workflow(*arguments)
            assert (done.returncode, done.stdout) == (code, "")
            assert done.stderr.startswith(f"orthanc-events: {said}")
        done = dispatch.run("--explain", one.series)
        assert "yes rule for-the-service\n" in done.stdout
        assert done.stdout.endswith(f"it goes to the service, by for-the-service\nworkflow {shown['id']} is done\n"), (
            done.stderr
        )
        found = json.loads(dispatch.run("--explain", shown["results"][0]["series"], "--json").stdout)
        assert (found["sent"], found["why"]) == (None, "it is pseudonymous: made here, or a result")
        assert dispatch.stop() == [0]


def test_more_images_are_another_workflow_and_a_part_has_no_results(tmp_path: Path) -> None:
    """They come while the results of the first ones are late."""
    broker_or_skip("nats")
    require("orthanc-dicomweb")
    ring = Ring(tmp_path, "nats", receiver(tmp_path), fault_late="1", fault_late_seconds=5)
    with ring.running(), Dispatches(tmp_path / "dispatch", ring) as dispatch:
        dispatch.start()
        phantom = Phantom()
        images = phantom.ct(slices=5)
        part = Sent(ring, phantom, images[:4])
        wait_for(lambda: dispatch.states() == {"waiting": 1}, "a part is sent")
        whole = Sent(ring, phantom, images)
        assert whole.series == part.series
        wait_for(lambda: dispatch.states() == {"superseded": 1, "done": 1}, "all of it is done")
        check_results(ring, [whole], set())
        first, second = dispatch.shown()
        assert (first["instances"], first["state"], second["instances"]) == (4, "superseded", 5)
        done = dispatch.workflow("retry", first["id"])
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr == f"orthanc-events: workflow {first['id']} is superseded: there is nothing to be done again\n"
        )
        assert dispatch.stop() == [0]


def test_what_the_service_answers_are_results_and_what_it_refuses_fails_at_once(tmp_path: Path) -> None:
    broker_or_skip("nats")
    require("orthanc-dicomweb")
    ring = Ring(tmp_path, "nats", receiver(tmp_path), fault_refuse="2")
    service = f"answers: '{ring.service.url}/results', timeout: 1m, concurrency: 1"
    anything = "{tag: Modality, exists: true}"  # also what it makes itself
    with ring.running(), Dispatches(tmp_path / "dispatch", ring, service, when=anything) as dispatch:
        done = dispatch.run("--check")
        assert done.returncode == 0, done.stderr
        assert f"service: its answers, from {ring.service.url}/results\n" in done.stdout
        assert "destination results: modality pacs, PACS at " in done.stdout
        dispatch.start()
        first, second = Phantom(), Phantom()
        one = Sent(ring, first, first.ct(slices=4))
        wait_for(lambda: dispatch.states() == {"done": 1}, "the first")
        other = Sent(ring, second, second.mr(slices=4))
        wait_for(lambda: dispatch.states() == {"done": 1, "failed": 1}, "the second")
        check_results(ring, [one, other], {other.series})
        (failed,) = [each for each in dispatch.shown() if each["state"] == "failed"]
        assert (failed["series"], failed["reason"]) == (
            other.series,
            "the service refuses it: answers 409, failure reason 0124",
        )
        assert len(dispatch.audit("sent")) == 1
        # All that it has made is looked at, and nothing of that is sent.
        results = [result for each in dispatch.shown() for result in each["results"]]
        made = {result[name] for result in results for name in ("series", "given")}
        wait_for(lambda: all(f"subject='series/{each}')" in dispatch.log() for each in made), "what it has made")
        assert dispatch.states() == {"done": 1, "failed": 1}
        assert dispatch.stop() == [0]
