"""What a message of RabbitMQ says to a subscriber, and what its copy says that is to be given again."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from orthanc_events_bridge.moments import seconds_of
from orthanc_events_bridge.transports.base import NO_HEADERS, Incoming
from orthanc_events_bridge.transports.headers import ADDRESS, ATTEMPTS, CONSUMER, DUE, OPERATION, due_text

#: What RabbitMQ tells about one delivery; all other headers a copy keeps.
_OF_DELIVERY: Final = (
    "x-delivery-count",
    "x-acquired-count",
    "x-stream-offset",
    "x-death",
    "x-first-death",
    "x-last-death",
)


def headers_of(message: DeliveredMessage) -> dict[str, Any]:
    """A message's headers, without what RabbitMQ says about this delivery of it."""
    headers: dict[str, Any] = dict(message.header.properties.headers or {})
    return {name: value for name, value in headers.items() if not name.startswith(_OF_DELIVERY)}


def incoming(message: DeliveredMessage) -> Incoming:
    """As a consumer gets it; a copy under the original's address."""
    headers = {name.lower(): str(value) for name, value in headers_of(message).items()}
    address = headers.get(ADDRESS) or message.routing_key or ""
    return Incoming(address, message.body, headers | {"content-type": message.header.properties.content_type or ""})


def attempt(message: DeliveredMessage) -> int:
    """How often it was given, this time included: by copies, and since the last by subscribers that died."""
    headers: dict[str, Any] = dict(message.header.properties.headers or {})
    died = _number(headers.get("x-delivery-count")) or int(bool(getattr(message.delivery, "redelivered", False)))
    return _number(headers.get(ATTEMPTS)) + died + 1


def dead_headers(message: DeliveredMessage, consumer: str, more: Mapping[str, str]) -> dict[str, Any]:
    """With what headers a copy is sent that nobody is to be given."""
    headers = headers_of(message)
    headers.pop(DUE, None)
    named = {CONSUMER: consumer, ATTEMPTS: str(attempt(message)), ADDRESS: incoming(message).address}
    return headers | named | dict(more)


def retry_headers(
    message: DeliveredMessage, consumer: str, delay: float, more: Mapping[str, str] = NO_HEADERS
) -> dict[str, Any]:
    """With what headers a copy is sent that is to be given again, in so many seconds."""
    headers = dead_headers(message, consumer, {OPERATION: "retry", **more})
    if delay > 0:
        headers[DUE] = due_text(time.time() + delay)
    return headers


def unbegun_headers(message: DeliveredMessage) -> dict[str, Any]:
    """With what headers a copy is sent of what nobody has begun: as if it had not been given this time."""
    said = {ATTEMPTS: str(attempt(message) - 1), ADDRESS: incoming(message).address}
    return headers_of(message) | said


def as_given_again(message: DeliveredMessage, consumer: str, more: Mapping[str, str]) -> DeliveredMessage:
    """The same delivery of a message, as if it were its next: it is tried again by whom it was given to."""
    properties = copy.copy(message.header.properties)
    properties.headers = retry_headers(message, consumer, 0.0, more)
    header, delivery = copy.copy(message.header), copy.copy(message.delivery)
    header.properties = properties
    if isinstance(delivery, Basic.Deliver):
        delivery.redelivered = False  # that is counted already
    return replace(message, header=header, delivery=delivery)


def seconds_left(message: DeliveredMessage) -> float:
    """In how many seconds it may be given."""
    text = (message.header.properties.headers or {}).get(DUE)
    due = seconds_of(str(text)) if text else None  # none of somebody else's
    return 0.0 if due is None else due - time.time()


def _number(value: object) -> int:
    text = str(value)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
