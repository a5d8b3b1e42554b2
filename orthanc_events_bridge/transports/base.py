"""The contract that every transport meets: publish a batch in order, confirm it, read it back, share it out.

After the habits of Watermill (the whole seam is one small interface) and Benthos (an error *means* "connect me
again"). `tests/contract/` asks every transport the same questions.

What the relay may rely on
--------------------------
Order
    Events reach the broker in the order in which they were given: within a batch by position, and across batches
    because the relay never starts a batch before the previous one has been settled.
Acknowledgement
    `Transport.publish` returns only when the broker has confirmed every event of the batch as stored, as durably
    as it was asked to (replicas, disk). Until then nothing counts as published.
Failure
    `Transport.publish` raises `PublishError` with the number of *leading* events that are confirmed. The event
    behind them is the one that failed. Events behind that one may or may not be stored: they will be sent again, with
    the same id, and the broker or the consumer recognises them by it.
Deadlines
    No call waits for ever. A broker that doesn't answer (frozen, cable cut) surfaces as `NotConnectedError` or
    `RefusedError` within the transport's own deadline.
Errors
    Only those of `orthanc_events_bridge.errors` leave a transport, never a client's own:
    `NotConnectedError`: close, connect again with backoff, send again.
    `RefusedError`: send again with backoff over the same connection.
    `EventRejectedError`: this one event can never be taken; it is set aside.
    `TransportConfigurationError`: a person has to change something; tried again slowly.

What a consumer may rely on
---------------------------
Sharing
    Subscribers of one name share its events: each is given to one of them. Another name gets all of them too. What
    is sent to a name's inbox (`Transport.inbox`) its subscribers share as well, under the address that everybody got it
    by; neither waits for the other. A name can have its inbox alone: what it is to do is then told to it, and to
    nobody else.
Beginning
    A name's very first subscription begins with the next event, or with the oldest kept one. Every later one begins
    with what the name has not settled yet, however long nobody was there. Where the place was deleted and made again,
    that is everything in the new one.
Settling
    A delivery is settled exactly once: `Delivery.ack`; or `Delivery.nack`, which gives it to the name again, not
    before the delay has passed, without holding up others meanwhile, and also if everything is restarted in between;
    or `Delivery.reject`, which puts it among the name's dead letters. What was not settled when its subscriber closed
    or died is given to another of the name. An acknowledgement is sent, and no broker here answers it: where the
    broker or the connection ends just then, the delivery comes again. What `nack` and `reject` store is confirmed by
    the broker before the original is acknowledged: it can be there twice, and never not at all.
Order
    Events of one key come in order as long as none is given back. With ``ordered`` an event is given only when the
    earlier ones of its partition are settled, whoever held them: see `Transport.subscribe`.
Dead letters
    The original bytes and headers, and named headers that say why (`Delivery.reject`). They are kept until somebody
    removes them: `Transport.dead_letters`.
Loss of the connection
    `Subscription.receive` and settling raise `NotConnectedError`; the deliveries in hand are void and come again:
    close, connect, subscribe again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from orthanc_events_bridge.errors import TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.headers import ADDRESS, CONSUMER

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.options import TransportOptions

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Outgoing(NamedTuple):
    """One event, ready to be sent.

    :param id: the CloudEvent's id, which is also the key by which the broker removes duplicates.
    :param site: the configured site, a part of the address.
    :param level: ``study``, ``instance``, ``job`` …, a part of the address.
    :param verb: ``created``, ``stable`` …, a part of the address.
    :param key: the CloudEvent's ``partitionkey``: events of one key stay in order.
    :param partition: ``00`` to ``63``, from the key (see `orthanc_events_bridge.events.mapping.partition`).
    :param content_type: of the body; ``application/cloudevents+json`` in structured mode.
    :param body: the bytes to send.
    :param attributes: the CloudEvent's attributes but for ``datacontenttype``, as text, in binary mode, where each is
        a header with the binding's prefix. Empty in structured mode, in which no such header may be sent.
    :param headers: further ones (``orthanc-operation`` …), in lower case, their values in ASCII.
    :param dedupe: the key by which the broker removes duplicates, where that is not the id: an event that is sent
        again on purpose must not be dropped.
    """

    id: str
    site: str
    level: str
    verb: str
    key: str
    partition: str
    content_type: str
    body: bytes
    attributes: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    dedupe: str = ""

    @property
    def address(self) -> str:
        """Under which everybody gets it: what brokers put a prefix of their own in front of, if any."""
        return f"{self.site}.{self.level}.{self.verb}.{self.partition}"

    @property
    def size(self) -> int:
        """Bytes of the body, and about those of the attributes and further headers."""
        headers = (*self.attributes, *self.headers)
        return len(self.body) + sum(len(name) + len(value) + 8 for name, value in headers)

    def in_inbox(self, consumer: str, address: str) -> Outgoing:
        """The event as it is sent to one consumer.

        :param address: under which everybody gets it, unless its headers say so already: what is sent again may have
            come from elsewhere.
        """
        kept = dict(self.headers)
        return self._replace(headers=tuple({ADDRESS: address, **kept, CONSUMER: consumer}.items()))


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as a subscriber of the broker receives it.

    :param address: subject, routing key or topic.
    :param body: the bytes as they were sent.
    :param headers: of the message, names in lower case.
    :param position: the broker's own number for it, as text; only for display.
    """

    address: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    position: str = ""


