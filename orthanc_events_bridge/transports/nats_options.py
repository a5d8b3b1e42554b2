"""The options of NATS."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from orthanc_events_bridge.transports.options import Tls, TransportOptions, one_way_to_log_in, user_with_password
from orthanc_events_bridge.values import Duration, FileName, Options, Place, Size, format_duration, mistake

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError


def _token(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]{1,255}", value) is None:
        raise mistake("can't be used as a name in NATS", "use letters, digits, `_` and `-` only", shown=value)
    return value


def _subject(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", value) is None:
        raise mistake(
            "can't be used as the beginning of a subject",
            "use letters, digits, `_` and `-`, with single dots between the parts",
            shown=value,
        )
    return value


def _nats_url(value: str) -> str:
    right = "write nats://HOST:PORT, or tls://HOST:PORT to insist on TLS"
    # What stands before an @ may be a password, so that such a value is never shown.
    shown = None if "@" in value else value
    if "@" in value:
        raise mistake(
            "holds credentials, which would show up in logs",
            "leave them out of the URL, and give them as user and password_file, or as token_file",
        )
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        raise mistake("is no URL of a NATS server", right, shown=shown) from None
    if url.scheme in ("ws", "wss"):
        raise mistake("is a WebSocket's URL, which this transport doesn't speak", right, shown=shown)
    if url.scheme not in ("nats", "tls") or not url.hostname or re.search(r"[\s,]", value) or port == 0:
        raise mistake("is no URL of a NATS server", right, shown=shown)
    if url.path not in ("", "/") or url.query or url.fragment:
        raise mistake("has more behind the port than a NATS server's URL can have", right, shown=shown)
    return value


class NatsTls(Tls):
    """TLS to the server. Certificates are read when connecting, so that they can be replaced in place."""

    handshake_first: bool = Field(
        default=False,
        description="Begin with the TLS handshake, for servers with `handshake_first: true`.",
    )


class NatsLimits(Options):
    """How much the stream keeps. What a full stream refuses waits in the outbox: nothing is evicted silently.

    When the bridge declares the stream these are its settings; a stream that exists with others is reported.
    """

    max_age: Annotated[float, Duration(minimum=1, zero="unlimited")] = Field(
        default=30 * 86400.0,
        description="How long an event is kept. 0: unlimited.",
        examples=["30d"],
    )
    max_bytes: Annotated[int, Size(minimum=64 * 1024, zero="unlimited")] = Field(
        default=10 * 1024**3,
        description="How large the stream can grow. NATS sets this much of its storage aside and refuses a "
        "stream for which it hasn't enough. 0: unlimited.",
        examples=["10GiB"],
    )
    max_messages: int = Field(default=0, ge=0, description="How many events are kept. 0: unlimited.")
    replicas: int = Field(
        default=1, ge=1, le=5, description="On how many servers of a NATS cluster each event is stored."
    )
    storage: Literal["file", "memory"] = Field(
        default="file",
        description="Where the server stores events. What is in `memory` is gone when the server stops.",
    )
    duplicate_window: Annotated[float, Duration(minimum=0.1)] = Field(
        default=600.0,
        description="How long the server remembers events' ids, to drop an event that is sent again after "
        "a lost acknowledgement. Not longer than `max_age`.",
        examples=["10m"],
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """NATS refuses a stream that forgets an event before its id."""
        if 0 < self.max_age < self.duplicate_window:
            yield (
                ("duplicate_window",),
                mistake(
                    f"is longer than max_age ({format_duration(self.max_age)}), which NATS refuses",
                    "make duplicate_window as long as max_age at most",
                    shown=format_duration(self.duplicate_window),
                ),
            )


class NatsOptions(TransportOptions):
    """NATS with JetStream. Each event is confirmed by the stream before it counts as sent.

    At most one way to log in: `user` with a password, a token, an NKey seed, or a credentials file.
    """

    type: Literal["nats"] = Field(default="nats", description="`nats`.")
    servers: tuple[Annotated[str, AfterValidator(_nats_url)], ...] = Field(
        min_length=1,
        description="URLs of the servers of one NATS system, `nats://` or `tls://`, port 4222 if none is "
        "given. Without credentials.",
        examples=[["nats://127.0.0.1:4222"]],
    )
    stream: Annotated[str, AfterValidator(_token)] = Field(
        default="ORTHANC_EVENTS", description="Name of the JetStream stream."
    )
    subject_prefix: Annotated[str, AfterValidator(_subject)] = Field(
        default="orthanc.events",
        description="Beginning of every subject: `{subject_prefix}.{site}.{level}.{verb}.{partition}`.",
    )
    inbox_stream: Annotated[str, AfterValidator(_token)] = Field(
        default="ORTHANC_EVENTS_INBOX",
        description="Name of the JetStream stream with the inboxes of all consumers: what is sent to one of them alone "
        "(`orthanc-events replay`). It is made when it is first needed; an event stays in it until its consumer "
        "has acknowledged it, or for `limits.max_age`.",
    )
    inbox_prefix: Annotated[str, AfterValidator(_subject)] = Field(
        default="orthanc.inbox",
        description="Beginning of the subject of an inbox: `{inbox_prefix}.{consumer}`.",
    )
    inbox_max_bytes: Annotated[int, Size(minimum=64 * 1024, zero="unlimited")] = Field(
        default=1024**3,
        description="How large all inboxes together can grow. A full stream refuses: a replay then waits. NATS sets "
        "this much of its storage aside. 0: unlimited.",
        examples=["1GiB"],
    )
    dead_stream: Annotated[str, AfterValidator(_token)] = Field(
        default="ORTHANC_EVENTS_DEAD",
        description="Name of the JetStream stream with the dead letters of all consumers. It is made when it is first "
        "needed; a dead letter stays in it until somebody removes it (`orthanc-events dlq`).",
    )
    dead_prefix: Annotated[str, AfterValidator(_subject)] = Field(
        default="orthanc.dead",
        description="Beginning of the subject of dead letters: `{dead_prefix}.{consumer}`.",
    )
    dead_max_bytes: Annotated[int, Size(minimum=64 * 1024, zero="unlimited")] = Field(
        default=1024**3,
        description="How large all dead letters together can grow. A full stream refuses: consumers then hold what "
        "they can't put there. NATS sets this much of its storage aside. 0: unlimited.",
        examples=["1GiB"],
    )
    declare: bool = Field(
        default=True,
        description="Make the streams if they are missing. `false`: only check that they are there and fit.",
    )
    on_recreate: Literal["replay", "continue"] = Field(
        default="replay",
        description="What to do when the stream was deleted and made again: `replay` sends everything that "
        "the outbox still keeps, `continue` goes on where it was.",
    )
    limits: NatsLimits = Field(default_factory=NatsLimits, description="How much the stream keeps.")
    user: str | None = Field(default=None, description="User name. Needs a password.", examples=["orthanc"])
    password: SecretStr | None = Field(default=None, description="Password of `user`.", examples=["${NATS_PASSWORD}"])
    password_file: FileName | None = Field(
        default=None, description="File with the password of `user`.", examples=["/run/secrets/nats-password"]
    )
    token: SecretStr | None = Field(default=None, description="Token.", examples=["${NATS_TOKEN}"])
    token_file: FileName | None = Field(
        default=None, description="File with the token.", examples=["/run/secrets/nats-token"]
    )
    nkey_seed: SecretStr | None = Field(
        default=None, description="Seed of an NKey (`SU…`).", examples=["${NATS_NKEY_SEED}"]
    )
    nkey_seed_file: FileName | None = Field(
        default=None, description="File with the seed of an NKey.", examples=["/run/secrets/nats.nk"]
    )
    credentials_file: FileName | None = Field(
        default=None,
        description="Credentials file (`.creds`) with a JWT and its seed, as `nsc` writes it.",
        examples=["/run/secrets/orthanc.creds"],
    )
    tls: NatsTls = Field(default_factory=NatsTls, description="TLS to the server.")
    connect_timeout: Annotated[float, Duration(minimum=0.1, maximum=60)] = Field(
        default=5.0, description="How long an attempt to connect to one server can take."
    )
    ack_timeout: Annotated[float, Duration(minimum=0.1, maximum=60)] = Field(
        default=5.0,
        description="How long the stream can take to confirm an event, before the event is sent again.",
    )
    batch: int = Field(default=500, ge=1, le=10000, description="How many events can be under way, not confirmed yet.")

    @property
    def tls_required(self) -> bool:
        """Whether a connection without TLS is refused."""
        if self.tls.enabled is not None:
            return self.tls.enabled
        return self.tls != NatsTls() or any(server.startswith("tls://") for server in self.servers)

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """At most one way to log in, and a whole one."""
        yield from super().conflicts(given)
        ways = (
            ("user", "password", "password_file"),
            ("token", "token_file"),
            ("nkey_seed", "nkey_seed_file"),
            ("credentials_file",),
        )
        yield from one_way_to_log_in(
            given, ways, "keep one of them: user with a password, token, nkey_seed, or credentials_file"
        )
        yield from user_with_password(given)
        tls, servers = given.get("tls"), given.get("servers")
        if isinstance(tls, Mapping) and tls.get("enabled") is False and isinstance(servers, list | tuple):
            for number, server in enumerate(servers):
                if isinstance(server, str) and server.startswith("tls://"):
                    yield (
                        ("servers", number),
                        mistake(
                            "{0} insists on TLS, and {1} forbids it",
                            "write nats://, or leave tls.enabled out",
                            options=(("servers", number), ("tls", "enabled")),
                        ),
                    )
