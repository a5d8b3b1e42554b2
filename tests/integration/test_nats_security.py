"""Logging in to real NATS servers, in every way there is; what is refused, and how it is said."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from pathlib import Path
from typing import Any

import nkeys
import pytest
import trustme

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
)
from orthanc_events_bridge.testing.servers import NatsServer, free_port
from orthanc_events_bridge.transports.nats import NatsTransport
from tests.contract.harness import SECRET, connect, event, events, run
from tests.contract.nats_tools import (
    Key,
    Operator,
    credentials,
    listener,
    nats_server,
    nats_transport,
    refusal,
)

pytestmark = pytest.mark.integration

EITHER = (NotConnectedError, TransportConfigurationError)


async def publish(transport: NatsTransport, sent: list[Any]) -> None:
    await transport.connect()
    await transport.publish(sent)


# TLS.


class Certificates:
    """A private authority, a server's certificate and a client's, as files."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        folder.mkdir(exist_ok=True)
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.server, self.server_key = self._issue(folder, "server", host)
        self.client, self.client_key = self._issue(folder, "client", "bridge.example.org")

    def _issue(self, folder: Path, name: str, host: str) -> tuple[Path, Path]:
        issued = self.authority.issue_cert(host)
        certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return certificate, key

    def config(self, more: str = "") -> str:
        return f"tls {{ cert_file: '{self.server}', key_file: '{self.server_key}', timeout: 2, {more} }}"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("theirs"))


def test_tls_with_a_private_authority(tmp_path: Path, ours: Certificates) -> None:
    with nats_server(tmp_path, ours.config()) as server:
        for url in (server.url, server.url.replace("nats:", "tls:")):
            assert "with TLS" in connect(nats_transport(url, tls={"ca_file": str(ours.ca)}))[0]


@pytest.mark.parametrize("authority", ["another", "the system's"])
def test_a_server_with_an_unknown_authority_is_refused(
    tmp_path: Path, ours: Certificates, theirs: Certificates, authority: str
) -> None:
    tls = {"ca_file": str(theirs.ca)} if authority == "another" else {"enabled": True}
    with nats_server(tmp_path, ours.config()) as server:
        text = refusal(nats_transport(server, tls=tls), TransportConfigurationError)
    assert "certificate verify failed" in text and "tls.ca_file" in text


def test_a_server_with_another_name_is_refused(tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other", host="nats.example.org")
    tls = {"ca_file": str(other.ca)}
    with nats_server(tmp_path, other.config()) as server:
        assert "127.0.0.1" in refusal(nats_transport(server, tls=tls), TransportConfigurationError)
        tls["server_hostname"] = "nats.example.org"
        assert "with TLS" in connect(nats_transport(server, tls=tls))[0]


def test_mutual_tls(tmp_path: Path, ours: Certificates, theirs: Certificates) -> None:
    with nats_server(tmp_path, ours.config(f"ca_file: '{ours.ca}', verify: true")) as server:

        def with_certificate(which: Certificates) -> NatsTransport:
            tls = {"ca_file": ours.ca, "cert_file": which.client, "key_file": which.client_key}
            return nats_transport(server, tls={name: str(path) for name, path in tls.items()})

        assert "with TLS" in connect(with_certificate(ours))[0]
        for _ in range(5):  # how a server hangs up is a matter of milliseconds
            text = refusal(with_certificate(theirs), TransportConfigurationError)
            assert "tls.cert_file" in text
            text = refusal(nats_transport(server, tls={"ca_file": str(ours.ca)}), TransportConfigurationError)
            assert "tls.cert_file" in text


def test_certificates_are_read_when_connecting(tmp_path: Path, ours: Certificates, theirs: Certificates) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(theirs.ca.read_bytes())
    with nats_server(tmp_path, ours.config()) as server:
        transport = nats_transport(server, tls={"ca_file": str(ca)})
        refusal(transport, TransportConfigurationError)
        ca.write_bytes(ours.ca.read_bytes())
        connect(transport)


def test_certificates_that_can_not_be_read(tmp_path: Path, ours: Certificates) -> None:
    empty, encrypted = tmp_path / "empty.pem", tmp_path / "encrypted.pem"
    empty.touch()
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", ours.client_key, "-out", encrypted]
        if b"RSA" in ours.client_key.read_bytes()
        else ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", ours.client_key, "-out", encrypted],
        check=True,
        capture_output=True,
    )
    with nats_server(tmp_path, ours.config()) as server:
        for tls, option in [
            ({"ca_file": empty}, "tls.ca_file"),
            ({"ca_file": tmp_path / "nowhere"}, "tls.ca_file"),
            ({"ca_file": ours.ca, "cert_file": ours.client, "key_file": empty}, "tls.key_file"),
            ({"ca_file": ours.ca, "cert_file": ours.client, "key_file": encrypted}, "tls.key_file"),
            ({"ca_file": ours.ca, "cert_file": ours.ca, "key_file": ours.client_key}, "tls.key_file"),
        ]:
            transport = nats_transport(server, tls={name: str(path) for name, path in tls.items()})
            assert option in refusal(transport, TransportConfigurationError)


