"""The options of Kafka."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr

from orthanc_events_bridge.transports.options import Tls, TransportOptions
from orthanc_events_bridge.values import Duration, FileName, Options, Place, Size, mistake

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError

#: Kafka's own port.
_PORT = 9092


def _server(value: str) -> str:
    right = "write HOST:PORT; TLS and a login are options of their own (tls, sasl)"
    if "@" in value:  # what stands before it may be a password, so that such a value is never shown
        raise mistake("holds credentials, which would show up in logs", right)
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::(\d{1,5}))?", value)
    if found is None or not 0 < int(found[2] or _PORT) < 65536:
        raise mistake("is no address of a Kafka server", right, shown=value)
    return value if found[2] else f"{value}:{_PORT}"


def _topic(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,249}", value) is None or value in (".", ".."):
        raise mistake("can't be used as a topic's name", "use letters, digits, `.`, `_` and `-` only", shown=value)
    return value


def _prefix(value: str) -> str:
    if len(value) > 120:  # a consumer's name of up to 128 characters stands behind it
        raise mistake("is too long for a topic's name", "use at most 120 characters", shown=value)
    return _topic(value)


class KafkaTls(Tls):
    """TLS to the servers. Certificates are read when connecting, so that they can be replaced in place."""

    enabled: bool | None = Field(
        default=None,
        description="Whether to use TLS, which a listener of Kafka either has or has not. Left out: TLS is used if "
        "another option of this block is given.",
    )
    server_hostname: str | None = Field(
        default=None,
        description="The name that every server's certificate must carry, if it is not the host that Kafka advertises.",
        examples=["kafka.example.org"],
    )


class KafkaLimits(Options):
    """How much the topic keeps. A full partition drops its oldest events: Kafka never refuses new ones for that.

    When the bridge declares the topic these are its settings; a topic that exists with others is reported.
    """

    max_age: Annotated[float, Duration(minimum=1, zero="unlimited")] = Field(
        default=30 * 86400.0,
        description="How long an event is kept, at least. 0: unlimited.",
        examples=["30d"],
    )
    max_bytes: Annotated[int, Size(minimum=1024**2, zero="unlimited")] = Field(
        default=160 * 1024**2,
        description="How large each partition can grow, before its oldest events are dropped, whether they are read "
        "or not. With 64 partitions, 160 MiB are 10 GiB in all. 0: unlimited.",
        examples=["160MiB"],
    )
    replicas: int = Field(
        default=1, ge=1, le=15, description="On how many servers of the cluster each event is stored. 3 in earnest."
    )
    min_insync_replicas: int | None = Field(
        default=None,
        ge=1,
        le=15,
        description="How many of the replicas must have an event before it counts as stored; with fewer of them there "
        "Kafka refuses. Left out: one less than `replicas`, so that one server can fail.",
    )

    @property
    def needed_replicas(self) -> int:
        """The topic's ``min.insync.replicas``."""
        return self.min_insync_replicas or max(1, self.replicas - 1)

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """More replicas can't be in step than there are."""
        if self.min_insync_replicas is not None and self.min_insync_replicas > self.replicas:
            yield (
                ("min_insync_replicas",),
                mistake(
                    f"is more than there are replicas ({self.replicas}), so that every event would be refused",
                    "make it one less than replicas",
                    shown=self.min_insync_replicas,
                ),
            )


class KafkaOptions(TransportOptions):
    """Apache Kafka, 3.1 or later. An event counts as sent when all replicas that are in step have stored it."""

    type: Literal["kafka"] = Field(default="kafka", description="`kafka`.")
    servers: tuple[Annotated[str, AfterValidator(_server)], ...] = Field(
        min_length=1,
        description="Servers of one Kafka cluster, `HOST:PORT`, port 9092 if none is given. They are tried in turn, "
        "and name the others.",
        examples=[["127.0.0.1:9092"]],
    )
    topic: Annotated[str, AfterValidator(_topic)] = Field(default="orthanc.events", description="Name of the topic.")
    partitions: int = Field(
        default=64,
        ge=1,
        le=64,
        description="How many partitions the topic has: so many consumers of one name can share its events and keep "
        "the order of each study. An event's partition is that of its key, 0 to 63, modulo this number.",
    )
    inbox_prefix: Annotated[str, AfterValidator(_prefix)] = Field(
        default="orthanc.inbox",
        description="Beginning of the name of a consumer's inbox, `{inbox_prefix}.{consumer}`: the topic of what is "
        "sent to this consumer alone (`orthanc-events replay`), and of what it gets again. It is made when it is "
        "first needed, with as many partitions as the topic.",
    )
    dead_prefix: Annotated[str, AfterValidator(_prefix)] = Field(
        default="orthanc.dead",
        description="Beginning of the name of the topic of a consumer's dead letters, `{dead_prefix}.{consumer}`. It "
        "is made when it is first needed, with one partition and `cleanup.policy=compact`: a dead letter is kept until "
        "somebody removes it.",
    )
    declare: bool = Field(
        default=True,
        description="Make the topics if they are missing. `false`: only check that they are there and fit.",
    )
    on_recreate: Literal["replay", "continue"] = Field(
        default="replay",
        description="What to do when the topic was deleted and made again: `replay` sends everything that "
        "the outbox still keeps, `continue` goes on where it was.",
    )
    limits: KafkaLimits = Field(default_factory=KafkaLimits, description="How much the topic keeps.")
    sasl: Literal["plain", "scram-sha-256", "scram-sha-512"] | None = Field(
        default=None,
        description="How to log in. Needs `user` and a password. `plain` shows the password to whoever listens where "
        "there is no TLS.",
        examples=["scram-sha-512"],
    )
    user: str | None = Field(default=None, description="User name. Needs `sasl`.", examples=["orthanc"])
    password: SecretStr | None = Field(default=None, description="Password of `user`.", examples=["${KAFKA_PASSWORD}"])
    password_file: FileName | None = Field(
        default=None, description="File with the password of `user`.", examples=["/run/secrets/kafka-password"]
    )
    tls: KafkaTls = Field(default_factory=KafkaTls, description="TLS to the servers.")
    connect_timeout: Annotated[float, Duration(minimum=0.1, maximum=60)] = Field(
        default=5.0, description="How long an attempt to connect to one server, or a question to it, can take."
    )
    ack_timeout: Annotated[float, Duration(minimum=0.1, maximum=60)] = Field(
        default=5.0,
        description="How long Kafka can take to confirm an event, before the event is sent again.",
    )
    batch: int = Field(default=1000, ge=1, le=10000, description="How many events can be under way, not confirmed yet.")
    compression: Literal["none", "gzip"] = Field(
        default="none",
        description="Whether events are compressed on their way and on the servers' disks. `gzip` costs the bridge "
        "some of its speed.",
    )

    @property
    def tls_required(self) -> bool:
        """Whether connections are made with TLS."""
        return self.tls.enabled if self.tls.enabled is not None else self.tls != KafkaTls()

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """A login is whole: the way, the user and one password."""
        yield from super().conflicts(given)
        passwords = [option for option in ("password", "password_file") if option in given]
        if "sasl" in given and "user" not in given:
            yield ("sasl",), mistake("needs a user", "give user and password_file (or password) too")
        if "user" in given and "sasl" not in given:
            yield ("user",), mistake("needs a way to log in", "give sasl too: plain, scram-sha-256 or scram-sha-512")
        if "user" in given and not passwords:
            yield ("user",), mistake("needs a password", "give password_file (or password) too")
        if passwords and "user" not in given:
            yield (passwords[0],), mistake("needs a user", "give user and sasl too")
