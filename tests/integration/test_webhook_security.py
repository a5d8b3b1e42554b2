"""Webhooks over TLS, with logins and signatures, against receivers that insist on them; secrets that stay secret."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.events.mapping import to_outgoing
from orthanc_events_bridge.testing.brokers.webhook import PLACE, WebhookServer
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.webhook_signature import keys, sign
from tests.contract.harness import SECRET, events, run
from tests.contract.relay_tools import SHAPE, Rows, row
from tests.integration.webhook_tools import Certificates, answering, publish, receiver, refusal, webhook

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


# TLS.


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("theirs"))


def tls(**files: Path | str) -> dict[str, str]:
    return {name: str(value) for name, value in files.items()}


@pytest.mark.parametrize("probe", [True, False])
def test_tls_with_a_private_authority(tmp_path: Path, ours: Certificates, probe: bool) -> None:
    with receiver(tmp_path, **ours.control()) as server:
        transport = webhook(server, probe=probe, tls=tls(ca_file=ours.ca))

        async def main() -> None:
            await transport.connect()
            assert "with TLS" in (await transport.describe())[0]
            await transport.publish(events(5))
            await transport.close()

        run(main())
        assert len(server.received()) == 5


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("authority", ["another", "the system's"])
def test_a_receiver_with_an_unknown_authority_is_refused(
    tmp_path: Path, ours: Certificates, theirs: Certificates, authority: str, probe: bool
) -> None:
    trusted = tls(ca_file=theirs.ca) if authority == "another" else {}
    with receiver(tmp_path, **ours.control()) as server:
        text = refusal(webhook(server, probe=probe, tls=trusted), events(1), TransportConfigurationError)
        assert server.received() == []
    assert "TLS failed" in text and "tls.ca_file" in text


def test_a_receiver_with_another_name_is_refused(tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other", host="hook.example.org")
    with receiver(tmp_path / "r", **other.control()) as server:
        text = refusal(webhook(server, tls=tls(ca_file=other.ca)), events(1), TransportConfigurationError)
        assert "127.0.0.1" in text and "mismatch" in text
        wrong = tls(ca_file=other.ca, server_hostname="other.example.org")
        text = refusal(webhook(server, tls=wrong), events(1), TransportConfigurationError)
        assert "other.example.org" in text
        right = tls(ca_file=other.ca, server_hostname="hook.example.org")
        assert run(publish(webhook(server, tls=right), events(1))) is None
        assert len(server.received()) == 1


@pytest.mark.parametrize("probe", [True, False])
def test_mutual_tls(tmp_path: Path, ours: Certificates, theirs: Certificates, probe: bool) -> None:
    with receiver(tmp_path, **ours.control(clients=ours.ca)) as server:
        right = tls(ca_file=ours.ca, cert_file=ours.client, key_file=ours.client_key)
        assert run(publish(webhook(server, probe=probe, tls=right), events(1))) is None
        for wrong in (
            tls(ca_file=ours.ca),
            tls(ca_file=ours.ca, cert_file=theirs.client, key_file=theirs.client_key),
        ):
            if probe:
                for _ in range(3):  # how a server hangs up is a matter of milliseconds
                    text = refusal(webhook(server, tls=wrong), events(1), TransportConfigurationError)
                    assert "tls.cert_file" in text
            else:
                error = run(publish(webhook(server, probe=False, tls=wrong), events(1)))
                assert error is not None
                assert isinstance(error.error, TransportConfigurationError | NotConnectedError)
        assert len(server.received()) == 1


def test_certificates_are_read_when_connecting(tmp_path: Path, ours: Certificates, theirs: Certificates) -> None:
    folder = tmp_path / "bridge"
    folder.mkdir()
    ca, certificate, key = (folder / name for name in ("ca.pem", "client.pem", "key.pem"))

    def install(authority: Path, which: Certificates) -> None:
        ca.write_bytes(authority.read_bytes())
        certificate.write_bytes(which.client.read_bytes())
        key.write_bytes(which.client_key.read_bytes())

    async def main() -> None:
        transport = webhook(server, tls=tls(ca_file=ca, cert_file=certificate, key_file=key))
        for authority, which in ((theirs.ca, ours), (ours.ca, theirs)):
            install(authority, which)
            with pytest.raises(TransportConfigurationError):
                await transport.connect()
        install(ours.ca, ours)
        await transport.connect()
        await transport.publish(events(1))
        await transport.close()

    with receiver(tmp_path / "r", **ours.control(clients=ours.ca)) as server:
        run(main())
        assert len(server.received()) == 1


def test_certificates_that_can_not_be_read(tmp_path: Path, ours: Certificates) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for wrong, option in [
        (tls(ca_file=empty), "tls.ca_file"),
        (tls(ca_file=tmp_path / "nowhere"), "tls.ca_file"),
        (tls(ca_file=ours.ca, cert_file=ours.client, key_file=empty), "tls.key_file"),
        (tls(ca_file=ours.ca, cert_file=ours.ca, key_file=ours.client_key), "tls.key_file"),
    ]:
        text = refusal(webhook("https://127.0.0.1:1/", tls=wrong), events(1), TransportConfigurationError)
        assert option in text


def test_a_receiver_without_tls(tmp_path: Path) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        text = refusal(webhook(url.replace("http:", "https:")), events(1), TransportConfigurationError)
        assert "TLS failed" in text
    with receiver(tmp_path) as server:  # waits for the end of what it takes for a line
        url = f"https://127.0.0.1:{server.port}/"
        assert "within 0.5 s" in refusal(webhook(url, timeout=0.5), events(1), NotConnectedError)
        assert server.received("/") == []


def test_nothing_is_sent_in_plain_text_to_a_receiver_with_tls(tmp_path: Path, ours: Certificates) -> None:
    with receiver(tmp_path, **ours.control()) as server:
        text = refusal(webhook(f"http://127.0.0.1:{server.port}/"), events(1), NotConnectedError)
        assert "ended the connection" in text
        assert server.received("/") == []


def test_a_receiver_whose_certificate_is_replaced_while_we_are_connected(
    tmp_path: Path, ours: Certificates, theirs: Certificates
) -> None:
    """Its restart ends the connection; what was under way is sent again to nobody but the one we trust."""

    async def main() -> None:
        transport = webhook(server, tls=tls(ca_file=ours.ca))
        await transport.connect()
        await transport.publish(events(1))
        server.stop()
        server.control(**theirs.control())
        server.start()
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(1, start=1))
        assert type(caught.value.error) is TransportConfigurationError and "TLS failed" in str(caught.value)
        await transport.close()

    with receiver(tmp_path, **ours.control()) as server:
        run(main())
        assert len(server.received()) == 1


@contextlib.contextmanager
def tunnels(port: int) -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP proxy that connects whoever asks to one port; its URL, and what it was asked."""
    asked: list[bytes] = []
    threads: list[threading.Thread] = []

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            asked.append(client.recv(65536))
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pass_on, args=(server, client))
            back.start()
            pass_on(client, server)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=listening.accept()[:1]))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for thread in threads:
            thread.join(30)


