"""Events that consumers publish: their ids and chains, what can't be published, and that the broker has them."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from orthanc_events_bridge.consumers import Consumer, Event, Reject, RetryPolicy
from orthanc_events_bridge.consumers.event import read
from orthanc_events_bridge.consumers.metrics import metrics_text
from orthanc_events_bridge.consumers.publishing import Publisher, derive
from orthanc_events_bridge.errors import BridgeError, NotConnectedError, RefusedError, TransportError
from orthanc_events_bridge.events.derived import DERIVED, NAMES, schema
from orthanc_events_bridge.events.mapping import partition
from orthanc_events_bridge.testing import derived, event, orthanc_id
from orthanc_events_bridge.transports.base import Incoming, Outgoing
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport
from orthanc_events_bridge.transports.options import MemoryOptions
from orthanc_events_bridge.workflows.telling import tell_anonymized, tell_received

STABLE = event("study.stable", study="study-1", patient="patient-1")
READY = {"rule": "all", "complete": True, "series": 2, "instances": 40}
#: Data of each type, beside what it is about.
DATA: dict[str, dict[str, Any]] = {
    "study.ready": {**READY, "complete": False, "missing": {"series": ["t1"], "instances": 2}, "expected": 42},
    "study.updated": READY,
    "study.routed": {"rule": "all", "destination": "pacs", "instances": 40, "job": "job-1"},
    "series.routed": {"level": "series", "id": "series-1", "rule": "all", "destination": "pacs", "instances": 3},
    "instance.routed": {"level": "instance", "id": "instance-1", "rule": "all", "destination": "pacs", "instances": 1},
    "transfer.failed": {"rule": "all", "destination": "pacs", "reason": "failed 20 times of 20", "attempts": 20},
    "study.anonymized": {"change": "AnonymizedStudy", "rule": "trial", "instances": 40},
    "result.received": {"level": "series", "id": "series-1", "parents": {"study": "s"}, "rule": "ai", "instances": 1},
}
OWN = "org.example.report.signed.v1"


def sent(name: str, data: dict[str, Any], cause: Event = STABLE, **more: Any) -> Outgoing:
    return derive(name, data, cause, **{"producer": "one", "now": 0.0, **more})


@pytest.mark.parametrize("kind", DERIVED, ids=lambda kind: kind.name)
def test_each_type_is_a_cloudevent_whose_data_fits_its_schema(kind: Any) -> None:
    body = sent(kind.name, DATA[kind.name]).body
    event_sent = JSONFormat().read(None, body)
    assert isinstance(event_sent, CloudEvent)  # its constructor has checked every attribute
    document = json.loads(body)
    rules = schema(kind, "urn:orthanc-events:schema:")
    assert document["dataschema"] == rules["$id"]
    validator = jsonschema_rs.Draft202012Validator(rules)
    validator.validate(document["data"])
    for name in rules["required"]:
        assert not validator.is_valid({key: value for key, value in document["data"].items() if key != name})


def test_the_id_is_the_one_that_the_contract_names() -> None:
    spelt = ("derived", "one", STABLE.source, "io.orthanc-events.study.ready.v1", STABLE.id)
    made = sent("study.ready", READY)
    assert made.id == str(uuid.uuid5(uuid.UUID("8be797cd-5573-46b7-8097-bea664a99a80"), "\n".join(spelt)))
    assert sent("study.ready", {**READY, "instances": 1}, now=99.0).id == made.id
    others = [
        sent("study.ready", READY, producer="two"),
        sent("study.updated", READY),
        sent("study.ready", READY, event("study.stable", study="study-1", number=2)),
        sent("study.ready", READY, of="content"),
    ]
    assert len({made.id, *(one.id for one in others)}) == 5
    again = sent("study.ready", READY, event("study.created", study="study-1"), of="content")
    assert again.id == others[-1].id


def test_it_goes_where_its_study_s_events_go() -> None:
    made = sent("study.ready", READY)
    assert made.address == f"main.study.ready.{partition('study-1')}"
    assert made.key == "study-1"
    assert sent("study.ready", READY, replace(STABLE, site="north")).address.startswith("north.study.ready.")
    received = derived("study.ready", READY, cause=STABLE)
    assert (received.name, received.ours, received.producer) == ("study.ready", True, "derive")
    assert (received.study_id, received.patient_id, received.site) == ("study-1", "patient-1", "main")
    assert received.attributes["subject"] == "studies/study-1"
    assert not received.attributes.keys() & {"recorder", "sequence"}


def test_a_site_is_found_in_any_broker_s_address() -> None:
    body = derive("study.ready", READY, STABLE, producer="one", now=0.0).body
    headers = {"content-type": "application/cloudevents+json"}
    for address, more, site in (
        ("orthanc.events.north.study.ready.07", {}, "north"),
        ("north.study.ready.07", {}, "north"),
        ("orthanc.inbox.one", {"orthanc-address": "north.study.ready.07"}, "north"),
        ("orthanc.events", {"orthanc-site": "north"}, "north"),
        ("elsewhere", {}, ""),
    ):
        assert read(Incoming(address, body, {**headers, **more})).site == site


def test_a_chain_has_one_correlation_and_each_its_cause() -> None:
    ready = derived("study.ready", READY, cause=STABLE)
    routed = derived("study.routed", DATA["study.routed"], cause=ready, producer="router")
    own = derived(OWN, {}, cause=routed, producer="reports")
    assert (STABLE.causation_id, STABLE.correlation_id) == (None, STABLE.id)
    assert [one.causation_id for one in (ready, routed, own)] == [STABLE.id, ready.id, routed.id]
    assert {one.correlation_id for one in (ready, routed, own)} == {STABLE.id}
    traces = {one.attributes["traceparent"].split("-")[1] for one in (STABLE, ready, routed, own)}
    spans = {one.attributes["traceparent"].split("-")[2] for one in (STABLE, ready, routed, own)}
    assert (len(traces), len(spans)) == (1, 4)


def test_nothing_leads_back_where_that_is_asked_for() -> None:
    original = event("study.stable", study=orthanc_id("original"), patient=orthanc_id("Jane"))
    result = {"change": "AnonymizedStudy", "level": "study", "id": "result", "parents": {"patient": "nobody"}}
    made = sent("study.anonymized", result, original, of="result 1", linked=False)
    text = made.body.decode()
    trace = original.attributes["traceparent"].split("-")[1]
    for secret in (original.id, orthanc_id("original"), orthanc_id("Jane"), trace, original.key):
        assert secret not in text
    assert made.key == "result" and json.loads(text)["correlationid"] == made.id
    assert made.id == sent("study.anonymized", result, STABLE, of="result 1", linked=False).id
    for data, of in ((result, None), ({"change": "AnonymizedStudy"}, "x")):
        with pytest.raises(BridgeError, match="nothing may lead back"):
            sent("study.anonymized", data, original, of=of, linked=False)


def test_prefix_and_schemas_are_those_of_the_cause() -> None:
    attributes = {**STABLE.attributes, "dataschema": "https://x.example/study.stable.v1"}
    attributes["type"] = "com.example.pacs.study.stable.v1"
    cause = read(
        Incoming(
            "", json.dumps({**attributes, "data": dict(STABLE.data)}).encode(), {"content-type": "application/json"}
        )
    )
    document = json.loads(sent("study.ready", READY, cause).body)
    assert document["type"] == "com.example.pacs.study.ready.v1"
    assert document["dataschema"] == "https://x.example/study.ready.v1"


def test_a_type_of_one_s_own() -> None:
    made = sent(OWN, {"report": 7})
    assert made.address == f"main.report.signed.{partition('study-1')}"
    document = json.loads(made.body)
    assert document["type"] == OWN and "dataschema" not in document
    wanted = {"level": "study", "id": "study-1", "parents": {"patient": "patient-1"}, "report": 7}
    assert document["data"] == wanted
    assert document["subject"] == "studies/study-1"
    received = derived(OWN, {"report": 7}, cause=STABLE)
    assert (received.name, received.ours, received.study_id) == (OWN, False, "study-1")
    assert sent("org.example.report.signed", {}).address.startswith("main.report.signed.")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("study.stable", "is told by the bridge alone"),
        ("transfer.ordered", "is told by the bridge alone"),
        ("report.signed", "can't be the type of an event"),
        ("org.Example.report.signed", "can't be the type of an event"),
        ("org.example.report signed.v1", "can't be the type of an event"),
        ("org.example.report.>", "can't be the type of an event"),
        ("org.example.report.07", "can't be the type of an event"),
        ("org.example.study.stable.v1", "would be taken for one of ours"),
        ("io.orthanc-events.report.signed.v1", "would be taken for one of ours"),
        ("", "can't be the type of an event"),
    ],
)
def test_what_can_be_no_type(name: str, wrong: str) -> None:
    with pytest.raises(BridgeError, match=wrong):
        sent(name, {})


@pytest.mark.parametrize(
    ("name", "data", "wrong"),
    [
        ("study.ready", {"rule": "all"}, "complete is missing; series is missing; instances is missing"),
        ("study.ready", {**READY, "patientName": "x"}, "it has no patientName"),
        ("study.ready", {**READY, "level": "series", "id": "x"}, "it is about a series"),
        (OWN, {"number": float("nan")}, "can't be written as JSON"),
        (OWN, {"number": object()}, "can't be written as JSON"),
    ],
)
def test_what_can_be_no_data(name: str, data: dict[str, Any], wrong: str) -> None:
    with pytest.raises(BridgeError, match=wrong):
        sent(name, data)


# -- through a consumer ---------------------------------------------------------------------------------------


def app(**options: Any) -> Consumer:
    return Consumer("one", broker={"type": "memory"}, **options)


def test_what_a_handler_publishes_is_recorded_and_the_same_when_it_is_called_again() -> None:
    consumer = app()

    @consumer.on("study.stable")
    async def tell(given: Event) -> None:
        await consumer.publish("study.ready", READY, cause=given)
        if given.attempt == 1:
            raise RuntimeError

    with consumer.test() as kit:
        kit.send(STABLE)
        kit.finish()
        first, second = kit.published
        assert (first.id, first.name, first.causation_id) == (second.id, "study.ready", STABLE.id)
        # The broker keeps one, and gives it to everybody, this consumer too.
        assert [message.address.split(".")[2] for message in kit.broker.messages].count("ready") == 1
        assert [one.event.name for one in kit.ignored if one.event] == ["study.ready"]


def test_wildcards_get_it_and_handlers_may_follow_each_other() -> None:
    consumer = app()
    seen = []

    @consumer.on("study.*")
    async def see(given: Event) -> None:
        seen.append(given.name)
        if given.name == "study.stable":
            await consumer.publish("study.ready", READY, cause=given)
            await consumer.publish(OWN, {}, cause=given)

    @consumer.on(OWN)
    def own(given: Event) -> None:
        seen.append(given.name)

    with consumer.test() as kit:
        kit.send(STABLE)
        assert seen == ["study.stable", "study.ready", OWN]
        assert not kit.dead


def test_a_handler_in_a_thread_publishes_and_waits() -> None:
    consumer = app()

    @consumer.on("study.stable")
    def tell(given: Event) -> str:
        return consumer.publish_and_wait("study.ready", READY, cause=given)

    with consumer.test() as kit:
        kit.send(STABLE)
        assert kit.results == [kit.published[0].id]
    with pytest.raises(BridgeError, match="the consumer doesn't run"):
        tell(STABLE)


def test_an_own_type_that_nobody_asks_for_is_no_dead_letter_and_a_stranger_s_is() -> None:
    consumer = app()

    @consumer.on("study.stable")
    def nothing(given: Event) -> None:
        pass

    own = derived(OWN, {}, cause=STABLE)
    stranger = json.dumps({"specversion": "1.0", "id": "1", "source": "x", "type": OWN}).encode()
    with consumer.test() as kit:
        kit.send(own, stranger)
        assert [one.event.id for one in kit.ignored if one.event] == [own.id]
        assert [one.event.id for one in kit.dead if one.event] == ["1"]


def test_what_an_anonymizer_tells_leads_nowhere() -> None:
    consumer = app()

    @consumer.on("study.stable")
    async def tell(given: Event) -> None:
        await tell_anonymized(consumer, given, study="result", patient="nobody", instances=["b", "a"], rule="trial")
        parents = {"study": "original", "patient": "somebody"}
        await tell_received(
            consumer, given, level="series", identifier="report", parents=parents, instances=["c"], rule="trial"
        )

    with consumer.test() as kit:
        kit.send(STABLE, event("study.stable", study="study-1", number=2))
        assert not kit.retried
        anonymized, received = kit.published[:2]
        assert (anonymized.name, anonymized.study_id, anonymized.data["instances"]) == ("study.anonymized", "result", 2)
        assert (received.name, received.series_id, received.key) == ("result.received", "report", "original")
        for one in (anonymized, received):
            assert one.causation_id is None and one.correlation_id == one.id
            assert "study-1" not in str(one.attributes) + str(one.data) and STABLE.id not in str(one.attributes)
        assert {one.id for one in kit.published} == {anonymized.id, received.id}


def test_a_dead_letter_is_told_before_it_is_one() -> None:
    consumer = app(retry=RetryPolicy(max_attempts=2))

    async def told(given: Event, reason: str) -> None:
        data = {"rule": "all", "destination": "pacs", "reason": reason, "attempts": given.attempt}
        await consumer.publish("transfer.failed", data, cause=given)

    @consumer.on("study.stable", on_dead=told)
    async def fail(given: Event) -> None:
        raise BridgeError("it is down", "wait")

    with consumer.test() as kit:
        kit.send(STABLE)
        kit.finish()
        kit.assert_dead(STABLE, "failed 2 times of 2: it is down")
        (failed,) = kit.published
        assert (failed.data["reason"], failed.data["attempts"]) == (kit.dead[0].reason, 2)
        assert failed.causation_id == STABLE.id


def test_what_on_dead_raises_itself_keeps_nothing_waiting(caplog: pytest.LogCaptureFixture) -> None:
    async def told(given: Event, reason: str) -> None:
        raise ValueError("Jane Doe")

    consumer = app()

    @consumer.on("study.stable", on_dead=told)
    async def fail(given: Event) -> None:
        raise Reject("no pixel data")

    with consumer.test() as kit:
        kit.send(STABLE)
        kit.assert_dead(STABLE)
    assert "that it is dead can't be told: ValueError" in caplog.text and "Jane" not in caplog.text
    with pytest.raises(BridgeError, match="can't be awaited"):
        consumer.on("study.stable", on_dead=lambda given, reason: None)(fail)  # type: ignore[arg-type, return-value]


def test_what_the_broker_refuses_fails_the_handler_which_tries_again() -> None:
    consumer = app()

    @consumer.on("study.stable")
    async def tell(given: Event) -> None:
        await consumer.publish("study.ready", READY, cause=given)

    with consumer.test() as kit:
        refusals = [RefusedError("it is full", "make room")]
        kit.broker.refuse = lambda sent: refusals.pop() if refusals and sent.verb == "ready" else None
        kit.send(STABLE)
        assert not kit.published
        assert isinstance(kit.retried[0].error, TransportError) and "it is full" in str(kit.retried[0].error)
        assert consumer.meter.counts == {("publish_failed", "study.ready"): 1}
        kit.finish()
        assert len(kit.published) == 1
        kit.assert_handled(STABLE)
    assert consumer.meter.counts == {("publish_failed", "study.ready"): 1, ("published", "study.ready"): 1}


def test_what_is_published_is_counted_by_types_of_ours_only() -> None:
    pytest.importorskip("prometheus_client")
    consumer = app()

    @consumer.on("study.stable")
    def tell(given: Event) -> None:
        for name, data in ((OWN, {}), ("org.example.doe.jane.v1", {}), ("study.ready", READY)):
            consumer.publish_and_wait(name, data, cause=given)
        with pytest.raises(BridgeError, match="is missing"):
            consumer.publish_and_wait("study.updated", {}, cause=given)

    with consumer.test() as kit:
        kit.send(STABLE)
        kit.assert_handled(STABLE)
    lines = metrics_text([consumer]).decode().splitlines()
    for line in (
        'orthanc_consumer_published_total{consumer="one",type="other"} 2.0',
        'orthanc_consumer_published_total{consumer="one",type="study.ready"} 1.0',
        'orthanc_consumer_publish_failed_total{consumer="one",type="study.updated"} 1.0',
    ):
        assert line in lines, lines
    assert not any("doe" in line for line in lines)


def test_a_connection_that_is_dead_is_made_again_at_once() -> None:
    async def work() -> None:
        broker = Broker()
        publisher = Publisher(lambda: MemoryTransport(MemoryOptions(), broker))
        await publisher.send(sent("study.ready", READY))
        losses = [NotConnectedError("the connection was lost", "connect again")]
        broker.refuse = lambda event: losses.pop() if losses else None
        await publisher.send(sent("study.updated", READY))
        assert not losses
        assert [message.address.split(".")[2] for message in broker.messages] == ["ready", "updated"]
        broker.up = False
        with pytest.raises(TransportError, match="down"):
            await publisher.send(sent("study.updated", READY, of="more"))
        broker.up = True
        await publisher.send(sent("study.updated", READY, of="more"))
        assert len(broker.messages) == 3
        await publisher.close()

    asyncio.run(work())


def test_the_names_are_each_there_once() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert {one.name for one in DERIVED} == DATA.keys()
