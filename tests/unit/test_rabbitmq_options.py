"""The options of RabbitMQ: what is valid, and one clear line per mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from orthanc_events_bridge.bridge.config import load
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from tests.unit.option_tools import mistakes_of, options_of

SERVERS = "servers: [amqp://mq.example.org]\n"
EXTERNAL = "auth: external\ntls: {cert_file: c, key_file: k}\n"


def options(text: str) -> RabbitOptions:
    found = options_of("rabbitmq", text)
    assert isinstance(found, RabbitOptions)
    return found


def mistakes(text: str) -> list[str]:
    return mistakes_of("rabbitmq", text)


def test_smallest() -> None:
    found = options(SERVERS)
    assert found.address(found.servers[0]) == ("mq.example.org", 5672, "/")
    assert (found.name, found.exchange, found.history) == ("rabbitmq", "orthanc.events", "orthanc.events.history")
    assert (found.mode, found.start, found.declare, found.auth) == ("structured", "oldest", True, "plain")
    assert (found.limits.max_age, found.limits.max_bytes, found.limits.segment) == (30 * 86400, 10 * 2**30, 100 * 2**20)
    assert not found.tls_required


def test_the_example() -> None:
    path = Path(__file__).resolve().parents[2] / "config" / "rabbitmq.yaml"
    found = load(path, {"RABBITMQ_URL": "amqp://mq:5673/pacs"}).transports[0]
    assert isinstance(found, RabbitOptions)
    assert found.address(found.servers[0]) == ("mq", 5673, "pacs")


@pytest.mark.parametrize(
    ("server", "address"),
    [
        ("amqp://h", ("h", 5672, "/")),
        ("amqp://h/", ("h", 5672, "/")),
        ("amqps://h", ("h", 5671, "/")),
        ("amqp://h:1/pacs", ("h", 1, "pacs")),
        ("amqp://h/%2Fpacs%2Fa%20b", ("h", 5672, "/pacs/a b")),
        ("amqp://10.0.0.1:5673", ("10.0.0.1", 5673, "/")),
        ("amqps://[::1]:5671/x", ("::1", 5671, "x")),
    ],
)
def test_servers(server: str, address: tuple[str, int, str]) -> None:
    assert options(f'servers: ["{server}"]').address(server) == address


@pytest.mark.parametrize(
    ("server", "wrong"),
    [
        ("h", "is no URL of a RabbitMQ server"),
        ("h:5672", "is no URL of a RabbitMQ server"),
        ("http://h:15672", "is no URL of a RabbitMQ server"),
        ("amqp://", "is no URL of a RabbitMQ server"),
        ("amqp://h:port", "is no URL of a RabbitMQ server"),
        ("amqp://h:0", "is no URL of a RabbitMQ server"),
        ("amqp://h:70000", "is no URL of a RabbitMQ server"),
        ("amqp://a,amqp://b", "is no URL of a RabbitMQ server"),
        ("amqp://h/a/b", "has more behind the port than the name of a virtual host"),
        ("amqp://h?heartbeat=5", "has more behind the port than the name of a virtual host"),
        ("amqp://user:canary@h", "holds credentials"),
    ],
)
def test_servers_that_are_none(server: str, wrong: str) -> None:
    (found,) = mistakes(f'servers: ["{server}"]')
    assert wrong in found and "x.yaml:4: transports[0].servers[0]" in found
    assert "canary" not in found


@pytest.mark.parametrize(
    ("text", "required", "port"),
    [
        (SERVERS, False, 5672),
        (SERVERS + "tls: {enabled: true}", True, 5671),
        (SERVERS + "tls: {enabled: false}", False, 5672),
        (SERVERS + "tls: {ca_file: x}", True, 5671),
        (SERVERS + "tls: {server_hostname: x}", True, 5671),
        ("servers: [amqp://a, amqps://b]", True, 5671),
    ],
)
def test_whether_there_is_tls(text: str, required: bool, port: int) -> None:
    found = options(text)
    assert found.tls_required == required
    assert found.address(found.servers[0])[1] == port


@pytest.mark.parametrize(
    ("limits", "segment"),
    [
        ("{max_bytes: 10MiB}", 2**20),
        ("{max_bytes: 0}", 100 * 2**20),
        ("{max_bytes: 1TiB}", 100 * 2**20),
        ("{max_bytes: 1TiB, segment_bytes: 1GiB}", 2**30),
    ],
)
def test_segments(limits: str, segment: int) -> None:
    assert options(f"{SERVERS}limits: {limits}").limits.segment == segment


def test_a_login() -> None:
    found = options(f"{SERVERS}user: orthanc\npassword: canary")
    assert found.secret("password") == "canary"
    assert "canary" not in repr(found)
    assert options(SERVERS + EXTERNAL).auth == "external"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("user: a", "user: needs a password"),
        ("password: canary", "password: needs a user"),
        ("password_file: p", "password_file: needs a user"),
        ("user: a\npassword: canary\npassword_file: p", "give the same secret twice"),
        ("auth: external", "auth: needs a client certificate"),
        ("auth: external\ntls: {ca_file: c}", "auth: needs a client certificate"),
        (EXTERNAL + "user: a", "auth (line 5) and user (line 7) are two ways to log in"),
        (EXTERNAL + "password: canary", "auth (line 5) and password (line 7) are two ways to log in"),
        ("auth: scram", "'scram' is none of the choices"),
        ("exchange: a b", "exchange: 'a b' can't be used as a name in RabbitMQ"),
        ("exchange: amq.topic", "exchange: 'amq.topic' can't be used as a name in RabbitMQ"),
        ("history: ''", "can't be used as a name in RabbitMQ"),
        ("inbox_prefix: amq.inbox", "inbox_prefix: 'amq.inbox' can't be used as a name in RabbitMQ"),
        (f"inbox_prefix: {'x' * 101}", "is too long for a name in RabbitMQ"),
        ("limits: {max_bytes: 1KiB}", "limits.max_bytes: '1KiB' is out of range"),
        ("limits: {segment_bytes: 4GB}", "limits.segment_bytes: '4000000000' is more than RabbitMQ takes"),
        ("limits: {max_bytes: 1MiB, segment_bytes: 2MiB}", "segment_bytes: '2MiB' is larger than max_bytes (1MiB)"),
        ("limits: {max_messages: 5}", "there is no such option"),
        ("tls: {cert_file: c}", "needs key_file beside it"),
        ("tls: {enabled: false, ca_file: c}", "enabled (line 5) switches off what ca_file (line 5) asks for"),
        ("urls: [amqp://h]", "there is no such option"),
        ("batch: 0", "batch: '0' is out of range"),
    ],
)
def test_mistakes(text: str, wrong: str) -> None:
    (found,) = mistakes(SERVERS + text)
    assert wrong in found, found
    assert "canary" not in found


def test_two_minds_about_tls() -> None:
    (found,) = mistakes("servers: [amqps://h]\ntls: {enabled: false}")
    assert "insists on TLS" in found and "forbids it" in found
