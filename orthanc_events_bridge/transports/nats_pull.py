"""What a subscriber asks a durable consumer of NATS, and what the answers mean."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

from orthanc_events_bridge.transports.base import Escaped, Incoming
from orthanc_events_bridge.transports.headers import ADDRESS

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.nats_origin import Origin

#: What the server answers when a request has ended and the next one may follow.
_ENDED: Final = frozenset({"404", "408"})
_PASSING: Final = ("exceeded maxwaiting", "leadership change")
#: From so many seconds on, a delay is to survive a restart of the server in full.
_LONG_DELAY: Final = 1.0


class Durable:
    """One durable consumer of a stream.

    :param reply: the subject that its answers come to.
    :param origin: the stream.
    :ivar ack_wait: its own, in seconds, whatever was asked for when subscribing.
    :ivar filled: whether its last request brought something; at first it may have anything.
    :ivar asked: when that was, on the clock `orthanc_events_bridge.transports.subscriptions.boot_time`.
    """

    def __init__(self, info: ConsumerInfo, reply: str, origin: Origin) -> None:
        self.origin = origin
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{info.stream_name}.{info.name}"
        self.reply = reply
        self.ack_wait = info.config.ack_wait or 30.0
        self.filled = True
        self.asked = 0.0

    def request(self, batch: int, expires: float) -> tuple[str, bytes]:
        """The subject and the text of a request for so many events at most.

        :param expires: seconds to wait for the first of them; 0: only what is there.
        """
        request: dict[str, Any] = {"batch": batch, "no_wait": True}  # with `expires`: wait for the first only
        if expires:
            request["expires"] = max(1, int(expires * 1e9))
        return self._subject, json.dumps(request).encode()

    def delay(self, seconds: float) -> bytes:
        """How ``-NAK`` says it."""
        if seconds <= 0:
            return b""
        if seconds >= _LONG_DELAY:
            # When it is restarted, the server knows only the whole second in which a message with this delay would
            # have been delivered: at the beginning of that second nothing is cut off.
            now = time.time()
            seconds = math.ceil(now + seconds - self.ack_wait) + self.ack_wait - now
        return b' {"delay": %d}' % math.ceil(seconds * 1e9)


@dataclass(slots=True)
class Pull:
    """A request that is under way.

    :ivar durable: who is asked.
    :ivar left: how many may still come.
    :ivar sent: when, on the clock `orthanc_events_bridge.transports.subscriptions.boot_time`.
    :ivar expires: after how many seconds the server answers at the latest.
    :ivar news: done when something has come, or the request has ended.
    """

    durable: Durable
    left: int
    sent: float
    expires: float
    news: asyncio.Future[None]

    def tell(self) -> None:
        """Wake up who waits for it."""
        if not self.news.done():
            self.news.set_result(None)


def received(message: Msg) -> tuple[Incoming, int]:
    """An event as a consumer gets it, one of an inbox under its address for everybody; how often it was given."""
    headers = {name.lower(): value for name, value in (message.headers or {}).items()}
    tokens = _tokens(message.reply)
    address = headers.get(ADDRESS) or message.subject
    return Escaped(address, message.data, headers, tokens[1]), int(tokens[0])


def key_of(reply: str) -> str:
    """What tells a message from all others that its stream has or ever had under this name: its number, and when it
    was stored, in nanoseconds."""
    _, number, _, stored, *_ = _tokens(reply)
    return f"{number}.{stored}"


def stored_at(reply: str) -> float:
    """When a message was stored, by the server's clock, in seconds of the epoch."""
    return int(_tokens(reply)[3]) / 1e9


def _tokens(reply: str) -> list[str]:
    """Of the subject that settles a delivery: how often it was given, its number in the stream, its number in the
    consumer, when it was stored."""
    # $JS.ACK.{stream}.{consumer}.{…} or $JS.ACK.{domain}.{account}.{stream}.{consumer}.{…}.
    tokens = reply.split(".")
    return tokens[4:] if len(tokens) == 9 else tokens[6:]


def problem(message: Msg) -> str:
    """Why no more can be asked for, in the server's words; empty where a request has only ended."""
    headers = message.headers or {}
    status, text = headers.get("Status", ""), headers.get("Description", "")
    if status in _ENDED or text.lower().startswith(_PASSING):
        return ""
    return f"{status} {text}".rstrip()  # "503": nobody listens; "409": deleted, or changed
