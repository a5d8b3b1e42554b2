"""examples/ai-service among real Orthancs: series go to it by STOW-RS, and its results come by STOW-RS."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

pytest.importorskip("highdicom", reason="it has no wheels for Python 3.14")

from orthanc_events_bridge.testing.ai_service import AiService
from orthanc_events_bridge.testing.phantoms import Phantom, file_of
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import find_dicomweb_plugin, require
from tests.integration.routers import Receiver, running

pytestmark = pytest.mark.integration


def test_results_come_once_although_the_service_dies_and_a_refused_series_fails_at_its_sender(tmp_path: Path) -> None:
    require("orthanc-dicomweb")
    plugins = [str(find_dicomweb_plugin())]
    pacs = Receiver(tmp_path / "pacs", Plugins=plugins, DicomWeb={"Enable": True})
    service = AiService(
        tmp_path / "ai",
        results_url=f"{pacs.url}/dicom-web",
        quiet_seconds=1,
        fault_crash="1",
        fault_crash_sent="2",
        fault_refuse="3",
    )
    servers = {"ai": [f"{service.url}/"]}
    gateway = Receiver(tmp_path / "gateway", Plugins=plugins, DicomWeb={"Enable": True, "Servers": servers})

    def send(series: str) -> bool:
        """In several requests: Orthanc sends ten instances in one."""
        try:
            gateway.post("/dicom-web/servers/ai/stow", {"Resources": [series], "Synchronous": True})
        except httpx.HTTPStatusError:
            return False
        return True

    phantoms = [Phantom(), Phantom(), Phantom()]
    images = [phantoms[0].ct(), phantoms[1].mr(), phantoms[2].ct()]
    with running(pacs, gateway), service:
        series = [[gateway.upload(file_of(one))["ParentSeries"] for one in some][-1] for some in images]
        for n in (0, 1):
            assert send(series[n])
            assert service.died() == 70
            service.start()
            state = f"/series/{images[n][0].SeriesInstanceUID}"
            assert wait_until(lambda state=state: service.get(state)["state"] == "done", 120)  # type: ignore[misc]
        assert [send(series[2]) for _ in "ab"] == [False, False]
        found = [pacs.get(f"/instances/{one}/simplified-tags") for one in pacs.has()]
        assert sorted((one["StudyInstanceUID"], one["Modality"]) for one in found) == sorted(
            (phantom.study_uid, modality) for phantom in phantoms[:2] for modality in ("SEG", "SR")
        )
        assert pacs.taken() == 2 + 4  # what was sent before it died came again, and was known
        before = pacs.has()
        assert send(series[0])
        assert wait_until(lambda: pacs.taken() == 2 + 4 + 2, 120)
        assert pacs.has() == before
        assert service.get("/health")["series"] == {"open": 0, "done": 2, "unfit": 0, "undelivered": 0, "failing": 0}
