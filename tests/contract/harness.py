"""What the contract suite needs of a broker, and the brokers that it is run on.

A new transport needs one class like those in ``*_harness.py``, and its line in `tests.contract.table`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar
from zlib import crc32

import pytest

from orthanc_events_bridge.errors import RefusedError, TransportError
from orthanc_events_bridge.testing.brokers import make_server
from orthanc_events_bridge.testing.processes import Server
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail
from orthanc_events_bridge.transports.base import Incoming, Outgoing, PublishError, Transport
from orthanc_events_bridge.transports.memory import MAX_PAYLOAD, Broker, MemoryTransport
from orthanc_events_bridge.transports.options import MemoryOptions
from tests.contract.link import Link

_T = TypeVar("_T")

#: What no error, description or log line may hold.
SECRET: Final = "s3cret-of-the-contract"
#: Structured mode's content type, spelt out here on purpose.
CONTENT_TYPE: Final = "application/cloudevents+json"


def run(main: Coroutine[Any, Any, _T], *, seconds: float = 180.0) -> _T:
    """Run a coroutine in an event loop of its own.

    It must end in time, leave no task behind, and no error that only the loop would have seen.
    """
    unseen: list[dict[str, Any]] = []

    async def guarded() -> _T:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        async with asyncio.timeout(seconds):
            result = await main
        for _ in range(20):  # what was cancelled needs a moment to end
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                break
            await asyncio.sleep(0.05)
        assert not left, f"left behind: {left}"
        gc.collect()  # only then a task says that nobody has looked at its error
        return result

    result = asyncio.run(guarded())
    assert not unseen
    return result


def aside(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in a loop of its own, also while another one runs here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def connect(transport: Transport) -> list[str]:
    """Connect, describe, close."""

    async def main() -> list[str]:
        try:
            await transport.connect()
            return await transport.describe()
        finally:
            await transport.close()

    return run(main())


def event(number: int, key: str = "key", *, size: int = 0, content: object = None) -> Outgoing:
    """An event as the mapping would make it, with more variety in its bytes."""
    identifier = f"{number:08d}-0000-4000-8000-{crc32(key.encode()):012d}"
    document = {"id": identifier, "number": number, "key": key, "content": content, "more": "ä€😀\u0000"}
    body = json.dumps(document, ensure_ascii=bool(number % 2)).encode()
    body += b" " * (size - len(body))
    level, verb = [("study", "created"), ("instance", "instance-added"), ("job", "failed")][number % 3]
    partition = f"{crc32(key.encode()) % 64:02d}"
    return Outgoing(identifier, "main", level, verb, key, partition, CONTENT_TYPE, body)


def events(count: int, *, start: int = 0, keys: Sequence[str] = ("key",), size: int = 0) -> list[Outgoing]:
    """Events in order, their keys in turn."""
    return [event(number, keys[number % len(keys)], size=size) for number in range(start, start + count)]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a plain client of the broker read back.

    :param dedupe_key: by which the broker removes duplicates.
    """

    address: str
    body: bytes
    content_type: str
    dedupe_key: str
    headers: dict[str, str] = field(default_factory=dict)


def server(kind: str, folder: Path, *, config: str = "") -> Server:
    """A broker's server, not started yet; ends the test where it can't be had: skipped, or failed in CI."""
    try:
        return make_server(kind, folder, config=config)
    except MissingComponentError as error:
        skip_or_fail(error)


