"""The durable pull consumers that a name's subscribers share at NATS: found and checked, or made."""

from __future__ import annotations

from typing import Final

import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.nats_stream import open_stream
from orthanc_events_bridge.transports.subscriptions import PARTITIONS

#: JetStream's numbers for: no leader at the moment, or the stream has just been deleted.
_NO_STREAM: Final = 10059
_PASSING: Final = frozenset({10008, 10009, _NO_STREAM})
#: What the description of an inbox's consumer begins with: there is one inbox for a name, which reads one stream; or
#: that it is for a name that reads none.
_BESIDE: Final = "Beside the stream "
_INBOX_ONLY: Final = "Inbox only"
#: Settings with which a consumer would lose events, or hold them up.
_NEEDED: Final = ("ack_policy", "max_deliver", "max_ack_pending", "deliver_subject", "headers_only", "backoff")


async def open_consumers(
    connection: Connection, options: NatsOptions, name: str, *, oldest: bool, ack_wait: float, ordered: bool = False
) -> list[ConsumerInfo]:
    """Find a name's consumers and check them, or make them: of the stream for everybody, and, last, of its inbox.

    With the stream for everybody goes what NATS knows of the name there. The consumer of its inbox, in another stream
    and made last, then tells that the name is not new: it begins with the oldest event, so that it misses nothing.

    :param ordered: one consumer for each partition, which gives the next event when the one before is settled.
    :raises NotConnectedError: NATS doesn't answer, or a stream is gone.
    :raises TransportConfigurationError: they can't be used as they are, or not be made.
    """
    asking = _Asking(connection, options)
    others = name if ordered else _of_partition(name, 0)
    if await asking.find(options.stream, others, needed=False) is not None:
        raise TransportConfigurationError(
            f"the NATS stream {options.stream} has the consumer {others}: {name} is {'not ' if ordered else ''}ordered",
            f"subscribe as before, use another name, or delete the consumers of {name}",
        )
    wanted = {name: _wanted(name, f"{options.subject_prefix}.>", ack_wait)}
    if ordered:
        partitions = ((_of_partition(name, one), _in_partition(options, one)) for one in range(PARTITIONS))
        wanted = {one: _wanted(one, subject, ack_wait, in_order=True) for one, subject in partitions}
    found = {one: await asking.find(options.stream, one) for one in wanted}
    await open_stream(connection, options, "inbox")
    inbox = await asking.find(options.inbox_stream, name)
    if inbox is not None:
        _check_stream(inbox, options, name)
    known = inbox is not None and inbox.config.description != _INBOX_ONLY
    begin = DeliverPolicy.ALL if oldest or known else DeliverPolicy.NEW
    made: list[ConsumerInfo] = []
    for one, config in wanted.items():
        info = found[one] or await asking.make(options.stream, config.evolve(deliver_policy=begin))
        _check(info, config, options.stream)
        made.append(info)
    return [*made, await asking.inbox(inbox, name, ack_wait, _BESIDE + options.stream)]


async def open_inbox_only(
    connection: Connection, options: NatsOptions, name: str, *, ack_wait: float
) -> list[ConsumerInfo]:
    """The same for a name that has its inbox alone; what it has of the stream for everybody is deleted.

    :raises TransportError: as `open_consumers`.
    """
    asking = _Asking(connection, options)
    await open_stream(connection, options, "inbox")
    found = await asking.find(options.inbox_stream, name)
    if found is not None:
        _check_stream(found, options, name)
    info = await asking.inbox(found, name, ack_wait, _INBOX_ONLY)
    if options.declare:
        if await asking.find(options.stream, name) is not None:  # only then one needs to be permitted to
            await asking.delete(options.stream, name)
        first = await asking.find(options.stream, _of_partition(name, 0))
        if first is not None and first.config.filter_subject == _in_partition(options, 0):
            for number in reversed(range(PARTITIONS)):  # the one that tells of the others last
                await asking.delete(options.stream, _of_partition(name, number))
    return [info]


def _of_partition(name: str, number: int) -> str:
    return f"{name}-{number:02d}"


def _in_partition(options: NatsOptions, number: int) -> str:
    return f"{options.subject_prefix}.*.*.*.{number:02d}"


def _wanted(name: str, subject: str, ack_wait: float, *, in_order: bool = False) -> ConsumerConfig:
    return ConsumerConfig(
        name=name,
        durable_name=name,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        filter_subject=subject,
        max_deliver=-1,  # with fewer, NATS skips an event silently
        # In order: one at a time, whoever asks. Otherwise no limit: those that wait for their delay would fill it.
        max_ack_pending=1 if in_order else -1,
    )


