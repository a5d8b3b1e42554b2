"""Who we are to a NATS server: TLS and credentials, read anew for each connection.

nats-py 2.16 reads a credentials file without its markers for ever; so it is read here.
"""

from __future__ import annotations

import re
import ssl
from typing import Any, Final

from nats.aio.client import RawCredentials

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.tls import client_context

_CREDENTIALS: Final = re.compile(
    r"-+BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT-+.*"
    r"-+BEGIN USER NKEY SEED-+\s+(\S+)\s+-+END USER NKEY SEED-+",
    re.DOTALL,
)


def tls_of(options: NatsOptions) -> ssl.SSLContext | None:
    """What TLS is spoken with; none where it isn't asked for.

    :raises TransportConfigurationError: a file can't be read.
    """
    return client_context(options.tls, "NATS") if options.tls_required else None


def login_of(options: NatsOptions) -> dict[str, Any]:
    """Credentials, as nats-py's `Client.connect` takes them. They are read now, so that rotated ones are used.

    :raises TransportConfigurationError: they can't be read.
    """
    if (password := options.secret("password")) is not None:
        return {"user": options.user, "password": password}
    if (token := options.secret("token")) is not None:
        return {"token": token}
    if (seed := options.secret("nkey_seed")) is not None:
        _check_seed(seed, "nkey_seed")
        return {"nkeys_seed_str": seed}
    if options.credentials_file is None:
        return {}
    try:
        text = options.credentials_file.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise TransportConfigurationError(
            f"NATS: credentials_file can't be read: {reason}",
            "put the file there, and let our user read it",
        ) from None
    found = _CREDENTIALS.search(text)
    if found is None:
        raise TransportConfigurationError(
            "NATS: credentials_file holds no user JWT with its seed", "write it with `nsc generate creds`"
        )
    _check_seed(found[2], "credentials_file")
    return {
        "user_credentials": RawCredentials(
            f"-----BEGIN NATS USER JWT-----\n{found[1]}\n------END NATS USER JWT------\n"
            f"-----BEGIN USER NKEY SEED-----\n{found[2]}\n------END USER NKEY SEED------\n"
        )
    }


def _check_seed(seed: str, option: str) -> None:
    try:
        import nkeys
    except ImportError as error:
        raise TransportConfigurationError(
            "NATS: NKeys and credentials files need one more package",
            'pip install "orthanc-events-bridge[nkeys]"',
        ) from error
    try:
        nkeys.from_seed(bytearray(seed.strip().encode())).wipe()
    except Exception:  # whatever it raises; it is not chained, since it may hold the seed
        raise TransportConfigurationError(
            f"NATS: {option} holds no seed of an NKey", "a user's seed begins with SU"
        ) from None
