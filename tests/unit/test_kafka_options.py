"""The options of Kafka: what is valid, and one clear line per mistake."""

from __future__ import annotations

import pytest

from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from tests.unit.option_tools import mistakes_of, options_of

SERVERS = "servers: [kafka.example.org]\n"


def options(text: str) -> KafkaOptions:
    found = options_of("kafka", text)
    assert isinstance(found, KafkaOptions)
    return found


def mistakes(text: str) -> list[str]:
    return mistakes_of("kafka", text)


def test_smallest() -> None:
    found = options(SERVERS)
    assert found.servers == ("kafka.example.org:9092",)
    assert (found.name, found.topic, found.partitions, found.declare) == ("kafka", "orthanc.events", 64, True)
    assert (found.mode, found.start, found.compression, found.sasl) == ("structured", "oldest", "none", None)
    assert (found.limits.replicas, found.limits.needed_replicas) == (1, 1)
    assert found.limits.max_bytes * found.partitions == 10 * 2**30
    assert not found.tls_required


@pytest.mark.parametrize(
    ("server", "read"),
    [
        ("h", "h:9092"),
        ("h:9094", "h:9094"),
        ("kafka-1.example.org:1", "kafka-1.example.org:1"),
        ("10.0.0.1", "10.0.0.1:9092"),
        ("[::1]", "[::1]:9092"),
        ("[2001:db8::7]:19092", "[2001:db8::7]:19092"),
    ],
)
def test_servers(server: str, read: str) -> None:
    assert options(f'servers: ["{server}"]').servers == (read,)


@pytest.mark.parametrize(
    ("server", "wrong"),
    [
        ("kafka://h:9092", "is no address of a Kafka server"),
        ("h:port", "is no address of a Kafka server"),
        ("h:0", "is no address of a Kafka server"),
        ("h:70000", "is no address of a Kafka server"),
        ("h:9092/x", "is no address of a Kafka server"),
        ("a:1,b:2", "is no address of a Kafka server"),
        ("::1", "is no address of a Kafka server"),
        ("[::1", "is no address of a Kafka server"),
        ("", "is no address of a Kafka server"),
        ("user:canary@h:9092", "holds credentials"),
    ],
)
def test_servers_that_are_none(server: str, wrong: str) -> None:
    (found,) = mistakes(f'servers: ["{server}"]')
    assert wrong in found and "x.yaml:4: transports[0].servers[0]" in found
    assert "canary" not in found


@pytest.mark.parametrize(
    ("replicas", "more", "needed"), [(1, "", 1), (2, "", 1), (3, "", 2), (5, ", min_insync_replicas: 3", 3)]
)
def test_replicas_that_an_event_needs(replicas: int, more: str, needed: int) -> None:
    assert options(f"{SERVERS}limits: {{replicas: {replicas}{more}}}").limits.needed_replicas == needed


@pytest.mark.parametrize(
    ("tls", "required"),
    [
        ("", False),
        ("tls: {enabled: true}", True),
        ("tls: {enabled: false}", False),
        ("tls: {ca_file: x}", True),
        ("tls: {server_hostname: x}", True),
    ],
)
def test_whether_there_is_tls(tls: str, required: bool) -> None:
    assert options(SERVERS + tls).tls_required == required


def test_a_login() -> None:
    found = options(f"{SERVERS}sasl: scram-sha-512\nuser: orthanc\npassword: canary")
    assert found.secret("password") == "canary"
    assert "canary" not in repr(found)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sasl: plain", "sasl: needs a user"),
        ("sasl: plain\nuser: a", "user: needs a password"),
        ("user: a\npassword: canary", "user: needs a way to log in"),
        ("password: canary", "password: needs a user"),
        ("password_file: p", "password_file: needs a user"),
        ("sasl: plain\nuser: a\npassword: canary\npassword_file: p", "give the same secret twice"),
        ("sasl: gssapi\nuser: a\npassword: canary", "'gssapi' is none of the choices"),
        ("topic: a b", "can't be used as a topic's name"),
        ("topic: ..", "can't be used as a topic's name"),
        ("inbox_prefix: a/b", "can't be used as a topic's name"),
        (f"inbox_prefix: {'x' * 121}", "is too long for a topic's name"),
        ("partitions: 0", "partitions: '0' is out of range"),
        ("partitions: 65", "partitions: '65' is out of range"),
        ("limits: {replicas: 0}", "limits.replicas: '0' is out of range"),
        ("limits: {replicas: 2, min_insync_replicas: 3}", "is more than there are replicas (2)"),
        ("limits: {max_bytes: 1KiB}", "limits.max_bytes: '1KiB' is out of range"),
        ("limits: {max_messages: 5}", "there is no such option"),
        ("tls: {cert_file: c}", "needs key_file beside it"),
        ("tls: {enabled: false, ca_file: c}", "enabled (line 5) switches off what ca_file (line 5) asks for"),
        ("compression: lz4", "'lz4' is none of the choices"),
        ("brokers: [h]", "there is no such option"),
        ("batch: 0", "batch: '0' is out of range"),
    ],
)
def test_mistakes(text: str, wrong: str) -> None:
    (found,) = mistakes(SERVERS + text)
    assert wrong in found
    assert "canary" not in found