class _Asking:
    """Asks for consumers."""

    def __init__(self, connection: Connection, options: NatsOptions) -> None:
        self._connection = connection
        self._manager = connection.jsm(timeout=options.connect_timeout * 2)  # the deadline is `ask`'s
        self._options = options
        self._declare = options.declare

    async def find(self, stream: str, name: str, *, needed: bool = True) -> ConsumerInfo | None:
        """Find one.

        :param needed: whether we would make it.
        :raises TransportConfigurationError: it isn't there, and is not to be made.
        """
        try:
            return await self._connection.ask(self._manager.consumer_info(stream, name))
        except nats.js.errors.NotFoundError as error:
            if self._declare or not needed or error.err_code == _NO_STREAM:
                return None
            raise TransportConfigurationError(
                f"the NATS stream {stream} has no consumer {name}, and declare is false",
                "make it, or set declare to true",
            ) from error
        except nats.js.errors.APIError as error:
            raise _no_consumer(error, stream, name) from error

    async def make(self, stream: str, wanted: ConsumerConfig) -> ConsumerInfo:
        """Make one, unless another subscriber has made it meanwhile, perhaps to begin elsewhere."""
        try:
            return await self._connection.ask(self._manager.add_consumer(stream, wanted))
        except nats.js.errors.APIError as error:
            info = await self.find(stream, str(wanted.name))
            if info is None:
                raise _no_consumer(error, stream, str(wanted.name)) from error
            return info

    async def inbox(self, found: ConsumerInfo | None, name: str, ack_wait: float, description: str) -> ConsumerInfo:
        """Check or make a name's consumer of its inbox.

        :param description: that it is to have.
        """
        stream = self._options.inbox_stream
        wanted = _wanted(name, f"{self._options.inbox_prefix}.{name}", ack_wait)
        if found is None:
            found = await self.make(stream, wanted.evolve(description=description))
        _check(found, wanted, stream)
        if self._declare and found.config.description != description:
            found = await self.make(stream, found.config.evolve(description=description))
        return found

    async def delete(self, stream: str, name: str) -> None:
        """Delete one, if it is there."""
        try:
            await self._connection.ask(self._manager.delete_consumer(stream, name))
        except nats.js.errors.NotFoundError:
            pass
        except nats.js.errors.APIError as error:
            raise _no_consumer(error, stream, name) from error


def _no_consumer(error: nats.js.errors.APIError, stream: str, name: str) -> TransportError:
    text = f"{error.description} ({error.err_code})"
    if error.err_code in _PASSING:
        return NotConnectedError(f"the NATS stream {stream} is not ready: {text}", "connect again")
    return TransportConfigurationError(
        f"NATS can't make or read the consumer {name} of the stream {stream}: {text}",
        "check the account's limits and the user's permissions",
    )


def _check(info: ConsumerInfo, wanted: ConsumerConfig, stream: str) -> None:
    """A consumer that exists is never changed: what differs is named."""
    differing = []
    for setting in _NEEDED:
        is_, should = getattr(info.config, setting), getattr(wanted, setting)
        if (is_ or None) != (should or None):
            differing.append(f"{setting} is {_plain(is_)}, wanted {_plain(should)}")
    filters: list[str | None] = list(info.config.filter_subjects or [])
    filters = filters or [info.config.filter_subject or wanted.filter_subject]
    if filters != [wanted.filter_subject]:
        differing.append(f"its filter is {filters}, wanted {wanted.filter_subject}")
    if differing:
        raise TransportConfigurationError(
            f"the consumer {info.name} of the NATS stream {stream} exists with other settings: {'; '.join(differing)}",
            "delete it or change it, or use another name",
        )


def _check_stream(inbox: ConsumerInfo, options: NatsOptions, name: str) -> None:
    """A name reads one stream: it has one inbox and one place of dead letters, named after it alone."""
    said = inbox.config.description or ""
    if said.startswith(_BESIDE) and said != _BESIDE + options.stream:
        other = said.removeprefix(_BESIDE)
        raise TransportConfigurationError(
            f"the consumer {name} reads the NATS stream {other}, and is to read {options.stream}",
            "give one of the two consumers another name; if it has moved for good, delete the consumer "
            f"{name} of the stream {options.inbox_stream}: what is in its inbox stays there",
        )


def _plain(value: object) -> object:
    return getattr(value, "value", value)