def test_tls_goes_through_a_proxy_which_sees_nothing(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "c", host="hook.example.org")
    options = {"token": SECRET, "tls": tls(ca_file=certificates.ca)}
    with receiver(tmp_path / "r", **certificates.control()) as server, tunnels(server.port) as (proxy, asked):
        transport = webhook(f"https://hook.example.org{PLACE}?key={SECRET}", proxy=proxy, **options)
        assert run(publish(transport, events(3))) is None
        (one, *_), (head,) = server.received(), asked
        assert one.headers["authorization"] == f"Bearer {SECRET}"
        assert head.startswith(b"CONNECT hook.example.org:443 HTTP/1.1\r\n") and SECRET.encode() not in head
        wrong = webhook(f"https://other.example.org{PLACE}", proxy=proxy, **options)
        assert "TLS failed" in refusal(wrong, events(1), TransportConfigurationError)


# Logging in.


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def test_logins(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET} ü\n", "utf-8")
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    with receiver(tmp_path / "r") as server:
        for login, header in [
            ({"token": SECRET}, f"Bearer {SECRET}"),
            ({"token_file": str(token)}, f"Bearer {SECRET}"),
            ({"user": "orthanc", "password": SECRET}, basic("orthanc", SECRET)),
            ({"user": "orthanc", "password_file": str(file)}, basic("orthanc", f"{SECRET} ü")),
        ]:
            server.control(authorization=[header])
            assert run(publish(webhook(server, **login), events(1))) is None
            server.control(authorization=["another"])
            text = refusal(webhook(server, **login), events(1), TransportConfigurationError)
            assert "401" in text
        assert "401" in refusal(webhook(server), events(1), TransportConfigurationError)


