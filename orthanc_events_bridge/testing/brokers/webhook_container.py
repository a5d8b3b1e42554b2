"""The receiver of webhooks in a container."""

from __future__ import annotations

import ssl
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from orthanc_events_bridge.testing.brokers.webhook import PROGRAM, WebhookServer
from orthanc_events_bridge.testing.contained import ContainerServer


class WebhookContainer(WebhookServer, ContainerServer):
    """`WebhookServer` in a container."""

    kind = "webhook"

    def _command(self) -> list[str]:
        host = "0.0.0.0" if self.published else "127.0.0.1"  # noqa: S104  # inside the container
        return ["python3", "-I", str(PROGRAM), str(self.folder), str(self.port), host]

    def _listen(self) -> list[int]:
        return [self.port]

    def _is_ready(self) -> bool:
        # The engine takes connections before the receiver does, and hangs up.
        kind = HTTPSConnection if self.url.startswith("https:") else HTTPConnection
        with closing(kind("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("OPTIONS", "*")
                return connection.getresponse().status > 0
            except ssl.SSLCertVerificationError:
                return True
            except (HTTPException, OSError):
                return False

    def _mounts(self) -> dict[Path, str]:
        return {**super()._mounts(), PROGRAM: "ro"}
