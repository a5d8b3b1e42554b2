"""``python -m benchmarks``: everything for real, and the results into ``RESULTS.md``.

``python -m benchmarks NAME…`` runs some, ``--quick`` runs small sizes; what such a run finds is only printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import callback, consuming, drain, fan_out, ingest, latency, million, walk
from benchmarks.report import Section, page, say

BENCHMARKS: dict[str, Callable[..., Section]] = {
    "callback": callback.run,
    "ingest": ingest.run,
    "fan-out": fan_out.run,
    "latency": latency.run,
    "drain": drain.run,
    "million": million.run,
    "walk": walk.run,
    "handling": consuming.run,
}
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see that they run")
    options = parser.parse_args()
    unknown = set(options.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    begin = time.monotonic()
    sections = []
    for name in options.names or BENCHMARKS:
        say(f"{name} begins")
        sections.append(BENCHMARKS[name](quick=options.quick))
    text = page(sections, quick=options.quick, seconds=time.monotonic() - begin)
    print(f"\n{text}")
    if not options.names and not options.quick:
        RESULTS.write_text(text, "utf-8")
        say(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
