"""TLS as the options ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Protocol

from orthanc_events_bridge.errors import TransportConfigurationError


class Certificates(Protocol):
    """PEM files: whom to trust, and who we are."""

    @property
    def ca_file(self) -> Path | None: ...

    @property
    def cert_file(self) -> Path | None: ...

    @property
    def key_file(self) -> Path | None: ...


def client_context(tls: Certificates, broker: str, block: str = "tls.") -> ssl.SSLContext:
    """Read the certificates, now, so that replaced ones are used.

    :param broker: its name for the message.
    :param block: what stands before the options' names.
    :raises TransportConfigurationError: they can't be used.
    """
    option = f"{block}ca_file"
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file and tls.key_file:
            option = f"{block}cert_file and {block}key_file"
            # Without a password of ours OpenSSL would ask for one on the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except OSError as error:  # with it ssl.SSLError
        reason = error.strerror if not isinstance(error, ssl.SSLError) else error.reason
        raise TransportConfigurationError(
            f"{broker}: {option} can't be used: {reason or 'no certificate or key in it'}",
            "give PEM files that our user can read, the key not encrypted",
        ) from error
    return context


def cut(writer: asyncio.StreamWriter) -> None:
    """End a connection at once, whatever the other end has not taken."""
    # Python before 3.11.4 forgets the protocol of a TLS connection that has ended by itself.
    with contextlib.suppress(AttributeError):
        writer.transport.abort()