@dataclass(frozen=True, slots=True)
class Escaped(Incoming):
    """One whose attributes, where they are headers, are percent-encoded: as NATS' and HTTP's bindings want it."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do, frozen. The contract suite keeps a table of its own of what each must have."""

    #: Survives a restart of the broker once confirmed.
    durable: bool
    #: The broker drops a second event of the same id, within its window.
    deduplicates: bool
    #: Its events can be read back from the oldest kept one.
    replayable: bool
    #: The broker keeps the order in which it confirmed the events of one key.
    ordered: bool
    #: The place where events are kept is declared by us, and can be checked instead.
    declares_topology: bool
    #: A full place refuses events, in place of dropping old ones: they wait in the outbox.
    refuses_when_full: bool
    #: A place that was deleted and made again is told from the one before.
    identifies_place: bool
    #: Consumers can subscribe: `Transport.subscribe`.
    subscribable: bool
    #: Each consumer has an inbox that nobody else reads: `Transport.inbox`.
    has_inboxes: bool
    #: A delivery says how often it was given before, also if its subscribers died.
    counts_deliveries: bool
    #: A batch is sent without waiting for each event's confirmation.
    pipelined: bool


class PublishError(TransportError):
    """A batch was not confirmed as a whole.

    :param confirmed: how many leading events of the batch are confirmed.
    :param error: why the next one is not.
    :param stored: indices in the batch, behind that one, of events that are confirmed as well: they are not sent again.
    """

    def __init__(self, confirmed: int, error: TransportError, stored: Iterable[int] = ()) -> None:
        super().__init__(error.message, error.remedy)
        self.confirmed = confirmed
        self.error = error
        self.stored = frozenset(stored)