def test_tls_before_anything_is_said(tmp_path: Path, ours: Certificates) -> None:
    tls: dict[str, Any] = {"ca_file": str(ours.ca), "handshake_first": True}
    with contextlib.closing(nats_server(tmp_path, ours.config("handshake_first: true"))) as server:
        server.start(wait=False)
        server.wait_log("Server is ready")
        assert "with TLS" in connect(nats_transport(server, tls=tls))[0]
        waiting = nats_transport(server, tls={"ca_file": str(ours.ca)}, connect_timeout=0.3)
        refusal(waiting, NotConnectedError)
    with nats_server(tmp_path) as server:
        refusal(nats_transport(server, tls=tls, connect_timeout=0.5), EITHER)


def test_a_server_that_leaves_tls_to_its_clients(tmp_path: Path, ours: Certificates) -> None:
    with nats_server(tmp_path, ours.config() + "\nallow_non_tls: true") as server:
        assert "without TLS" in connect(nats_transport(server))[0]
        assert "with TLS" in connect(nats_transport(server, tls={"ca_file": str(ours.ca)}))[0]


def test_tls_that_the_configuration_forbids(tmp_path: Path, ours: Certificates) -> None:
    with nats_server(tmp_path, ours.config()) as server:
        text = refusal(nats_transport(server, tls={"enabled": False}), TransportConfigurationError)
    assert "tls.enabled" in text


LOGINS: dict[str, dict[str, Any]] = {
    "password": {"user": "bridge", "password": SECRET},
    "token": {"token": SECRET},
    "nkey": {"nkey_seed": Key(nkeys.PREFIX_BYTE_USER).seed},
    "credentials": {"credentials_file": "user.creds"},
}


