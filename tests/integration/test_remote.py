"""``orthanc-events run --orthanc``: logging in, secrets, what answers in Orthanc's place, and what the command says."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orthanc_events_bridge import cli_orthanc, folder, orthanc_api
from orthanc_events_bridge.bridge import config
from orthanc_events_bridge.cli import _parser, main
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.remote import RemoteLine
from orthanc_events_bridge.testing.servers import OrthancServer
from tests.integration.test_docs import OPERATING, blocks, codes, part_of
from tests.integration.webhook_tools import Certificates

pytestmark = pytest.mark.integration

#: Canaries: whatever begins like this is a secret, and must be nowhere.
MARK = "CNRY"


class Front(http.server.ThreadingHTTPServer):
    """A proxy in front of an Orthanc.

    :param behind: Orthanc's port.
    :ivar instead: what is answered in place of what Orthanc does, by the beginning of the path: status and body.
    :ivar token: what everyone has to bring, if anything.
    """

    def __init__(self, behind: int, context: ssl.SSLContext | None = None) -> None:
        front = self
        self.instead: dict[str, tuple[int, bytes]] = {}
        self.token = ""
        client = self._client = httpx.Client(timeout=30, trust_env=False)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                login = self.headers.get("Authorization")
                status, body = next((a for path, a in front.instead.items() if self.path.startswith(path)), (0, b""))
                if front.token and login != f"Bearer {front.token}":
                    status, body = 401, b""
                elif not status:
                    headers = {"Authorization": login} if login and not front.token else {}
                    try:
                        url = f"http://127.0.0.1:{behind}{self.path}"
                        answer = client.get(url, headers=headers)
                        status, body = answer.status_code, answer.content
                    except httpx.TransportError:
                        status, body = 502, b"<html>Bad gateway</html>"
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            log_message: Callable[..., None] = lambda *_: None

        super().__init__(("127.0.0.1", 0), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Whoever is not let in is no error."""

    def server_close(self) -> None:
        super().server_close()
        self._client.close()


@pytest.fixture
def fronts() -> Iterator[Callable[..., Front]]:
    with contextlib.ExitStack() as stack:

        def make(port: int, context: ssl.SSLContext | None = None) -> Front:
            front = stack.enter_context(Front(port, context))
            thread = threading.Thread(target=front.serve_forever, daemon=True)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(front.shutdown)
            return front

        yield make


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    require("orthanc")
    for name in list(os.environ):
        if name.startswith("ORTHANC_EVENTS_"):
            monkeypatch.delenv(name)


def upload(line: RemoteLine, study: dicom.Study | None = None) -> None:
    line.store(study or dicom.make_study())


def problem(line: RemoteLine, *words: str) -> None:
    """Wait until the status says that Orthanc can't be asked, in these words; the log says the same."""

    def said(document: dict[str, Any]) -> bool:
        capture = document["capture"]
        return capture["state"] == "not connected" and all(word in capture["problem"]["message"] for word in words)

    line.wait(said)
    assert all(word in line.bridge.log_text() for word in words)


def well(line: RemoteLine) -> None:
    line.wait(lambda document: document["capture"]["state"] == "following" and document["capture"]["problem"] is None)


def everywhere(line: RemoteLine) -> Iterator[tuple[str, bytes]]:
    """All that an operator, a log collector or another user of the machine can see of the bridge."""
    yield "the log", line.bridge.log_text().encode()
    yield "the command line", Path(f"/proc/{line.bridge.pid}/cmdline").read_bytes()
    yield "the process listing", subprocess.run(["ps", "axww"], capture_output=True, check=True).stdout
    for options in ((), ("--json",)):
        command = [sys.executable, "-m", "orthanc_events_bridge", "status", "--outbox", str(line.bridge.outbox.path)]
        yield "the status", subprocess.run([*command, *options], capture_output=True, check=True).stdout
    for path in line.bridge.outbox.path.iterdir():
        yield path.name, path.read_bytes()
    for event in line.events():
        yield "an event", repr(event).encode()


