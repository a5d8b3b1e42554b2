"""What the line's tests, the demo and the benchmarks need of a broker, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
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
    #: Whether events are kept in a place that we declare, and that can be deleted.
    has_place: ClassVar[bool] = True
    #: Whether it refuses events when it is full; and the words by which the operator learns of it.
    can_be_full: ClassVar[bool] = True
    full_words: ClassVar[tuple[str, ...]] = ("full",)

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

    def settle(self) -> None:  # noqa: B027  # most need no time
        """Wait until what was just declared survives a kill."""

    # Faults. What a broker doesn't define here, it can't have.

    @classmethod
    def limit_options(cls, events: int) -> list[str]:
        """The transport's options for a place that takes so many events, a line of YAML each."""
        return []

    def limit(self, events: int) -> None:  # noqa: B027  # where the options are enough
        """Let the running broker take so many events, then no more."""

    def make_room(self, through: int) -> None:
        """Drop the events up to a position, so that a full place takes more."""
        raise NotImplementedError

    @property
    def proxied_port(self) -> int:
        """Where a proxy has to lead."""
        return self.port

    def stand_behind(self, port: int) -> None:  # noqa: B027  # most don't know
        """Learn of a proxy's port, before the start."""

    def demand(self, password: str) -> None:
        """Let in only who gives this password: from the start, or, while it runs, from now on, connections included."""
        raise NotImplementedError

    def login(self, password_file: Path) -> list[str]:
        """The transport's options to log in, a line of YAML each."""
        raise NotImplementedError

    def small(self, size: int) -> AbstractContextManager[None]:
        """Take no event of more bytes than this meanwhile."""
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
