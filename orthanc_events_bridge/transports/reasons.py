"""Why there is no answer over HTTP, in words that may be shown. Imports no client."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator, Sequence


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it comes from."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:
                yield from causes(one)
            return
        error = error.__cause__ or error.__context__


def tls_failure(chain: Sequence[BaseException]) -> str:
    """Why TLS could not be agreed on; empty where it is something else that failed."""
    for one in chain:
        # The end of a connection is an SSLError too.
        if isinstance(one, ssl.SSLError) and not isinstance(one, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return _plain(getattr(one, "verify_message", "") or one.reason or "no reason given")
    return ""


def reason(chain: Sequence[BaseException]) -> str:
    """What the system says of it; asyncio's own words would name the address once more."""
    for one in chain:
        if isinstance(one, socket.gaierror):
            return _plain(one.strerror or "its name is not known")
        if isinstance(one, OSError) and one.errno:
            return os.strerror(one.errno)
    return type(chain[-1]).__name__


def _plain(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable()).strip().rstrip(".")