class Harness(ABC):
    """One broker, for all tests of a run; a fresh place on it for each test.

    :param folder: for its data.
    """

    #: As messages of the transport call it.
    title: ClassVar[str]
    #: Seconds after which an impatient transport gives up waiting.
    deadline: ClassVar[float] = 1.0
    #: The same for others: long enough for a busy machine.
    patience: ClassVar[float] = 10.0
    #: The header, as a subscriber sees it, that carries the event's id.
    id_header: ClassVar[str] = "orthanc-event-id"
    #: With which the names of headers begin that carry attributes in binary mode.
    attribute_prefix: ClassVar[str] = "ce-"
    #: Whether the place has one order over all keys; otherwise each key has its own.
    one_order: ClassVar[bool] = True
    #: Whether the broker takes a delivery away from a subscriber that lives, when its ``ack_wait`` is over.
    takes_back: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places = itertools.count(1)
        self.place = ""
        self._links: list[Link] = []

    def new_place(self) -> None:
        """Begin a test."""
        self.place = f"PLACE{next(self._places)}"

    def tidy(self) -> None:
        """End a test: the broker runs again, whatever was done to it."""
        while self._links:
            self._links.pop().close()

    @abstractmethod
    def transport(
        self, *, declare: bool = True, room: int = 0, port: int | None = None, impatient: bool = False
    ) -> Transport:
        """Make a transport to the place.

        :param room: how many events the place takes; 0: all.
        :param port: of a link to the broker, in place of its own.
        :param impatient: with the short deadline.
        """

    @abstractmethod
    def read(self) -> list[Stored]:
        """Everything that the place holds, in the broker's order, read by a client of the tests' own."""

    @abstractmethod
    def too_large(self) -> int:
        """The size of a body that the broker can never take."""

    @abstractmethod
    def make_room(self) -> None:
        """Empty the place, so that it takes events again."""

    @abstractmethod
    def kill(self) -> None:
        """Kill the broker."""

    @abstractmethod
    def start(self) -> None:
        """Start it again, with what it had stored."""

    @abstractmethod
    def freeze(self) -> None:
        """It takes connections and answers nothing."""

    @abstractmethod
    def thaw(self) -> None:
        """It goes on."""

    @abstractmethod
    def remove_place(self) -> None:
        """Delete the place with all that it holds."""

    def read_inbox(self, consumer: str) -> list[Stored]:
        """Everything that a consumer's inbox holds, as `read`."""
        raise NotImplementedError

    def remove_inbox(self, consumer: str) -> None:
        """Delete a consumer's inbox with all that it holds."""
        raise NotImplementedError

    def left_of(self, consumer: str) -> list[str]:
        """What the broker would keep growing for a consumer of what everybody gets: names of queues and the like."""
        return []

    def make_other_inbox(self, consumer: str) -> list[str]:
        """Make a consumer's inbox as the transport would not.

        :return: words that an error about the difference must hold.
        """
        raise NotImplementedError

    def make_place(self, **different: Any) -> list[str]:
        """Make the place as the transport would.

        :param different: as the broker needs it; see `different`.
        :return: words that an error about the difference must hold.
        """
        raise NotImplementedError

    def different(self) -> list[dict[str, Any]]:
        """Ways in which the place can differ, for `make_place`."""
        return []

    def traces(self) -> int:
        """How many subscribers the place knows."""
        return 0

    def address(self, event: Outgoing) -> str:
        """How the address of an event ends that a subscriber is given."""
        return f"{event.site}.{event.level}.{event.verb}.{event.partition}"

    def settled(self, consumer: str) -> None:  # noqa: B027  # most brokers need no time for it
        """Wait until the broker has stored what a consumer's subscribers have settled, as far as it ever will."""

    @contextmanager
    def slow(self, latency: float) -> Iterator[tuple[Transport, Callable[[], None], Callable[[], int]]]:
        """A transport behind a slow line; what cuts the line; how often an answer was waited for."""
        link = self._link(latency)
        yield self.transport(port=link.port), link.cut, lambda: link.turns

    def _link(self, latency: float) -> Link:
        link = Link(self.port, latency)
        self._links.append(link)
        return link

    @property
    def port(self) -> int:
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027  # a broker in memory has nothing to stop
        """Stop the broker."""


class MemoryHarness(Harness):
    title = "broker"
    deadline = 0.3
    takes_back = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._broker = Broker()

    def new_place(self) -> None:
        super().new_place()
        self._broker = Broker()

    def transport(
        self, *, declare: bool = True, room: int = 0, port: int | None = None, impatient: bool = False
    ) -> Transport:
        broker = self._broker
        broker.deadline = self.deadline if impatient else self.patience
        if room:
            full = RefusedError("the broker is full", "make room")
            broker.refuse = lambda event: full if len(broker.messages) >= room else None
        return MemoryTransport(MemoryOptions(), broker)

    def read(self) -> list[Stored]:
        return [self._stored(one) for one in self._broker.messages]

    def read_inbox(self, consumer: str) -> list[Stored]:
        return [self._stored(one) for one in self._broker.inboxes.get(consumer, [])]

    def remove_inbox(self, consumer: str) -> None:
        self._broker.remove_inbox(consumer)

    def left_of(self, consumer: str) -> list[str]:
        return [name for name in self._broker.names if name == consumer]

    @staticmethod
    def _stored(one: Incoming) -> Stored:
        headers = dict(one.headers)
        key = headers.pop("dedupe-key", headers["orthanc-event-id"])
        return Stored(one.address, one.body, headers["content-type"], key, headers)

    def too_large(self) -> int:
        return MAX_PAYLOAD + 1

    def make_room(self) -> None:
        self._broker.messages.clear()

    def kill(self) -> None:
        self._broker.up = False
        self._broker.cut()

    def start(self) -> None:
        self._broker.forget()
        self._broker.up = True

    def freeze(self) -> None:
        self._broker.frozen = True

    def thaw(self) -> None:
        self._broker.frozen = False

    def remove_place(self) -> None:
        self._broker.recreate()

    @contextmanager
    def slow(self, latency: float) -> Iterator[tuple[Transport, Callable[[], None], Callable[[], int]]]:
        self._broker.latency = 2 * latency
        yield self.transport(), self._broker.cut, lambda: 1


@contextmanager
def failing(
    harness: Harness, kind: type[TransportError], confirmed: int | None = None
) -> Iterator[list[TransportError]]:
    """What is done here must fail with one error of ours, which says what to do and holds no secret.

    :param confirmed: how many leading events a `PublishError` must call confirmed; -1: any number; none: what
        is done isn't publishing.
    :return: holds the error afterwards.
    """
    caught: list[TransportError] = []
    with pytest.raises(TransportError) as raised:
        yield caught
    error = raised.value
    if confirmed is None:
        assert type(error) is kind, repr(error)
    else:
        assert isinstance(error, PublishError)
        assert type(error.error) is kind, repr(error.error)
        assert confirmed in (-1, error.confirmed), f"{error.confirmed} confirmed: {error}"
    assert harness.title.lower() in str(error).lower(), f"doesn't name the broker: {error}"
    assert error.remedy, f"doesn't say what to do: {error}"
    check_text(error)
    caught.append(error)


def check_text(error: BaseException) -> None:
    """No secret, in no error of the chain."""
    chain: BaseException | None = error
    while chain is not None:
        assert SECRET not in f"{chain} {chain!r} {chain.args}"
        chain = chain.__cause__ or chain.__context__