class Delivery(ABC):
    """An event that a subscriber holds until it has settled it.

    :ivar message: the event as it was received.
    :ivar attempt: how often the name was given it, this time included; at least 1.
    """

    def __init__(self, message: Incoming, attempt: int) -> None:
        self.message = message
        self.attempt = attempt

    @abstractmethod
    async def ack(self) -> None:
        """It is done with: the name is never given it again.

        :raises NotConnectedError: it will come again.
        """

    @abstractmethod
    async def nack(self, delay: float = 0.0, headers: Mapping[str, str] = NO_HEADERS) -> None:
        """It is not: give it to the name again, not before so many seconds have passed.

        It then stands outside the order of its key, unless the subscription is ``ordered``: then its partition waits
        for it. A delay is met as exactly as the broker can, never by less than what was asked for, and at worst a
        second late.

        :param headers: are added to the message, in place of those of the same name; names in lower case, values in
            ASCII. With ``ordered`` they may be forgotten when the subscriber ends.
        :raises NotConnectedError: it will come again, and that at once.
        :raises TransportError: it can't be kept now, or not for so long. The delivery is held on, and can be given back
            again, or settled otherwise.
        """

    @abstractmethod
    async def reject(self, headers: Mapping[str, str]) -> None:
        """It never will be: put the original bytes and headers among the name's dead letters.

        The transport adds ``orthanc-consumer``, ``orthanc-address`` (under which it came) and ``orthanc-attempts``.

        :param headers: say why, and are added as in `nack`.
        :raises NotConnectedError: it will come again.
        :raises TransportError: the place of dead letters takes nothing now. The delivery is held on, and can be
            rejected again, or settled otherwise.
        """

    @abstractmethod
    async def extend(self) -> None:
        """Work on it goes on: it is not given to another for one more ``ack_wait``.

        :raises NotConnectedError: it is already lost to us, and comes again.
        """


class Subscription(ABC):
    """One subscriber of a name; made by `Transport.subscribe`, used in one event loop.

    :ivar ack_wait: the one that holds, where the name has another than was asked for when subscribing; else 0.
    """

    ack_wait: float = 0.0

    @abstractmethod
    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        """Take what is there for us.

        :param limit: at most so many.
        :param wait: at most so many seconds until the first; 0: only what is there.
        :return: in the broker's order; empty when nothing came.
        :raises NotConnectedError: subscribe again.
        """

    async def leave(self, back: Sequence[Delivery]) -> None:  # noqa: B027 -- who has nothing faster waits for `close`
        """Take nothing more, and give back what was not begun: others of the name are given it at once.

        As what `Delivery.nack` gives back it stands outside the order then, unless the subscription is ``ordered``.

        `receive` is not called any more. What else is held can be settled until `close`. Where the broker can't give
        single deliveries back, they go to others with `close`. It is no attempt; but a broker that counts deliveries by
        itself counts it.

        :param back: of those that are held, in their order.
        :raises NotConnectedError: all that is held comes again.
        """

    @abstractmethod
    async def close(self) -> None:
        """End it; what is not settled is given to others of the name, at once where the broker can, otherwise when
        its ``ack_wait`` is over. Never raises, never takes longer than a second."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delivery that was rejected.

    :ivar message: its body as it was; its headers, with what `Delivery.reject` has added.
    :ivar mark: by which its transport knows it again.
    """

    message: Incoming
    mark: object


class DeadLetters(ABC):
    """The dead letters of one consumer, to look at and to clear away; made by `Transport.dead_letters`."""

    @abstractmethod
    def read(self) -> AsyncGenerator[DeadLetter]:
        """Yield those that are there now, oldest first, and end. Nothing is changed by it.

        What it has given may be removed before it ends.

        :raises NotConnectedError: the broker doesn't answer.
        """

    @abstractmethod
    async def remove(self, letters: Sequence[DeadLetter]) -> None:
        """Remove some that `read` has given. One that is not there any more is no error.

        :raises NotConnectedError: some may be there still.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give it up. Never raises, never takes longer than a second."""


class Place(ABC):
    """A place at one broker that events are sent to. An object is used by one relay, in one event loop, and can be
    connected again after `close`."""

    capabilities: ClassVar[Capabilities]

    @abstractmethod
    async def connect(self) -> str:
        """Connect, and declare or check the place where events are kept.

        Does nothing but answer when it is connected already.

        :return: the identity of that place: another text than last time means that it was deleted and made again
            (for JetStream, the stream's creation time); empty where a broker can't tell.
        :raises NotConnectedError: the broker can't be reached.
        :raises TransportConfigurationError: it can be reached and refuses us, or the topology differs.
        """

    @abstractmethod
    async def publish(self, events: Sequence[Outgoing]) -> None:
        """Send the events in order, pipelined, and return when the broker has confirmed all of them.

        :raises PublishError: see the module's text.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give the connection up. Never raises, never takes longer than a second; publishing afterwards raises."""