def test_tls_on_both_sides_and_a_password_that_is_wrong_at_first_and_changes(
    tmp_path: Path, fronts: Callable[..., Front]
) -> None:
    ours = Certificates(tmp_path / "ours")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ours.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(ours.server, ours.server_key)
    password = tmp_path / "password"
    password.write_text(f"{MARK}wrong\n", "utf-8")
    files = {"ca-file": ours.ca, "cert-file": ours.client, "key-file": ours.client_key, "password-file": password}
    options = ["--orthanc-user", "bridge", *(f"--orthanc-{name}={path}" for name, path in files.items())]
    line = RemoteLine(
        tmp_path / "line",
        login=("bridge", f"{MARK}right"),
        url=lambda port: fronts(port, context).url,
        options=options,
        settings="log_level: debug\n",
        wait=False,
    )
    with line:
        problem(line, "answers 401", "check the user and password")
        password.write_text(f"{MARK}right\n", "utf-8")
        well(line)
        upload(line)
        line.settle()
        line.orthanc.login = ("bridge", f"{MARK}rotated")
        line.orthanc.restart()
        upload(line)
        problem(line, "answers 401")
        password.write_text(f"{MARK}rotated\n", "utf-8")
        well(line)
        line.report(kills=1).assert_clean()
        assert "is well again after" in line.bridge.log_text()
        places = [*everywhere(line)]
        assert len(places) > 10 and any(b"https://127.0.0.1" in content for name, content in places if "status" in name)
        assert [name for name, content in places if MARK.encode() in content] == []


def test_secrets_in_the_environment_and_a_token(tmp_path: Path, fronts: Callable[..., Front]) -> None:
    token = f"{MARK}token"
    seen: list[Front] = []

    def guarded(port: int) -> str:
        seen.append(fronts(port))
        seen[0].token = token
        return seen[0].url

    environment = {"ORTHANC_EVENTS_ORTHANC_TOKEN": token}
    with RemoteLine(tmp_path / "line", url=guarded, environment=environment, settings="log_level: debug\n") as line:
        upload(line)
        line.report().assert_clean()
        seen[0].token = f"{MARK}another"
        problem(line, "answers 401", "or the token")
        seen[0].token = token
        well(line)
        assert [name for name, content in everywhere(line) if MARK.encode() in content] == []


def test_what_answers_in_orthancs_place_is_said_and_nothing_is_lost(
    tmp_path: Path, fronts: Callable[..., Front]
) -> None:
    made: list[Front] = []

    def through(port: int) -> str:
        made.append(fronts(port))
        return made[0].url

    with RemoteLine(tmp_path / "line", url=through) as line:
        front = made[0]
        for instead, words in (
            ({"/": (200, b"<html>Log in here</html>")}, ["does not answer", "in JSON", "past any page to log in"]),
            ({"/": (200, b'{"status": "ok"}')}, ["the answer is no list of changes"]),
            ({"/changes": (200, b'{"Changes": [{"Seq": "x"}], "Last": 3}')}, ["change log can't be read"]),
            ({"/": (503, b"<html>Busy</html>")}, ["answers 503"]),
            ({"/": (403, b"")}, ["answers 403", "what they permit"]),
            ({"/": (404, b"")}, ["answers 404"]),
            ({"/": (302, b"")}, ["answers 302", "check the URL"]),
        ):
            front.instead = instead
            upload(line)
            problem(line, *words)
            front.instead = {}
            well(line)
        broken = dicom.make_study()
        upload(line, broken)
        line.settle()
        front.instead = {f"/studies/{broken.id}": (500, b"")}
        line.bridge.wait_log("it is passed over, and what depends on it is not told")
        upload(line)
        tip = line.orthanc.get("/changes?since=9000000000000000000&limit=1")["Last"]
        line.wait(lambda document: document["log"]["cursor"] >= tip and document["capture"]["state"] == "following")
        front.instead = {"/jobs": (403, b"")}
        line.bridge.restart()
        line.wait(lambda document: "answers 403" in (document["capture"]["jobs_problem"] or ""))
        line.report().assert_clean()  # without jobs, all the rest is seen
        log = line.bridge.log_text()
        assert "jobs are not seen: " in log and "Traceback" not in log


