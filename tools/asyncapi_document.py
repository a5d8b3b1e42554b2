"""asyncapi.yaml: what is where on each broker, for AsyncAPI's tools. One document that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from orthanc_events_bridge.events import catalog, mapping
from orthanc_events_bridge.events.catalog import TYPES, EventType
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.transports.kafka_options import KafkaLimits, KafkaOptions
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from tools.event_examples import example
from tools.event_schemas import ALL, data_schema, default, derived_envelope, envelope

_SCHEMAS = "#/components/schemas"
#: Versions of AsyncAPI's bindings (https://github.com/asyncapi/bindings).
_NATS, _AMQP, _KAFKA, _HTTP = "0.1.0", "0.3.0", "0.5.0", "0.3.0"


class Place(NamedTuple):
    """Where events are on a broker.

    :param key: of the channel.
    :param address: with its parameters in braces.
    :param bindings: of the channel.
    """

    key: str
    address: str
    title: str
    description: str
    bindings: dict[str, Any]


class Broker(NamedTuple):
    """A kind of broker.

    :param name: of the server in the document, and of its channels' keys.
    :param operation: bindings of what is sent there.
    :param places: of the changes, and what only one consumer reads.
    """

    name: str
    server: dict[str, Any]
    operation: dict[str, Any]
    places: tuple[Place, ...]


def _of(options: type[TransportOptions], name: str) -> Any:
    """An option's default."""
    return options.model_fields[name].default


def _nats() -> Broker:
    def of(name: str) -> str:
        return str(_of(NatsOptions, name))

    prefix = of("subject_prefix")
    wildcard = (
        f"Bind to a part of them with wildcards: `{prefix}.*.study.stable.*` are the stable studies of all sites."
    )
    return Broker(
        "nats",
        {"host": "127.0.0.1:4222", "protocol": "nats", "description": "A NATS server or cluster, with JetStream."},
        {"nats": {"bindingVersion": _NATS}},
        (
            Place(
                "Changes",
                f"{prefix}.{{site}}.{{level}}.{{verb}}.{{partition}}",
                "Changes of Orthanc",
                f"The subjects of stream {of('stream')}. {wildcard}",
                {},
            ),
            Place(
                "Inbox",
                f"{of('inbox_prefix')}.{{consumer}}",
                "What is sent to one consumer again",
                f"The subjects of stream {of('inbox_stream')}. Only the consumer reads its own.",
                {},
            ),
            Place(
                "Dead",
                f"{of('dead_prefix')}.{{consumer}}",
                "What a consumer could not handle",
                f"The subjects of stream {of('dead_stream')}.",
                {},
            ),
        ),
    )


def _rabbitmq() -> Broker:
    exchange = {
        "name": _of(RabbitOptions, "exchange"),
        "type": "topic",
        "durable": True,
        "autoDelete": False,
        "vhost": "/",
    }

    def queue(option: str) -> dict[str, Any]:
        name = f"{_of(RabbitOptions, option)}.{{consumer}}"
        of = {"name": name, "durable": True, "exclusive": False, "autoDelete": False, "vhost": "/"}
        return {"amqp": {"is": "queue", "queue": of, "bindingVersion": _AMQP}}

    return Broker(
        "rabbitmq",
        {
            "host": "127.0.0.1:5672",
            "protocol": "amqp",
            "protocolVersion": "0.9.1",
            "description": "A RabbitMQ server or cluster.",
        },
        {"amqp": {"deliveryMode": 2, "mandatory": True, "bindingVersion": _AMQP}},
        (
            Place(
                "Changes",
                "{site}.{level}.{verb}.{partition}",
                "Changes of Orthanc",
                "Routing keys of the exchange. Bind a queue of yours: `*.study.stable.*` are the stable studies of all "
                f"sites. The stream queue `{_of(RabbitOptions, 'history')}` keeps all, to be read again.",
                {"amqp": {"is": "routingKey", "exchange": exchange, "bindingVersion": _AMQP}},
            ),
            Place(
                "Inbox",
                f"{_of(RabbitOptions, 'inbox_prefix')}.{{consumer}}",
                "What is sent to one consumer again",
                "A quorum queue, by the default exchange. Only the consumer reads its own.",
                queue("inbox_prefix"),
            ),
            Place(
                "Dead",
                f"{_of(RabbitOptions, 'dead_prefix')}.{{consumer}}",
                "What a consumer could not handle",
                "A quorum queue, by the default exchange.",
                queue("dead_prefix"),
            ),
        ),
    )


