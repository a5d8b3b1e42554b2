"""The ledger derives from acknowledgements what a real Orthanc then says: its callbacks are the witness."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthanc_events_bridge.testing.dicom import Instance, make_patient, make_study
from orthanc_events_bridge.testing.ledger import Event, Ledger
from orthanc_events_bridge.testing.servers import NotAcknowledgedError, OrthancServer, require, wait_until

pytestmark = pytest.mark.integration

WITNESS = """
import os, orthanc

names = {getattr(orthanc.ChangeType, name): name for name in dir(orthanc.ChangeType) if name.isupper()}
log = open(os.environ["WITNESS"], "a")

def on_change(change, level, resource):
    log.write(f"{names[change]} {int(level)} {resource}\\n")
    log.flush()

orthanc.RegisterOnChangeCallback(on_change)
"""

VERBS = {"NEW_CHILD_INSTANCE": "instance-added", "DELETED": "deleted"}
LEVELS = ("patient", "study", "series", "instance")


class Witness:
    """Orthanc with a script that writes down every callback."""

    def __init__(self, folder: Path) -> None:
        require("orthanc", "orthanc-python", "storescu")
        folder.mkdir(exist_ok=True)
        self.path = folder / "witness.txt"
        script = folder / "script.py"
        script.write_text(WITNESS, "utf-8")
        self.orthanc = OrthancServer(
            folder / "orthanc", script=script, environment={"WITNESS": str(self.path)}, stable_age=60
        )
        self.study: dict[str, str] = {}
        self.ledger = Ledger()

    def know(self, instances: list[Instance]) -> None:
        for one in instances:
            self.study |= dict.fromkeys((one.id, one.series, one.study), one.study)

    def events(self) -> list[Event]:
        found = []
        for number, line in enumerate(self.path.read_text("utf-8").splitlines(), 1):
            name, level, resource = line.split(" ")
            kind = f"{LEVELS[int(level)]}.{VERBS.get(name, 'created')}" if name in KINDS else f"other.{name.lower()}"
            key = self.study.get(resource, resource)
            found.append(Event(str(number), kind, resource, "orthanc", "witness", number, key))
        return found

    def balance(self) -> None:
        """Wait until all has been said, and compare."""
        self.ledger.allow("other.*")
        wait_until(lambda: len([e for e in self.events() if e.kind[:5] != "other"]) >= self.ledger.required, 20)
        report = self.ledger.compare(self.events(), existing=self.orthanc.existing())
        report.assert_clean()
        assert report.required > 0


KINDS = {"NEW_INSTANCE", "NEW_SERIES", "NEW_STUDY", "NEW_PATIENT", *VERBS}


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    witness = Witness(tmp_path)
    witness.orthanc.start()
    try:
        yield witness
    finally:
        witness.orthanc.close(kill=True)


def test_every_way_to_store_and_delete(witness: Witness, tmp_path: Path) -> None:
    orthanc, ledger = witness.orthanc, witness.ledger
    one, two = make_patient(studies=2, series=2, instances=2)
    witness.know([*one, *two])
    for instance in [*one, *two, *one]:
        ledger.stored(orthanc.upload(instance.data))
    for level, resource in (
        ("instances", one.instances[0].id),
        ("instances", one.instances[1].id),  # takes its series along
        ("series", two.series[0]),
        ("studies", one.id),
    ):
        assert orthanc.delete(level, resource)
        ledger.deleted(level, resource)
    for instance in [*one, *two]:
        ledger.stored(orthanc.upload(instance.data))
    for resource in (one.patient,):
        assert orthanc.delete("patients", resource)
        ledger.deleted("patients", resource)
    other = make_study(instances=3)
    witness.know([*other])
    for instance, done in zip(other, orthanc.store_scu(other.write(tmp_path / "dicom")).values(), strict=True):
        assert done
        ledger.stored_ids(instance.id, instance.series, instance.study, instance.patient)
    witness.balance()


def test_overwriting(witness: Witness) -> None:
    orthanc, ledger = witness.orthanc, witness.ledger
    orthanc.config["OverwriteInstances"] = True
    orthanc.restart()
    several, single = make_study(instances=2), make_study()
    witness.know([*several, *single])
    for instance in [*several, *single, *several, *single]:
        ledger.stored(orthanc.upload(instance.data))
    witness.balance()


def test_clients_that_store_and_delete_at_the_same_time(witness: Witness) -> None:
    orthanc, ledger = witness.orthanc, witness.ledger
    unanswered = []

    def work() -> None:
        study = make_study(instances=2)
        witness.know([*study])
        for turn in range(40):
            for one in study:
                try:
                    ledger.stored(orthanc.upload(one.data))
                except NotAcknowledgedError as error:
                    unanswered.append(error)
                    ledger.maybe_stored(one.id, one.series, one.study, one.patient)
            if turn == 39:
                return
            try:
                if orthanc.delete("studies", study.id):
                    ledger.deleted("studies", study.id)
            except NotAcknowledgedError as error:
                unanswered.append(error)
                ledger.maybe_deleted("studies", study.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    witness.balance()
    print(f"{len(unanswered)} requests were not acknowledged: {unanswered[:3]}")
