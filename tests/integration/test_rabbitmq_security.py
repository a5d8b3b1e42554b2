"""Logging in to a real RabbitMQ that enforces it, in every way there is; what is refused, and how it is said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.rabbitmq import RabbitTransport
from tests.contract.harness import SECRET, connect, events, run
from tests.contract.rabbitmq_harness import administrate
from tests.contract.rabbitmq_tools import (
    EXCHANGE,
    HISTORY,
    check_refusal,
    rabbit_server,
    rabbit_transport,
    refusal,
)

pytestmark = pytest.mark.integration

LOGIN: dict[str, Any] = {"user": "bridge", "password": SECRET}
PAST = datetime.now(UTC) - timedelta(days=2)


@pytest.fixture(autouse=True)
def no_secret_in_any_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert SECRET not in caplog.text


class Authority:
    """A private authority, and certificates of it, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._authority = trustme.CA()
        self._folder = folder
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, host: str, *, common_name: str | None = None, ended: bool = False) -> dict[str, str]:
        """A certificate and its key, as options of `tls` call them."""
        issued = self._authority.issue_cert(
            host, common_name=common_name, not_after=PAST + timedelta(days=1) if ended else None, not_before=PAST
        )
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return {"cert_file": str(certificate), "key_file": str(key)}


class Fortress:
    """A server with TLS, and its authority."""

    def __init__(self, folder: Path, host: str, verify: str) -> None:
        self.ours, self.theirs = Authority(folder / "ours"), Authority(folder / "theirs")
        self.tls_port = free_port()
        files = self.ours.issue("server", host)
        lines = [
            f"default_user = bridge\ndefault_pass = {SECRET}",
            f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
            f"ssl_options.cacertfile = {self.ours.ca}",
            f"ssl_options.certfile = {files['cert_file']}",
            f"ssl_options.keyfile = {files['key_file']}",
            verify,
            "auth_mechanisms.1 = PLAIN\nauth_mechanisms.2 = EXTERNAL\nssl_cert_login_from = common_name",
        ]
        self.server = rabbit_server(folder, "\n".join(lines), ("rabbitmq_auth_mechanism_ssl",))
        self.url = f"amqps://127.0.0.1:{self.tls_port}"

    def transport(self, tls: dict[str, str], **options: Any) -> RabbitTransport:
        login = {} if "auth" in options or "user" in options else LOGIN
        return rabbit_transport(self.url, tls={"ca_file": str(self.ours.ca)} | tls, **login, **options)


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fortress]:
    """It asks for no certificate, and its own is for another name than that by which it is reached."""
    fortress = Fortress(tmp_path_factory.mktemp("open"), "rabbitmq.example.org", "ssl_options.verify = verify_none")
    with fortress.server:
        yield fortress


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fortress]:
    """It takes clients with certificates only."""
    verify = "ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true"
    fortress = Fortress(tmp_path_factory.mktemp("mutual"), "127.0.0.1", verify)
    with fortress.server:
        yield fortress


NAMED = {"server_hostname": "rabbitmq.example.org"}


# TLS.


def test_tls_with_a_private_authority(open_to_all: Fortress) -> None:
    assert "with TLS" in connect(open_to_all.transport(NAMED))[0]
    ca = {"ca_file": str(open_to_all.ours.ca), **NAMED}
    assert "with TLS" in connect(rabbit_transport(open_to_all.url.replace("amqps", "amqp"), tls=ca, **LOGIN))[0]
    assert "without TLS" in connect(rabbit_transport(open_to_all.server, **LOGIN))[0]


def test_a_server_with_an_unknown_authority_is_refused(open_to_all: Fortress) -> None:
    for transport in (
        open_to_all.transport({"ca_file": str(open_to_all.theirs.ca), **NAMED}),
        rabbit_transport(open_to_all.url, tls=NAMED, **LOGIN),  # the system's
    ):
        text = refusal(transport, TransportConfigurationError)
        assert "certificate verify failed" in text and "tls.ca_file" in text


def test_a_server_with_another_name_is_refused(open_to_all: Fortress) -> None:
    text = refusal(open_to_all.transport({}), TransportConfigurationError)
    assert "127.0.0.1" in text and "certificate verify failed" in text


def test_an_expired_certificate_of_the_server(open_to_all: Fortress) -> None:
    def forget() -> None:
        open_to_all.server.ctl("eval", "ssl:clear_pem_cache().")

    open_to_all.ours.issue("server", "rabbitmq.example.org", ended=True)
    forget()
    try:
        text = refusal(open_to_all.transport(NAMED), TransportConfigurationError)
        assert "certificate has expired" in text and "dates" in text
    finally:
        open_to_all.ours.issue("server", "rabbitmq.example.org")
        forget()
    connect(open_to_all.transport(NAMED))


