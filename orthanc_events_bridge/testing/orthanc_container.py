"""A newer Orthanc for tests, in a container: the same class as for a process, run in another way.

``TEST_ORTHANC=containers`` lets every `orthanc_events_bridge.testing.line.Line` have one; ``TEST_ORTHANC_IMAGE`` names
another image than ``orthanc`` of those in `orthanc_events_bridge.testing.images`. It has this machine's network
and its own folder under the same path; the package is mounted read-only. So capture runs in the image's Python and the
bridge in the image's environment (``docker/orthanc/Dockerfile``), while status and outbox are read from outside: the
kernel, and thereby SQLite's locks and shared memory, are the same.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final

import orthanc_events_bridge
from orthanc_events_bridge.testing.bridged import BridgedOrthanc
from orthanc_events_bridge.testing.containers import ContainerServer
from orthanc_events_bridge.testing.engine import shares_network
from orthanc_events_bridge.testing.programs import MissingComponentError

_PLUGIN: Final = "/usr/share/orthanc/plugins/libOrthancPython.so"
_PYTHON: Final = "/opt/bridge/bin/python"
_PACKAGE: Final = Path(orthanc_events_bridge.__file__).parent


class ContainedOrthanc(BridgedOrthanc, ContainerServer):
    """`BridgedOrthanc` in a container; a kill takes its bridge along.

    :raises MissingComponentError: no container engine answers that can give it this machine's network, or there is no
        image.
    """

    kind = os.environ.get("TEST_ORTHANC_IMAGE", "orthanc")

    def __init__(self, folder: Path, **options: Any) -> None:
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        script = options.get("user_script")
        self._scripts = {Path(script).parent: "rw"} if script else {}
        super().__init__(folder, python=str(self._interpreter(folder)), **options)
        if not shares_network():
            raise MissingComponentError("this container engine can't give a container the machine's network")
        self.binary = Path("Orthanc")
        self.config["Plugins"] = [_PLUGIN]

    @staticmethod
    def _interpreter(folder: Path) -> Path:
        """A program that is the image's Python with the mounted package."""
        path = folder / "python-in-the-image"
        text = f'#!/bin/sh\nPYTHONDONTWRITEBYTECODE=1 PYTHONPATH="{_PACKAGE.parent}" exec {_PYTHON} "$@"\n'
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def _mounts(self) -> dict[Path, str]:
        return {**super()._mounts(), **self._scripts, _PACKAGE: "ro"}
