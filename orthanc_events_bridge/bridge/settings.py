"""The bridge's settings: every option declared once, with its documentation.

``docs/configuration.md`` and ``orthanc-events.schema.json`` are generated from here
(``tools/generate_docs.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.transports.blocks import TransportBlock, block_of
from orthanc_events_bridge.values import Duration, EventFilter, Options, Place, Size, mistake

#: What `template.yaml` carries in place of a source of one's own.
NO_SOURCE = "urn:uuid:00000000-0000-0000-0000-000000000000"


def _absolute_uri(value: str) -> str:
    """RFC 3986, section 4.3, with a scheme; http and https with a host, urn with a name (RFC 8141)."""
    right = "write a URL such as https://pacs.example.org/orthanc/main, or urn:uuid: and a UUID of your own"
    try:
        url = urlsplit(value)
    except ValueError:
        raise mistake("is no absolute URI", right) from None
    if url.username is not None or url.password is not None:
        raise mistake("holds credentials, which every event would carry", "leave out what stands before the @")
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[!#-;=?-\[\]_a-z~]+", value) is None or re.search(
        r"%(?![0-9A-Fa-f]{2})", value
    ):
        raise mistake("is no absolute URI", right, shown=value)
    if re.match(r"[A-Za-z0-9.-]+:\d+(/|$)", value):
        raise mistake("is a host and a port, but no absolute URI", right, shown=value)
    if url.scheme in ("http", "https") and not (value[len(url.scheme) :].startswith("://") and url.hostname):
        raise mistake("is a URL without a host", right, shown=value)
    if url.scheme == "urn" and re.fullmatch(r"urn:[A-Za-z0-9][A-Za-z0-9-]{0,31}:.+", value, re.IGNORECASE) is None:
        raise mistake("is no URN", right, shown=value)
    return value


def _source(value: str) -> str:
    _absolute_uri(value)
    if value.lower().startswith("urn:uuid:"):
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value[9:], re.IGNORECASE) is None:
            raise mistake("has no UUID behind urn:uuid:", "put the output of the command `uuidgen` there", shown=value)
        if not UUID(value[9:]).int:
            raise mistake(
                "is still the placeholder",
                "put the output of the command `uuidgen` behind urn:uuid:",
                shown=value,
            )
    return value


def _schema_base(value: str) -> str:
    _absolute_uri(value)
    if value[-1] not in ":/#":
        raise mistake("has to end in :, / or #", "append one of them, because a schema's name follows", shown=value)
    return value


def _type_prefix(value: str) -> str:
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", value) is None:
        raise mistake(
            "can't be used as the prefix of event types",
            "write a domain of yours backwards, in lower case, such as org.example.pacs",
            shown=value,
        )
    return value


def _site(value: str) -> str:
    # With what is added to it a broker has to take it: RabbitMQ's routing keys have 255 bytes at most.
    if re.fullmatch(r"[A-Za-z0-9_-]{1,100}", value) is None:
        raise mistake("can't be used as a site", "use letters, digits, `_` and `-` only, 100 at most", shown=value)
    return value


def _keyword(value: str) -> str:
    if re.fullmatch(r"[A-Z][A-Za-z0-9]*", value) is None:
        raise mistake(
            "is no keyword of a DICOM attribute",
            "write the keyword as DICOM's part 6 spells it, such as Modality or StudyDescription",
            shown=value,
        )
    return value


def _metadata(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]+", value) is None:
        raise mistake(
            "is no name of Orthanc metadata",
            "write it as Orthanc's REST API does, such as RemoteAET or ReceptionDate",
            shown=value,
        )
    return value


class DataSettings(Options):
    """What `data` of an event carries besides Orthanc's ids. By default nothing.

    **Privacy:** what is named here leaves Orthanc, and stays in the outbox and on the broker as long as these
    keep events. Tags such as `PatientName` or `AccessionNumber` are patient data, and so may be what users
    and modalities write into others. Name only what consumers can't do without. Orthanc's ids themselves are
    pseudonyms, not anonymous: they are unsalted SHA-1 sums of PatientID and UIDs.
    """

    tags: tuple[Annotated[str, AfterValidator(_keyword)], ...] = Field(
        default=(),
        description="DICOM attributes to add, by keyword. May carry patient data: see above.",
        examples=[["Modality", "StudyInstanceUID"]],
    )
    metadata: tuple[Annotated[str, AfterValidator(_metadata)], ...] = Field(
        default=(),
        description="Orthanc metadata to add, by name. May carry patient data: see above.",
        examples=[["RemoteAET"]],
    )


class CaptureSettings(Options):
    """How changes are recorded."""

    start: Literal["now", "log"] = Field(
        default="now",
        description="What the very first start records: `now` only what changes from then on, `log` also "
        "what Orthanc's change log still holds.",
    )
    infer_instances: bool = Field(
        default=False,
        description="Whether it is also inferred that single instances were deleted while nobody listened (of series, "
        "studies and patients it always is). It costs a question to Orthanc for each series at every start, 0.1 ms of "
        "its time each with Orthanc 1.10 and 1.4 ms with 1.13, and 50 bytes on the disk for each instance. A change "
        "takes effect when Orthanc starts.",
    )
    log: bool = Field(
        default=True,
        description="Whether what Orthanc logs is recorded here. `false` is for all but one of several Orthancs on "
        "one database, each with a bridge: that one then records what all of them log, the others only what "
        "their own callbacks show (deletions, added instances, jobs, the server's own), and no event comes twice. "
        "While that one is down, nobody records what is logged; it reads it when it is back.",
    )
    grace: Annotated[float, Duration(minimum=1)] = Field(
        default=10.0,
        description="Where Orthanc keeps its index in PostgreSQL, or another database than its own SQLite: how long "
        "a number missing in its change log is waited for, because a transaction under way may still fill it; and "
        "how long a logged change waits for its callback, before it is recorded as another Orthanc's. Longer than "
        "the longest transaction. Changes of this Orthanc's own are recorded at once all the same.",
        examples=["10s"],
    )


class OutboxSettings(Options):
    """The store on Orthanc's disk in which changes wait until every transport has them.

    Its folder is not an option of this file, so that a mistake here never keeps changes from being recorded:
    it is taken from `ORTHANC_EVENTS_OUTBOX`, from `"OrthancEvents": {"Outbox": …}` in Orthanc's
    configuration, or is `orthanc-events` in Orthanc's `IndexDirectory`.
    """

    max_bytes: Annotated[int | None, Size(minimum=64 * 1024)] = Field(
        default=None,
        description="How large the outbox can grow, what is kept after delivery included. Left out: the "
        "smaller of 10 GiB and 10 % of the free disk.",
        examples=["10GiB"],
    )
    on_full: Literal["pause", "detach"] = Field(
        default="pause",
        description="What happens when it is full of undelivered events. `pause`: recording pauses and "
        "takes up Orthanc's change log later; what only callbacks show (deletions, jobs) is at risk once "
        "100,000 of them wait. `detach`: the transport that is furthest behind loses its place, and is "
        "marked with the gap.",
    )
    keep: Annotated[float, Duration()] = Field(
        default=7 * 86400.0,
        description="How long a delivered event is kept, to be replayed. 0: not at all.",
        examples=["7d"],
    )


class Settings(Options):
    """What the file begins with, not indented. Only `source` and `transports` are required."""

    source: Annotated[str, AfterValidator(_source)] = Field(
        description="Which Orthanc the events come from: CloudEvents' `source`, an absolute URI, the same "
        "for ever and different for each Orthanc. It is part of the events' ids and doesn't have to lead "
        "anywhere.",
        examples=["https://pacs.example.org/orthanc/main"],
    )
    site: Annotated[str, AfterValidator(_site)] = Field(
        default="main",
        description="Short name of this Orthanc in the broker's addresses, to tell several on one broker apart.",
        examples=["north"],
    )
    type_prefix: Annotated[str, AfterValidator(_type_prefix)] = Field(
        default="io.orthanc-events",
        description="Beginning of every event type: `{type_prefix}.{level}.{verb}.v1`.",
        examples=["org.example.pacs"],
    )
    schema_base: Annotated[str, AfterValidator(_schema_base)] = Field(
        default="urn:orthanc-events:schema:",
        description="Beginning of `dataschema`; `study.stable.v1`, say, is appended.",
        examples=["https://schemas.example.org/orthanc/"],
    )
    data: DataSettings = Field(default_factory=DataSettings, description="What events carry besides Orthanc's ids.")
    events: EventFilter = Field(default_factory=EventFilter, description="Which events are sent.")
    capture: CaptureSettings = Field(default_factory=CaptureSettings, description="How changes are recorded.")
    outbox: OutboxSettings = Field(default_factory=OutboxSettings, description="Where changes wait.")
    transports: tuple[TransportBlock, ...] = Field(
        min_length=1,
        description="Where the events go: at least one broker. Each has its own position in the outbox, so "
        "that one that is down doesn't hold up another. In place of a block its URL alone can be given: "
        "`nats://HOST:4222`, `amqp://HOST:5672` or `kafka://HOST:9092`, several servers of one with commas between.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe messages that reach Orthanc's log."
    )
    drain_timeout: Annotated[float, Duration(maximum=4.5)] = Field(
        default=4.0,
        description="How long the bridge goes on sending when Orthanc stops. What is left then is sent "
        "after the next start. Orthanc's stop waits 5 seconds for it.",
        examples=["4s"],
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Two transports can't have the same name."""
        transports = given.get("transports")
        places: dict[str, Place] = {}
        for number, transport in enumerate(transports if isinstance(transports, list | tuple) else ()):
            is_url = isinstance(transport, str)
            if is_url:
                with suppress(PydanticCustomError):  # told where it is read
                    transport = block_of(transport)
            if not isinstance(transport, Mapping):
                continue
            option = "name" if transport.get("name") is not None else "type"
            name = transport.get(option)
            if not isinstance(name, str):
                continue
            place: Place = ("transports", number) if is_url else ("transports", number, option)
            if name not in places:
                places[name] = place
                continue
            yield (
                place,
                mistake(
                    "{0} and {1} give two transports the same name",
                    "give one of them a `name` of its own",
                    options=(places[name], place),
                ),
            )

    def shape(self) -> dict[str, Any]:
        """The settings that shape events: with the same ones, a row always gives the same bytes."""
        return {
            "source": self.source,
            "site": self.site,
            "type_prefix": self.type_prefix,
            "schema_base": self.schema_base,
            "tags": sorted(set(self.data.tags)),
            "metadata": sorted(set(self.data.metadata)),
        }

    def capture_document(self) -> dict[str, Any]:
        """The settings that capture needs: ``max_bytes`` in bytes or None, ``keep`` in seconds."""
        return {
            "start": self.capture.start,
            "infer_instances": self.capture.infer_instances,
            "log": self.capture.log,
            "grace": self.capture.grace,
            "max_bytes": self.outbox.max_bytes,
            "on_full": self.outbox.on_full,
            "keep": self.outbox.keep,
            "transports": [transport.name for transport in self.transports],
        }
