"""What the webhook tests share: a receiver for a module, transports to it, and what becomes of batches."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trustme

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.testing.brokers.webhook import PLACE, WebhookServer
from orthanc_events_bridge.transports.base import Outgoing, PublishError
from orthanc_events_bridge.transports.webhook import WebhookTransport
from orthanc_events_bridge.transports.webhook_options import WebhookOptions
from tests.contract.harness import check_text, run


@contextlib.contextmanager
def receiver(folder: Path, **control: Any) -> Iterator[WebhookServer]:
    """A running receiver."""
    folder.mkdir(parents=True, exist_ok=True)
    server = WebhookServer(folder)
    server.control(**control)
    with server:
        yield server


def webhook(server: WebhookServer | str, **options: Any) -> WebhookTransport:
    """A transport to it, patient by default."""
    url = server if isinstance(server, str) else f"{server.url}{PLACE}"
    return WebhookTransport(WebhookOptions.model_validate({"url": url, "timeout": 30, **options}))


async def publish(transport: WebhookTransport, sent: Sequence[Outgoing]) -> PublishError | None:
    """Connect, send one batch, close; why it stopped."""
    await transport.connect()
    try:
        await transport.publish(sent)
    except PublishError as error:
        checked(error.error)
        return error
    finally:
        await transport.close()
    return None


def refusal(transport: WebhookTransport, sent: Sequence[Outgoing], kind: type[TransportError]) -> str:
    """The text of the error with which connecting, or else the first event, must fail."""

    async def main() -> TransportError:
        try:
            error = await publish(transport, sent)
        except TransportError as caught:
            return checked(caught)
        assert error is not None, "nothing was refused"
        assert error.confirmed == 0
        return error.error

    error = run(main())
    assert type(error) is kind, repr(error)
    return str(error)


def checked(error: TransportError) -> TransportError:
    """An error as every one has to be: it names the place, says what to do, and holds no secret."""
    assert error.remedy, f"doesn't say what to do: {error}"
    assert "webhook" in str(error).lower(), f"doesn't name the place: {error}"
    check_text(error)
    return error


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Something that listens, and says always the same; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)


class Certificates:
    """A private authority, a receiver's certificate and a client's, as files.

    :param host: whom the receiver's certificate is for.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.server, self.server_key = self.issue("server", host)
        self.client, self.client_key = self.issue("client", "bridge.example.org")

    def issue(self, name: str, host: str) -> tuple[Path, Path]:
        issued = self.authority.issue_cert(host)
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return certificate, key

    def control(self, **more: Any) -> dict[str, Any]:
        """For a receiver with the certificate."""
        return {"certificate": self.server, "key": self.server_key, **more}