def test_what_the_documents_say_of_it(tmp_path: Path) -> None:
    """Its fields of the status, and the container's command."""
    plugin = {name for name in codes(part_of("Looking at it")) if name.startswith("capture.")}
    told = set(re.findall(r"^\| `(capture\.\w+)` \|", part_of("Without the plugin"), re.MULTILINE))
    with RemoteLine(tmp_path / "line") as line:
        assert {f"capture.{name}" for name in line.status()["capture"]} - plugin == told
    (compose,) = blocks(OPERATING, "yaml")
    service = yaml.safe_load(compose)["services"]["events"]
    arguments = [*service["command"], "--orthanc-password-file", "x"]
    assert cli_orthanc.is_named(_parser().parse_args(["run", *arguments]))
    assert service["environment"].keys() <= {
        config.ENVIRONMENT,
        folder.ENVIRONMENT,
        f"{orthanc_api.ENVIRONMENT}PASSWORD_FILE",
    }


def test_the_log_from_its_beginning(tmp_path: Path) -> None:
    with RemoteLine(tmp_path / "line", settings="capture:\n  start: log\n", wait=False) as line:
        line.bridge.stop()
        for path in line.bridge.outbox.path.iterdir():
            path.unlink()
        upload(line, dicom.make_study(series=2))
        line.bridge.start()
        line.report().assert_clean()
        assert any(event.kind == "study.created" for event in line.events())


def test_the_check_says_what_was_found(
    tmp_path: Path, fronts: Callable[..., Front], capsys: pytest.CaptureFixture[str]
) -> None:
    server = OrthancServer(tmp_path / "orthanc", login=("bridge", f"{MARK}right"))
    password = tmp_path / "password"
    password.write_text(f"{MARK}right", "utf-8")
    arguments = ["check", "--connect", "--orthanc-user", "bridge", "--orthanc-password-file", str(password)]
    with server:
        assert main([*arguments, "--orthanc", server.url]) == 0
        found = capsys.readouterr().out
        assert "version 1." in found and "its index in SQLite" in found and "its log is empty" in found
        for instance in dicom.make_study():
            server.upload(instance.data)
        assert main([*arguments, "--orthanc", server.url]) == 0
        found = capsys.readouterr().out
        assert "its log holds changes from number 1 on" in found and "it holds 1 studies" in found
        assert "its jobs can be seen (0 now)" in found
        assert main([*arguments, "--orthanc", f"{server.url}/nowhere"]) == 1
        assert "answers 404" in capsys.readouterr().err
        front = fronts(server.port)
        for answer in (b"[1]", b"{}", b'"text"', b"<html>"):
            front.instead = {"/": (200, answer)}
            assert main([*arguments, "--orthanc", front.url]) == 1
            assert "does not answer" in capsys.readouterr().err
        password.write_text(f"{MARK}wrong", "utf-8")
        assert main([*arguments, "--orthanc", server.url]) == 1
        assert "answers 401" in capsys.readouterr().err
    assert main([*arguments, "--orthanc", server.url]) == 1
    assert "can't be reached" in capsys.readouterr().err


def test_what_can_not_be_right_ends_it_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    source = "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
    config.write_text(f"source: {source}\ntransports:\n  - type: memory\n", "utf-8")
    run = ["run", "--outbox", str(tmp_path / "outbox"), "--config", str(config), "--orthanc"]
    for arguments, says in (
        ([f"http://bridge:{MARK}secret@127.0.0.1:1"], "holds credentials"),
        (["127.0.0.1:8042"], "is no URL of an Orthanc"),
        (["http://127.0.0.1:1", "--orthanc-user", "bridge"], "a user needs a password"),
        (["http://127.0.0.1:1", "--orthanc-token-file", str(tmp_path / "none")], "can't be read"),
        (["https://127.0.0.1:1", "--orthanc-ca-file", str(tmp_path / "none")], "can't be used"),
        (["http://127.0.0.1:1", "--poll", "0"], "is no number of seconds"),
        (["http://127.0.0.1:1", "--compare-every", "often"], "is no number of seconds"),
    ):
        try:
            code = main([*run, *arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "") and says in printed.err, printed
        assert MARK not in printed.err and "Traceback" not in printed.err
    assert not wait_until(lambda: (tmp_path / "outbox" / "outbox.db").exists(), 0)