@pytest.fixture(params=LOGINS)
def login(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "credentials":
        path = tmp_path / "user.creds"
        path.write_text(credentials(f"{SECRET}.x.y", Key(nkeys.PREFIX_BYTE_USER).seed))
        return {"credentials_file": str(path)}
    return LOGINS[request.param]


def test_a_login_without_tls_can_be_overheard(login: dict[str, Any]) -> None:
    """Otherwise the next test would find nothing either."""
    with listener() as heard:
        refusal(nats_transport(heard.url, connect_timeout=0.2, **login), NotConnectedError)
        assert heard.holds("CONNECT", "sig" if "nkey_seed" in login else SECRET)


@pytest.mark.parametrize(
    ("info", "scheme", "tls", "kind"),
    [
        ({}, "tls", {}, TransportConfigurationError),
        ({}, "nats", {"enabled": True}, TransportConfigurationError),
        # Whether TLS meets the greeting, or silence, is a matter of milliseconds.
        ({}, "nats", {"handshake_first": True}, EITHER),
        # It offers TLS, and then doesn't speak it.
        ({"tls_required": True}, "tls", {}, NotConnectedError),
        ({"tls_required": True}, "nats", {}, NotConnectedError),
        ({"tls_available": True}, "nats", {"enabled": True}, NotConnectedError),
    ],
)
def test_a_login_that_was_meant_for_tls_is_never_sent_without(
    login: dict[str, Any], info: dict[str, Any], scheme: str, tls: dict[str, Any], kind: Any
) -> None:
    with listener(**info) as heard:
        url = heard.url.replace("nats:", f"{scheme}:")
        timeout = 5 if kind is TransportConfigurationError else 0.2
        refusal(nats_transport(url, tls=tls, connect_timeout=timeout, **login), kind)
        for text in (SECRET, "CONNECT", "sig", "jwt", "bridge"):
            assert not heard.holds(text)


def test_a_server_without_tls_is_refused_where_tls_is_insisted_on(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        for transport in (
            nats_transport(server.url.replace("nats:", "tls:")),
            nats_transport(server, tls={"enabled": True}),
        ):
            assert "does not offer TLS" in refusal(transport, TransportConfigurationError)


# Logging in.


def password_server(folder: Path) -> NatsServer:
    return nats_server(folder, f'authorization {{ user: bridge, password: "{SECRET}" }}')


def test_user_and_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    with password_server(tmp_path) as server:
        connect(nats_transport(server, user="bridge", password=SECRET))
        connect(nats_transport(server, user="bridge", password_file=str(file)))
        for given in (
            {"user": "bridge", "password": f"{SECRET}x"},
            {"user": "someone", "password": SECRET},
            {"token": SECRET},
            {},
        ):
            text = refusal(nats_transport(server, **given), TransportConfigurationError)
            assert "refuses the credentials" in text


def test_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    with nats_server(tmp_path, f'authorization {{ token: "{SECRET}" }}') as server:
        connect(nats_transport(server, token=SECRET))
        connect(nats_transport(server, token_file=str(file)))
        text = refusal(nats_transport(server, token=f"{SECRET}x"), TransportConfigurationError)
        assert "refuses the credentials" in text


def test_nkey(tmp_path: Path) -> None:
    key, other, file = Key(nkeys.PREFIX_BYTE_USER), Key(nkeys.PREFIX_BYTE_USER), tmp_path / "user.nk"
    file.write_text(f"{key.seed}\n")
    with nats_server(tmp_path, f"authorization {{ users: [ {{ nkey: {key.public} }} ] }}") as server:
        connect(nats_transport(server, nkey_seed=key.seed))
        connect(nats_transport(server, nkey_seed_file=str(file)))
        text = refusal(nats_transport(server, nkey_seed=other.seed), TransportConfigurationError)
        assert "refuses the credentials" in text and other.seed not in text
        for broken in (key.seed[:-2], key.public, SECRET, "ä"):
            text = refusal(nats_transport(server, nkey_seed=broken), TransportConfigurationError)
            assert "nkey_seed" in text and broken not in text


def test_credentials_file(tmp_path: Path) -> None:
    operator, stranger = Operator(), Operator()
    file = tmp_path / "user.creds"
    with nats_server(tmp_path, operator.config) as server:
        transport = nats_transport(server, credentials_file=str(file))
        assert "credentials_file" in refusal(transport, TransportConfigurationError)  # it isn't there
        for text in (operator.credentials(), operator.credentials().replace("\n", "\r\n")):
            file.write_text(text)
            connect(transport)
        for wrong in (stranger.credentials(), operator.credentials(expires=int(time.time()) - 10)):
            file.write_text(wrong)
            refusal(transport, TransportConfigurationError)
        whole = operator.credentials()
        for broken in ("", SECRET, whole[: len(whole) // 2], whole.replace("BEGIN NATS", ""), "\xff\n"):
            file.write_bytes(broken.encode("latin-1"))
            text = refusal(transport, TransportConfigurationError)
            assert "credentials_file" in text


def test_a_secret_that_is_replaced_is_used_from_the_next_connection_on(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(SECRET)

    async def main() -> None:
        transport = nats_transport(server, user="bridge", password_file=str(file))
        identity = await transport.connect()
        await transport.publish(events(3))
        server.stop()
        server.config = server.config.replace(SECRET, "another")
        server.start()
        await transport.close()
        with pytest.raises(TransportConfigurationError):
            await transport.connect()
        file.write_text("another\n")
        assert await transport.connect() == identity
        await transport.publish(events(3, start=3))
        await transport.close()
        file.unlink()
        with pytest.raises(TransportConfigurationError, match="password_file"):
            await transport.connect()
        await transport.close()

    with password_server(tmp_path) as server:
        run(main())


# What a user may do.


def permissions_server(folder: Path, permissions: str) -> NatsServer:
    user = f'{{ user: bridge, password: "{SECRET}", permissions: {{ {permissions} }} }}'
    return nats_server(folder, f"authorization {{ users: [ {user} ] }}")


@pytest.mark.parametrize(
    ("permissions", "named"),
    [
        ('publish: { deny: "orthanc.>" }', "orthanc.events.main."),
        ('publish: { deny: "$JS.API.STREAM.CREATE.>" }', "stream.create"),
        ('publish: { deny: "$JS.>" }', "stream.info"),
        ('subscribe: { deny: "_INBOX.>" }', "_inbox"),
        ('subscribe: { allow: "orthanc.>" }', "_inbox"),
    ],
)
def test_what_is_not_permitted_is_named_at_once(tmp_path: Path, permissions: str, named: str) -> None:
    with permissions_server(tmp_path, permissions) as server:
        transport = nats_transport(server, user="bridge", password=SECRET, ack_timeout=10, connect_timeout=10)
        text = refusal(transport, TransportConfigurationError, publish(transport, events(300)))
    assert named in text and "permissions violation" in text and "let it publish to" in text


def test_what_is_confirmed_before_a_permission_ends_is_counted(tmp_path: Path) -> None:
    """Every third event is an instance's."""
    with permissions_server(tmp_path, 'publish: { deny: "orthanc.events.main.job.>" }') as server:
        transport = nats_transport(server, user="bridge", password=SECRET)
        text = refusal(transport, TransportConfigurationError, publish(transport, events(9)))
        assert "orthanc.events.main.job.failed" in text

        async def main() -> None:
            await transport.connect()
            await transport.publish([one for one in events(9) if one.level != "job"])
            await transport.close()

        run(main())


def test_a_subscription_that_is_not_permitted(tmp_path: Path) -> None:
    with permissions_server(tmp_path, 'subscribe: { deny: "orthanc.>" }') as server:
        transport = nats_transport(server, user="bridge", password=SECRET)

        async def main() -> None:
            await transport.connect()
            async with contextlib.aclosing(transport.tail()) as subscription:
                await anext(subscription)

        assert "subscription" in refusal(transport, TransportConfigurationError, main())


def test_the_minimum_of_permissions_that_the_remedy_names_is_enough(tmp_path: Path) -> None:
    allowed = 'publish: ["orthanc.events.>", "$JS.API.>"], subscribe: ["_INBOX.>"]'
    with permissions_server(tmp_path, allowed) as server:
        transport = nats_transport(server, user="bridge", password=SECRET)

        async def main() -> None:
            await publish(transport, events(30))
            async with contextlib.aclosing(transport.tail(oldest=True)) as subscription:
                for _ in range(30):
                    await anext(subscription)
            await transport.close()

        run(main())


def test_jetstream_is_off(tmp_path: Path) -> None:
    with nats_server(tmp_path, "jetstream: disabled") as server:
        assert "-js" in refusal(nats_transport(server), TransportConfigurationError)
    account = f'accounts {{ A {{ users: [ {{ user: bridge, password: "{SECRET}" }} ] }} }}'
    with nats_server(tmp_path, account) as server:
        transport = nats_transport(server, user="bridge", password=SECRET)
        assert "JetStream is not on" in refusal(transport, TransportConfigurationError)


def account_server(folder: Path, limits: str) -> NatsServer:
    user = f'users: [ {{ user: bridge, password: "{SECRET}" }} ]'
    return nats_server(folder, f"accounts {{ A {{ jetstream: {{ {limits} }}, {user} }} }}")


def test_an_account_without_room_for_the_stream(tmp_path: Path) -> None:
    login = {"user": "bridge", "password": SECRET}
    with account_server(tmp_path, "max_file: 2MB, max_streams: 1") as server:
        transport = nats_transport(server, **login, limits={"max_bytes": 2**30})
        text = refusal(transport, TransportConfigurationError)
        assert "ORTHANC_EVENTS" in text and "limits.max_bytes" in text and "account" in text
        connect(nats_transport(server, **login))
        transport = nats_transport(server, **login, stream="ANOTHER", subject_prefix="another")
        text = refusal(transport, TransportConfigurationError)
        assert "ANOTHER" in text and "account" in text


def test_an_account_that_is_full(tmp_path: Path) -> None:
    with account_server(tmp_path, "max_file: 100KB") as server:
        transport = nats_transport(server, user="bridge", password=SECRET, limits={"max_bytes": 0})

        async def main() -> None:
            await transport.connect()
            await transport.publish(events(100, size=2000))

        text = refusal(transport, RefusedError, main())
        assert "full" in text and "account" in text


def test_a_user_who_may_send_only_small_messages(tmp_path: Path) -> None:
    operator, file = Operator(), tmp_path / "user.creds"
    file.write_text(operator.credentials(payload=5000))
    with nats_server(tmp_path, operator.config) as server:
        transport = nats_transport(server, credentials_file=str(file))

        async def main() -> None:
            await transport.connect()
            await transport.publish([event(0), event(1), event(2, size=5000)])

        assert "5000" in refusal(transport, EventRejectedError, main())


# Several servers.


def test_a_dead_server_among_several(tmp_path: Path) -> None:
    dead = f"nats://127.0.0.1:{free_port()}"

    async def main() -> None:
        transport = nats_transport(dead, server, dead)
        began = time.monotonic()
        first = await transport.connect()
        await transport.publish(events(3))
        assert time.monotonic() - began < 1
        server.kill()
        await transport.close()
        with pytest.raises(NotConnectedError, match="can't be reached"):
            await transport.connect()
        server.start()
        assert await transport.connect() == first
        assert time.monotonic() - began < 2
        await transport.close()

    with nats_server(tmp_path) as server:
        run(main())
    text = refusal(nats_transport(dead, dead), NotConnectedError)
    assert dead in text and "start NATS" in text


def test_a_frozen_server_among_several(tmp_path: Path) -> None:
    with nats_server(tmp_path) as frozen, nats_server(tmp_path) as server:
        frozen.freeze()
        began = time.monotonic()
        connect(nats_transport(frozen, server, connect_timeout=0.5))
        assert 0.5 <= time.monotonic() - began < 2


def test_of_several_refusals_that_is_told_which_a_person_can_mend(tmp_path: Path) -> None:
    dead = f"nats://127.0.0.1:{free_port()}"
    with password_server(tmp_path) as server:
        for servers in ((server, dead), (dead, server)):
            transport = nats_transport(*servers, user="bridge", password="wrong")
            assert "credentials" in refusal(transport, TransportConfigurationError)


def test_a_login_that_is_revoked_while_connected(tmp_path: Path) -> None:
    operator, file = Operator(), tmp_path / "user.creds"
    file.write_text(operator.credentials(expires=int(time.time()) + 2))

    async def main() -> None:
        transport = nats_transport(server, credentials_file=str(file))
        await transport.connect()
        with pytest.raises(NotConnectedError):
            async with contextlib.aclosing(transport.tail()) as subscription, asyncio.timeout(5):
                await anext(subscription)
        with pytest.raises(TransportConfigurationError, match=r"refuses the credentials|while we logged in"):
            await transport.connect()
        await transport.close()

    with nats_server(tmp_path, operator.config) as server:
        run(main())
