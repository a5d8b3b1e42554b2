"""What a benchmark found, and the page that says so."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from tempfile import TemporaryDirectory

from orthanc_events_bridge.testing.programs import (
    MissingComponentError,
    find_kafka,
    find_nats,
    find_orthanc,
    find_rabbitmq,
)


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
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rest))


def page(sections: Sequence[Section], *, quick: bool, seconds: float) -> str:
    """The whole page."""
    lines: list[Sequence[str]] = [("what", "target", "measured", "met")]
    for section in sections:
        lines += [
            (row.what, row.target, row.measured, {True: "yes", False: "**no**", None: "-"}[row.met])
            for row in section.rows
        ]
    text = ["# Benchmark results", ""]
    for paragraph in _about(seconds):
        text += [_filled(paragraph), ""]
    if quick:
        text += ["**Small sizes (`--quick`): these numbers only show that the benchmarks run.**", ""]
    text += [table(lines), ""]
    short = [row for section in sections for row in section.rows if row.met is False]
    if short:
        text += ["## Where it falls short", ""]
        for row in short:
            text += [_filled(f"- **{row.what}** ({row.measured}; wanted {row.target}): {row.why}"), ""]
    for section in sections:
        text += [f"## {section.title}", ""]
        for part in (*map(_filled, section.how), *map(table, section.tables), *map(_filled, section.notes)):
            text += [part, ""]
    return "\n".join(text)


def _filled(paragraph: str) -> str:
    hanging = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, 110, subsequent_indent=hanging, break_on_hyphens=False)


def _about(seconds: float) -> list[str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    orthanc = _output(str(find_orthanc()), "--version").split()[1]
    clients = ("nats-py", "aio-pika", "aiormq", "aiokafka", "httpx")
    return [
        (
            f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}, in {seconds / 60:.0f} minutes. Everything"
            f" ran on one machine, over loopback: {os.cpu_count()} cores, {memory:.0f} GiB of memory, {_system()},"
            f" {platform.machine()}. Orthanc, the brokers, the bridge and the clients that load them share these cores."
        ),
        (
            f"Orthanc {orthanc}, {', '.join(_brokers())}, Python {platform.python_version()},"
            f" {', '.join(f'{client} {version(client)}' for client in clients)}, SQLite {sqlite3.sqlite_version},"
            f" orthanc-events-bridge {version('orthanc-events-bridge')}."
        ),
    ]


def _brokers() -> Iterator[str]:
    """Those that are here, with their versions."""
    with suppress(MissingComponentError):
        yield _output(str(find_nats()), "--version").replace(": v", " ")
    with suppress(MissingComponentError), TemporaryDirectory() as home:  # it leaves a file there
        yield f"RabbitMQ {_output(str(find_rabbitmq().with_name('rabbitmqctl')), 'version', HOME=home)}"
    with suppress(MissingComponentError):
        jar = next(find_kafka().glob("kafka_*.jar"))
        yield f"Kafka {jar.stem.rpartition('-')[2]}"


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _output(*command: str, **variables: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    return run.stdout.splitlines()[0]
