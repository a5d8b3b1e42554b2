"""Writes down how many instances a study has when it is stable: as metadata 1024 of the study, in Orthanc."""

import os

import httpx

from orthanc_events_bridge.consumers import Consumer, Event

app = Consumer(
    "counting",
    broker=os.environ.get("BROKER_URL", "nats://127.0.0.1:4222"),
    orthanc=os.environ.get("ORTHANC_URL", "http://127.0.0.1:8042"),
    start="oldest",
)


@app.on("study.stable")
async def count(event: Event, orthanc: httpx.AsyncClient) -> None:
    """Ask Orthanc, and tell it; a study that is gone by now needs no count."""
    answer = await orthanc.get(f"/studies/{event.study_id}/statistics")
    if answer.status_code == 404:
        return
    instances = str(answer.raise_for_status().json()["CountInstances"])
    (await orthanc.put(f"/studies/{event.study_id}/metadata/1024", content=instances)).raise_for_status()


if __name__ == "__main__":
    app.run()
