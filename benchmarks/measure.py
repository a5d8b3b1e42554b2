"""Quantiles, ratios, and what the system says about a process."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of the values don't exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: Iterable[float]) -> float:
    """The median; NaN of none."""
    known = list(values)
    return statistics.median(known) if known else math.nan


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """``0.97 (0.93 to 1.02)``: the median, and the middle half."""
    low, high = quantile(values, 0.25), quantile(values, 0.75)
    return f"{median(values):{form}} ({low:{form}} to {high:{form}})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours in units of theirs, pair by pair."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, what: str = "VmRSS") -> float:
    """Resident memory of a process in MiB: now (``VmRSS``), or at its peak (``VmHWM``)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} has no {what}")
