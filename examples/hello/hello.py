"""Says hello for every start of Orthanc."""

import os

from orthanc_events_bridge.consumers import Consumer

app = Consumer(
    "hello",
    broker=os.environ.get("BROKER_URL", "nats://127.0.0.1:4222"),
    orthanc=os.environ.get("ORTHANC_URL", "http://127.0.0.1:8042"),
    start="oldest",
)


@app.on("server.started")
async def hello(event, orthanc):
    print("hello, Orthanc with API", (await orthanc.get("/system")).json()["ApiVersion"], flush=True)


if __name__ == "__main__":
    app.run()
