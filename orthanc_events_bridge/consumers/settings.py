"""A consumer's settings: every option declared once, with its documentation.

``docs/consumer-configuration.md`` and ``orthanc-consumer.schema.json`` are generated from here
(``tools/generate_docs.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    SerializeAsAny,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticCustomError

from orthanc_events_bridge.consumers import stores
from orthanc_events_bridge.consumers.retry import RetryPolicy
from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.orthanc_api import OrthancOptions
from orthanc_events_bridge.secret import given_twice
from orthanc_events_bridge.transports.blocks import ByType, transport_of
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.values import Duration, FileName, Options, Place, format_duration, mistake

#: With `ordered` a retry keeps its partition waiting: longer ones are refused.
LONGEST_ORDERED_RETRY: Final = 300.0
#: What is ordered is held while it waits: all its waits, 20 minutes, lie within what every broker allows by itself
#: (RabbitMQ 3.10: half an hour).
ORDERED_ATTEMPTS: Final = 12
_POLICY: Final = RetryPolicy()


def _name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]{1,128}", value) is None:
        raise mistake("can't be the name of a consumer", "use letters, digits, _ and -, at most 128", shown=value)
    return value


#: An option that is the name of a consumer.
ConsumerName = Annotated[str, AfterValidator(_name)]


def _broker(value: object, info: ValidationInfo) -> TransportOptions:
    return transport_of(value, info).for_consumer()


def _orthanc(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


class _Url:
    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


def _http(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]*", host) or not re.fullmatch(r"[0-9]{1,5}", port):
        raise mistake("is no address to listen at", "write 127.0.0.1:9100, or :9100 for all addresses", shown=value)
    if int(port) > 65535:
        raise mistake("has a port that there isn't", "write one of 1 to 65535, or 0 for any free one", shown=value)
    return value


class _Store:
    """A URL, or a block of NATS' options."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(NatsOptions.__pydantic_core_schema__)]}


class OrthancSettings(Options):
    """The Orthanc that handlers ask. In place of the block its URL alone can be given.

    Every option can also come from the environment: `ORTHANC_EVENTS_ORTHANC_URL`, `ORTHANC_EVENTS_ORTHANC_USER` and so
    on. What is said there wins; a login is never put together from both.
    """

    url: str | None = Field(
        default=None,
        description="Of its REST API, without credentials.",
        examples=["https://pacs.example.org/orthanc"],
    )
    user: str | None = Field(
        default=None, description="Log in with a password: needs `password_file`.", examples=["consumer"]
    )
    password: SecretStr | None = Field(default=None, description="The password; `password_file` is the safer way.")
    password_file: FileName | None = Field(default=None, description="A file with the password.")
    token: SecretStr | None = Field(default=None, description="A bearer token; `token_file` is the safer way.")
    token_file: FileName | None = Field(default=None, description="A file with a bearer token, in place of a user.")
    ca_file: FileName | None = Field(
        default=None, description="PEM file with the authorities to trust, in place of the system's."
    )
    cert_file: FileName | None = Field(
        default=None, description="PEM file with our own certificate (mutual TLS). Needs `key_file`."
    )
    key_file: FileName | None = Field(
        default=None, description="PEM file with the private key of `cert_file`, not encrypted."
    )
    timeout: Annotated[float, Duration(minimum=0.001)] | None = Field(
        default=None,
        description="How long an answer is waited for: to connect, and for each piece of it. Left out: 30 seconds.",
        examples=["30s"],
    )

    def given(self) -> dict[str, Any]:
        """What is given, as `OrthancOptions.find` takes it."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in found.items()
            if value is not None
        }

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """What can't be right wherever the rest comes from."""
        if self.url is None:
            return
        try:
            OrthancOptions(self.url).check()
        except OrthancError as error:
            yield ("url",), mistake(error.message, error.remedy)


#: An option that is an Orthanc: a block, or its URL alone.
OrthancBlock = Annotated[OrthancSettings, BeforeValidator(_orthanc), _Url()]


