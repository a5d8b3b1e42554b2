"""The options of RabbitMQ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, SecretStr

from orthanc_events_bridge.transports.options import Tls, TransportOptions, user_with_password
from orthanc_events_bridge.values import Duration, FileName, Options, Place, Size, format_size, mistake

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError


_SEGMENT: Final = 100 * 1024**2
_LARGEST_SEGMENT: Final = 3_000_000_000


def _name(value: str) -> str:
    # AMQP's short strings have 255 bytes, and names that begin with amq. are the server's.
    if re.fullmatch(r"[A-Za-z0-9_.:-]{1,200}", value) is None or value.startswith("amq."):
        raise mistake(
            "can't be used as a name in RabbitMQ",
            "use letters, digits, `_`, `.`, `:` and `-` only, and don't begin with `amq.`",
            shown=value,
        )
    return value


def _prefix(value: str) -> str:
    if len(value) > 100:  # a consumer's name of up to 128 characters stands behind it
        raise mistake("is too long for a name in RabbitMQ", "use at most 100 characters", shown=value)
    return _name(value)


def _amqp_url(value: str) -> str:
    right = "write amqp://HOST:PORT, or amqps://HOST:PORT for TLS, with /VHOST behind it where it is not /"
    # What stands before an @ may be a password, so that such a value is never shown.
    shown = None if "@" in value else value
    if "@" in value:
        raise mistake(
            "holds credentials, which would show up in logs",
            "leave them out of the URL, and give them as user and password_file",
        )
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        raise mistake("is no URL of a RabbitMQ server", right, shown=shown) from None
    if url.scheme not in ("amqp", "amqps") or not url.hostname or re.search(r"[\s,]", value) or port == 0:
        raise mistake("is no URL of a RabbitMQ server", right, shown=shown)
    if url.query or url.fragment or "/" in url.path[1:]:
        raise mistake(
            "has more behind the port than the name of a virtual host",
            "write a slash in that name as %2F, and give everything else as options",
            shown=shown,
        )
    return value


class RabbitTls(Tls):
    """TLS to the server. Certificates are read when connecting, so that they can be replaced in place."""

    enabled: bool | None = Field(
        default=None,
        description="`true` insists on TLS, `false` forbids it. Left out: TLS is used if a server's URL begins "
        "with `amqps://` or another option of this block is given.",
    )


class RabbitLimits(Options):
    """How much is kept. A full history drops its oldest events, and full dead letters refuse new ones; the queues of
    others have limits of their own.

    What is made is made with these settings; what exists with others is reported.
    """

    max_age: Annotated[float, Duration(minimum=1, zero="unlimited")] = Field(
        default=30 * 86400.0,
        description="How long an event is kept, in whole seconds. 0: unlimited.",
        examples=["30d"],
    )
    max_bytes: Annotated[int, Size(minimum=1024**2, zero="unlimited")] = Field(
        default=10 * 1024**3,
        description="How large the history can grow. 0: unlimited.",
        examples=["10GiB"],
    )
    segment_bytes: Annotated[int | None, Size(minimum=64 * 1024)] = Field(
        default=None,
        description="Size of the files that the history is made of. RabbitMQ drops whole files only, and never the "
        "last one: this much can be there beyond the two limits. Left out: a tenth of `max_bytes`, 100MiB at most.",
        examples=["100MiB"],
    )

    dead_letters: int = Field(
        default=50_000,
        ge=1,
        le=65_535,
        description="How many dead letters a consumer can have. Further ones are refused, and the consumer holds what "
        "it could not handle until some are removed.",
    )

    @property
    def segment(self) -> int:
        """The size of those files, in bytes."""
        return self.segment_bytes or min(self.max_bytes // 10 or _SEGMENT, _SEGMENT)

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """RabbitMQ takes segments of up to 3 GB, and drops nothing while there is only one."""
        size = self.segment
        if size > _LARGEST_SEGMENT:
            yield (
                ("segment_bytes",),
                mistake("is more than RabbitMQ takes", "the most is 3GB", shown=size),
            )
        elif 0 < self.max_bytes < size:
            yield (
                ("segment_bytes",),
                mistake(
                    f"is larger than max_bytes ({format_size(self.max_bytes)}), which could then not be kept to",
                    "make segment_bytes as large as max_bytes at most, or leave it out",
                    shown=format_size(size),
                ),
            )


class RabbitOptions(TransportOptions):
    """RabbitMQ, from 3.10 on, by AMQP 0.9.1. Each event is confirmed by every queue that takes it before it counts
    as sent.

    Two ways to log in: `user` with a password, or the client certificate with `auth: external`. With neither it is
    RabbitMQ's own `guest`, which a server takes from its own machine only.
    """

    type: Literal["rabbitmq"] = Field(default="rabbitmq", description="`rabbitmq`.")
    servers: tuple[Annotated[str, AfterValidator(_amqp_url)], ...] = Field(
        min_length=1,
        description="URLs of the servers of one RabbitMQ cluster, `amqp://` or `amqps://`, port 5672 (with TLS 5671) "
        "if none is given, and behind it the virtual host, `/` if none is given. Without credentials. They are tried "
        "in turn, beginning with the one that worked last.",
        examples=[["amqp://127.0.0.1:5672"]],
    )
    exchange: Annotated[str, AfterValidator(_name)] = Field(
        default="orthanc.events",
        description="Name of the durable topic exchange. The routing key is `{site}.{level}.{verb}.{partition}`.",
    )
    history: Annotated[str, AfterValidator(_name)] = Field(
        default="orthanc.events.history",
        description="Name of the stream queue that keeps every event for a while, so that none is unroutable and all "
        "can be read again.",
    )
    inbox_prefix: Annotated[str, AfterValidator(_prefix)] = Field(
        default="orthanc.inbox",
        description="Beginning of the name of a consumer's inbox, `{inbox_prefix}.{consumer}`: the quorum queue of "
        "what is sent to this consumer alone (`orthanc-events replay`), and of what it gets again. It is made "
        "when it is first needed.",
    )
    dead_prefix: Annotated[str, AfterValidator(_prefix)] = Field(
        default="orthanc.dead",
        description="Beginning of the name of a consumer's dead letters, `{dead_prefix}.{consumer}`: the quorum queue "
        "of what it could not handle. It is made when it is first needed.",
    )
    declare: bool = Field(
        default=True,
        description="Make the exchange, the history and consumers' queues if they are missing. `false`: only check "
        "that they are there.",
    )
    on_recreate: Literal["replay", "continue"] = Field(
        default="replay",
        description="What to do when the history was deleted and made again: `replay` sends everything that the outbox "
        "still keeps, `continue` goes on where it was. RabbitMQ doesn't tell when a queue was made: it is noticed if "
        "the bridge was connected when it was deleted, or has made it again itself.",
    )
    limits: RabbitLimits = Field(default_factory=RabbitLimits, description="How much is kept.")
    auth: Literal["plain", "external"] = Field(
        default="plain",
        description="How to log in. `plain`: with user and password. `external`: with the certificate in `tls`; the "
        "server needs its plugin `rabbitmq_auth_mechanism_ssl` for that.",
    )
    user: str | None = Field(default=None, description="User name. Needs a password.", examples=["orthanc"])
    password: SecretStr | None = Field(default=None, description="Password of `user`.", examples=["${RABBIT_PASSWORD}"])
    password_file: FileName | None = Field(
        default=None, description="File with the password of `user`.", examples=["/run/secrets/rabbitmq-password"]
    )
    tls: RabbitTls = Field(default_factory=RabbitTls, description="TLS to the server.")
    connect_timeout: Annotated[float, Duration(minimum=0.1, maximum=60)] = Field(
        default=5.0, description="How long an attempt to connect to one server can take."
    )
    ack_timeout: Annotated[float, Duration(minimum=0.1, maximum=60)] = Field(
        default=5.0,
        description="How long the queues can take to confirm an event, before the event is sent again.",
    )
    consumer_timeout: Annotated[float, Duration(minimum=60)] = Field(
        default=1800.0,
        description="The server's own `consumer_timeout`, where it was raised in its `rabbitmq.conf`: for so long a "
        "consumer may hold an event. It sets nothing. RabbitMQ 4 asks the queues that are made here instead, and they "
        "say a day.",
        examples=["1h"],
    )
    batch: int = Field(default=500, ge=1, le=10000, description="How many events can be under way, not confirmed yet.")

    @property
    def tls_required(self) -> bool:
        """Whether TLS is used: AMQP has no way to agree on it."""
        if self.tls.enabled is not None:
            return self.tls.enabled
        return self.tls != RabbitTls() or any(server.startswith("amqps://") for server in self.servers)

    def address(self, server: str) -> tuple[str, int, str]:
        """Host, port and virtual host of one of the servers."""
        url = urlsplit(server)
        assert url.hostname is not None
        return url.hostname, url.port or (5671 if self.tls_required else 5672), unquote(url.path[1:]) or "/"

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """One way to log in, and a whole one; and no two minds about TLS."""
        yield from super().conflicts(given)
        external, tls, servers = given.get("auth") == "external", given.get("tls"), given.get("servers")
        if external:
            for option in ("user", "password", "password_file"):
                if option in given:
                    yield (
                        (option,),
                        mistake(
                            "{0} and {1} are two ways to log in",
                            "keep one of them: user with a password, or auth: external with tls.cert_file",
                            options=(("auth",), (option,)),
                        ),
                    )
            if not isinstance(tls, Mapping) or tls.get("cert_file") is None:
                yield ("auth",), mistake("needs a client certificate", "give tls.cert_file and tls.key_file too")
        else:
            yield from user_with_password(given)
        if isinstance(tls, Mapping) and tls.get("enabled") is False and isinstance(servers, list | tuple):
            for number, server in enumerate(servers):
                if isinstance(server, str) and server.startswith("amqps://"):
                    yield (
                        ("servers", number),
                        mistake(
                            "{0} insists on TLS, and {1} forbids it",
                            "write amqp://, or leave tls.enabled out",
                            options=(("servers", number), ("tls", "enabled")),
                        ),
                    )