def test_mutual_tls(mutual: Fortress) -> None:
    client = mutual.ours.issue("client", "bridge.example.org")
    assert "with TLS" in connect(mutual.transport(client))[0]
    stranger = mutual.theirs.issue("client", "bridge.example.org")
    ended = mutual.ours.issue("ended", "bridge.example.org", ended=True)
    for _ in range(3):  # how a server hangs up is a matter of milliseconds
        for tls in ({}, stranger, ended):
            text = refusal(mutual.transport(tls), TransportConfigurationError)
            assert "tls.cert_file" in text


def test_certificates_are_read_when_connecting(mutual: Fortress, tmp_path: Path) -> None:
    ca, certificate, key = tmp_path / "ca.pem", tmp_path / "c.pem", tmp_path / "k.pem"
    transport = mutual.transport({"ca_file": str(ca), "cert_file": str(certificate), "key_file": str(key)})

    def put(authority: Authority, files: dict[str, str]) -> None:
        ca.write_bytes(authority.ca.read_bytes())
        certificate.write_bytes(Path(files["cert_file"]).read_bytes())
        key.write_bytes(Path(files["key_file"]).read_bytes())

    assert "tls.ca_file" in refusal(transport, TransportConfigurationError)  # it isn't there
    client = mutual.ours.issue("client", "bridge.example.org")
    put(mutual.theirs, client)
    assert "certificate verify failed" in refusal(transport, TransportConfigurationError)
    put(mutual.ours, mutual.ours.issue("ended", "bridge.example.org", ended=True))
    refusal(transport, TransportConfigurationError)
    put(mutual.ours, client)
    connect(transport)


def test_a_frozen_server_with_tls(mutual: Fortress) -> None:
    client = mutual.ours.issue("client", "bridge.example.org")

    async def main() -> None:
        one = mutual.transport(client, connect_timeout=1, ack_timeout=1)
        other = mutual.transport(client, connect_timeout=1)
        await one.connect()
        mutual.server.freeze()
        with pytest.raises(PublishError) as caught:
            await one.publish(events(400, size=50_000))
        check_refusal(caught.value, NotConnectedError)
        with pytest.raises(NotConnectedError):
            await other.connect()
        for transport in (one, other):
            began = time.monotonic()
            await transport.close()
            assert time.monotonic() - began < 1

    try:
        run(main())
    finally:
        mutual.server.thaw()


def test_a_password_that_was_meant_for_tls_is_never_sent_without(open_to_all: Fortress) -> None:
    heard: list[bytes] = []

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(b"AMQP\x00\x00\x09\x01")  # as a server without TLS answers a handshake
                    while data := connection.recv(65536):
                        heard.append(data)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        for url, tls in ((f"amqps://127.0.0.1:{port}", {}), (f"amqp://127.0.0.1:{port}", {"enabled": True})):
            text = refusal(rabbit_transport(url, tls=tls, **LOGIN), TransportConfigurationError)
            assert "TLS failed" in text
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert heard and SECRET.encode() not in b"".join(heard) and b"bridge" not in b"".join(heard)
    # And the other way round it is no riddle: the server hangs up.
    without = rabbit_transport(f"amqp://127.0.0.1:{open_to_all.tls_port}", connect_timeout=5, **LOGIN)
    refusal(without, NotConnectedError)


# Logging in.


def test_user_and_password(open_to_all: Fortress, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    connect(open_to_all.transport(NAMED, user="bridge", password_file=str(file)))
    for given in (
        {"user": "bridge", "password": f"{SECRET}x"},
        {"user": "someone", "password": SECRET},
    ):
        text = refusal(open_to_all.transport(NAMED, **given), TransportConfigurationError)
        assert "refuses the credentials" in text
    assert "refuses the credentials" in refusal(rabbit_transport(open_to_all.server), TransportConfigurationError)


def test_names_and_passwords_with_signs_of_all_kinds(open_to_all: Fortress) -> None:
    user, password = "orth:anc/@ä %41", "p/w:@ %41?#ü"
    open_to_all.server.ctl("add_user", user, password)
    open_to_all.server.ctl("add_vhost", "/pa cs/%41")
    open_to_all.server.ctl("set_permissions", "-p", "/pa cs/%41", user, ".*", ".*", ".*")
    url = f"amqp://127.0.0.1:{open_to_all.server.port}/%2Fpa%20cs%2F%2541"
    lines = connect(rabbit_transport(url, user=user, password=password))
    assert "virtual host /pa cs/%41" in lines[0]


def test_a_certificate_in_place_of_a_password(mutual: Fortress) -> None:
    client = mutual.ours.issue("bridge", "bridge.example.org", common_name="bridge")
    assert "with TLS" in connect(mutual.transport(client, auth="external"))[0]
    other = mutual.ours.issue("nobody", "bridge.example.org", common_name="nobody")
    text = refusal(mutual.transport(other, auth="external"), TransportConfigurationError)
    assert "refuses the credentials" in text and "certificate" in text


def test_a_server_that_does_not_take_certificates(tmp_path: Path) -> None:
    fortress = Fortress(tmp_path, "127.0.0.1", "ssl_options.verify = verify_peer")
    fortress.server.plugins = []
    fortress.server.config = fortress.server.config.replace("auth_mechanisms.2 = EXTERNAL\n", "").replace(
        "ssl_cert_login_from = common_name", ""
    )
    client = fortress.ours.issue("bridge", "bridge.example.org", common_name="bridge")
    with fortress.server:
        text = refusal(fortress.transport(client, auth="external"), TransportConfigurationError)
        assert "EXTERNAL" in text and "PLAIN" in text and "rabbitmq_auth_mechanism_ssl" in text


def test_a_password_that_is_replaced_is_used_from_the_next_connection_on(open_to_all: Fortress, tmp_path: Path) -> None:
    server, file = open_to_all.server, tmp_path / "password"
    file.write_text("first")
    server.ctl("add_user", "changing", "first")
    server.ctl("set_permissions", "changing", ".*", ".*", ".*")

    async def main() -> None:
        transport = rabbit_transport(server, user="changing", password_file=str(file))
        identity = await transport.connect()
        await transport.publish(events(3))
        server.ctl("change_password", "changing", SECRET)
        server.ctl("close_all_connections", "the password was changed")
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(3, start=3))
        check_refusal(caught.value, NotConnectedError)
        await transport.close()
        with pytest.raises(TransportConfigurationError, match="refuses the credentials"):
            await transport.connect()
        file.write_text(f"{SECRET}\n")
        assert await transport.connect() == identity
        await transport.publish(events(3, start=3))
        await transport.close()
        file.unlink()
        with pytest.raises(TransportConfigurationError, match="password_file"):
            await transport.connect()

    run(main())


