"""The line without a plugin: real Orthanc that knows nothing of us, the bridge that follows it over HTTP, a broker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orthanc_events_bridge import status
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.testing import mutants
from orthanc_events_bridge.testing.bridged import smallest
from orthanc_events_bridge.testing.brokers import make_broker
from orthanc_events_bridge.testing.dicom import Instance
from orthanc_events_bridge.testing.ledger import Event, Ledger, Report
from orthanc_events_bridge.testing.line import Watched
from orthanc_events_bridge.testing.processes import Server, wait_until
from orthanc_events_bridge.testing.servers import NotAcknowledgedError, OrthancServer

#: The bridge, but it looks for what Orthanc forgot for half of the time, not for a tenth.
_PROGRAM = """\
import sys, orthanc_events_bridge.plugin.chores as chores
from orthanc_events_bridge.testing.mutants import main
chores._REST_FACTOR = 1
sys.exit(main())
"""
#: Whatever takes minutes by default takes seconds.
_HURRIED = ("--poll", "0.1", "--compare-every", "0.5", "--stable-age", "2")


class RemoteBridge(Server):
    """``orthanc-events run --orthanc``, as a process of its own.

    :param arguments: behind ``run``.
    :param without: names of `orthanc_events_bridge.testing.mutants`.
    """

    title = "the bridge"

    def __init__(
        self,
        folder: Path,
        arguments: Iterable[str],
        environment: Mapping[str, str] | None = None,
        without: Iterable[str] = (),
    ) -> None:
        without = sorted(without)
        super().__init__(folder, {**(environment or {}), **({mutants.VARIABLE: ",".join(without)} if without else {})})
        self.outbox = Folder(folder / "outbox")
        self.arguments = [*arguments]

    def _command(self) -> list[str]:
        command = [sys.executable, "-P", "-c", _PROGRAM, "orthanc_events_bridge", "run"]
        return [*command, "--outbox", str(self.outbox.path), *self.arguments]

    def _is_ready(self) -> bool:
        return status.running(self.outbox)


class RemoteLine(Watched):
    """Orthanc, the bridge far from it, and a broker; used as a context manager.

    :param folder: where everything is.
    :param broker: the transport's type.
    :param orthanc: options of Orthanc's configuration.
    :param login: a user and a password of Orthanc's; the bridge is told neither.
    :param stable_age: Orthanc's, seconds.
    :param url: where the bridge asks Orthanc, where it isn't Orthanc's own address: a function of Orthanc's port.
    :param options: of ``run``, behind the hurried ones.
    :param environment: for the bridge.
    :param settings: YAML behind the smallest configuration, at the top level.
    :param without: names of `orthanc_events_bridge.testing.mutants`.
    :param wait: until capture follows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        broker: str = "nats",
        orthanc: Mapping[str, Any] | None = None,
        login: tuple[str, str] | None = None,
        stable_age: int = 1,
        url: Callable[[int], str] | None = None,
        options: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        settings: str = "",
        without: Iterable[str] = (),
        wait: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder
        self.ledger = Ledger()
        # What is never seen without a plugin, and what is told by other means than the ledger's.
        self.ledger.allow("*.instance-added", "server.*", "job.*", "*.stable")
        self.broker = make_broker(broker, folder / broker)
        self.orthanc = OrthancServer(folder / "orthanc", config=orthanc, stable_age=stable_age, login=login)
        config = folder / "orthanc-events.yaml"
        config.write_text(smallest(broker, self.broker.options()) + settings, "utf-8")
        address = url(self.orthanc.port) if url else self.orthanc.url
        arguments = ["--config", str(config), "--orthanc", address, *_HURRIED, *options]
        self.bridge = RemoteBridge(folder / "bridge", arguments, environment, without)
        self._wait = wait
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in (self.broker, self.orthanc, self.bridge):
                stack.enter_context(server)
            self._stack = stack.pop_all()
        try:
            if self._wait:
                self.wait(lambda document: document["capture"]["state"] == "following")
                self.broker.settle()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(self.bridge.log_text()[-5000:], self.status())
        self._stack.__exit__(kind, error, trace)

    def status(self) -> dict[str, Any]:
        return self.read_status(self.bridge.outbox)

    def settle(self, timeout: float = 120.0) -> None:
        """Wait until everything that Orthanc has logged is captured and published, and it was compared since."""
        self.wait(self._at_rest, timeout)
        rounds = self.status()["capture"]["rounds"]
        # The status is up to a second old, and one round may be halfway.
        self.wait(lambda document: document["capture"]["rounds"] >= rounds + 4, timeout)
        self.wait(lambda document: not document["capture"]["suspects"], timeout)
        self.wait(self._at_rest, timeout)

    def _at_rest(self, document: dict[str, Any]) -> bool:
        tip = self.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"]
        transport = document["transports"][0]
        return (
            document["capture"]["state"] == "following"
            and document["log"]["cursor"] == tip
            and bool(transport["position"] == document["outbox"]["last_position"])
            and transport["state"] == "connected"
        )

    def store(self, study: Iterable[Instance]) -> None:
        """Upload until Orthanc has acknowledged: it ends idle connections whenever it likes.

        :raises TimeoutError: it never did.
        """
        for instance in study:
            if not wait_until(partial(self._store, instance), 60):
                raise TimeoutError("Orthanc takes nothing")

    def _store(self, instance: Instance) -> bool:
        try:
            self.ledger.stored(self.orthanc.upload(instance.data))
        except NotAcknowledgedError:
            self.ledger.maybe_stored(instance.id, instance.series, instance.study, instance.patient)
            return False
        return True

    def events(self) -> list[Event]:
        """What a plain client of the broker reads."""
        return self.broker.read()

    def report(self, *, kills: int = 0) -> Report:
        """Settle, and compare both ends."""
        self.settle()
        return self.ledger.compare(
            self.events(), kills=kills, existing=self.orthanc.existing(), log=self.orthanc.changes()
        )
