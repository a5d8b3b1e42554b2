"""The whole line on one machine: real Orthanc with the bridge, a real broker, clients that work on it, and the ledger.

What the fault tests, the mutants and the benchmarks share.
"""

from __future__ import annotations

import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from orthanc_events_bridge import status
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.folder import ENVIRONMENT, Folder
from orthanc_events_bridge.testing import dicom, mutants
from orthanc_events_bridge.testing.bridged import BridgedOrthanc, smallest
from orthanc_events_bridge.testing.brokers import Broker, make_broker
from orthanc_events_bridge.testing.ledger import Event, Ledger, Report
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.servers import NotAcknowledgedError, OrthancServer


def _kind_of_orthanc(image: str | None) -> Callable[..., BridgedOrthanc]:
    """How Orthanc is started: as a process, or in a container if an image or ``TEST_ORTHANC=containers`` says so."""
    if image is None and os.environ.get("TEST_ORTHANC") != "containers":
        return BridgedOrthanc
    # Only here: what it needs is not installed wherever the demo runs.
    from orthanc_events_bridge.testing.orthanc_container import OrthancContainer

    return partial(OrthancContainer, image=image)


class Watched(ABC):
    """What has a status that can be waited for."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """The status as it is now."""

    @staticmethod
    def read_status(folder: Folder) -> dict[str, Any]:
        """The status from an outbox's folder; empty in all its parts where there is none yet."""
        try:
            return status.read(folder)
        except OutboxError:
            return {"capture": {}, "bridge": {}, "transports": [], "outbox": {}, "log": {}}

    def wait(self, condition: Any, timeout: float = 60.0, what: str = "the line") -> dict[str, Any]:
        """Wait until a condition on the status holds.

        :raises TimeoutError: it didn't; the message holds the status.
        """
        seen: list[dict[str, Any]] = [{}]

        def holds() -> bool:
            seen[0] = self.status()
            try:
                return bool(condition(seen[0]))
            except (KeyError, IndexError):
                return False

        if not wait_until(holds, timeout, every=0.05):
            raise TimeoutError(f"{what} did not come to rest within {timeout:.0f} s: {seen[0]}")
        return seen[0]


class Line(Watched):
    """Orthanc with the bridge, publishing to a broker; used as a context manager.

    :param folder: where everything is.
    :param broker: the transport's type.
    :param made: that broker, if it was made before, not started yet.
    :param port: of a proxy between the bridge and the broker.
    :param settings: YAML behind the smallest configuration, at the top level.
    :param transport: YAML options of the transport, one per line.
    :param without: names of `orthanc_events_bridge.testing.mutants`.
    :param script: a user's own script, for the shim.
    :param orthanc: options of Orthanc's configuration.
    :param environment: for Orthanc.
    :param stable_age: seconds.
    :param image: of an Orthanc in a container (see `OrthancContainer`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        broker: str = "nats",
        made: Broker | None = None,
        port: int | None = None,
        settings: str = "",
        transport: Iterable[str] = (),
        without: Iterable[str] = (),
        script: Path | None = None,
        orthanc: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        stable_age: int = 1,
        image: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder
        self.ledger = Ledger()
        self.broker = made or make_broker(broker, folder / broker)
        without = set(without)
        variables = dict(environment or {})
        if without & mutants.MUTANTS.keys():
            variables["ORTHANC_EVENTS_PYTHON"] = str(mutants.wrapper(folder))
            variables[mutants.VARIABLE] = ",".join(sorted(without & mutants.MUTANTS.keys()))
        self.orthanc = _kind_of_orthanc(image)(
            folder=folder / "orthanc",
            yaml=smallest(broker, [*self.broker.options(port=port), *transport]) + settings,
            user_script=script,
            config=orthanc,
            environment=variables,
            stable_age=stable_age,
        )
        self.config = self.orthanc.config_path
        shim = self.orthanc.shim_path
        in_orthanc = sorted(without & mutants.IN_ORTHANC.keys())
        shim.write_text(mutants.in_orthanc(shim.read_text("utf-8"), in_orthanc), "utf-8")
        self.folder = Folder(Path(variables.get(ENVIRONMENT, self.orthanc.outbox)))

    def __enter__(self) -> Self:
        try:
            self.broker.start()
            self.orthanc.start()
            self.wait(
                lambda document: (
                    document["capture"]["state"] == "following" and document["transports"][0]["state"] == "connected"
                ),
                what="the started line",
            )
            self.broker.settle()
        except BaseException:
            self.orthanc._kill_all()
            self.broker.server._kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.orthanc.__exit__(kind, error, trace)
        self.broker.__exit__(kind, error, trace)

    # -- looking at it -------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The status from Orthanc's own REST API, or from the folder while Orthanc is down."""
        if self.orthanc.running:
            try:
                return dict(self.orthanc.get("/orthanc-events/status"))
            except httpx.HTTPError:
                pass
        return self.read_status(self.folder)

    def bridge_pid(self) -> int:
        """The process id of the bridge, once it is running."""
        self.wait(lambda document: bool(document["bridge"].get("pid")))
        return int(self.status()["bridge"]["pid"])

    def settle(self, timeout: float = 120.0) -> None:
        """Wait until everything that Orthanc has logged, or forgotten, is captured and published."""

        def at_rest(document: dict[str, Any]) -> bool:
            tip = self.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"]
            transport = document["transports"][0]
            return (
                document["capture"]["state"] == "following"
                and not document["capture"]["waiting"]
                and not document["capture"]["repairing"]
                and document["log"]["cursor"] >= tip  # the counter of PostgreSQL may fall behind its rows
                and transport["position"] == document["outbox"]["last_position"]
                and transport["state"] == "connected"
            )

        self.wait(at_rest, timeout)
        time.sleep(0.1)
        self.wait(at_rest, timeout)

    def events(self) -> list[Event]:
        """What a plain client of the broker reads."""
        return self.broker.read()

    def report(self, *, kills: int = 0, forgotten: Iterable[tuple[str, str]] = ()) -> Report:
        """Settle, and compare both ends; see `Ledger.compare`."""
        self.settle()
        return self.ledger.compare(
            self.events(),
            kills=kills,
            existing=self.orthanc.existing(),
            log=self.orthanc.changes(),
            forgotten=forgotten,
        )


