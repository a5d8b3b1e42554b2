"""Orthanc asked over HTTP: a real one behind TLS that insists on certificates and a login, and what goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthanc_events_bridge.errors import BridgeError, GoneError, LogUnavailableError, OrthancError
from orthanc_events_bridge.orthanc_api import OrthancApi, OrthancOptions
from orthanc_events_bridge.testing.dicom import make_study
from orthanc_events_bridge.testing.processes import free_port, wait_until
from orthanc_events_bridge.testing.servers import OrthancServer
from tests.integration.webhook_tools import Certificates, answering

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ours"))


class _Gate(http.server.ThreadingHTTPServer):
    """A proxy in front of an Orthanc, as users put one: with OpenSSL 3, Debian 12's Orthanc crashes at TLS of its own.

    :param behind: Orthanc's address; without one, everything is answered with ``{}``.
    :ivar seen: with what each has logged in.
    """

    def __init__(self, behind: str = "", context: ssl.SSLContext | None = None) -> None:
        seen: list[str | None] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                login = self.headers.get("Authorization")
                seen.append(login)
                status, body = 200, b"{}"
                if behind:
                    headers = {"Authorization": login} if login else {}
                    answer = httpx.get(f"{behind}{self.path}", headers=headers, timeout=30, trust_env=False)
                    status, body = answer.status_code, answer.content
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            log_message: Callable[..., None] = lambda *_: None

        super().__init__(("127.0.0.1", 0), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.seen = seen
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Whoever is not let in is no error."""


@contextlib.contextmanager
def gate(behind: str = "", context: ssl.SSLContext | None = None) -> Iterator[_Gate]:
    with _Gate(behind, context) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, ours: Certificates) -> Iterator[OrthancOptions]:
    """An Orthanc that takes nobody without a certificate and a password."""
    folder = tmp_path_factory.mktemp("secured")
    (folder / "password").write_text("open sesame\n", "utf-8")
    server = OrthancServer(
        folder / "orthanc", config={"AuthenticationEnabled": True, "RegisteredUsers": {"bridge": "open sesame"}}
    )
    server.start(wait=False)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ours.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(ours.server, ours.server_key)
    login: dict[str, Any] = {"user": "bridge", "password_file": folder / "password"}

    def ready() -> bool:
        try:
            with OrthancApi(OrthancOptions(server.url, **login)) as api:
                return bool(api.json("/system"))
        except LogUnavailableError:
            return False

    assert wait_until(ready, 60)
    with gate(server.url, context) as front:
        yield OrthancOptions(front.url, ca_file=ours.ca, cert_file=ours.client, key_file=ours.client_key, **login)
    server.close()


def changed(options: OrthancOptions, **changes: Any) -> OrthancOptions:
    return dataclasses.replace(options, **changes)


def refused(options: OrthancOptions, kind: type[BridgeError], path: str = "/system") -> str:
    """The text of the error, which names the place and the remedy."""
    with pytest.raises(BridgeError) as caught, OrthancApi(options) as api:
        api.json(path)
    assert type(caught.value) is kind, repr(caught.value)
    assert caught.value.remedy and "sesame" not in str(caught.value)
    return str(caught.value)


def test_tls_with_certificates_on_both_sides_and_a_password(secured: OrthancOptions) -> None:
    with OrthancApi(secured) as api:
        assert json.loads(api.get("/changes?since=0&limit=1"))["Done"]
        assert api.json("/system")["ApiVersion"] > 10
        with pytest.raises(GoneError, match="404"):
            api.get("/studies/none")


def test_what_the_secured_one_refuses(secured: OrthancOptions, tmp_path: Path) -> None:
    theirs = Certificates(tmp_path / "theirs")
    assert "401" in refused(changed(secured, user=None, password_file=None), OrthancError)
    assert "401" in refused(changed(secured, password="wrong sesame", password_file=None), OrthancError)
    assert "TLS failed" in refused(changed(secured, ca_file=theirs.ca), OrthancError)
    assert "TLS failed" in refused(changed(secured, ca_file=None), OrthancError)
    with pytest.raises(BridgeError), OrthancApi(changed(secured, cert_file=None, key_file=None)) as api:
        api.get("/system")
    assert "ca_file can't be used" in refused(changed(secured, ca_file=tmp_path / "none"), OrthancError)


def test_plain_http_and_a_path_in_front(orthanc_plain: OrthancServer) -> None:
    data = make_study().instances[0].data
    stored = orthanc_plain.upload(data)
    with OrthancApi(OrthancOptions(orthanc_plain.url)) as api:
        assert api.json(f"/instances/{stored['ID']}")["ParentSeries"] == stored["ParentSeries"]
    # As behind a proxy that gives Orthanc a path of its own.
    with OrthancApi(OrthancOptions(f"{orthanc_plain.url}/instances/{stored['ID']}/")) as api:
        assert "0008" in api.json("/content")[0]


@pytest.fixture
def orthanc_plain(tmp_path: Path) -> Iterator[OrthancServer]:
    server = OrthancServer(tmp_path / "orthanc")
    server.start()
    yield server
    server.close()


def test_what_is_no_orthanc(tmp_path: Path) -> None:
    assert "can't be reached" in refused(OrthancOptions(f"http://127.0.0.1:{free_port()}"), LogUnavailableError)
    assert "can't be reached" in refused(OrthancOptions("http://nowhere.invalid"), LogUnavailableError)
    cases: dict[bytes, tuple[type[BridgeError], str]] = {
        b"220 mail ready\r\n\r\n": (OrthancError, "does not answer in HTTP"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>": (OrthancError, "in JSON"),
        b"HTTP/1.1 302 Found\r\nLocation: http://example.org\r\nContent-Length: 0\r\n\r\n": (OrthancError, "302"),
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n": (LogUnavailableError, "503"),
        b"": (LogUnavailableError, "ended the connection"),
    }
    for answer, (kind, says) in cases.items():
        with answering(answer) as url:
            assert says in refused(OrthancOptions(url), kind)


def test_a_silent_one_is_not_waited_for_without_end() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = OrthancOptions(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.2)
        assert "has not answered in time" in refused(options, LogUnavailableError)


def test_a_token_is_sent_as_bearer(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc.def\n", "utf-8")
    with gate() as front:
        options = OrthancOptions(front.url, token_file=tmp_path / "token")
        with OrthancApi(options) as api:
            assert api.json("/system") == {}
    assert front.seen == ["Bearer abc.def"]
    (tmp_path / "token").write_text("abc\ndef", "utf-8")
    assert "no header can have" in refused(options, OrthancError)