@pytest.mark.parametrize("content", ["", "\n", f"{SECRET} {SECRET}", f"{SECRET}\n{SECRET}", f"{SECRET}ü"])
def test_a_token_that_no_header_can_have(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content, "utf-8")
    transport = webhook(f"http://127.0.0.1:{free_port()}/webhook", name="webhook", token_file=str(file))
    text = refusal(transport, events(1), TransportConfigurationError)
    assert "token" in text


def test_a_secret_file_that_is_not_there(tmp_path: Path) -> None:
    for option, more in (("token_file", {}), ("password_file", {"user": "x"}), ("signing_secret_file", {})):
        transport = webhook("http://127.0.0.1:1/webhook", **more, **{option: str(tmp_path / "nowhere")})
        assert option in refusal(transport, events(1), TransportConfigurationError)


# Signatures.


def test_requests_are_signed_with_every_secret(tmp_path: Path) -> None:
    known = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    file = tmp_path / "secrets"
    file.write_text(f"{known}\nanother one\n")
    began = int(time.time())
    with receiver(tmp_path / "r") as server:
        for key in (base64.b64decode(known[6:]), b"another one"):
            server.control(keys=[base64.b64encode(key).decode()])
            assert run(publish(webhook(server, signing_secret_file=str(file)), events(3))) is None
        for one in server.received():
            assert one.headers["webhook-id"] == json.loads(one.body)["id"] == one.headers["orthanc-event-id"]
            when = int(one.headers["webhook-timestamp"])
            assert began <= when <= time.time()
            expected = sign(keys(file.read_text(), "x"), one.headers["webhook-id"], when, one.body)
            assert one.headers["webhook-signature"] == expected
        server.control(keys=[base64.b64encode(b"a third").decode()])
        transport = webhook(server, signing_secret_file=str(file))
        assert "401" in refusal(transport, events(1), TransportConfigurationError)
        assert len(server.received()) == 6


