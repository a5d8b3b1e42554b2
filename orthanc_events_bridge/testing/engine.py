"""The container engine for tests: whether it answers, which images it has, and what earlier runs have left in it.

Containers carry the run's label: `orthanc_events_bridge.testing.guard` removes them when this process is gone, and the
next run what even the guard could not. Ryuk, testcontainers' own guard, isn't used: its image would have to be pulled,
and it is given the engine's socket.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from docker.errors import (  # type: ignore[import-not-found]  # mypy looks for it in the folder docker/
    APIError,
    DockerException,
    ImageNotFound,
)
from packaging.requirements import Requirement
from testcontainers.core.config import testcontainers_config
from testcontainers.core.docker_client import DockerClient, get_docker_host

from orthanc_events_bridge.testing.guard import LABEL, RUN, guard
from orthanc_events_bridge.testing.images import OFFICIAL, OURS, OWN, VERSIONS, own_image
from orthanc_events_bridge.testing.programs import MissingComponentError

testcontainers_config.ryuk_disabled = True

_BUILD: Final = "in a clone on Debian, as root: scripts/images.sh"
#: What the bridge needs beside its own requirements, whatever the broker.
_EXTRAS: Final = ("nats", "rabbitmq", "kafka", "webhook")
#: Where images of Orthanc have a Python for the bridge: ours for tests (``docker/orthanc``), and ``docker/Dockerfile``.
INTERPRETERS: Final = ("/opt/bridge/bin/python", "/opt/orthanc-events/bin/python")
#: How an image gets one that has none.
_RECIPE: Final = """\
FROM {base}
USER root
ARG PIP_INDEX_URL
RUN {has_one} || (python3 -m venv --without-pip /opt/bridge \\
    && python3 -m pip --python /opt/bridge/bin/python install --no-cache-dir {packages})
