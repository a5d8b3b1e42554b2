"""The images of the servers that tests run in containers, and of those that the Compose file starts.

Each server has two: the official one, pinned, which is pulled; and where none can be pulled one of our own, which
``scripts/images.sh`` builds from Debian's packages by the files in ``docker/``. Both have the same program where it is
looked for, so that one class starts either (`orthanc_events_bridge.testing.containers`). Other versions, `VERSIONS`,
and the images with this repository's programs in them, `OURS`, are built only; these stand on others of our own.

``python -m orthanc_events_bridge.testing.images`` prints of each image of our own its name, its tag, the folder of its
recipe and what it stands on. Standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from orthanc_events_bridge.testing.programs import MissingComponentError, find_nats

#: The official images.
OFFICIAL: Final[dict[str, str]] = {
    "nats": "nats:2.14.5-alpine",
    "rabbitmq": "rabbitmq:4.0.9",
    "kafka": "apache/kafka:4.1.0",
    "webhook": "python:3.13.9-slim-trixie",
    "orthanc": "orthancteam/orthanc:26.9.1",
}

#: Other versions, which are built only → the image that they stand on, by the release of Debian that has them.
VERSIONS: Final[dict[str, str]] = {
    "nats-2.10": "base",
    "orthanc-1.10": "base-bookworm",
    "orthanc-sid": "base",
    "rabbitmq-3.10": "base-bookworm",
}

#: The images with this repository's programs in them → the server's image that they stand on.
OURS: Final[dict[str, str]] = {"consumers": "webhook", "orthanc-events": "orthanc", "ai-service": "webhook"}

#: How the names of our own begin.
OWN: Final = "orthanc-events-bridge/test-"

#: What our own are built by; it is there in a checkout only.
RECIPES: Final = Path(__file__).parents[2] / "docker"


def own_image(kind: str) -> str | None:
    """Return the name of our own image of a server, with a tag that stands for what it is built from.

    :param kind: one of `OFFICIAL`, `VERSIONS` or `OURS`, or what those stand on.
    :return: None where it can't have been built here.
    """
    content = hashlib.sha256()
    if kind in OURS:
        under = own_image(OURS[kind])
        if under is None:
            return None
        content.update(under.encode())
        files = _of_the_example() if kind == "ai-service" else _of_the_package(kind)
    else:
        content.update(VERSIONS.get(kind, "base").removeprefix("base").encode())
        files = [path for folder in {"base", recipe(kind)} for path in (RECIPES / folder).glob("*")]
    if not files:
        return None
    for path in sorted(files):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    if kind == "nats":
        try:
            content.update(find_nats().read_bytes())
        except MissingComponentError:
            return None
    if kind.startswith("orthanc") or kind == "consumers":
        content.update((RECIPES.parent / "requirements" / "bridge.txt").read_bytes())
    return f"{OWN}{kind}:{content.hexdigest()[:12]}"


def recipe(kind: str) -> str:
    """The folder of `RECIPES` that an image of a server is built from: its own, or that of its other versions."""
    return kind if (RECIPES / kind).is_dir() else kind.partition("-")[0]


def _of_the_package(kind: str) -> list[Path]:
    """What an image with this package in it is built from, beside the locked packages."""
    root = RECIPES.parent
    recipes = (RECIPES / "consumers").glob("*") if kind == "consumers" else [RECIPES / "Dockerfile"]
    shared = [path for path in RECIPES.glob("*") if path.is_file() and path.name != "Dockerfile"]
    package = [path for path in (root / "orthanc_events_bridge").rglob("*") if path.is_file()]
    # The version is not what an image does, and changes with each commit, when the package is built.
    sources = [path for path in package if "__pycache__" not in path.parts and path.name != "_version.py"]
    build = [root / "pyproject.toml", root / "tools" / "index_page.py"]
    return [*recipes, *shared, *sources, *build, root / "config" / "orthanc_events.py"]


def _of_the_example() -> list[Path]:
    """What the AI service's image is built from: nothing of this package."""
    example = RECIPES.parent / "examples" / "ai-service"
    return [example / "Dockerfile", example / "requirements.txt", *(example / "ai_service").glob("*.py")]


if __name__ == "__main__":
    for name in ("base", "base-bookworm", *OFFICIAL, *VERSIONS, *OURS):
        print(name, own_image(name) or "-", recipe(name), OURS.get(name) or VERSIONS.get(name, "base"))