@contextlib.contextmanager
def example(folder: Path, secret: str) -> Iterator[tuple[str, Path]]:
    """The receiver of examples/, as it is; its URL and its database."""
    database = folder / "events.sqlite"
    command = [sys.executable, str(ROOT / "examples/webhook-receiver/receiver.py")]
    running = subprocess.Popen(
        [*command, "--port", "0", "--database", str(database)],
        env={"WEBHOOK_SECRET": secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with running:
        assert running.stdout is not None and running.stderr is not None
        try:
            found = re.search(r"http://\S+", running.stdout.readline())
            assert found, running.stderr.read()
            yield found[0], database
        finally:
            running.terminate()
            said, errors = running.communicate(timeout=60)
    assert "Traceback" not in said + errors, said + errors
    assert "canary" not in said + errors


def stored(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [str(one) for (one,) in connection.execute("SELECT event FROM events ORDER BY position")]


def outgoing(count: int) -> list[Any]:
    """Real events."""
    facts = [row(number) for number in range(1, count + 1)]
    return [to_outgoing(one, SHAPE, Rows.recorder) for one in facts]


def test_the_example_takes_what_is_signed_once_each_in_order(tmp_path: Path) -> None:
    sent = outgoing(20)
    with example(tmp_path, f"whsec_{base64.b64encode(SECRET.encode()).decode()} another") as (url, database):
        for secret in (f"whsec_{base64.b64encode(SECRET.encode()).decode()}", "another", f"wrong\n{SECRET}\nanother"):
            assert run(publish(webhook(url, signing_secret=secret), sent)) is None
        assert [one.encode() for one in stored(database)] == [one.body for one in sent]


def test_the_example_refuses_what_is_not(tmp_path: Path) -> None:
    sent = outgoing(2)
    with example(tmp_path, SECRET) as (url, database):
        assert "401" in refusal(webhook(url, signing_secret="wrong"), sent, TransportConfigurationError)
        assert "401" in refusal(webhook(url), sent, TransportConfigurationError)
        key, now = keys(SECRET, "x"), int(time.time())
        right = {"Content-Type": "application/cloudevents+json", "webhook-id": sent[0].id}

        def post(when: int, body: bytes, different: dict[str, str] | None = None, *, signed: bytes = b"") -> int:
            signature = sign(key, right["webhook-id"], when, signed or body)
            headers = {**right, "webhook-timestamp": str(when), "webhook-signature": signature, **(different or {})}
            return httpx.post(url, content=body, headers=headers, trust_env=False, timeout=60).status_code

        assert post(now, sent[0].body + b" ", signed=sent[0].body) == 401
        assert post(now - 1000, sent[0].body) == 401
        assert post(now + 1000, sent[0].body) == 401
        assert post(now, sent[0].body, {"webhook-id": sent[1].id}) == 401
        assert post(now, sent[0].body, {"webhook-signature": "v1, v1,x v2,y"}) == 401
        assert post(now, b"canary") == 400
        assert post(now, b'"canary"') == 400
        assert post(now, sent[1].body) == 400  # another's id
        assert post(now, sent[0].body, {"Content-Type": "application/json"}) == 415
        assert stored(database) == []
        assert post(now, sent[0].body) == 204
        assert httpx.options(url, trust_env=False, timeout=60).status_code == 204
        assert httpx.get(url, trust_env=False, timeout=60).status_code == 501
        assert len(stored(database)) == 1


# Secrets.


def test_secrets_are_in_no_message_and_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: Certificates
) -> None:
    """The canaries are first seen where they belong: with the receiver."""
    canaries = {name: f"canary-{name}" for name in ("password", "token", "signing", "query", "body")}
    basics = basic("orthanc", canaries["password"]).partition(" ")[2]
    seen: list[str] = []
    statuses = (401, 400, 429, 302, 500)

    async def main(server: WebhookServer) -> None:
        for login in (
            {"user": "orthanc", "password": canaries["password"]},
            {"token": canaries["token"]},
        ):
            url = f"{server.url}{PLACE}?key={canaries['query']}"
            transport = webhook(url, signing_secret=canaries["signing"], tls=tls(ca_file=ours.ca), **login)
            seen.append(f"{transport} {transport._options}")
            for status in (*statuses, 0):
                location = f"/x?{canaries['query']}"
                answer = {"status": status or 200, "hang_up": not status, "headers": {"Location": location}}
                server.control(answers=[answer | {"body": canaries["body"]}])
                await transport.connect()
                seen.extend(await transport.describe())
                with pytest.raises(PublishError) as caught:
                    await transport.publish(events(2))
                seen.extend(texts(caught.value))
                seen.extend(texts(caught.value.error))
            server.control(answers=None)
            await transport.connect()
            await transport.publish(events(1))
            server.kill()
            for work in (transport.publish(events(1)), transport.connect()):
                with pytest.raises(TransportError) as failed:
                    await work
                seen.extend(texts(failed.value))
            server.start()
            await transport.close()

    with receiver(tmp_path, **ours.control()) as server:
        with caplog.at_level(logging.DEBUG, "httpcore"):  # as nothing of ours sets it: its lines would be found
            run(main(server))
        assert canaries["query"] in caplog.text
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            run(main(server))
        received = "".join(f"{one.headers}" for one in server.received()) + server.log_text()
    for name in ("token", "query"):
        assert canaries[name] in received
    assert basics in received
    text = "\n".join([*seen, caplog.text])
    for canary in (*canaries.values(), basics):
        assert canary not in text


def texts(error: BaseException | None) -> Iterator[str]:
    """All that a traceback, or a look into an exception, would show."""
    while error is not None:
        yield f"{error} {error!r} {error.args} {vars(error)}"
        error = error.__cause__ or error.__context__
