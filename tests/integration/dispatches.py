"""What the tests of the AI dispatch share: dispatches as processes, and what they know of their workflows."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydicom.dataset import Dataset

from orthanc_events_bridge.testing.dicom import orthanc_id
from orthanc_events_bridge.testing.phantoms import Phantom, file_of
from orthanc_events_bridge.testing.ring import FROM_PACS, Ring
from orthanc_events_bridge.workflows.workflow import Workflows
from tests.integration.commands import ran
from tests.integration.routers import Routers


class Sent:
    """A series that the PACS has sent to the gateway.

    :ivar images: its data sets.
    :ivar series: Orthanc's id, in PACS and gateway alike.
    """

    def __init__(self, ring: Ring, phantom: Phantom, images: list[Dataset]) -> None:
        self.phantom, self.images = phantom, images
        self.series = [ring.pacs.upload(file_of(one))["ParentSeries"] for one in images][-1]
        self.study = orthanc_id(phantom.patient_id, phantom.study_uid)
        ring.send(self.series)

    @property
    def uids(self) -> set[str]:
        return {str(one.SOPInstanceUID) for one in self.images}


class Dispatches(Routers):
    """AI dispatches of one configuration, as processes.

    :param service: as `Ring.options`.
    :param store: as there.
    :param when: as there.
    """

    COMMAND = "dispatch"
    MUTANTS = "orthanc_events_bridge.testing.dispatch_mutants"

    def __init__(
        self,
        folder: Path,
        ring: Ring,
        service: str = "",
        store: str | None = None,
        when: str = FROM_PACS,
        without: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, ring.line, ring.options(folder, service, store, when), without)
        self.store = store or f"sqlite:///{folder}/dispatch.db"

    def workflow(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Run ``orthanc-events workflow``."""
        command = [sys.executable, "-m", "orthanc_events_bridge", "workflow", more[0], "--config", str(self.path)]
        return ran([*command, *more[1:]])

    def dead_letters(self, step: str) -> subprocess.CompletedProcess[str]:
        """Those of a step, in JSON."""
        command = [sys.executable, "-m", "orthanc_events_bridge", "dlq", "list", "--config", str(self.path), "--json"]
        return ran([*command, "--consumer", f"dispatch-{step}"])

    def shown(self) -> list[dict[str, Any]]:
        """All workflows."""
        done = self.workflow("list", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def states(self) -> Counter[str]:
        """How many workflows are in which state: commands take long."""

        async def look() -> Counter[str]:
            rows = Workflows(SecretStr(self.store), "dispatch")
            try:
                return Counter(one.state for one in await rows.all())
            finally:
                await rows.close()

        return asyncio.run(look())
