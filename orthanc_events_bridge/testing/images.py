"""The images of the servers that tests run in containers.

Each server has two: the official one, pinned, which is pulled; and where none can be pulled one of our own, which
``scripts/images.sh`` builds from Debian's packages by the files in ``docker/``. Both have the same program where it is
looked for, so that one class starts either (`orthanc_events_bridge.testing.containers`).

``python -m orthanc_events_bridge.testing.images`` prints the servers' names and our own images' tags. Standard library
only.
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
    "webhook": "python:3.13-slim",
    "orthanc": "jodogne/orthanc-python:1.12.7",
    "orthanc-sid": "jodogne/orthanc-python:latest",
}

#: What our own are built by; it is there in a checkout only.
RECIPES: Final = Path(__file__).parents[2] / "docker"


def own_image(kind: str) -> str | None:
    """Return the name of our own image of a server, with a tag that stands for what it is built from.

    :param kind: one of `OFFICIAL`, or ``base``.
    :return: None where it can't have been built here.
    """
    files = [path for folder in {"base", kind} for path in (RECIPES / folder).glob("*")]
    if not files:
        return None
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    if kind == "nats":
        try:
            content.update(find_nats().read_bytes())
        except MissingComponentError:
            return None
    if kind.startswith("orthanc"):
        for name in ("bridge.txt", "dev.txt"):
            content.update((RECIPES.parent / "requirements" / name).read_bytes())
    return f"orthanc-events-bridge/test-{kind}:{content.hexdigest()[:12]}"


if __name__ == "__main__":
    for name in ("base", *OFFICIAL):
        print(name, own_image(name) or "-")
