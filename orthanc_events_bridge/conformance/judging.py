"""Comparing what was seen with what is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.moments import seconds_of
from orthanc_events_bridge.transports.headers import ADDRESS, ATTEMPTS, CONSUMER, EVENT_ID

if TYPE_CHECKING:
    from orthanc_events_bridge.conformance.program import Program
    from orthanc_events_bridge.conformance.rules import Verdicts
    from orthanc_events_bridge.consumers.dead import Letter
    from orthanc_events_bridge.transports.base import Outgoing

_SHOWN: Final = 3


def steady(attempts: Sequence[int]) -> bool:
    """Whether none is left out on the way up from 1. Some come again where a connection was lost."""
    highest = itertools.accumulate([0, *attempts], max)
    return bool(attempts) and all(1 <= one <= before + 1 for one, before in zip(attempts, highest, strict=False))


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What an event differs in, field by field. Times are compared as times: SDKs spell them in their own way."""
    wrong = []
    for name in dict.fromkeys((*wanted, *found)):
        one, other = wanted.get(name), found.get(name)
        same_time = name == "time" and None is not _moment(one) == _moment(other)
        if one != other and not same_time:
            wrong.append(f"{name} is {other!r}, and not {one!r}")
    return wrong


def _moment(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def some(names: Sequence[str]) -> str:
    left = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {left} more" if left > 0 else "")


def judge_order(verdicts: Verdicts, program: Program, events: Sequence[Outgoing], *, given_back: bool = False) -> None:
    """Were the events of each key begun in the order in which they were sent, and one by one?

    :param given_back: some were, at a worker's end, and may have come in another order.
    """
    keys: dict[str, list[str]] = {}
    for one in events:
        keys.setdefault(one.key, []).append(one.id)
    ends = {identifier: place for identifier, place, _ in reversed(program.ended)}
    for ids in keys.values():
        first: dict[str, int] = {}
        for begun in program.begun:
            if begun.id in ids:
                first.setdefault(begun.id, begun.place)
        in_order = sorted(first, key=lambda identifier: first[identifier])
        wanted = [one for one in ids if one in first]
        verdicts.check("O1", given_back or in_order == wanted, "the events of a key came in another order")
        for before, after in itertools.pairwise(in_order):
            together = ends.get(before, 0) > first[after]
            verdicts.check("O1", not together, "two events of one key were handled at the same time")


def seen_as(options: Any, event: Outgoing) -> tuple[str, str]:
    """The address under which everybody gets an event, and what its headers with attributes begin with.

    :param options: of the broker, whichever it is.
    """
    prefix = "ce_" if options.type == "kafka" else "ce-"
    if options.type == "nats":
        return f"{options.subject_prefix}.{event.address}", prefix
    return str(options.topic) if options.type == "kafka" else event.address, prefix


@dataclass(frozen=True, slots=True)
class Expected:
    """What a dead letter has to say.

    :ivar event: as it was sent.
    :ivar name: of the consumer.
    :ivar address: under which everybody got it.
    :ivar prefix: of the headers with attributes.
    :ivar given: how often it was.
    :ivar failed: its handler has raised an error.
    :ivar secret: of its data.
    """

    event: Outgoing
    name: str
    address: str
    prefix: str
    given: int
    failed: bool
    secret: str


def judge(verdicts: Verdicts, letter: Letter, expected: Expected) -> None:
    """Look at the headers of a dead letter: those of the original, and what is said beside them."""
    said, event = letter.letter.message.headers, expected.event
    what = f"{letter.type or 'a malformed one'} {event.id}"
    kind = said.get("content-type")
    verdicts.check("S4", kind == event.content_type, f"{what}: content-type is {kind}, and not {event.content_type}")
    wanted = dict(event.headers) | {expected.prefix + name: value for name, value in event.attributes}
    lost = [name for name in wanted if name not in said]
    verdicts.check("S4", not lost, f"{what}: the headers {some(lost)} are not kept")
    for name, value in (
        (CONSUMER, expected.name),
        (ADDRESS, expected.address),
        (EVENT_ID, event.id),
        (ATTEMPTS, str(expected.given)),
    ):
        found = said.get(name, "missing")
        verdicts.check("S6", found == value, f"{what}: {name} is {found}, and not {value}")
    verdicts.check("S6", letter.reason, f"{what}: no orthanc-reason")
    verdicts.check("S6", not expected.failed or letter.exception, f"{what}: its handler failed: no orthanc-exception")
    first, last = seconds_of(letter.first), seconds_of(letter.last)
    right = first is not None and last is not None and (first < last or (first == last and not expected.failed))
    verdicts.check(
        "S6", right, f"{what}: its first failure is {letter.first or 'not said'}, its last {letter.last or 'not'}"
    )
    secret = [name for name, value in said.items() if expected.secret in value]
    verdicts.check("S6", not secret, f"{what}: {some(secret)} has what is in its data")
    _judge_key(verdicts, letter, expected, what)


def _judge_key(verdicts: Verdicts, letter: Letter, expected: Expected, what: str) -> None:
    """By what a broker tells a letter from others."""
    key = letter.letter.mark
    if "S9" in verdicts.rules:
        another = isinstance(key, bytes) and key != expected.event.key.encode()
        verdicts.check("S9", another, f"{what}: its key is that of the event: of two of a study one would be removed")
    if "S8" in verdicts.rules:
        begins, found = f"{expected.event.id}:dead:{expected.name}:", letter.letter.message.headers.get("nats-msg-id")
        right = str(found).startswith(begins)
        verdicts.check("S8", right, f"{what}: Nats-Msg-Id is {found}, and does not begin with {begins}")
