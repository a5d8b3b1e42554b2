"""Logging in to a real Kafka that enforces it, in every way there is; what is refused, and how it is said."""
# mypy: disallow-subclassing-any=False
# (aiokafka comes without types.)

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trustme
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Int8, Int16, Int32, Schema, String
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.testing.brokers.kafka import KafkaServer
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_delays import STEPS
from tests.contract.harness import SECRET, aside, connect, event, events, run
from tests.contract.kafka_tools import (
    PLAIN,
    administrate,
    failing,
    kafka_transport,
    read_topic,
    refusal,
)

pytestmark = pytest.mark.integration

LISTENERS: Final = ("OURS", "NAMED", "MUTUAL", "LOGIN", "OPEN")
SCRAM: Final = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
PROTOCOLS: Final = {"LOGIN": "SASL_SSL", "OPEN": "SASL_PLAINTEXT"}


class Authority:
    """A private authority, and certificates of it, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)
        self.client, self.client_key = folder / "client.pem", folder / "client-key.pem"
        self.issue("bridge.example.org", self.client, self.client_key)

    def issue(self, name: str, certificate: Path, key: Path) -> None:
        issued = self._authority.issue_cert(name)
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)

    def keystore(self, name: str) -> Path:
        """A server's key and certificate in one file, as Kafka takes them."""
        issued, path = self._authority.issue_cert(name), self._folder / f"{name}.pem"
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(text + issued.cert_chain_pems[0].bytes())
        return path


