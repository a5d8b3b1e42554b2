"""What the demonstrations have in common: how they begin, and how they end where something is missing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.testing.guard import scratch_folder
from orthanc_events_bridge.testing.processes import ServerError
from orthanc_events_bridge.testing.programs import MissingComponentError


def shown(name: str, run: Callable[[Path, str, bool], int]) -> int:
    """Run a demonstration in a scratch folder, and leave nothing behind.

    :param name: what messages begin with.
    :param run: takes the folder, the kind of the broker, and whether to go on running in the end, as ``BROKER`` and
        ``KEEP`` say; returns the exit code.
    :return: the exit code; 3 where a server or a program is missing or fails.
    """
    try:
        with scratch_folder() as scratch:
            return run(scratch, os.environ.get("BROKER", "") or "nats", os.environ.get("KEEP", "") not in ("", "0"))
    except (MissingComponentError, ServerError, BridgeError, TimeoutError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nstopped")
        return 0


def go_on(while_: Callable[[], bool] = lambda: True) -> None:
    """Keep everything running until Ctrl-C.

    :param while_: until that is over.
    """
    print("\nIt goes on running; Ctrl-C ends it.", flush=True)
    while while_():
        time.sleep(1)
