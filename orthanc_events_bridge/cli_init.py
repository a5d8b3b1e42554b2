"""The two files that ``orthanc-events init`` writes: the configuration, and the shim that Orthanc loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import orthanc_events_bridge
from orthanc_events_bridge.bridge.config import template
from orthanc_events_bridge.errors import BridgeError

CONFIG_NAME: Final = "orthanc-events.yaml"
#: Never `orthanc.py`: that would hide Orthanc's own module.
SHIM_NAME: Final = "orthanc_events.py"

_SHIM: Final = '''\
"""Loads orthanc-events-bridge into Orthanc. Written by `orthanc-events init`; name it in Orthanc's "PythonScript".

Only the standard library and the package itself are imported here, in Orthanc's process. The bridge runs beside it, with
the interpreter below.
"""

import importlib.util
import sys

import orthanc

#: The interpreter that the package is installed for; ORTHANC_EVENTS_PYTHON overrides it.
PYTHON = {python!r}
PACKAGE = {package!r}
#: The bridge's configuration; ORTHANC_EVENTS_CONFIG overrides it.
CONFIG = {config!r}
#: A Python script of your own, for Orthanc to load as well. Its OnChange callback goes on working.
SCRIPT = {script!r}

try:
    spec = importlib.util.spec_from_file_location(
        "orthanc_events_bridge", PACKAGE + "/__init__.py", submodule_search_locations=[PACKAGE]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["orthanc_events_bridge"] = module
    spec.loader.exec_module(module)
    from orthanc_events_bridge.plugin import start
except Exception as error:
    orthanc.LogError("orthanc-events: changes are NOT recorded: " + PACKAGE + " can't be loaded: " + repr(error)
                     + "; install the package again, then run `orthanc-events init --shim`")
    if SCRIPT:  # yours goes on without us
        sys.path.insert(0, SCRIPT.rpartition("/")[0])
        spec = importlib.util.spec_from_file_location("orthanc_user_script", SCRIPT)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
else:
    start(python=PYTHON, config=CONFIG, script=SCRIPT)
'''  # noqa: E501


def shim_text(python: str, package: str, config: str, script: str | None = None) -> str:
    """The shim for this interpreter and package.

    :param python: the interpreter that the bridge runs with.
    :param package: the folder of ``orthanc_events_bridge``.
    :param config: the bridge's configuration.
    :param script: the user's own script, if there is one.
    """
    return _SHIM.format(python=python, package=package, config=config, script=script)


def write(folder: Path, *, force: bool, only_shim: bool = False, script: Path | None = None) -> tuple[Path, Path]:
    """Write both files, or the shim alone. What is written over is kept beside it, as ``*.bak``.

    :param only_shim: leave the configuration as it is, and with it the source, which every event's id is made of.
    :return: the configuration, and the shim.
    :raises BridgeError: one of them is there already and neither `force` nor `only_shim` is given, or the folder can't
        be written.
    """
    folder = folder.absolute()
    config, shim = folder / CONFIG_NAME, folder / SHIM_NAME
    there = [str(path) for path in (config, shim) if path.exists()]
    if there and not force and not only_shim:
        raise BridgeError(
            f"{' and '.join(there)} exist already",
            "say --shim to write the shim alone, or --force to write over both (the source would be a new one)",
        )
    package = str(Path(orthanc_events_bridge.__file__).parent)
    own = str(script.absolute()) if script else None
    texts = {shim: shim_text(sys.executable, package, str(config), own)}
    if not only_shim:
        texts[config] = template()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            if path.exists():
                path.replace(path.with_name(f"{path.name}.bak"))
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BridgeError(f"{folder} can't be written: {error.strerror}") from error
    return config, shim
