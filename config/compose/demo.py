"""Two studies into Orthanc, and where they have got to: `docker compose run --rm demo`."""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from orthanc_events_bridge.testing.dicom import Instance, Study, instance_bytes, make_study, measured, new_uid

NAMES = ("orthanc", "archive", "research")
PASSWORD = Path(os.environ["ORTHANC_EVENTS_ORTHANC_PASSWORD_FILE"]).read_text().strip()
#: Seconds. Orthanc calls a study stable when nothing has come for StableAge, and what is pseudonymised once more.
PATIENCE = 300
#: Of the CT that the AI service measures: pixels in width, height and depth, millimetres from one to the next, and the
#: radius of the sphere in it.
SIZE, SPACING, RADIUS = 32, 1.5, 12.0


def sphere(patient_id: str) -> Study:
    """A CT of 16 slices: a sphere of 300 Hounsfield units, in air (-1000)."""
    study, series, frame = new_uid(), new_uid(), new_uid()
    middle, instances = (SIZE - 1) / 2, []
    for number in range(16):
        z = (number - 7.5) * 2 * SPACING
        pixels = bytearray()
        for y in range(SIZE):
            for x in range(SIZE):
                inside = ((x - middle) * SPACING) ** 2 + ((y - middle) * SPACING) ** 2 + z**2 <= RADIUS**2
                pixels += (1324 if inside else 24).to_bytes(2, "little")
        tags = {
            "FrameOfReferenceUID": frame,
            "ImageOrientationPatient": r"1\0\0\0\1\0",
            "ImagePositionPatient": rf"{-middle * SPACING}\{-middle * SPACING}\{z}",
            "InstanceNumber": number + 1,
            "PixelData": bytes(pixels),
            "PixelSpacing": rf"{SPACING}\{SPACING}",
            "RescaleIntercept": "-1024",
            "RescaleSlope": "1",
            "SliceThickness": str(2 * SPACING),
        }
        sop = new_uid()
        data = instance_bytes(patient_id, study, series, sop, modality="CT", rows=SIZE, tags=tags)
        instances.append(Instance(patient_id, study, series, sop, data))
    return Study(patient_id, study, tuple(instances))


def shown(client: httpx.Client) -> list[str]:
    """The studies of an Orthanc, without anybody's name."""
    studies = client.get("/studies?expand").raise_for_status().json()
    return sorted(f"{study['PatientMainDicomTags'].get('PatientID', '')}  {study['ID']}" for study in studies)


def results(client: httpx.Client, study: str) -> dict[str, str]:
    """What the AI service has found in a study, if an Orthanc has it: Orthanc's ids of instances, by modality."""
    answer = client.get(f"/studies/{study}/series")
    series = answer.json() if answer.is_success else []
    found = {one["MainDicomTags"]["Modality"]: one["Instances"][0] for one in series}
    return {modality: one for modality, one in found.items() if modality in ("SEG", "SR")}


def main() -> int:
    """Upload a CT and an MR study, wait, and show; the exit code."""
    options: dict[str, Any] = {
        "auth": ("orthanc", PASSWORD),
        "timeout": 60,
        "limits": httpx.Limits(max_keepalive_connections=0),  # Orthanc ends one that waits for a second
    }
    clients = {name: httpx.Client(base_url=f"http://{name}:8042", **options) for name in NAMES}
    before = {name: set(shown(client)) for name, client in clients.items()}
    now = time.time_ns() % 10**9
    ct, mr = sphere(f"DEMO-CT-{now}"), make_study(instances=3, modality="MR", patient_id=f"DEMO-MR-{now}")
    for modality, study in (("CT", ct), ("MR", mr)):
        for instance in study:
            clients["orthanc"].post("/instances", content=instance.data).raise_for_status()
        print(f"stored: a study of {modality}, {study.id}", flush=True)
    print("waiting until Orthanc calls them stable, and the consumers have done their work …", flush=True)
    until = time.monotonic() + PATIENCE
    wanted = {"orthanc": 4, "archive": 2, "research": 1}
    while True:
        new = {name: sorted(set(shown(client)) - before[name]) for name, client in clients.items()}
        found = results(clients["archive"], ct.id)
        done = all(len(new[name]) >= count for name, count in wanted.items()) and len(found) == 2
        if done or time.monotonic() > until:
            break
        time.sleep(0.5)
    for name in NAMES:
        print(f"\nnew in {name}:", *(f"  {study}" for study in new[name]), sep="\n")
    print("\nof the AI service, in the CT study of the archive:")
    for modality, instance in sorted(found.items()):
        print(f"  {modality:<3}  instance {instance}")
    if report := found.get("SR"):
        volume = measured(clients["archive"].get(f"/instances/{report}/simplified-tags").raise_for_status().json())
        sphere_volume = 4 / 3 * math.pi * RADIUS**3 / 1000
        print(f"  the report says {float(volume):.2f} ml; the sphere in the images has {sphere_volume:.2f} ml")
    if not done:
        logs = "docker compose logs router anonymizer dispatch ai"
        print(f"\nnot all of it has arrived: docker compose ps, {logs}", file=sys.stderr)
    return 0 if done else 1


sys.exit(main())