class Fortress:
    """A server with a listener for each kind of security."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Authority(folder / "ours"), Authority(folder / "theirs")
        self.ports = {name: free_port() for name in LISTENERS}
        self.server = KafkaServer(folder / "kafka")
        self.server.scram = {"bridge": SECRET, "guest": SECRET}
        self.server.config = self._config(self.server)
        self._topics = itertools.count(1)

    def _config(self, server: KafkaServer) -> str:
        mine = [f"{name}://127.0.0.1:{port}" for name, port in self.ports.items()]
        internal = f"INTERNAL://127.0.0.1:{server.admin_port}"
        controller = f"CONTROLLER://127.0.0.1:{server.controller_port}"
        client = f"CLIENT://127.0.0.1:{server.port}"
        protocols = {"CLIENT": "PLAINTEXT", "INTERNAL": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}
        protocols |= {name: PROTOCOLS.get(name, "SSL") for name in LISTENERS}
        lines = [
            f"listeners={','.join([client, internal, controller, *mine])}",
            f"advertised.listeners={','.join([client, internal, *mine])}",
            f"listener.security.protocol.map={','.join(f'{name}:{value}' for name, value in protocols.items())}",
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={self.ours.keystore('127.0.0.1')}",
            f"listener.name.named.ssl.keystore.location={self.ours.keystore('kafka.example.org')}",
            "listener.name.named.ssl.keystore.type=PEM",
            "listener.name.mutual.ssl.client.auth=required",
            "listener.name.mutual.ssl.truststore.type=PEM",
            f"listener.name.mutual.ssl.truststore.location={self.ours.ca}",
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "connection.failed.authentication.delay.ms=0",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users=User:ANONYMOUS;User:bridge",
            "allow.everyone.if.no.acl.found=true",
        ]
        for name in ("login", "open"):
            prefix = f"listener.name.{name}"
            lines.append(f'{prefix}.plain.sasl.jaas.config={PLAIN} user_bridge="{SECRET}" user_guest="{SECRET}";')
            lines += [f"{prefix}.scram-sha-{bits}.sasl.jaas.config={SCRAM}" for bits in (256, 512)]
        return "\n".join(lines)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server.admin_port}"

    def topic(self) -> str:
        """A name that no other test uses."""
        return f"topic{next(self._topics)}"

    def transport(self, listener: str, **options: Any) -> KafkaTransport:
        return kafka_transport(self.ports[listener], **({"topic": self.topic()} | options))

    def make(self, topic: str) -> None:
        async def work(admin: AIOKafkaAdminClient) -> None:
            await admin.create_topics([NewTopic(topic, 4, 1)])

        administrate(self.url, work)


@pytest.fixture(scope="module")
def fortress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fortress]:
    require("kafka")
    found = Fortress(tmp_path_factory.mktemp("fortress"))
    found.server.start()
    try:
        yield found
    finally:
        found.server.close(kill=True)


def tls(authority: Authority, **more: Any) -> dict[str, Any]:
    return {"ca_file": str(authority.ca), **more}


# TLS.


def test_tls_with_a_private_authority(fortress: Fortress) -> None:
    transport = fortress.transport("OURS", tls=tls(fortress.ours))
    assert "with TLS" in connect(transport)[0]

    async def main() -> None:
        await transport.connect()
        await transport.publish(events(300, keys=["a", "b", "c"]))
        await transport.close()

    run(main())


@pytest.mark.parametrize("trusting", ["theirs", "the system's"])
def test_a_server_with_an_unknown_authority_is_refused(fortress: Fortress, trusting: str) -> None:
    options = tls(fortress.theirs) if trusting == "theirs" else {"enabled": True}
    text = refusal(fortress.transport("OURS", tls=options), TransportConfigurationError)
    assert "certificate verify failed" in text and "tls.ca_file" in text


def test_a_server_with_another_name_is_refused(fortress: Fortress) -> None:
    options = tls(fortress.ours)
    assert "127.0.0.1" in refusal(fortress.transport("NAMED", tls=options), TransportConfigurationError)
    options["server_hostname"] = "kafka.example.org"
    assert "with TLS" in connect(fortress.transport("NAMED", tls=options))[0]
    text = refusal(fortress.transport("OURS", tls=options), TransportConfigurationError)
    assert "kafka.example.org" in text


def test_mutual_tls(fortress: Fortress) -> None:
    ours, theirs = fortress.ours, fortress.theirs

    def with_certificate(which: Authority) -> KafkaTransport:
        pair = {"cert_file": str(which.client), "key_file": str(which.client_key)}
        return fortress.transport("MUTUAL", tls=tls(ours, **pair))

    assert "with TLS" in connect(with_certificate(ours))[0]
    for _ in range(3):  # how a server hangs up is a matter of milliseconds
        assert "tls.cert_file" in refusal(with_certificate(theirs), TransportConfigurationError)
        assert "tls.cert_file" in refusal(fortress.transport("MUTUAL", tls=tls(ours)), TransportConfigurationError)


def test_certificates_are_read_when_connecting(fortress: Fortress, tmp_path: Path) -> None:
    ca, certificate, key = tmp_path / "ca.pem", tmp_path / "bridge.pem", tmp_path / "bridge-key.pem"
    options = {"ca_file": str(ca), "cert_file": str(certificate), "key_file": str(key)}
    ca.write_bytes(fortress.theirs.ca.read_bytes())
    fortress.theirs.issue("bridge.example.org", certificate, key)
    transport = fortress.transport("MUTUAL", tls=options)
    refusal(transport, TransportConfigurationError)
    ca.write_bytes(fortress.ours.ca.read_bytes())
    refusal(transport, TransportConfigurationError)
    fortress.ours.issue("bridge.example.org", certificate, key)
    connect(transport)


def test_certificates_that_can_not_be_read(fortress: Fortress, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for options, option in [
        ({"ca_file": str(empty)}, "tls.ca_file"),
        ({"ca_file": str(tmp_path / "nowhere")}, "tls.ca_file"),
        (tls(fortress.ours, cert_file=str(fortress.ours.client), key_file=str(empty)), "tls.key_file"),
    ]:
        assert option in refusal(fortress.transport("OURS", tls=options), TransportConfigurationError)


def test_tls_where_there_is_none_and_none_where_there_is_tls(fortress: Fortress) -> None:
    plain = kafka_transport(fortress.server.port, tls=tls(fortress.ours))
    assert "tls" in refusal(plain, TransportConfigurationError).lower()
    assert "tls.enabled" in refusal(fortress.transport("OURS"), TransportConfigurationError)
    assert "tls.enabled" in refusal(fortress.transport("OURS", tls={"enabled": False}), TransportConfigurationError)


def test_closing_is_quick_also_with_tls_and_a_frozen_server(fortress: Fortress) -> None:
    transport = fortress.transport("OURS", tls=tls(fortress.ours), ack_timeout=1, connect_timeout=20)

    async def main() -> None:
        await transport.connect()
        await transport.publish(events(10))
        fortress.server.freeze()
        try:
            with failing(NotConnectedError):
                await transport.publish(events(400, size=50_000))
            began = time.monotonic()
            await transport.close()
            assert time.monotonic() - began < 1
        finally:
            fortress.server.thaw()
        waiting = fortress.transport("OURS", tls=tls(fortress.ours), connect_timeout=1)
        fortress.server.freeze()
        try:
            with failing(NotConnectedError):
                await waiting.connect()
            await waiting.close()
        finally:
            fortress.server.thaw()

    run(main())


# Logging in.


MECHANISMS: Final = ("plain", "scram-sha-256", "scram-sha-512")


@pytest.mark.parametrize("sasl", MECHANISMS)
@pytest.mark.parametrize("listener", ["LOGIN", "OPEN"])
def test_user_and_password(
    fortress: Fortress, sasl: str, listener: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    secure = {"tls": tls(fortress.ours)} if listener == "LOGIN" else {}
    who = {"sasl": sasl, "user": "bridge", **secure}
    password = tmp_path / "password"
    with caplog.at_level(logging.DEBUG):
        password.write_text(SECRET)
        lines = connect(fortress.transport(listener, password_file=str(password), **who))
        wrong = fortress.transport(listener, **(who | {"user": "nobody"}), password=SECRET)
        assert "user nobody" in refusal(wrong, TransportConfigurationError)
        password.write_text(f"{SECRET}x")
        transport = fortress.transport(listener, password_file=str(password), **who)
        text = refusal(transport, TransportConfigurationError)
        assert "user bridge" in text and "password" in text
        password.write_text(f"{SECRET}\n")  # rotated
        connect(transport)
    assert f"as bridge by {sasl}" in lines[0]
    assert ("with TLS" in lines[0]) == (listener == "LOGIN")
    assert SECRET not in caplog.text and SECRET not in repr(transport._options)


def test_a_login_that_is_missing_or_not_wanted(fortress: Fortress) -> None:
    text = refusal(fortress.transport("OPEN"), TransportConfigurationError)
    assert "sasl" in text
    text = refusal(fortress.transport("LOGIN", tls=tls(fortress.ours)), TransportConfigurationError)
    assert "sasl" in text
    login = {"sasl": "plain", "user": "bridge", "password": SECRET}
    unwanted = kafka_transport(fortress.server.port, **login)
    assert "sasl" in refusal(unwanted, TransportConfigurationError)


def test_a_user_whom_scram_was_not_told_about(fortress: Fortress) -> None:
    login = {"sasl": "scram-sha-256", "user": "stranger", "password": SECRET}
    assert "user stranger" in refusal(fortress.transport("OPEN", **login), TransportConfigurationError)


def test_a_password_that_is_replaced_is_used_from_the_next_connection_on(fortress: Fortress, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(SECRET)
    transport = fortress.transport("OPEN", sasl="plain", user="bridge", password_file=str(password))

    async def main() -> None:
        await transport.connect()
        await transport.publish(events(3))
        password.write_text("another")
        await transport.publish(events(3, start=3))  # the connection goes on
        await transport.close()
        with failing(TransportConfigurationError):
            await transport.connect()
        password.write_text(SECRET)
        await transport.connect()
        await transport.publish(events(3, start=6))
        await transport.close()

    run(main())


# Permissions.


#: What one permission says, and what is asked of permissions.
_RULE = (
    ("resource_type", Int8),
    ("resource_name", String()),
    ("pattern_type", Int8),
    ("principal", String()),
    ("host", String()),
    ("operation", Int8),
    ("permission", Int8),
)


class _CreateAclsResponse(Response):
    API_KEY = 30
    API_VERSION = 1
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("results", Array(("error_code", Int16), ("error_message", String()))),
    )


class _CreateAclsStruct(RequestStruct):
    API_KEY = 30
    API_VERSION = 1
    RESPONSE_TYPE = _CreateAclsResponse
    SCHEMA = Schema(("creations", Array(*_RULE)))


class _CreateAcls(Request[_CreateAclsStruct]):
    API_KEY = 30

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(self._rows)


class _DescribeAclsResponse(Response):
    API_KEY = 29
    API_VERSION = 1
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("error_message", String()),
        (
            "resources",
            Array(
                ("resource_type", Int8),
                ("resource_name", String()),
                ("pattern_type", Int8),
                (
                    "acls",
                    Array(("principal", String()), ("host", String()), ("operation", Int8), ("permission", Int8)),
                ),
            ),
        ),
    )


class _DescribeAclsStruct(RequestStruct):
    API_KEY = 29
    API_VERSION = 1
    RESPONSE_TYPE = _DescribeAclsResponse
    SCHEMA = Schema(*_RULE)


class _DescribeAcls(Request[_DescribeAclsStruct]):
    """Asks for those of one resource, whosoever and whatever they permit."""

    API_KEY = 29

    def __init__(self, kind: int, name: str) -> None:
        self._kind, self._name = kind, name

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(self._kind, self._name, 3, None, None, 1, 1)


#: What the protocol calls what may be done with a topic, and what else may be permitted.
READ, WRITE, DESCRIBE = 3, 4, 8
TOPIC, GROUP = 2, 3
ALLOW, DENY = 3, 2


def permit(fortress: Fortress, name: str, *operations: int, permission: int = ALLOW, kind: int = TOPIC) -> None:
    """Let the guest do this with a topic, and nothing else."""

    async def work(admin: AIOKafkaAdminClient) -> None:
        rows = [(kind, name, 3, "User:guest", "*", operation, permission) for operation in operations]
        answer = await admin._client.send(admin._client.get_random_node(), _CreateAcls(rows))
        assert [code for code, _ in answer.results] == [0] * len(rows), answer
        # The controller has them; the broker, which is to act by them, hears of them a moment later.
        known: set[tuple[int, int]] = set()
        end = time.monotonic() + 30
        while not known >= {(operation, permission) for operation in operations}:
            assert time.monotonic() < end, f"of what is permitted it knows {known} only"
            found = await admin._client.send(admin._client.get_random_node(), _DescribeAcls(kind, name))
            assert not found.error_code, found
            known = {(row[2], row[3]) for resource in found.resources for row in resource[3]}
            await asyncio.sleep(0.02)

    administrate(fortress.url, work)


def guest(fortress: Fortress, topic: str) -> KafkaTransport:
    return fortress.transport("OPEN", sasl="plain", user="guest", password=SECRET, topic=topic)


@pytest.mark.parametrize("operations", [(DESCRIBE,), (WRITE,), ()])
def test_what_is_not_permitted_is_named_at_once(fortress: Fortress, operations: tuple[int, ...]) -> None:
    topic = fortress.topic()
    fortress.make(topic)
    permit(fortress, topic, *(operations or (DESCRIBE,)), permission=ALLOW if operations else DENY)
    transport = guest(fortress, topic)

    async def main() -> str:
        # To write is to be allowed to describe, too.
        with failing(TransportConfigurationError) as caught:
            await transport.connect()
            await transport.publish(events(3))
        await transport.close()
        return str(caught[0])

    if operations == (WRITE,):
        connect(transport)
        return
    text = run(main())
    assert topic in text and "permit" in text


def test_the_minimum_of_permissions_that_the_remedy_names_is_enough(fortress: Fortress) -> None:
    topic = fortress.topic()
    fortress.make(topic)
    permit(fortress, topic, WRITE, DESCRIBE)
    transport = guest(fortress, topic)

    async def main() -> list[str]:
        await transport.connect()
        await transport.publish(events(300, keys=["a", "b", "c"]))
        lines = await transport.describe()
        await transport.close()
        return lines

    lines = run(main())
    assert "can't be read" in lines[-1]
    assert len(aside(read_topic(fortress.url, topic))) == 300


def test_a_permission_that_ends_in_mid_stream(fortress: Fortress) -> None:
    topic = fortress.topic()
    fortress.make(topic)
    permit(fortress, topic, WRITE, DESCRIBE)
    transport = guest(fortress, topic)

    async def main() -> None:
        await transport.connect()
        await transport.publish(events(30))
        permit(fortress, topic, WRITE, permission=DENY)
        with failing(TransportConfigurationError, confirmed=0):
            await transport.publish(events(30, start=30))
        await transport.close()

    run(main())
    assert len(aside(read_topic(fortress.url, topic))) == 30


def test_what_is_too_large_where_the_limit_may_not_be_read(fortress: Fortress) -> None:
    """The server says so, of a whole batch; then of the one event."""
    topic = fortress.topic()

    async def small(admin: AIOKafkaAdminClient) -> None:
        await admin.create_topics([NewTopic(topic, 4, 1, topic_configs={"max.message.bytes": "20000"})])

    administrate(fortress.url, small)
    permit(fortress, topic, WRITE, DESCRIBE)
    transport = guest(fortress, topic)
    sent = events(60, size=2000)
    sent[33] = event(33, size=30_000)
    refusals: list[tuple[int, PublishError]] = []

    async def main() -> None:
        await transport.connect()
        done = 0
        while done < len(sent):
            try:
                await transport.publish(sent[done:])
                done = len(sent)
            except PublishError as error:
                done += error.confirmed
                refusals.append((done, error))
                done += isinstance(error.error, EventRejectedError)
        await transport.close()

    run(main())
    assert {type(error.error) for _, error in refusals} == {EventRejectedError, RefusedError}
    ((place, rejection),) = [one for one in refusals if isinstance(one[1].error, EventRejectedError)]
    assert place == 33 and "30000" in str(rejection)
    stored = [dict(row.headers)["orthanc-event-id"].decode() for row in aside(read_topic(fortress.url, topic))]
    assert stored == [one.id for one in sent if one is not sent[33]]


def test_the_minimum_of_permissions_of_a_consumer(fortress: Fortress) -> None:
    """As docs/operating.md has them: one after the other is given, and what is missing is named."""
    topic = fortress.topic()
    name = f"consumer-{topic}"
    inbox, dead = f"orthanc.inbox.{name}", f"orthanc.dead.{name}"
    delays = [f"orthanc.retry.{name}.{step}" for step in STEPS]
    for one in (topic, inbox, *delays):
        fortress.make(one)

    async def make_dead(admin: AIOKafkaAdminClient) -> None:
        await admin.create_topics([NewTopic(dead, 1, 1, topic_configs={"cleanup.policy": "compact"})])

    administrate(fortress.url, make_dead)
    permit(fortress, topic, READ)
    for one in (inbox, *delays):
        permit(fortress, one, READ, WRITE)
    permit(fortress, name, DESCRIBE, kind=GROUP)
    permit(fortress, dead, DESCRIBE)

    def consumer() -> KafkaTransport:
        return fortress.transport("OPEN", sasl="plain", user="guest", password=SECRET, topic=topic, declare=False)

    async def refused() -> str:
        transport = consumer()
        with failing(TransportConfigurationError) as caught:
            await transport.connect()
            await transport.subscribe(name, oldest=True)
        await transport.close()
        return str(caught[0])

    assert name in run(refused())
    permit(fortress, name, READ, kind=GROUP)

    async def main() -> None:
        bridge = fortress.transport("OPEN", sasl="plain", user="bridge", password=SECRET, topic=topic, declare=False)
        await bridge.connect()
        await bridge.publish([event(0)])
        await bridge.close()
        transport = consumer()
        await transport.connect()
        subscription = await transport.subscribe(name, oldest=True, ordered=True)
        while not (some := await subscription.receive(1, 1.0)):
            pass
        (found,) = some
        with failing(TransportConfigurationError) as caught:
            await found.reject({"orthanc-reason": "no"})
        assert dead in str(caught[0])
        permit(fortress, dead, WRITE)
        await found.reject({"orthanc-reason": "no"})  # it was held
        await transport.close()

        transport = consumer()
        await transport.connect()
        with failing(TransportConfigurationError) as caught:
            assert [one async for one in (await transport.dead_letters(name)).read()]
        assert dead in str(caught[0]) and "read" in str(caught[0])
        permit(fortress, dead, READ)
        (letter,) = [one async for one in (await transport.dead_letters(name)).read()]
        await (await transport.dead_letters(name)).remove([letter])
        await transport.close()

    run(main())
