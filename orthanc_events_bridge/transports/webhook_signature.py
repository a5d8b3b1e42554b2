"""Signatures in the manner of Standard Webhooks (https://www.standardwebhooks.com), version 1: symmetric."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Final

from orthanc_events_bridge.errors import TransportConfigurationError

_PREFIX: Final = "whsec_"


def keys(text: str, place: str) -> tuple[bytes, ...]:
    """The keys in a secret: one per line, ``whsec_`` and base64, or text that is the key itself.

    :param place: what to call it in a message.
    :raises TransportConfigurationError: there is none in it, or one is no base64.
    """
    found = tuple(_key(line.strip(), place) for line in text.splitlines() if line.strip())
    if not found:
        raise TransportConfigurationError(f"{place} holds no secret", "write one per line into it")
    return found


def _key(line: str, place: str) -> bytes:
    if not line.startswith(_PREFIX):
        return line.encode()
    try:
        key = base64.b64decode(line.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:  # outside of the handler: its exception would be chained
        raise TransportConfigurationError(
            f"{place} holds a secret that begins with {_PREFIX} and does not go on with base64",
            "copy it again from where it was made, or leave the beginning out if it is plain text",
        )
    return key


def sign(keys: tuple[bytes, ...], identifier: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``: one signature for each key.

    :param identifier: ``webhook-id``.
    :param timestamp: ``webhook-timestamp``: of this attempt, in seconds since 1970.
    """
    content = b"%b.%d.%b" % (identifier.encode(), timestamp, body)
    digests = (hmac.digest(key, content, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
