"""What each answer of a webhook means, and how long a receiver asks us to wait."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus

import pytest

from orthanc_events_bridge.errors import (
    EventRejectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.webhook_answers import problem, retry_after, spelt

URL = "https://hook.example.org/orthanc"


def test_2xx_is_a_confirmation() -> None:
    assert [status for status in range(100, 600) if problem(status, {}, URL, 5) is None] == list(range(200, 300))


#: Whatever isn't named in the issue waits for a person: it must neither be lost nor set aside.
KINDS: dict[int, type[TransportError]] = {
    **dict.fromkeys((400, 413, 415, 422), EventRejectedError),
    **dict.fromkeys((408, 425, 429), RefusedError),
    **dict.fromkeys(range(500, 600), RefusedError),
}


@pytest.mark.parametrize(
    "status", sorted({*HTTPStatus, 101, 299, 399, 418, 451, 499, 507, 520, 599} - {*range(200, 300)})
)
def test_each_status(status: int) -> None:
    error = problem(status, {}, URL, 1234)
    assert type(error) is KINDS.get(status, TransportConfigurationError)
    assert error is not None
    assert error.remedy
    assert URL in error.message and str(status) in error.message and "webhook" in error.message
    assert ("1234 bytes" in error.message) == isinstance(error, EventRejectedError)


def test_names_are_ours() -> None:
    assert spelt(404) == "404 (Not Found)"
    assert spelt(520) == "520"


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://other.example.org:8443/x?token=canary#canary", " to https://other.example.org:8443/x"),
        ("https://canary:canary@other.example.org/", " to https://other.example.org/"),
        ("/login", " to https://hook.example.org/login"),
        ("?token=canary", " to https://hook.example.org/orthanc"),
        ("", ""),
        ("https://[canary", ""),
        ("https://other.example.org:canary/", ""),
        ("/can\x1b[2Jary", ""),
        ("/\u202ecanary", ""),
    ],
)
def test_redirect_names_the_place_without_what_may_be_a_secret(location: str, shown: str) -> None:
    error = problem(308, {"location": location}, URL, 5)
    assert type(error) is TransportConfigurationError
    assert (
        error.message
        == f"the webhook at {URL} answered 308 (Permanent Redirect): a redirect{shown}, which is not followed"
    )
    assert "canary" not in str(error)


NOW = datetime(1994, 11, 6, 8, 49, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("9" * 400, 999999999.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 37.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 37.0),  # the two forms that RFC 9110 calls obsolete, and asks us to take
        ("Sun Nov  6 08:49:37 1994", 37.0),
        ("Sun, 06 Nov 1994 08:48:37 GMT", 0.0),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
        ("Sun, 99 Nov 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 99999999999 08:49:37 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}, NOW) == seconds


def test_a_date_is_compared_with_the_receivers_own_clock() -> None:
    headers = {"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT", "date": "Sun, 06 Nov 1994 08:49:27 GMT"}
    assert retry_after(headers, datetime.now(UTC)) == 10.0


@pytest.mark.parametrize(("status", "wait"), [(429, 7.0), (503, 7.0), (500, 7.0), (408, 7.0)])
def test_refusal_carries_the_wait(status: int, wait: float) -> None:
    error = problem(status, {"retry-after": "7"}, URL, 5)
    assert isinstance(error, RefusedError)
    assert error.retry_after == wait
    # A message that changes each time would look like another fault each time.
    again = problem(status, {"retry-after": "6"}, URL, 5)
    assert again is not None and again.message == error.message
    assert "7 s" in error.remedy


def test_refusal_without_a_wait() -> None:
    error = problem(503, {}, URL, 5)
    assert isinstance(error, RefusedError) and error.retry_after is None
