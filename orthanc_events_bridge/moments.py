"""Moments as text, and back: RFC 3339. Standard library only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal


def iso(milliseconds: float, until: Literal["milliseconds", "seconds"] = "milliseconds") -> str:
    """Milliseconds since the epoch as RFC 3339, UTC.

    :param until: how exactly; what is beyond is cut off.
    """
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec=until).replace("+00:00", "Z")


def seconds_of(text: str) -> float | None:
    """The reverse, in seconds since the epoch; none for what is no such text. Without an offset it is taken as UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
