"""The AsyncAPI document: valid by AsyncAPI's own schema, for each broker's bindings, whole, and true of real events."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema_rs import Draft7Validator

from orthanc_events_bridge.events.catalog import TYPES, EventType
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.events.described import asyncapi_text, schema
from tools import asyncapi_document
from tools.asyncapi_document import BROKERS, Broker

OFFICIAL = Draft7Validator(json.loads((Path(__file__).parents[1] / "vendor/asyncapi/3.0.0.json").read_text("utf-8")))
GOLDEN = Path(__file__).parent / "golden" / "events.jsonl"

each_broker = pytest.mark.parametrize("broker", BROKERS, ids=lambda broker: broker.name)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(asyncapi_text())
    return found


def faults(document: dict[str, Any]) -> list[str]:
    return [f"{'/'.join(map(str, error.instance_path))}: {error.message}" for error in OFFICIAL.iter_errors(document)]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from references(one)


def whole(node: Any, document: dict[str, Any]) -> Any:
    """With what it refers to in it."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            node = reduce(lambda inner, key: inner[key], node["$ref"][2:].split("/"), document)
        return {name: whole(one, document) for name, one in node.items()}
    return [whole(one, document) for one in node] if isinstance(node, list) else node


def test_it_is_valid(document: dict[str, Any]) -> None:
    assert faults(document) == []


@each_broker
def test_it_is_valid_for_each_broker_alone(broker: Broker) -> None:
    alone = asyncapi_document.document([broker])
    assert alone["channels"].keys() == {f"{broker.name}{place.key}" for place in broker.places}
    assert faults(alone) == []


#: Of each broker's bindings something that its schema refuses: where, and what stands there then.
WRONG: dict[str, list[tuple[str, Any]]] = {
    "nats": [
        ("operations/natsReplay/bindings/nats/queue", 5),
        ("operations/natsReplay/bindings/nats/stream", "ORTHANC_EVENTS"),
        ("operations/natsReplay/bindings/nats/bindingVersion", "9.0.0"),
    ],
    "rabbitmq": [
        ("channels/rabbitmqChanges/bindings/amqp/exchange/type", "stream"),
        ("channels/rabbitmqInbox/bindings/amqp/queue/durable", "yes"),
        ("channels/rabbitmqInbox/bindings/amqp/is", "routingKey"),
        ("operations/rabbitmqPublishChange/bindings/amqp/deliveryMode", 3),
    ],
    "kafka": [
        ("channels/kafkaChanges/bindings/kafka/partitions", 0),
        ("channels/kafkaDead/bindings/kafka/topicConfiguration/cleanup.policy", ["forget"]),
        ("components/messages/studyStable/bindings/kafka/key/type", "text"),
    ],
    "webhook": [("operations/webhookPublishChange/bindings/http/method", "SEND")],
}


@pytest.mark.parametrize(("place", "value"), [case for cases in WRONG.values() for case in cases])
def test_a_wrong_binding_is_found(document: dict[str, Any], place: str, value: Any) -> None:
    wrong = copy.deepcopy(document)
    *above, last = place.split("/")
    reduce(lambda node, key: node[key], above, wrong)[last] = value
    assert faults(wrong)


def test_each_broker_has_bindings_that_are_judged() -> None:
    assert WRONG.keys() == {broker.name for broker in BROKERS}


def test_it_needs_no_other_file(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert len(found) > 100
    for one in found:
        assert one.startswith("#/")
        assert isinstance(reduce(lambda node, key: node[key], one[2:].split("/"), document), dict)


def test_each_place_has_every_type_once(document: dict[str, Any]) -> None:
    messages = document["components"]["messages"]
    for name, channel in document["channels"].items():
        assert channel["messages"].keys() == messages.keys(), name
        assert set(channel.get("parameters", {})) == {part.split("}")[0] for part in channel["address"].split("{")[1:]}
    names = {f"io.orthanc-events.{event_type.name}.v1" for event_type in (*TYPES, *DERIVED)}
    assert {message["name"] for message in messages.values()} == names
    assert len(messages) == len(names)
    for message in messages.values():
        own = message["payload"]["allOf"][-1]["properties"]
        assert own["type"]["const"] == message["name"]
        title = own["data"]["$ref"].rpartition("/")[2]
        data = document["components"]["schemas"][title]
        stored = schema(message["name"])
        assert stored["$id"] == own["dataschema"]["const"]
        assert whole(data, document) == {
            name: value for name, value in (stored | {"title": title}).items() if name[0] != "$" and name != "examples"
        }


def test_a_message_s_payload_is_what_events_are(document: dict[str, Any]) -> None:
    messages = {one["name"]: one["payload"] for one in document["components"]["messages"].values()}
    events = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()]
    assert {event["type"] for event in events} >= {f"io.orthanc-events.{one.name}.v1" for one in TYPES}
    for event in events:
        rules = {"components": document["components"], **messages[event["type"]]}
        validator = Draft7Validator(rules, validate_formats=True)
        validator.validate(event)
        assert not validator.is_valid({**event, "data": {**event["data"], "level": "elsewhere"}})
        assert not validator.is_valid({**event, "sequence": "42"})


def test_generated_code_gets_a_name_for_every_object(document: dict[str, Any]) -> None:
    components = document["components"]
    for key, one in components["schemas"].items():
        assert one["title"] == key
        for name, inner in one.get("properties", {}).items():
            # `data` of an envelope is another object in each message. What is plainly a map gets no class.
            if "properties" in inner or "enum" in inner:
                assert (key, name) == ("Headers", "orthanc-operation")
    titles = [one["payload"]["title"] for one in components["messages"].values()]
    assert len(titles) == len(set(titles))
    assert not set(titles) & components["schemas"].keys()


def test_two_objects_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(event_type: EventType) -> dict[str, Any]:
        return {"properties": {"log": {"title": "Log", "description": event_type.name}}}

    monkeypatch.setattr(asyncapi_document, "data_schema", made)
    with pytest.raises(SystemExit, match="two schemas have the title Log"):
        asyncapi_document.document()


def test_each_message_has_an_example_that_it_fits(document: dict[str, Any]) -> None:
    for one in document["components"]["messages"].values():
        (example,) = one["examples"]
        rules = {"components": document["components"], **one["payload"]}
        Draft7Validator(rules, validate_formats=True).validate(example["payload"])
        assert example["payload"]["type"] == one["name"]
