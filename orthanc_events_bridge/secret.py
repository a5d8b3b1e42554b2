"""Secrets in a configuration: each as it is, or as the name of a file that holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.values import Place, mistake

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError


def from_file(place: str, path: Path, kind: type[BridgeError], remedy: str) -> str:
    """Read a secret from its file. One line break at its end is no part of it.

    It is read whenever the secret is needed, so that it can be replaced while we run.

    :param place: what is read, for messages.
    :param kind: the class of what is raised.
    :param remedy: what to do where the file can't be read.
    :raises BridgeError: the file can't be read, isn't UTF-8, or is empty. Nothing secret is in the message.
    """
    try:
        text = path.read_bytes().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise kind(f"{place} {path} can't be read: {error.strerror}", remedy) from error
    except UnicodeDecodeError:  # chained, it would hold the secret
        raise kind(f"{place} {path} is not UTF-8 text", "save it as UTF-8") from None
    if not text:
        raise kind(f"{place} {path} is empty", "write the secret into it")
    return text


def given_twice(given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
    """Say which secrets are given both as they are and by a file.

    :param given: the options of a block, by name.
    """
    for option in given:
        file = f"{option}_file"
        if file in given:
            wrong, right = "{0} and {1} give the same secret twice", "keep one of them (the file is the safer one)"
            yield (file,), mistake(wrong, right, options=((option,), (file,)))