class Site(Protocol):
    """An Orthanc, and the ledger of what it acknowledged."""

    @property
    def orthanc(self) -> OrthancServer: ...
    @property
    def ledger(self) -> Ledger: ...


class Clients:
    """Threads that work on Orthanc and write down what it acknowledges, also while it is down and comes back.

    :param line: what they work on.
    :param adders: how many of them upload new studies.
    :param loopers: how many of them upload one study and delete it, over and over.
    :param pause: seconds between two requests of an adder.
    :param size: instances in an adder's study.
    """

    def __init__(self, line: Site, *, adders: int = 0, loopers: int = 0, pause: float = 0.0, size: int = 5) -> None:
        self._line = line
        self._pause = pause
        self._size = size
        self._stop = threading.Event()
        self.acknowledged = 0
        self.problem: BaseException | None = None
        self._threads = [threading.Thread(target=self._guarded, args=(self._add,)) for _ in range(adders)]
        self._threads += [threading.Thread(target=self._guarded, args=(self._loop,)) for _ in range(loopers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.problem is not None and kind is None:
            raise self.problem

    def _guarded(self, work: Any) -> None:
        try:
            while not self._stop.is_set():
                work()
        except BaseException as error:  # raised in the main thread
            self.problem = error

    def _upload(self, instance: dicom.Instance) -> bool:
        """Upload until Orthanc has answered; true when it did."""
        ids = instance.id, instance.series, instance.study, instance.patient
        while not self._stop.is_set():
            try:
                self._line.ledger.stored(self._line.orthanc.upload(instance.data))
                self.acknowledged += 1
                return True
            except NotAcknowledgedError as error:
                if not isinstance(error.__cause__, httpx.ConnectError):
                    self._line.ledger.maybe_stored(*ids)
                self._stop.wait(0.02)
        return False

    def _add(self) -> None:
        for instance in dicom.make_study(instances=self._size):
            if not self._upload(instance):
                return
            if self._pause:
                self._stop.wait(random.uniform(0, 2 * self._pause))

    def _loop(self) -> None:
        study = dicom.make_study(instances=1)
        while self._upload(study.instances[0]) and self._delete(study.id):
            pass

    def _delete(self, study: str) -> bool:
        while not self._stop.is_set():
            try:
                if self._line.orthanc.delete("studies", study):
                    self._line.ledger.deleted("studies", study)
                    self.acknowledged += 1
                return True
            except NotAcknowledgedError as error:
                if not isinstance(error.__cause__, httpx.ConnectError):
                    self._line.ledger.maybe_deleted("studies", study)
                self._stop.wait(0.02)
        return False
