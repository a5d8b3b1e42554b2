"""The bridge's configuration file: where it is, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final
from uuid import uuid4

from orthanc_events_bridge import loading
from orthanc_events_bridge.bridge.overrides import override
from orthanc_events_bridge.bridge.settings import NO_SOURCE, Settings
from orthanc_events_bridge.loading import Advice, ConfigError, Problem

__all__ = ["ENVIRONMENT", "FILE_NAME", "ConfigError", "Problem", "find_config", "load", "parse", "template"]

ENVIRONMENT: Final = "ORTHANC_EVENTS_CONFIG"
FILE_NAME: Final = "orthanc-events.yaml"

_ADVICE: Final = Advice(
    missing=f"make one with `orthanc-events init`, or name another in {ENVIRONMENT}",
    name=FILE_NAME,
    reader="the user that Orthanc runs as",
    smallest="give at least source and transports; `orthanc-events init` writes an example",
)


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
    return parse(loading.read_file(path, _ADVICE), str(path), environment)


def parse(text: str, file_name: str, environment: Mapping[str, str]) -> Settings:
    """Read settings from a YAML text, and from the variables that stand over it, without any I/O.

    :param file_name: for messages, and its folder for relative file names.
    :raises ConfigError: with every mistake in the text.
    """
    return loading.parse(Settings, text, file_name, environment, _ADVICE, override)


def template() -> str:
    """The commented file for a new installation, with a source of its own in it."""
    text = resources.files("orthanc_events_bridge.bridge").joinpath("template.yaml").read_text("utf-8")
    return text.replace(NO_SOURCE, f"urn:uuid:{uuid4()}")
