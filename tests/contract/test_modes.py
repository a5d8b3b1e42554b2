"""Structured and binary mode, as each broker's binding spells them; read back by a plain client.

The `cloudevents` SDK decodes where it has the binding. NATS' is read here, as its draft (1.0.3) says; the broker in
memory has none and does as RabbitMQ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import unquote

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings import http, kafka, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.outbox_schema import OutboxRow
from orthanc_events_bridge.transports.base import Outgoing
from tests.contract.harness import CONTENT_TYPE, Harness, run

#: With a percent sign, which some bindings write otherwise.
SHAPE: Final = {
    "source": "https://pacs.example.org/orthanc/no%201",
    "site": "main",
    "type_prefix": "io.orthanc-events",
    "schema_base": "urn:orthanc-events:schema:",
}
RECORDER: Final = "0b7a3c1e-55aa-4f0e-8f83-9d3a4f6d1c02"


def row(position: int, change: str, level: str, resource: str | None, **extra: Any) -> OutboxRow:
    minted = f"5a0c7f5e-91f9-4b0f-8c39-14b1f1f2{position:04d}"
    return OutboxRow(position, change, level, resource, 1795464387083, None, None, minted, 1795464387090, 1, extra)


ROWS: Final = (
    row(1, "NewInstance", "instance", "66a662ce", parents={"series": "f2635388", "study": "27f7126f"}),
    row(2, "StableStudy", "study", "27f7126f", parents={}, tags={"PatientName": "Müller^Jörg", "StudyDate": '"\r\n%'}),
    row(3, "JobFailure", "job", "f7e4f7f5", parents={}, job={"progress": 100, "runtime": 0.487}),
    row(4, "OrthancStarted", "server", None),
)


def sent(*, binary: bool) -> list[Outgoing]:
    return [to_outgoing(one, SHAPE, RECORDER, binary=binary) for one in ROWS]


Decoder = Callable[[str, dict[str, str], bytes], BaseCloudEvent]


def _rabbitmq(content_type: str, headers: dict[str, str], body: bytes) -> BaseCloudEvent:
    return rabbitmq.from_rabbitmq_event(rabbitmq.RabbitMQMessage({**headers}, content_type, body))


def _kafka(content_type: str, headers: dict[str, str], body: bytes) -> BaseCloudEvent:
    encoded = {name: value.encode() for name, value in {**headers, "content-type": content_type}.items()}
    return kafka.from_kafka_event(kafka.KafkaMessage(encoded, None, body))


def _http(content_type: str, headers: dict[str, str], body: bytes) -> BaseCloudEvent:
    return http.from_http_event(http.HTTPMessage({**headers, "content-type": content_type}, body))


def _nats(content_type: str, headers: dict[str, str], body: bytes) -> BaseCloudEvent:
    if content_type.lower().startswith("application/cloudevents"):
        return JSONFormat().read(CloudEvent, body)
    assert all(value.isascii() and value.isprintable() and " " not in value for value in headers.values())
    attributes: dict[str, Any] = {
        name[3:]: unquote(value, errors="strict") for name, value in headers.items() if name.startswith("ce-")
    }
    assert attributes["datacontenttype"] == content_type
    document = {**attributes, "data": json.loads(body)}
    return JSONFormat().read(CloudEvent, json.dumps(document).encode())


DECODERS: Final[Mapping[str, Decoder]] = {
    "memory": _rabbitmq,
    "nats": _nats,
    "rabbitmq": _rabbitmq,
    "kafka": _kafka,
    "webhook": _http,
}


@pytest.fixture
def decode(request: pytest.FixtureRequest) -> Decoder:
    return DECODERS[request.node.callspec.params["harness"]]


def check(decode: Decoder, content_type: str, headers: dict[str, str], body: bytes, row: OutboxRow) -> None:
    """What a reader makes of it is the event that the mapping made."""
    found = decode(content_type, headers, body)
    wanted = JSONFormat().read(CloudEvent, to_outgoing(row, SHAPE, RECORDER).body)
    assert found.get_attributes() == wanted.get_attributes()
    data = found.get_data()
    assert (json.loads(data) if isinstance(data, bytes) else data) == wanted.get_data()


def publish(harness: Harness, outgoing: list[Outgoing]) -> None:
    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        await transport.publish(outgoing)
        await transport.close()

    run(main())


def test_binary_mode(harness: Harness, decode: Decoder) -> None:
    outgoing = {one.id: (one, row) for one, row in zip(sent(binary=True), ROWS, strict=True)}
    publish(harness, [one for one, _ in outgoing.values()])
    stored = harness.read()
    assert {one.dedupe_key for one in stored} == outgoing.keys()
    assert len(stored) == len(outgoing)
    for one in stored:
        original, row = outgoing[one.dedupe_key]
        assert (one.content_type, one.body) == ("application/json", original.body)
        names = {name.lower() for name in one.headers if name.lower().startswith(("ce-", "ce_"))}
        assert names >= {f"{harness.attribute_prefix}{name}" for name, _ in original.attributes}
        assert all(name.startswith(harness.attribute_prefix) for name in names)
        assert one.address == harness.address(original)
        check(decode, one.content_type, one.headers, one.body, row)


def test_structured_mode(harness: Harness, decode: Decoder) -> None:
    outgoing = {one.id: (one, row) for one, row in zip(sent(binary=False), ROWS, strict=True)}
    publish(harness, [one for one, _ in outgoing.values()])
    stored = harness.read()
    assert {one.dedupe_key for one in stored} == outgoing.keys()
    for one in stored:
        original, row = outgoing[one.dedupe_key]
        assert (one.content_type, one.body) == (CONTENT_TYPE, original.body)
        assert not [name for name in one.headers if name.lower().startswith(("ce-", "ce_"))]
        check(decode, one.content_type, one.headers, one.body, row)


@pytest.mark.needs("subscribable")
@pytest.mark.parametrize("binary", [False, True])
def test_a_subscriber_can_read_both_modes(harness: Harness, decode: Decoder, binary: bool) -> None:
    outgoing = {one.id: row for one, row in zip(sent(binary=binary), ROWS, strict=True)}

    async def main() -> None:
        transport = harness.transport()
        await transport.connect()
        await transport.publish(sent(binary=binary))
        subscription = await transport.subscribe(f"modes-{harness.place}", oldest=True)
        while outgoing:
            for delivery in await subscription.receive(10, 1.0):
                headers = delivery.message.headers
                row = outgoing.pop(headers[harness.id_header])
                check(decode, headers["content-type"], headers, delivery.message.body, row)
                await delivery.ack()
        await subscription.close()
        await transport.close()

    run(main(), seconds=90)