def _kafka() -> Broker:
    age, size = (KafkaLimits.model_fields[name].default for name in ("max_age", "max_bytes"))
    kept = {"cleanup.policy": ["delete"], "retention.ms": round(age * 1000), "retention.bytes": size}

    def topic(partitions: int, configuration: dict[str, Any]) -> dict[str, Any]:
        replicas = KafkaLimits.model_fields["replicas"].default
        of = {"partitions": partitions, "replicas": replicas, "topicConfiguration": configuration}
        return {"kafka": {**of, "bindingVersion": _KAFKA}}

    partitions = _of(KafkaOptions, "partitions")
    return Broker(
        "kafka",
        {"host": "127.0.0.1:9092", "protocol": "kafka", "description": "A Kafka cluster."},
        {"kafka": {"bindingVersion": _KAFKA}},
        (
            Place(
                "Changes",
                str(_of(KafkaOptions, "topic")),
                "Changes of Orthanc",
                "One topic of all events; `type` tells them apart, and the header `orthanc-site` the Orthancs. The "
                "partition of a message is that of its key: CRC-32 of its UTF-8 bytes, modulo 64, modulo the number "
                "of partitions.",
                topic(partitions, kept),
            ),
            Place(
                "Inbox",
                f"{_of(KafkaOptions, 'inbox_prefix')}.{{consumer}}",
                "What is sent to one consumer again",
                "Only the consumer reads its own.",
                topic(partitions, kept),
            ),
            Place(
                "Dead",
                f"{_of(KafkaOptions, 'dead_prefix')}.{{consumer}}",
                "What a consumer could not handle",
                "Compacted: a dead letter is kept until somebody removes it.",
                topic(1, {"cleanup.policy": ["compact"]}),
            ),
        ),
    )


def _webhook() -> Broker:
    return Broker(
        "webhook",
        {"host": "events.example.org", "protocol": "https", "description": "Whoever takes the webhook."},
        {"http": {"method": "POST", "bindingVersion": _HTTP}},
        (
            Place(
                "Changes",
                "/",
                "Changes of Orthanc",
                "The URL is configured. An event is sent again until it is answered with 2xx.",
                {},
            ),
        ),
    )


BROKERS = (_nats(), _rabbitmq(), _kafka(), _webhook())


def message_key(event_type: EventType) -> str:
    """``studyInstanceAdded``: keys of AsyncAPI's maps are plain."""
    first, *rest = event_type.name.replace(".", "-").split("-")
    return first + "".join(part.capitalize() for part in rest)


def payload_key(event_type: EventType) -> str:
    """``StudyInstanceAdded``: what generated code calls a whole event."""
    key = message_key(event_type)
    return f"{key[0].upper()}{key[1:]}"


def data_key(event_type: EventType) -> str:
    """``StudyInstanceAddedData``: its data, among the schemas."""
    return f"{payload_key(event_type)}Data"