class Transport(Place):
    """One broker, and its place where everybody gets the events."""

    def __init__(self, options: TransportOptions) -> None:
        self.name = options.name

    def inbox(self, consumer: str) -> Place:
        """The place of what only one consumer gets, over a connection of its own.

        Every event there has the headers ``orthanc-consumer`` and ``orthanc-address``, under which everybody gets it.

        :param consumer: its name, as for `subscribe`; nobody need have subscribed yet.
        :raises TransportConfigurationError: there can be no such name, or the transport has no inboxes (see
            `Capabilities.has_inboxes`).
        """
        raise TransportConfigurationError(
            f"transport {self.name}: consumers have no inbox there", "send to everyone, or use a broker"
        )

    @abstractmethod
    def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        """Yield what the broker receives, live, to look at: nothing is acknowledged, no trace is left on the broker.

        It begins when the first event is asked for, and is ended by ``aclose`` (`contextlib.aclosing`).

        :param oldest: begin with the oldest kept event in place of the next one.
        :raises NotConnectedError: not connected, or the connection was lost.
        :raises TransportConfigurationError: the broker does not permit it.
        """

    async def dead_letters(self, consumer: str) -> DeadLetters:
        """The dead letters of a consumer, over this connection.

        :param consumer: its name, as for `subscribe`. Where nothing was ever rejected, there are none.
        :raises NotConnectedError: not connected.
        :raises TransportConfigurationError: there can be no such name, the broker does not permit it, or the transport
            has no subscribers.
        """
        raise TransportConfigurationError(
            f"transport {self.name}: consumers have no dead letters there", "use a broker"
        )

    async def subscribe(
        self,
        name: str,
        *,
        oldest: bool = False,
        in_flight: int = 256,
        ack_wait: float = 30.0,
        ordered: bool = False,
        longest: float = 0.0,
        inbox_only: bool = False,
    ) -> Subscription:
        """Begin to share a name's events; what it needs at the broker is made, or checked where ``declare`` is off.

        :param name: of the consumer: letters, digits, ``_`` and ``-``.
        :param oldest: where the name's very first subscription begins: with the oldest kept event.
        :param in_flight: how many deliveries this subscriber may hold unsettled; `Subscription.receive` then waits.
        :param ack_wait: after so many seconds without a settlement or `Delivery.extend` a delivery may be given to
            another.
        :param ordered: of each of the 64 partitions of the wire contract an event is given only when the one before
            is settled by whoever of the name held it; `Delivery.nack` keeps its partition waiting. What is in the
            inbox stands outside the order. A name is ordered or not for good.
        :param longest: for how many seconds deliveries may be held, by extending them, where the broker has a limit
            of its own; 0: what it allows by itself.
        :param inbox_only: only what is sent to the name's inbox comes, nothing of what everybody gets; ``oldest`` and
            ``ordered`` then mean nothing. What an earlier subscription to everything has left of that for the name is
            given up, and where topology is declared it is removed from the broker. A later subscription to everything
            begins as the name's very first does. All that subscribe at one time do it alike.
        :raises NotConnectedError: not connected.
        :raises TransportConfigurationError: the broker does not permit it, its topology differs, the name exists with
            the other ``ordered``, the broker has a limit below ``longest``, or the transport has no subscribers (see
            `Capabilities.subscribable`).
        """
        raise TransportConfigurationError(
            f"transport {self.name}: consumers can't subscribe to it", "let them subscribe to a broker"
        )

    @abstractmethod
    async def describe(self) -> list[str]:
        """Say in a few lines what was found at the broker (server version, limits); for ``check --connect``.

        :raises TransportError: not connected, or as `connect`.
        """