"""
#: What of this environment a build is told.
_GIVEN: Final = ("PIP_INDEX_URL", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

#: The label that tells whose containers these are, so that others' leftovers can be told from what is in use.
STARTER: Final = "io.orthanc-events.tests.starter"


def _starter(pid: int | str = "self") -> str:
    """Name a process of this machine for good: a number alone comes again.

    :raises OSError: there is no such process, or no ``/proc``.
    """
    process = Path("/proc") / str(pid)
    number, _, rest = (process / "stat").read_text().partition(" ")
    began = rest.rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{(process / 'ns' / 'pid').readlink()}/{number}/{began}"


@functools.cache
def this_starter() -> str:
    """Name this process, for `STARTER`."""
    try:
        return _starter()
    except OSError:
        return "unknown"


@contextmanager
def engine_client() -> Iterator[Any]:
    """Docker's client.

    :raises DockerException: no engine answers; an `OSError` too.
    """
    address = get_docker_host() or "unix:///var/run/docker.sock"
    if address.startswith("unix://"):
        # Where nobody listens, Docker's client would leave its own socket open.
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(address.removeprefix("unix://"))
    client = DockerClient().client
    try:
        yield client
    finally:
        client.close()


def remove_leftovers(client: Any) -> None:
    """Remove containers and networks whose starter is gone, in this boot and among the processes seen from here."""
    for container in client.containers.list(all=True, filters={"label": STARTER}, ignore_removed=True):
        if _is_left(container.labels[STARTER]):
            _remove(container, force=True, v=True)
    for network in client.networks.list(filters={"label": STARTER}):
        if _is_left(network.attrs["Labels"][STARTER]):
            _remove(network)


def _is_left(starter: str) -> bool:
    """Whether a process that we would see if it were there is gone."""
    boot, space, *_ = [*this_starter().split("/"), ""]
    if not starter.startswith(f"{boot}/{space}/"):
        return False
    try:
        return _starter(starter.split("/")[2]) != starter
    except OSError:
        return True


def _remove(what: Any, **options: bool) -> None:
    try:
        what.remove(**options)
    except APIError as error:  # others clean up too: gone, or going
        if error.status_code not in (403, 404, 409):
            raise


@functools.cache
def find_engine() -> None:
    """Make sure that a container engine answers, and that earlier runs have left nothing in it.

    :raises MissingComponentError: none does.
    """
    try:
        with engine_client() as client:
            remove_leftovers(client)
    except (DockerException, OSError) as error:
        raise MissingComponentError(
            "no container engine answers: start one, or name it by DOCKER_HOST (in a clone scripts/docker.sh COMMAND… "
            "starts one for a command; without TEST_SERVERS our own tests have processes)"
        ) from error
    guard.tell("containers", LABEL)


@functools.cache
def shares_network() -> bool:
    """Whether a container can have this machine's network: not that of an engine in a machine or namespace of its own
    (Docker Desktop, rootless).
    """
    with engine_client() as client:
        info = client.info()
    apart = info["OperatingSystem"] == "Docker Desktop" or "name=rootless" in (info["SecurityOptions"] or [])
    return sys.platform == "linux" and not apart


@functools.cache
def run_network() -> str:
    """Make the network in which the containers of this run find each other by their aliases; it goes with the run.

    :raises DockerException: it can't be made.
    """
    name = f"orthanc-events-{RUN}"
    with engine_client() as client:
        client.networks.create(name, labels={LABEL: RUN, STARTER: this_starter()})
    return name


@functools.cache
def find_image(kind: str, wanted: str | None = None) -> str:
    """Find the image of a server: our own where it was built, else the official one, which is pulled if need be.

    :param kind: one of `images.OFFICIAL`.
    :param wanted: another image, or the name of one of ours in `images`; where it isn't given, the variable
        ``ORTHANC_EVENTS_IMAGE_`` with the kind behind it in capitals may name one.
    :return: of Orthanc: with a Python for the bridge, if need be in an image that is built on the one that is meant.
    :raises MissingComponentError: no container engine answers, or there is no such image.
    """
    find_engine()
    variable = f"ORTHANC_EVENTS_IMAGE_{kind.upper()}"
    wanted = wanted or os.environ.get(variable) or kind
    built_only = wanted in VERSIONS or wanted in OURS
    own = own_image(wanted) if wanted in OFFICIAL or built_only else None
    prefix = testcontainers_config.hub_image_name_prefix
    with engine_client() as client:
        if own is not None and _is_there(client, own):
            return own
        if built_only:
            raise MissingComponentError(f"there is no image {wanted}: build it ({_BUILD} {wanted})")
        name = OFFICIAL.get(wanted, wanted)
        if name in OFFICIAL.values() or not _is_there(client, name):  # others' may be local, under the name as it is
            name = prefix + name
        if not _is_there(client, name):
            try:
                client.images.pull(name)
            except (DockerException, OSError) as error:
                remedy = f", or build our own ({_BUILD} {wanted})" if wanted in OFFICIAL else ""
                raise MissingComponentError(
                    f"the image {name} can't be pulled: name another by {variable}{remedy}"
                ) from error
        return _with_bridge(client, name) if kind == "orthanc" and not name.startswith(OWN) else name


def _is_there(client: Any, name: str) -> bool:
    try:
        client.images.get(name)
    except ImageNotFound:
        return False
    return True


def _with_bridge(client: Any, base: str) -> str:
    """Build an image on one of Orthanc, once: with a Python that has what the bridge needs, where it has none.

    :raises MissingComponentError: it can't be built.
    """
    needed = [Requirement(text) for text in metadata.requires("orthanc-events-bridge") or []]
    wanted = [
        f"'{one.name}{one.specifier}'"
        for one in needed
        if one.name != "orthanc-events-bridge"
        and (one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in _EXTRAS))
    ]
    has_one = " || ".join(f"test -x {path}" for path in INTERPRETERS)
    recipe = _RECIPE.format(base=base, has_one=has_one, packages=" ".join(sorted(set(wanted)))).encode()
    stands_for = recipe + client.images.get(base).id.encode()  # the same name may be given to another image
    name = f"orthanc-events-bridge/for-tests:{hashlib.sha256(stands_for).hexdigest()[:12]}"
    if not _is_there(client, name):
        given = {one: os.environ[one] for one in _GIVEN if one in os.environ}
        network = "host" if shares_network() else None
        try:
            client.images.build(
                fileobj=io.BytesIO(recipe), tag=name, rm=True, forcerm=True, buildargs=given, network_mode=network
            )
        except (DockerException, OSError) as error:
            said = "".join(line.get("stream", "") for line in getattr(error, "build_log", ()))[-1000:]
            raise MissingComponentError(
                f"no image can be built on {base} (name a ready one by ORTHANC_EVENTS_IMAGE_ORTHANC): {error}\n{said}"
            ) from error
    return name
