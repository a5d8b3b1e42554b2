"""What the line's tests, the demo and the benchmarks need of a broker, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from orthanc_events_bridge.testing.brokers.events import Event
from orthanc_events_bridge.testing.processes import Server


class Broker(ABC):
    """A real broker: its server, what an administrator does to it, and a plain client that reads it back.

    Used as a context manager it is started on entry and closed on exit.

    :param server: a process or a container, not started yet, which has a ``port`` for clients.
    """

    #: The ``type`` of the transport.
    kind: ClassVar[str]
    #: As messages call it.
    title: ClassVar[str]
    #: The transport's options, a line of YAML each, with which it gives up waiting after about a second.
    impatient: ClassVar[tuple[str, ...]] = ()
    #: Whether the broker itself drops a second copy of an event.
    deduplicates: ClassVar[bool] = False

    def __init__(self, server: Server) -> None:
        self.server = server

    @property
    def port(self) -> int:
        """Where clients connect, on this machine."""
        return int(self.server.port)

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect, as a URL."""

    @abstractmethod
    def options(self, *, port: int | None = None) -> list[str]:
        """The transport's options that lead here, a line of YAML each.

        :param port: of a proxy, in place of the server's own.
        """

    @abstractmethod
    def read(self) -> list[Event]:
        """Everything that the place holds, in the broker's order, by a plain client and a decoder of the tests' own.

        :raises MalformedEventError: a message is not an event.
        """

    @abstractmethod
    def stored(self) -> int:
        """How many events were ever stored, cheaply; 0 where that, or the server, can't be asked."""

    @abstractmethod
    def remove_place(self) -> None:
        """Delete the place where events are kept, with all that it holds, as an administrator may."""

    def limit(self, events: int) -> list[str]:
        """The transport's options for a place that takes so many events, a line of YAML each.

        :raises NotImplementedError: the broker has no such limit.
        """
        raise NotImplementedError(f"{self.title} does not refuse events when it is full")

    def make_room(self, through: int) -> None:
        """Drop the events up to a position, so that a full place takes more."""
        raise NotImplementedError

    # Life.

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()

    def freeze(self) -> None:
        self.server.freeze()

    def thaw(self) -> None:
        self.server.thaw()

    @property
    def pid(self) -> int:
        return self.server.pid

    @property
    def running(self) -> bool:
        return self.server.running

    def close(self) -> None:
        self.server.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.__exit__(kind, error, trace)
