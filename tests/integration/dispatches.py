"""What the tests of the AI dispatch share: dispatches as processes, and what they know of their workflows."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from orthanc_events_bridge.testing.dicom import orthanc_id
from orthanc_events_bridge.testing.phantoms import Phantom, file_of
from orthanc_events_bridge.testing.ring import Ring
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
    :param more: the rest of the file.
    """

    COMMAND = "dispatch"
    MUTANTS = "orthanc_events_bridge.testing.dispatch_mutants"

    def __init__(
        self, folder: Path, ring: Ring, service: str = "", more: str = "", without: Sequence[str] = ()
    ) -> None:
        super().__init__(folder, ring.line, ring.options(folder, service) + more, without)

    def workflow(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Run ``orthanc-events workflow``."""
        command = [sys.executable, "-m", "orthanc_events_bridge", "workflow", more[0], "--config", str(self.path)]
        return ran([*command, *more[1:]])

    def shown(self) -> list[dict[str, Any]]:
        """All workflows."""
        done = self.workflow("list", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def states(self) -> Counter[str]:
        """How many workflows are in which state, by a plain look into the database: commands take long."""
        path = self.path.with_name("dispatch.db")
        if not path.exists():
            return Counter()
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
            try:
                return Counter(
                    dict(database.execute("SELECT state, count(*) FROM orthanc_events_workflows GROUP BY 1"))
                )
            except sqlite3.OperationalError:  # the table is not made yet
                return Counter()
