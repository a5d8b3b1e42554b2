"""What the NATS tests share: transports to a server, keys and JWTs, and a server that only listens."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nkeys

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.testing.servers import NatsServer, require
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.nats import NatsTransport
from orthanc_events_bridge.transports.nats_options import NatsOptions
from tests.contract.harness import check_text, run

#: Small enough for every account here.
LIMITS = {"max_bytes": 2**20}


def nats_server(folder: Path, config: str = "") -> NatsServer:
    """A server with this configuration; starting it takes a few hundredths of a second."""
    require("nats-server")
    return NatsServer(folder / f"nats{time.monotonic_ns()}", config=config)


def nats_transport(*servers: NatsServer | str, **options: Any) -> NatsTransport:
    """A transport to them."""
    urls = [one if isinstance(one, str) else one.url for one in servers]
    defaults: dict[str, Any] = {"connect_timeout": 10, "ack_timeout": 10, "limits": LIMITS}
    return NatsTransport(NatsOptions.model_validate({"servers": urls, **defaults, **options}))


def refusal(
    transport: NatsTransport,
    kind: type[TransportError] | tuple[type[TransportError], ...],
    work: Coroutine[Any, Any, object] | None = None,
    *,
    within: float = 10.0,
) -> str:
    """The text of the error with which connecting, or other work, must fail soon. Closes the transport."""

    async def main() -> TransportError:
        try:
            await (work or transport.connect())
        except TransportError as error:
            return error
        finally:
            await transport.close()
        raise AssertionError(f"no {kind}")

    began = time.monotonic()
    error = run(main())
    seconds = time.monotonic() - began
    actual = error.error if isinstance(error, PublishError) else error
    assert type(actual) in (kind if isinstance(kind, tuple) else (kind,)), repr(actual)
    assert seconds < within, f"{seconds:.1f} s: {error}"
    assert actual.remedy, f"doesn't say what to do: {error}"
    assert "nats" in str(error).lower(), f"doesn't name the broker: {error}"
    check_text(error)
    return str(error)


# Keys.


class Key:
    """An NKey.

    :param kind: `nkeys.PREFIX_BYTE_USER` and the like.
    """

    def __init__(self, kind: int) -> None:
        self.seed: str = nkeys.encode_seed(os.urandom(32), kind).decode()
        self.public: str = self._pair().public_key.decode()

    def _pair(self) -> Any:
        return nkeys.from_seed(bytearray(self.seed.encode()))

    def sign(self, name: str, subject: Key, kind: str, claims: dict[str, Any], expires: int | None = None) -> str:
        """A JWT of NATS, version 2, about a key, signed by this one."""
        body = {
            "jti": os.urandom(8).hex(),
            "iat": int(time.time()),
            "iss": self.public,
            "name": name,
            "sub": subject.public,
            "nats": {"type": kind, "version": 2, **claims},
            **({} if expires is None else {"exp": expires}),
        }
        parts = [_base64(json.dumps(one).encode()) for one in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)]
        text = ".".join(parts)
        return f"{text}.{_base64(self._pair().sign(text.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


_ACCOUNT = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
_JETSTREAM = ("mem_storage", "disk_storage", "streams", "consumer")


class Operator:
    """An operator with one account, as `nsc` would make them; what the server has to know, and users."""

    def __init__(self, **limits: int) -> None:
        self._account = Key(nkeys.PREFIX_BYTE_ACCOUNT)
        operator, system = Key(nkeys.PREFIX_BYTE_OPERATOR), Key(nkeys.PREFIX_BYTE_ACCOUNT)
        everything = {"limits": dict.fromkeys(_ACCOUNT + _JETSTREAM, -1) | {"wildcards": True} | limits}
        system_limits = {"limits": dict.fromkeys(_ACCOUNT, -1)}
        claims = operator.sign("operator", operator, "operator", {"system_account": system.public})
        self.config = "\n".join(
            [
                f"operator: {claims}",
                f"system_account: {system.public}",
                "resolver: MEMORY",
                "resolver_preload: {",
                f"  {system.public}: {operator.sign('SYS', system, 'account', system_limits)}",
                f"  {self._account.public}: {operator.sign('PACS', self._account, 'account', everything)}",
                "}",
            ]
        )

    def credentials(self, *, expires: int | None = None, **claims: Any) -> str:
        """A credentials file of a new user of the account."""
        user = Key(nkeys.PREFIX_BYTE_USER)
        claims = {"subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}} | claims
        jwt = self._account.sign("bridge", user, "user", claims, expires)
        return credentials(jwt, user.seed)


def credentials(jwt: str, seed: str) -> str:
    """What `nsc generate creds` writes."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\n"
        "NKEY Seed printed below can be used to sign and prove identity.\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


# A server that only listens.


@dataclass
class Heard:
    """What clients said to it."""

    port: int
    data: bytes = b""

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def holds(self, *texts: str) -> bool:
        return all(text.encode() in self.data for text in texts)


@contextmanager
def listener(**info: object) -> Iterator[Heard]:
    """Introduces itself as NATS, answers a PING, and keeps all that it hears."""
    greeting: Mapping[str, object] = {
        "server_id": "FAKE",
        "version": "2.15.0",
        "max_payload": 65536,
        "headers": True,
        "auth_required": True,
        "nonce": "ABCDEFGHIJKLMNO",
        **info,
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard = Heard(server.getsockname()[1])

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"INFO " + json.dumps(greeting).encode() + b"\r\n")
                while data := connection.recv(65536):
                    heard.data += data
                    if b"PING" in data:
                        connection.sendall(b"PONG\r\n")

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threads.append(threading.Thread(target=serve, args=server.accept()[:1], daemon=True))
                    threads[-1].start()

        threads = [threading.Thread(target=accept, daemon=True)]
        threads[0].start()
        yield heard
        server.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
