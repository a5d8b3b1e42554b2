"""What a webhook's answers mean. An answer's text is never shown: it may repeat what was sent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final
from urllib.parse import urljoin, urlsplit

from orthanc_events_bridge.errors import (
    EventRejectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)

#: About this one event.
_REJECTED: Final = frozenset({400, 413, 415, 422})
#: For the moment.
_PASSING: Final = frozenset({408, 425, 429})
#: Until a person has done something; so is every other one that isn't named here.
_REMEDIES: Final = {
    401: "check user, password or token, or give the bridge new ones",
    403: "let the bridge's user or token post there",
    404: "check the path in `url`",
    405: "check `url`: what is there takes no POST",
    407: "do without the proxy, or take one that asks for no password",
    409: "let the receiver answer 2xx to an event that it has already",
    410: "the receiver wants no events any more: remove the transport, or change `url`",
}


def problem(status: int, headers: Mapping[str, str], url: str, size: int) -> TransportError | None:
    """Which error an answer is; none for 2xx.

    :param headers: of the answer, names in lower case or in any.
    :param url: the address, which is shown, without a query.
    :param size: of the event, in bytes.
    """
    if 200 <= status < 300:
        return None
    said = f"the webhook at {url} answered {spelt(status)}"
    if status in _REJECTED:
        return EventRejectedError(f"{said} to an event of {size} bytes", "see the receiver's log for what is wrong")
    if status in _PASSING or status >= 500:
        wait = retry_after(headers)
        when = f" in {wait:.0f} s, as the receiver asks for" if wait else ""
        return RefusedError(said, f"it is sent again by itself{when}; see the receiver's log", wait)
    if 300 <= status < 400:
        place = _place(url, headers.get("location", ""))
        return TransportConfigurationError(
            f"{said}: a redirect{place}, which is not followed", "write the right address into `url`"
        )
    return TransportConfigurationError(said, _REMEDIES.get(status, "see the receiver's log and its documentation"))


def spelt(status: int) -> str:
    """A status with its name, where it has one: the receiver's own words may be anything."""
    try:
        return f"{status} ({HTTPStatus(status).phrase})"
    except ValueError:
        return str(status)


def _place(url: str, location: str) -> str:
    """Where a redirect leads, without what may be a secret."""
    try:
        parts = urlsplit(urljoin(url, location))
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return ""
    place = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
    return f" to {place}" if location and parts.hostname and place.isascii() and place.isprintable() else ""


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The seconds that a receiver asks us to wait: RFC 9110, section 10.2.3, both forms.

    A date is compared with the answer's own ``Date``, so that it doesn't matter whether our clocks agree.

    :return: 0 where it has passed; none where nothing, or nothing legible, was said.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])  # longer than anyone waits
    date = _date(value)
    if date is None:
        return None
    return max(0.0, (date - (_date(headers.get("date", "")) or now or datetime.now(UTC))).total_seconds())


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
