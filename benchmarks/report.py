"""What a benchmark found, and the page that says so."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from orthanc_events_bridge.testing.servers import find_nats, find_orthanc


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the page's first table.

    :param what: was measured.
    :param target: in words; a dash where there is none.
    :param measured: with its unit.
    :param met: whether the target is met; None where there is none.
    :param why: it falls short, in plain words; printed only then.
    """

    what: str
    target: str
    measured: str
    met: bool | None = None
    why: str = ""


@dataclass(slots=True)
class Section:
    """The result of one benchmark.

    :param how: it was measured: paragraphs.
    :param rows: for the first table.
    :param tables: more numbers: each a heading line and lines of cells.
    :param notes: what the numbers mean: paragraphs.
    """

    title: str
    how: list[str]
    rows: list[Row] = field(default_factory=list)
    tables: list[list[Sequence[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def say(text: str) -> None:
    """Progress, for the one who waits."""
    print(f"{datetime.now().astimezone():%H:%M:%S}  {text}", flush=True)


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its heading."""
    heading, *rest = lines
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rest)
    )


def page(sections: Sequence[Section], *, quick: bool, seconds: float) -> str:
    """The whole page."""
    lines: list[Sequence[str]] = [("what", "target", "measured", "met")]
    for section in sections:
        lines += [
            (row.what, row.target, row.measured, {True: "yes", False: "**no**", None: "–"}[row.met])
            for row in section.rows
        ]
    text = ["# Benchmark results", "", *_about(seconds), ""]
    if quick:
        text += ["**Small sizes (`--quick`): these numbers only show that the benchmarks run.**", ""]
    text += [table(lines), ""]
    short = [row for section in sections for row in section.rows if row.met is False]
    if short:
        text += ["## Where it falls short", ""]
        text += [f"- **{row.what}** ({row.measured}; wanted {row.target}): {row.why}" for row in short]
        text += [""]
    for section in sections:
        text += [f"## {section.title}", ""]
        for part in (*section.how, *map(table, section.tables), *section.notes):
            text += [part, ""]
    return "\n".join(text)


def _about(seconds: float) -> list[str]:
    now = datetime.now(timezone.utc)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        f"Written by `make bench` on {now:%Y-%m-%d}, {seconds / 60:.0f} minutes. Everything ran on one machine over",
        f"loopback: {os.cpu_count()} cores, {memory:.0f} GiB of memory, {_system()}, {platform.machine()}. Orthanc,",
        "NATS, the bridge and the clients that load them share these cores.",
        "",
        f"Orthanc {_output(str(find_orthanc()), '--version').split()[1]},"
        f" {_output(str(find_nats()), '--version').replace(': v', ' ')},"
        f" Python {platform.python_version()}, nats-py {version('nats-py')}, SQLite {sqlite3.sqlite_version},"
        f" orthanc-events-bridge {version('orthanc-events-bridge')}.",
    ]


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _output(*command: str) -> str:
    run: subprocess.CompletedProcess[Any] = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(run.stdout).splitlines()[0]