def test_a_virtual_host_that_is_missing_or_closed(open_to_all: Fortress) -> None:
    url = f"amqp://127.0.0.1:{open_to_all.server.port}"
    text = refusal(rabbit_transport(f"{url}/nowhere", **LOGIN), TransportConfigurationError)
    assert "virtual host nowhere" in text and "not found" in text
    open_to_all.server.ctl("add_vhost", "closed")
    text = refusal(rabbit_transport(f"{url}/closed", **LOGIN), TransportConfigurationError)
    assert "virtual host closed" in text and "permissions" in text


# What a user may do.


@contextlib.contextmanager
def permitted(server: RabbitServer, configure: str, write: str, read: str) -> Iterator[dict[str, Any]]:
    """A user who may do this."""
    server.ctl("add_user", "small", SECRET)
    server.ctl("set_permissions", "small", configure, write, read)
    try:
        yield {"user": "small", "password": SECRET}
    finally:
        server.ctl("delete_user", "small")


def clear(server: RabbitServer) -> None:
    administrate(
        f"amqp://bridge:{SECRET}@127.0.0.1:{server.port}/",
        lambda channel: channel.queue_delete(HISTORY),
        lambda channel: channel.exchange_delete(EXCHANGE),
    )


def test_what_is_not_permitted_is_named(open_to_all: Fortress) -> None:
    server = open_to_all.server
    clear(server)
    with permitted(server, "", ".*", ".*") as login:
        text = refusal(rabbit_transport(server, **login), TransportConfigurationError)
        assert EXCHANGE in text and "does not permit" in text and "declare to false" in text
    connect(rabbit_transport(server, **LOGIN))

    async def main(transport: RabbitTransport) -> None:
        await transport.connect()
        await transport.publish(events(300))

    with permitted(server, "", "", "") as login:
        transport = rabbit_transport(server, declare=False, **login)
        text = refusal(transport, TransportConfigurationError, main(transport))
        assert f"let it write to {EXCHANGE}" in text and "access" in text


def test_the_minimum_of_permissions_is_enough(open_to_all: Fortress) -> None:
    """To publish to what somebody else has made: only that."""
    server = open_to_all.server
    clear(server)
    connect(rabbit_transport(server, **LOGIN))

    async def publish(transport: RabbitTransport) -> list[str]:
        await transport.connect()
        await transport.publish(events(30))
        with pytest.raises(TransportConfigurationError, match="read"):
            await anext(transport.tail(oldest=True))
        with pytest.raises(TransportConfigurationError, match="read"):
            await transport.describe()
        assert await transport.connect() == ""
        await transport.publish(events(30, start=30))
        await transport.close()
        return []

    with permitted(server, "", r"orthanc\.events", "") as login:
        run(publish(rabbit_transport(server, declare=False, **login)))

    async def everything(transport: RabbitTransport) -> None:
        await transport.connect()
        await transport.publish(events(30, start=60))
        async with contextlib.aclosing(transport.tail(oldest=True)) as found:
            for _ in range(90):
                await anext(found)
        async with contextlib.aclosing(transport.tail()) as found:
            coming = asyncio.ensure_future(anext(found))
            await asyncio.sleep(0.5)
            await transport.publish(events(1))
            await coming
        assert "91 events" in (await transport.describe())[1]
        await transport.close()

    names = r"^(orthanc\.events(\.history)?|amq\.gen-.*)$"
    with permitted(server, names, names, names) as login:
        run(everything(rabbit_transport(server, **login)))
