"""A real Orthanc with the bridge, set up as a user would do it: the shim and the smallest configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import orthanc_events_bridge
from orthanc_events_bridge.testing.servers import OrthancServer

#: The source of events in tests.
SOURCE: Final = "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"


def smallest(kind: str, options: Iterable[str]) -> str:
    """The smallest valid configuration, as text.

    :param kind: the transport's type.
    :param options: of the transport, a line of YAML each.
    """
    lines = "".join(f"    {line}\n" for line in options)
    return f"source: {SOURCE}\ntransports:\n  - type: {kind}\n{lines}"


class BridgedOrthanc(OrthancServer):
    """Orthanc with the bridge. The two files lie in the folder, ``config_path`` and ``shim_path``.

    :param nats: a NATS server's address for the smallest configuration.
    :param yaml: text for the end of that configuration; or a whole one, where no broker is given.
    :param user_script: a user's own Python script for Orthanc, to be loaded by the shim as well.
    :param python: the interpreter for the bridge process; this one by default.
    :param options: of `OrthancServer`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nats: str | None = None,
        yaml: str = "",
        user_script: Path | None = None,
        python: str = sys.executable,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from orthanc_events_bridge.cli_init import CONFIG_NAME, SHIM_NAME, shim_text

        folder.mkdir(parents=True, exist_ok=True)
        self.config_path = folder / CONFIG_NAME
        self.shim_path = folder / SHIM_NAME
        beginning = smallest("nats", [f'servers: ["{nats}"]']) if nats else ""
        self.config_path.write_text(beginning + yaml, "utf-8")
        package = Path(orthanc_events_bridge.__file__).parent
        script = str(user_script) if user_script else None
        self.shim_path.write_text(shim_text(python, str(package), str(self.config_path), script=script), "utf-8")
        super().__init__(folder, script=self.shim_path, config=config, **options)

    @property
    def outbox(self) -> Path:
        """The outbox's folder, where it is unless the configuration or the environment names another."""
        return self.database / "orthanc-events"

    def status(self) -> dict[str, Any]:
        """Return ``GET /orthanc-events/status``."""
        answer: dict[str, Any] = self.get("/orthanc-events/status")
        return answer