class RetrySettings(Options):
    """What becomes of an event whose handler fails: it is given again, and in the end goes among the dead letters.

    `on(…, retry=RetryPolicy(…))` in the code wins for its handler.
    """

    max_attempts: int = Field(
        default=_POLICY.max_attempts or 0,
        ge=0,
        description="Deliveries in all; behind the last it is a dead letter. 0: no limit. In order, if nothing is said:"
        " 12.",
    )
    backoff: Literal["exponential", "constant"] = Field(
        default=_POLICY.backoff,
        description="`exponential`: each wait is twice the one before. `constant`: all are `initial`.",
    )
    initial: Annotated[float, Duration()] = Field(
        default=_POLICY.initial, description="The first wait.", examples=["1s"]
    )
    maximum: Annotated[float, Duration()] | None = Field(
        default=None,
        description="The longest wait. Left out: 15 minutes, with `ordered` 5 minutes, and never less than `initial`.",
        examples=["15m"],
    )
    jitter: float = Field(
        default=_POLICY.jitter,
        ge=0,
        le=1,
        description="Up to this part of a wait is added at random, so that what failed together doesn't come together.",
    )
    max_age: Annotated[float, Duration()] = Field(
        default=_POLICY.max_age or 0.0,
        description="How long after its first failure an event is given again. 0: no limit.",
        examples=["7d"],
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """The longest wait is not shorter than the first."""
        if self.maximum is not None and self.maximum < self.initial:
            wrong = "{0} is shorter than {1}"
            options: tuple[Place, ...] = (("maximum",), ("initial",))
            yield ("maximum",), mistake(wrong, "give at least as long a time as initial", options=options)


class ConsumerSettings(Options):
    """What the file begins with, not indented. Nothing is required that the code says already."""

    name: ConsumerName = Field(
        description="Of the consumer. Workers of one name share its events, and what was settled under it is not given "
        "to it again.",
        examples=["router"],
    )
    broker: Annotated[SerializeAsAny[TransportOptions], BeforeValidator(_broker), ByType()] | None = Field(
        default=None,
        description="Where the events come from: a URL (`nats://`, `tls://`, `amqp://`, `amqps://`, `kafka://`; "
        "several servers with commas between), or a block as in `transports` of "
        "[the bridge's configuration](configuration.md). `ORTHANC_EVENTS_BROKER` gives a URL in place of it.",
        examples=["nats://127.0.0.1:4222"],
    )
    orthanc: OrthancBlock = Field(
        default_factory=OrthancSettings, description="Which Orthanc handlers ask, by its URL or a block."
    )
    start: Literal["new", "oldest"] = Field(
        default="new",
        description="Where the name's very first start begins: with the next event, or with the oldest that the broker "
        "keeps. Later ones go on where it was.",
    )
    concurrency: int = Field(
        default=16,
        ge=1,
        le=10_000,
        description="How many events one worker handles at a time. Of one key (a study) it is always one.",
    )
    prefetch: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="How many events one worker holds, those that are being handled among them. 0: twice "
        "`concurrency`.",
    )
    ordered: bool = Field(
        default=False,
        description="Whether events of one key stay in order across all workers, retries included: while one waits for "
        "its retry, 1/64 of all keys waits with it.",
    )
    retry: RetrySettings = Field(
        default_factory=RetrySettings, description="What becomes of events whose handlers fail."
    )
    ack_wait: Annotated[float, Duration(minimum=1, maximum=86400)] = Field(
        default=30.0,
        description="Without a sign of life for so long, a worker's events are given to others.",
        examples=["30s"],
    )
    longest: Annotated[float, Duration()] = Field(
        default=0.0,
        description="How long a handler may take, where the broker has a limit of its own (RabbitMQ: half an hour). "
        "0: as the broker has it.",
        examples=["45m"],
    )
    drain: Annotated[float, Duration()] = Field(
        default=25.0,
        description="How long handlers have to end when the worker is stopped. What is left then goes back to the "
        "broker.",
        examples=["25s"],
    )
    http: Annotated[str, AfterValidator(_http)] | None = Field(
        default=None,
        description="Where health and metrics are told over HTTP. With `consume --workers N` each worker has a port of "
        "its own: this one, and those behind it.",
        examples=["127.0.0.1:9100"],
    )
    store: Annotated[SecretStr | SerializeAsAny[TransportOptions], BeforeValidator(stores.option), _Store()] | None = (
        Field(
            default=None,
            description="Where it is noted what is done once ([stores](once.md#stores)): `broker`, "
            "`sqlite:////FOLDER/FILE`, `postgresql://USER@HOST/DATABASE`, `nats://HOST:4222`, or a block of NATS' "
            "options. Left out: the broker, where that is NATS. Also `ORTHANC_EVENTS_STORE`.",
            examples=["sqlite:////var/lib/orthanc-events/once.db"],
        )
    )
    store_file: FileName | None = Field(
        default=None,
        description="A file with the URL of a database, in place of `store`: the safer way for one that holds a "
        "password. Also `ORTHANC_EVENTS_STORE_FILE`.",
        examples=["/run/secrets/once-url"],
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The least severe messages that are logged. `debug` shows what handlers raised, which can hold "
        "patient data.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """A store is given as it is, or by a file."""
        yield from given_twice(given)

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Fewer events held than handled; a retry that would hold up an order; a store that the broker is not."""
        if self.prefetch and self.prefetch < self.concurrency:
            options: tuple[Place, ...] = (("prefetch",), ("concurrency",))
            right = "give at least as many, or 0 for twice as many"
            yield ("prefetch",), mistake("{0} is less than {1}", right, options=options)
        longest = self.policy().maximum
        if self.ordered and longest > LONGEST_ORDERED_RETRY:
            wrong = f"in order, a retry of {format_duration(longest)} would hold up 1/64 of all events"
            yield ("retry", "maximum"), mistake(wrong, f"give {format_duration(LONGEST_ORDERED_RETRY)} at most")
        if self._store_is_broker and not isinstance(self.broker, NatsOptions):
            wrong = f"{self.broker.type if self.broker else 'no broker'} can't note what is done once"
            yield ("store",), mistake(wrong, stores.STORES)

    def without_store(self, what: str) -> Iterator[tuple[Place, PydanticCustomError]]:
        """What is wrong where something has to be noted, and there is nowhere to.

        :param what: has to be noted.
        """
        if self.broker is not None and self.chosen_store() is None:
            wrong = f"where to note {what} is not said, and {self.broker.type} can't note it"
            yield ("store",), mistake(wrong, stores.STORES)

    @property
    def _store_is_broker(self) -> bool:
        return isinstance(self.store, SecretStr) and self.store.get_secret_value() == stores.BROKER

    def chosen_store(self) -> SecretStr | Path | NatsOptions | None:
        """Where it is noted what is done once, as `stores.make` takes it; none where that is not said."""
        if self.store_file is not None:
            return self.store_file
        if self.store is not None and not self._store_is_broker:
            assert isinstance(self.store, SecretStr | NatsOptions)
            return self.store
        return self.broker if isinstance(self.broker, NatsOptions) else None

    def policy(self) -> RetryPolicy:
        """What `retry` says."""
        retry = self.retry
        maximum = retry.maximum
        if maximum is None:
            maximum = max(retry.initial, LONGEST_ORDERED_RETRY if self.ordered else _POLICY.maximum)
        attempts = retry.max_attempts
        if self.ordered and "max_attempts" not in retry.model_fields_set:
            attempts = ORDERED_ATTEMPTS
        return RetryPolicy(attempts or None, retry.backoff, retry.initial, maximum, retry.jitter, retry.max_age or None)


class AnySettings(ConsumerSettings):
    """Of any consumer, where only what all have matters: a router's file has options of its own."""

    model_config = ConfigDict(extra="ignore")
