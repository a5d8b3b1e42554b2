"""The status as one document, read in a thread of Orthanc's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_READ = """
import sys, time
from pathlib import Path
from orthanc_events_bridge import outbox, plugin, status
from orthanc_events_bridge.folder import Folder
folder = Folder(Path(sys.argv[1]))
outbox.OutboxWriter(folder.outbox, time.time).close()
before = set(sys.modules)
status.read(folder)
print(*sorted(set(sys.modules) - before))
"""


def test_reading_it_imports_nothing(tmp_path: Path) -> None:
    # Orthanc's HTTP threads can have 100 KiB of stack, in which Python 3.14 refuses to import much.
    done = subprocess.run([sys.executable, "-c", _READ, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([], "")