def _only(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What has to be in an envelope and not in another."""
    return [name for name in one["required"] if name not in other["required"]]


def _any_envelope() -> dict[str, Any]:
    """What all events have in common, by whomever they are told; as one object, of which generated code is made."""
    one, other = envelope(), derived_envelope()
    common = [name for name in one["required"] if name in other["required"]]
    return {"type": "object", "properties": other["properties"] | one["properties"], "required": common}


def message(event_type: EventType) -> dict[str, Any]:
    """One type of event as AsyncAPI describes it."""
    by_bridge, by_consumers = event_type in TYPES, event_type in DERIVED
    envelopes: list[dict[str, Any]] = [{"$ref": f"{_SCHEMAS}/{'DerivedCloudEvent' if by_consumers else 'CloudEvent'}"}]
    if by_bridge and by_consumers:
        either = [
            {"required": _only(envelope(), derived_envelope())},
            {"required": _only(derived_envelope(), envelope())},
        ]
        envelopes = [{"$ref": f"{_SCHEMAS}/AnyCloudEvent"}, {"anyOf": either}]
    name = f"{event_type.name}.{catalog.VERSION}"
    constants = {
        "type": {"const": f"{default('type_prefix')}.{name}"},
        "dataschema": {"const": f"{default('schema_base')}{name}"},
        "data": {"$ref": f"{_SCHEMAS}/{data_key(event_type)}"},
    }
    key = {"type": "string", "description": "The event's `partitionkey`."}
    return {
        "name": f"{default('type_prefix')}.{name}",
        "title": event_type.name,
        "summary": event_type.meaning,
        "contentType": mapping.STRUCTURED,
        "headers": {"$ref": f"{_SCHEMAS}/Headers"},
        "payload": {
            "title": payload_key(event_type),
            "allOf": [*envelopes, {"type": "object", "properties": constants}],
        },
        "bindings": {"kafka": {"key": key, "bindingVersion": _KAFKA}},
        "examples": [{"name": message_key(event_type), "payload": example(event_type)}],
    }


def _headers() -> dict[str, Any]:
    def text(description: str) -> dict[str, Any]:
        return {"type": "string", "description": description}

    return {
        "type": "object",
        "properties": {
            "content-type": {
                "const": mapping.STRUCTURED,
                "description": "A header on NATS, Kafka and of a webhook; on RabbitMQ the property of this name.",
            },
            "Nats-Msg-Id": text(
                "NATS alone: the event's id, of what is sent again `{id}:{operation}:{…}`. JetStream drops an equal "
                "one within its window."
            ),
            "orthanc-event-id": text("The event's id. On NATS with an operation only, where Nats-Msg-Id is another."),
            "orthanc-site": text("Kafka alone: the short name of the Orthanc, as configured."),
            "orthanc-operation": {
                "enum": ["replay", "retry", "redrive"],
                "description": "It is sent again on purpose. Retries and redrives are in inboxes only.",
            },
            "orthanc-consumer": text("In an inbox and of a dead letter: whose it is."),
            "orthanc-address": text(
                "In an inbox and of a dead letter: the subject, routing key or topic under which everybody got it. Of "
                "a webhook: {site}.{level}.{verb}.{partition}."
            ),
            "orthanc-attempts": text("With a retry and of a dead letter: how often it was given."),
            "orthanc-due": text("With a retry: when it is to be given again, RFC 3339."),
            "orthanc-first-failure": text("With a retry and of a dead letter, RFC 3339."),
            "orthanc-last-failure": text("With a retry and of a dead letter, RFC 3339."),
            "orthanc-reason": text("Of a dead letter: why, in one sentence."),
            "orthanc-exception": text("Of a dead letter: the type of what was raised."),
            "webhook-id": text("Of a signed webhook: the event's id; of what is sent again another one."),
            "webhook-timestamp": text("Of a signed webhook: when it was sent, in seconds of the epoch."),
            "webhook-signature": text("Of a signed webhook: as Standard Webhooks has it."),
        },
    }


def _parameters(address: str) -> dict[str, Any]:
    levels = list(dict.fromkeys(one.level for one in ALL))
    verbs = list(dict.fromkeys(one.verb for one in ALL))
    known: dict[str, dict[str, Any]] = {
        "site": {"description": "The short name of an Orthanc, as configured.", "default": default("site")},
        "level": {"description": "What changed.", "enum": levels},
        "verb": {"description": "What happened to it.", "enum": verbs},
        "partition": {
            "description": "`00` to `63`: CRC-32 of the partition key's UTF-8 bytes, modulo 64, in two digits.",
            "examples": ["00", "63"],
        },
        "consumer": {"description": "The consumer's name."},
    }
    return {name: value for name, value in known.items() if f"{{{name}}}" in address}


def _channel(broker: Broker, place: Place) -> dict[str, Any]:
    parameters = _parameters(place.address)
    return {
        "address": place.address,
        "title": f"{place.title} ({broker.server['protocol']})",
        "description": place.description,
        "servers": [{"$ref": f"#/servers/{broker.name}"}],
        **({"parameters": parameters} if parameters else {}),
        "messages": {key: {"$ref": f"#/components/messages/{key}"} for key in map(message_key, ALL)},
        **({"bindings": place.bindings} if place.bindings else {}),
    }


#: Operation, and what is in which place by it.
_OPERATIONS = (
    ("PublishChange", "Changes", "The bridge publishes each change, and sends it again until it is confirmed."),
    ("PublishDerived", "Changes", "Consumers publish what they derive from the changes, beside them."),
    ("Replay", "Inbox", "`orthanc-events replay` sends kept events again, to one consumer."),
    ("GiveUp", "Dead", "A consumer puts there what it could not handle."),
)


def _operations(broker: Broker) -> dict[str, Any]:
    there = {place.key for place in broker.places}
    return {
        f"{broker.name}{name}": {
            "action": "send",
            "channel": {"$ref": f"#/channels/{broker.name}{place}"},
            "summary": summary,
            "bindings": broker.operation,
        }
        for name, place, summary in _OPERATIONS
        if place in there and (name != "PublishDerived" or len(there) > 1)
    }


def _schemas() -> dict[str, Any]:
    """All schemas. Objects in them that have a title are among them, each once: what generated code calls them."""
    shared: dict[str, Any] = {}

    def referring(schema: dict[str, Any]) -> dict[str, Any]:
        found = dict(schema)
        for name, one in schema.get("properties", {}).items():
            if "title" in one:
                if shared.setdefault(one["title"], one) != one:
                    raise SystemExit(f"two schemas have the title {one['title']}: give one of them another")
                found["properties"] = found["properties"] | {name: {"$ref": f"{_SCHEMAS}/{one['title']}"}}
        return found

    whole = {
        name: {"title": name, **made}
        for name, made in (
            ("Headers", _headers()),
            ("CloudEvent", envelope()),
            ("DerivedCloudEvent", derived_envelope()),
            ("AnyCloudEvent", _any_envelope()),
        )
    }
    # In AsyncAPI's own dialect, under no address of its own; the message has the example.
    left = ("$schema", "$id", "examples")
    data = {
        data_key(one): referring({name: value for name, value in data_schema(one).items() if name not in left})
        | {"title": data_key(one)}
        for one in ALL
    }
    return {**whole, **dict(sorted(shared.items())), **data}


def document(brokers: Sequence[Broker] = BROKERS) -> dict[str, Any]:
    """The whole document."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "orthanc-events-bridge",
            "version": catalog.VERSION.removeprefix("v"),
            "description": "Every change of an Orthanc DICOM server as a CloudEvent 1.0.2 on NATS JetStream, RabbitMQ, "
            "Kafka or a webhook: in structured JSON, as described here, or by option in binary mode, with the "
            "attributes in headers that begin with `ce-` (Kafka: `ce_`). All names are shown with their defaults. "
            "`data` has Orthanc's ids only, unless the configuration allows tags or metadata; these are pseudonyms, "
            "not anonymous.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": mapping.STRUCTURED,
        "servers": {broker.name: broker.server for broker in brokers},
        "channels": {
            f"{broker.name}{place.key}": _channel(broker, place) for broker in brokers for place in broker.places
        },
        "operations": {name: one for broker in brokers for name, one in _operations(broker).items()},
        "components": {
            "messages": {message_key(event_type): message(event_type) for event_type in ALL},
            "schemas": _schemas(),
        },
    }


class _Dumper(yaml.SafeDumper):
    """Without anchors: what is there twice is written twice, which every reader understands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text() -> str:
    """As it is written."""
    head = "# Generated by tools/generate_docs.py from the catalog of event types: run `make docs`.\n"
    return head + yaml.dump(document(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
