"""The demo's own consumer: it reacts to stable studies while the demonstration goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from orthanc_events_bridge.consumers import Consumer, Event
from orthanc_events_bridge.testing.brokers import Broker
from orthanc_events_bridge.testing.servers import broker_url

if TYPE_CHECKING:
    import httpx

#: Seconds that it may take to begin, and to end.
_PATIENCE: Final = 60.0


def consumer_url(broker: Broker) -> str:
    """A broker's address as consumers are given it."""
    return broker_url(broker.kind, broker.port)


class Reacting:
    """Prints a line for each stable study, with what it asks Orthanc for. Used as a context manager, in which it works.

    :ivar studies: the ids of those that it has handled.
    :ivar problem: why it could not work; none where it could. Told by the main thread.
    """

    def __init__(self, broker: Broker, orthanc: str) -> None:
        self.studies: list[str] = []
        self.problem: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.consumer = Consumer("demo", broker=consumer_url(broker), orthanc=orthanc, start="oldest")
        self.consumer.on("study.stable")(self._react)

    async def _react(self, event: Event, orthanc: httpx.AsyncClient) -> None:
        answer = await orthanc.get(f"/studies/{event.study_id}/statistics")
        found = answer.json() if answer.status_code == 200 else {}
        what = f"{found['CountInstances']} instances in {found['CountSeries']} series" if found else "deleted meanwhile"
        print(f"    a consumer reacts: study {event.study_id} is stable, {what}", flush=True)
        self.studies.append(event.study_id or "")

    def __enter__(self) -> Self:
        for name in ("orthanc_events_bridge.consumers", "orthanc_events_bridge.transports"):
            logging.getLogger(name).setLevel(logging.ERROR)  # this is a picture, not a log
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self.consumer.serve())
        except Exception as error:
            self.problem = error
        finally:
            self._loop.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._loop.call_soon_threadsafe(self.consumer.stop)
        except RuntimeError:  # it has ended already
            pass
        self._thread.join(_PATIENCE)
