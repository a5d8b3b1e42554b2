"""The AI dispatch among real servers: a PACS, a gateway with the bridge, a broker, and the service of examples/."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

from pydicom.dataset import Dataset

from orthanc_events_bridge.testing.dicom import orthanc_id
from orthanc_events_bridge.testing.phantoms import Phantom, file_of
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.ring import Ring
from tests.integration.anonymized import as_dataset, elements, files
from tests.integration.commands import PATIENCE, wait_for
from tests.integration.dispatches import Dispatches
from tests.integration.routers import Receiver, stored
from tests.integration.whole import broker_or_skip

pytestmark = pytest.mark.integration

KINDS = ("nats", "rabbitmq", "kafka")


class Sent:
    """A series that the PACS has sent to the gateway.

    :ivar images: its data sets.
    :ivar series: Orthanc's id, in PACS and gateway alike.
    """

    def __init__(self, ring: Ring, phantom: Phantom, images: list[Dataset]) -> None:
        self.phantom, self.images = phantom, images
        self.series = [ring.pacs.upload(file_of(one))["ParentSeries"] for one in images][-1]
        self.study = orthanc_id(phantom.patient_id, phantom.study_uid)
        ring.send(self.series)

    @property
    def uids(self) -> set[str]:
        return {str(one.SOPInstanceUID) for one in self.images}


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
    service = "dicomweb: ai, deadline: 4s, retry: {max_attempts: 5, initial: 1s, maximum: 1s}"
    with ring.running(), Dispatches(tmp_path / "dispatch", ring, service) as dispatch:
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
        assert dispatch.stop() == [0, 0]
        assert crashes == 2

        (failed,) = [one for one in shown if one["state"] == "failed"]
        assert {one["series"] for one in shown} == {one.series for one in everything}
        assert failed["step"] == "send" and "failed 5 times of 5: job" in failed["reason"]
        check_results(ring, everything, {failed["series"]})
        assert set(stored(ring.gateway).values()) == {1}  # nothing was made twice
        assert set(stored(pacs).values()) == {1}
        overdue = [one for one in shown if "overdue" in [each["state"] for each in one["history"]]]
        assert len(overdue) >= 2 and {one["state"] for one in overdue} <= {"done"}
        said = dispatch.audit("sent")
        print(
            f"{kind}: {series} series, {kills} kills, {time.monotonic() - began:.0f} s: {len(said)} sent,"
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
        assert {event.resource for event in told if event.kind == "transfer.failed"} == {failed["series"]}

        # And a person goes on with the one that has failed.
        done = dispatch.workflow("list", "--state", "failed")
        assert failed["id"] in done.stdout and done.stdout.count("\n") == 2
        ring.service.close(kill=True)
        del ring.service.environment["AI_SERVICE_FAULT_REFUSE"]
        ring.service.start()
        done = dispatch.workflow("retry", failed["id"][:8])
        assert (done.returncode, done.stdout) == (0, f"workflow {failed['id']} is sending again\n"), done.stderr
        dispatch.start()
        wait_for(lambda: dispatch.states() == {"done": series}, "the last one")
        check_results(ring, everything, set())
        assert dispatch.stop() == [0]


def one_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    (one,) = found
    return one
