"""The dead letters of a consumer: choose some, give them to the consumer again, or throw them away."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

from orthanc_events_bridge.consumers.event import UnreadableError, address_parts, read
from orthanc_events_bridge.events.mapping import partition
from orthanc_events_bridge.events.reading import event_of
from orthanc_events_bridge.moments import seconds_of
from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters, Incoming, Outgoing, Place, PublishError
from orthanc_events_bridge.transports.headers import (
    ADDRESS,
    ATTEMPTS,
    CONSUMER,
    DUE,
    EVENT_ID,
    EXCEPTION,
    FIRST_FAILURE,
    LAST_FAILURE,
    OPERATION,
    REASON,
    SITE,
)

#: What is said of the failure, and what the inbox's transport says anew.
_DROPPED: Final = frozenset(
    {OPERATION, CONSUMER, ATTEMPTS, DUE, REASON, EXCEPTION, FIRST_FAILURE, LAST_FAILURE, EVENT_ID, SITE, "content-type"}
)
#: What brokers say of a message of their own, and by what keys they recognise it.
_BROKERS: Final = ("nats-", "x-", "dedupe-")
_BINARY: Final = ("ce-", "ce_")
_WILD: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, read.

    :ivar letter: as its transport has it.
    :ivar id: of the event; of what is none, what its publisher or its bytes are known by.
    :ivar type: its short name, or the whole type of another producer's; empty where it is no event.
    :ivar reason: why it is there.
    :ivar exception: the type of what its handler raised; empty where none did.
    :ivar attempts: how often it was given.
    :ivar first: when it failed first, as it is written; empty where that is not said.
    :ivar last: when it failed last.
    """

    letter: DeadLetter
    id: str
    type: str
    reason: str
    exception: str
    attempts: int
    first: str
    last: str

    def age(self, now: float) -> float | None:
        """Seconds since it failed last; none where that is not said.

        :param now: seconds since the epoch.
        """
        last = seconds_of(self.last)
        return None if last is None else now - last

    def row(self) -> dict[str, Any]:
        """For programs; nothing of its content."""
        return {
            "id": self.id,
            "type": self.type,
            "reason": self.reason,
            "exception": self.exception,
            "attempts": self.attempts,
            "first_failure": self.first,
            "last_failure": self.last,
            "address": self.letter.message.headers.get(ADDRESS, self.letter.message.address),
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """Which dead letters are meant: those that fit all that is given.

    :ivar ids: of events.
    :ivar reason: a part of the reason, whatever the case; with ``*``, ``?`` or ``[…]`` a pattern for all of it.
    :ivar older: failed last at least so many seconds ago. What doesn't say when is of no age, and not meant.
    :ivar newer: failed last at most so many seconds ago.
    :ivar type: a pattern for the short name, or for the whole type of another producer's.
    :ivar all: all are meant.
    """

    ids: tuple[str, ...] = ()
    reason: str = ""
    older: float | None = None
    newer: float | None = None
    type: str = ""
    all: bool = False

    @property
    def chosen(self) -> bool:
        """Whether anything is said."""
        return bool(self.all or self.ids or self.reason or self.type) or (self.older, self.newer) != (None, None)

    def fits(self, letter: Letter, now: float) -> bool:
        """Is it meant?"""
        if self.ids and letter.id not in self.ids:
            return False
        reason, said = self.reason.lower(), letter.reason.lower()
        if reason and not (fnmatch.fnmatchcase(said, reason) if _WILD.search(reason) else reason in said):
            return False
        if self.type and not fnmatch.fnmatchcase(letter.type, self.type):
            return False
        age = letter.age(now)
        if self.older is not None and (age is None or age < self.older):
            return False
        return self.newer is None or (age is not None and age <= self.newer)


def letter_of(letter: DeadLetter) -> Letter:
    """Read one; whatever is in it, it can be."""
    message, headers = letter.message, letter.message.headers
    try:
        event = read(message)
        identifier, kind = event.id, event.name
    except UnreadableError:
        identifier, kind = headers.get(EVENT_ID) or hashlib.sha256(message.body).hexdigest()[:32], ""
    attempts = headers.get(ATTEMPTS, "")
    return Letter(
        letter,
        identifier,
        kind,
        headers.get(REASON, ""),
        headers.get(EXCEPTION, ""),
        int(attempts) if attempts.isascii() and attempts.isdecimal() else 0,
        headers.get(FIRST_FAILURE, ""),
        headers.get(LAST_FAILURE, ""),
    )


async def select(
    letters: DeadLetters, choice: Choice, now: float, seen: Callable[[int], object] = lambda count: None
) -> AsyncGenerator[Letter]:
    """Those that are meant, oldest first. They may be removed meanwhile.

    :param seen: is told how many there were so far, with those that are not meant.
    :raises NotConnectedError: the broker doesn't answer.
    """
    count = 0
    async with aclosing(letters.read()) as found:
        async for one in found:
            count += 1
            seen(count)
            letter = letter_of(one)
            if choice.fits(letter, now):
                yield letter


async def in_parts(letters: AsyncGenerator[Letter], size: int) -> AsyncGenerator[list[Letter]]:
    """The same, so many at a time, so that no more are held than that."""
    part: list[Letter] = []
    async with aclosing(letters):
        async for one in letters:
            part.append(one)
            if len(part) == size:
                yield part
                part = []
    if part:
        yield part


def marked(letter: Letter) -> DeadLetter:
    """What removing one needs, without what is in it."""
    return replace(letter.letter, message=Incoming("", b""))


def again(letter: Letter) -> Outgoing:
    """A dead letter as it is sent to its consumer once more: the same event, whose attempts begin anew."""
    message = letter.letter.message
    headers = message.headers
    address = headers.get(ADDRESS, message.address)
    # What has no such address gets plain words in place of it.
    *names, part = address_parts(address)
    site, level, verb = (name or "unknown" for name in names)
    attributes = [
        (name[3:], value)
        for name, value in headers.items()
        if name.startswith(_BINARY) and name[3:] != "datacontenttype"
    ]
    key = _key(letter)
    kept = {
        name: value
        for name, value in headers.items()
        if name not in _DROPPED and not name.startswith((*_BROKERS, *_BINARY))
    }
    return Outgoing(
        id=letter.id,
        site=headers.get(SITE, site),
        level=level,
        verb=verb,
        key=key,
        partition=part or partition(key),
        content_type=headers.get("content-type", ""),
        body=message.body,
        attributes=tuple(attributes),
        headers=tuple({**kept, OPERATION: "redrive", ADDRESS: address}.items()),
        # One that died again is another letter, with another last failure: it must not be dropped as a duplicate. Where
        # it is only the removal that failed, a second redrive is dropped.
        dedupe=f"{letter.id}:redrive:{letter.last}.{message.position}",
    )


async def redrive(letters: DeadLetters, inbox: Place, chosen: Sequence[Letter]) -> None:
    """Give some to their consumer again. Each leaves the dead letters when its inbox has confirmed it.

    :param inbox: of their consumer, connected.
    :raises TransportError: not all are; what is not is a dead letter still. One can be both.
    """
    try:
        await inbox.publish([again(one) for one in chosen])
    except PublishError as error:
        confirmed = {*range(error.confirmed), *error.stored}
        await letters.remove([one.letter for number, one in enumerate(chosen) if number in confirmed])
        raise
    await letters.remove([one.letter for one in chosen])


def _key(letter: Letter) -> str:
    try:
        event = event_of(letter.letter.message) or {}
    except (RecursionError, UnicodeDecodeError):
        event = {}
    return str(event.get("partitionkey") or letter.id)
