"""``orthanc-events`` with protections switched off: what a module of mutants is when it is run as a program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from orthanc_events_bridge import cli


def run(mutants: Mapping[str, Callable[[], Any]]) -> None:
    """Switch off what the first argument names, with commas between, and do what the others say. Doesn't return."""
    for name in sys.argv[1].split(","):
        mutants[name]()
    sys.exit(cli.main(sys.argv[2:]))
