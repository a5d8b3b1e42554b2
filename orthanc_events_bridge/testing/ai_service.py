"""The AI service of ``examples/ai-service`` as a server of tests and demo, among real Orthancs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import httpx

from orthanc_events_bridge.testing.processes import Server, ServerError, free_port, wait_until

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ai-service"


class AiService(Server):
    """The service, with its data in the folder. It needs highdicom, and this repository around the package.

    :param options: its settings in small letters, as ``results_url`` and ``fault_crash="1,4"`` (see its README).
    """

    title: ClassVar[str] = "the AI service"

    def __init__(self, folder: Path, **options: object) -> None:
        self.port = free_port()
        settings = {"port": self.port, "folder": Path(folder) / "data", **options}
        environment = {f"AI_SERVICE_{name.upper()}": str(value) for name, value in settings.items()}
        super().__init__(folder, environment={"PYTHONPATH": str(_EXAMPLE), **environment})

    @property
    def url(self) -> str:
        """Where requests are sent; as a server of Orthanc's DICOMweb plugin it ends with a slash."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """Return the JSON of a ``GET``.

        :raises httpx.HTTPError: no answer.
        """
        return httpx.get(self.url + path, timeout=60).json()

    def died(self, timeout: float = 120.0) -> int:
        """Wait until it has ended by itself, as it does where it is told to, and return the exit code.

        :param timeout: seconds.
        :raises ServerError: it has not.
        """
        process = self._process
        if process is None or not wait_until(lambda: process.poll() is not None, timeout):
            raise ServerError(self._message("has not ended by itself"))
        code = int(process.returncode)
        self._forget()
        return code

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "ai_service"]

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False
