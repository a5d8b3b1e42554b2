"""The ring of the AI dispatch, for tests and demo: PACS → gateway with the bridge → AI service → gateway → PACS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from orthanc_events_bridge.testing.ai_service import AiService
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.programs import find_dicomweb_plugin, find_python_plugin
from orthanc_events_bridge.testing.servers import OrthancServer

#: The conditions of a rule: of CT and MR that have come from the PACS.
FROM_PACS: Final = "[{tag: Modality, is: [CT, MR]}, {metadata: RemoteAET, is: PACS}]"


class Ring:
    """Real servers. The gateway knows the PACS as the modality ``pacs``, and the service as the DICOMweb server ``ai``.

    :param folder: where everything is.
    :param kind: of the broker.
    :param pacs: an Orthanc of the AET ``PACS``, not started.
    :param service: settings of the service (`AiService`).
    """

    def __init__(self, folder: Path, kind: str, pacs: OrthancServer, **service: object) -> None:
        self.pacs = pacs
        self.service = AiService(folder / "ai", quiet_seconds=1, **service)
        config: dict[str, Any] = {
            "DicomAet": "GATEWAY",
            "DicomModalities": {"pacs": ["PACS", "127.0.0.1", pacs.dicom_port]},
            "Plugins": [str(find_python_plugin()), str(find_dicomweb_plugin())],
            "DicomWeb": {"Enable": True, "Servers": {"ai": [f"{self.service.url}/"]}},
            "ConcurrentJobs": 8,
            "JobsHistorySize": 1000,
        }
        self.line = Line(folder / "line", broker=kind, orthanc=config)
        self.gateway = self.line.orthanc
        self.service.environment["AI_SERVICE_RESULTS_URL"] = f"{self.gateway.url}/dicom-web"
        pacs.config["DicomModalities"] = {"gateway": ["GATEWAY", "127.0.0.1", self.gateway.dicom_port]}

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """All of it; killed at the end, which is quicker than to stop it."""
        servers = (self.pacs, self.service, self.gateway, self.line.broker.server)
        try:
            self.pacs.start()
            self.service.start()
            self.line.__enter__()
            yield self
            for server in servers:
                if server.running:
                    server.close(kill=True)
        finally:
            for server in servers:
                server._kill_all()

    def send(self, series: str) -> None:
        """The PACS sends a series to the gateway, by C-STORE."""
        self.pacs.post("/modalities/gateway/store", {"Resources": [series]})

    def options(self, folder: Path, service: str = "", store: str | None = None, when: str = FROM_PACS) -> str:
        """A dispatch's options, beside broker and Orthanc. Its secret is written into the folder.

        :param folder: of its file.
        :param service: options of the service, in YAML's short form, in place of STOW-RS to it.
        :param store: where it remembers; none: a file.
        :param when: the conditions of its rule, in YAML's short form.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "secret").write_text("0123456789abcdef0123456789abcdef\n")
        return f"""store: {store or f"sqlite:///{folder}/dispatch.db"}
rules:
  - {{name: for-the-service, when: {when}}}
anonymize: {{secret_file: secret}}
service: {{{service or "dicomweb: ai"}}}
results:
  to: {{modality: pacs}}
  expect:
    segmentation: {{tag: Modality, is: SEG}}
    report: {{tag: Modality, is: SR}}
"""
