"""The configuration: YAML to validated settings, or one message per mistake.

Each message has file, line, option, what is wrong, and what would be right; none has a secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from pydantic import ValidationError

from orthanc_events_bridge.bridge.document import UNKNOWN, Document, read
from orthanc_events_bridge.bridge.mistakes import explain, kind_of, spell
from orthanc_events_bridge.bridge.settings import NO_SOURCE, Settings
from orthanc_events_bridge.errors import BridgeError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENVIRONMENT: Final = "ORTHANC_EVENTS_CONFIG"
FILE_NAME: Final = "orthanc-events.yaml"

_SMALLEST = "give at least source and transports; `orthanc-events init` writes an example"


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration.

    :ivar file: as it was named; empty where there is none.
    :ivar line: from 1; None where the mistake is about the file as a whole.
    :ivar option: such as ``transports[0].servers``; empty where the mistake is about no single option.
    :ivar wrong: what is wrong, without secrets.
    :ivar right: what would be right.
    """

    file: str
    line: int | None
    option: str
    wrong: str
    right: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        return ": ".join(filter(None, (place, self.option, f"{self.wrong}; {self.right}")))


class ConfigError(BridgeError):
    """The configuration can't be used.

    :ivar problems: every mistake in it, in the order of the lines.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def find_config(shim_dir: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Say where the configuration is: ``ORTHANC_EVENTS_CONFIG``, else beside the shim. It need not exist.

    :param shim_dir: the folder of the script that Orthanc loads; None where there is none.
    :raises ConfigError: neither is known.
    """
    if environment.get(ENVIRONMENT):
        return Path(environment[ENVIRONMENT])
    if shim_dir is None:
        problem = Problem("", None, "", "no configuration file is named", f"name it in {ENVIRONMENT}")
        raise ConfigError([problem])
    return Path(shim_dir) / FILE_NAME


def load(path: Path | str, environment: Mapping[str, str] = os.environ) -> Settings:
    """Load a configuration file.

    :raises ConfigError: it can't be read, or something in it is wrong.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        problem = (
            "there is no such file",
            f"make one with `orthanc-events init`, or name another in {ENVIRONMENT}",
        )
    except IsADirectoryError:
        problem = "this is a folder", f"name the file in it, such as {FILE_NAME}"
    except OSError as error:
        problem = f"the file can't be read: {error.strerror}", "let the user that Orthanc runs as read it"
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            wrong = Problem(str(path), line, "", "the file is not UTF-8 text here", "save it as UTF-8")
            raise ConfigError([wrong]) from None  # the chained exception would hold the file
        return parse(text, str(path), environment)
    raise ConfigError([Problem(str(path), None, "", *problem)])


def parse(text: str, file_name: str, environment: Mapping[str, str]) -> Settings:
    """Read settings from a YAML text, without any I/O.

    :param file_name: for messages, and its folder for relative file names in the text.
    :raises ConfigError: with every mistake in the text.
    """
    document = read(text, environment)
    problems = [Problem(file_name, line, spell(place), wrong, right) for place, line, wrong, right in document.mistakes]
    if document.data is None:
        problems.append(Problem(file_name, 1, "", "the file is empty", _SMALLEST))
    elif not isinstance(document.data, dict):
        if document.data is not UNKNOWN:
            wrong = f"options are expected, and {kind_of(document.data)} was found"
            problems.append(Problem(file_name, 1, "", wrong, _SMALLEST))
    else:
        settings, errors = _validate(document, Path(file_name).parent)
        problems += [
            Problem(file_name, line, spell(place), wrong, right)
            for place, line, wrong, right in explain(document, errors)
        ]
        if settings is not None and not problems:
            return settings
    raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0))


def template() -> str:
    """The commented file for a new installation, with a source of its own in it."""
    text = resources.files("orthanc_events_bridge.bridge").joinpath("template.yaml").read_text("utf-8")
    return text.replace(NO_SOURCE, f"urn:uuid:{uuid4()}")


def _validate(document: Document, folder: Path) -> tuple[Settings | None, list[ErrorDetails]]:
    errors: list[ErrorDetails] = []
    for _ in range(2):
        try:
            return Settings.model_validate(document.data, context={"folder": folder}), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
        # Where text is wanted, an unquoted `no`, `0123` or `2024-01-01` is meant as it is written.
        restored = [
            error["loc"]
            for error in errors
            if error["type"] in ("string_type", "path_type") and error["loc"] in document.texts
        ]
        for place in restored:
            block = document.data
            for step in place[:-1]:
                block = block[step]
            block[place[-1]] = document.texts[place]
        if not restored:
            break
    return None, errors
