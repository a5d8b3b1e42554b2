"""Two studies into Orthanc, and where they have got to: `docker compose run --rm demo`."""

import os
import sys
import time
from pathlib import Path

import httpx

from orthanc_events_bridge.testing.dicom import make_study

NAMES = ("orthanc", "archive", "research")
PASSWORD = Path(os.environ["ORTHANC_EVENTS_ORTHANC_PASSWORD_FILE"]).read_text().strip()
#: Seconds. Orthanc calls a study stable when nothing has come for StableAge, and what is pseudonymised once more.
PATIENCE = 180


def shown(client: httpx.Client) -> list[str]:
    """The studies of an Orthanc, without anybody's name."""
    studies = client.get("/studies?expand").raise_for_status().json()
    return sorted(f"{study['PatientMainDicomTags'].get('PatientID', '')}  {study['ID']}" for study in studies)


def main() -> int:
    """Upload a CT and an MR study, wait, and show; the exit code."""
    clients = {
        name: httpx.Client(base_url=f"http://{name}:8042", auth=("orthanc", PASSWORD), timeout=60) for name in NAMES
    }
    before = {name: set(shown(client)) for name, client in clients.items()}
    for modality in ("CT", "MR"):
        study = make_study(instances=3, modality=modality, patient_id=f"DEMO-{modality}-{time.time_ns() % 10**9}")
        for instance in study:
            clients["orthanc"].post("/instances", content=instance.data).raise_for_status()
        print(f"stored: a study of {modality}, {study.id}", flush=True)
    print("waiting until Orthanc calls them stable, and the consumers have done their work …", flush=True)
    until = time.monotonic() + PATIENCE
    wanted = {"orthanc": 3, "archive": 2, "research": 1}
    while True:
        new = {name: sorted(set(shown(client)) - before[name]) for name, client in clients.items()}
        done = all(len(new[name]) >= count for name, count in wanted.items())
        if done or time.monotonic() > until:
            break
        time.sleep(0.5)
    for name in NAMES:
        print(f"\nnew in {name}:", *(f"  {study}" for study in new[name]), sep="\n")
    if not done:
        print("\nnot all of it has arrived: docker compose ps, docker compose logs router anonymizer", file=sys.stderr)
    return 0 if done else 1


sys.exit(main())
