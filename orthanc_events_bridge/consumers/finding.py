"""Find a consumer in the user's own module."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import traceback
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.loading import ConfigError

log = logging.getLogger(__name__)

#: Of these Python itself says what is wrong: names and signatures, and nothing of what a program has read.
_PYTHONS: Final = (AttributeError, ImportError, NameError, SyntaxError, TypeError)


class TargetError(BridgeError):
    """What is to be run can't be found, or is none."""


def find(target: str, folder: Path) -> Consumer:
    """Import a module, and give the consumer in it.

    :param target: ``module:name``; ``module`` alone where there is one consumer in it.
    :param folder: where modules are looked for first.
    :raises TargetError: there is none; in one sentence.
    :raises BridgeError: what the consumer itself says about its configuration.
    """
    name, _, attribute = target.partition(":")
    if re.fullmatch(r"\w+(\.\w+)*", name) is None or not re.fullmatch(r"\w*", attribute) or name.endswith(".py"):
        raise TargetError(
            f"{target!r} names no consumer", "write module:name, such as router:app; without .py, and dots for slashes"
        )
    module = _import(name, folder)
    # By themselves: one that has two names is one.
    consumers = [*{id(value): key for key, value in vars(module).items() if isinstance(value, Consumer)}.values()]
    listed = f"there are: {', '.join(consumers)}" if consumers else "there is no Consumer in it"
    if not attribute:
        if not consumers:
            raise TargetError(
                f"there is no consumer in {_file(module)}", 'make one: app = Consumer("NAME", broker=URL)'
            )
        if len(consumers) > 1:
            raise TargetError(f"which consumer of {name} is meant is not said", f"write {name}:name; {listed}")
        attribute = consumers[0]
    if not hasattr(module, attribute):
        raise TargetError(f"{_file(module)} has no {attribute}", listed)
    found = getattr(module, attribute)
    if not isinstance(found, Consumer):
        raise TargetError(f"{target} is no Consumer: its type is {type(found).__name__}", listed)
    return found


def _import(name: str, folder: Path) -> ModuleType:
    place = str(folder)
    if place not in sys.path:
        sys.path.insert(0, place)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            where = f"{missing.replace('.', '/')}.py or a package {missing.replace('.', '/')}/"
            near = _near(name, folder)
            raise TargetError(
                f"there is no module {missing}: looked for {where} in {folder}, then among what is installed",
                near or "change to the folder that it is in, or install it",
            ) from None
        raise TargetError(
            f"{name} can't be imported: {_where(error)} needs the module {missing}", "install it"
        ) from None
    except ConfigError:  # which says where each mistake is
        raise
    except BridgeError as error:
        raise TargetError(f"{_where(error)}: {error.message}", error.remedy) from None
    except (Exception, SystemExit) as error:
        log.debug("importing %s failed", name, exc_info=error)
        said = f": {error.msg if isinstance(error, SyntaxError) else error}" if isinstance(error, _PYTHONS) else ""
        raise TargetError(
            f"{name} can't be imported: {_where(error)} raises {type(error).__name__}{said}",
            "--log-level debug shows all of it",
        ) from None


def _where(error: BaseException) -> str:
    """File and line: of a mistake in writing, else the deepest of the user's own, else of whoever raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<")]
    libraries = (str(Path(importlib.__file__ or "").parents[1]), str(Path(__file__).parents[1]), "site-packages")
    own = [one for one in frames if not any(part in one.filename for part in libraries)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _near(name: str, folder: Path) -> str:
    """What could be meant, where the name is that of a file somewhere below."""
    last = name.rpartition(".")[2]
    found = sorted(folder.glob(f"*/{last}.py"))
    if not found or PathFinder.find_spec(last, [str(found[0].parent)]) is None:
        return ""
    return f"there is {found[0].relative_to(folder)}: cd {found[0].parent.name}, or write {found[0].parent.name}.{last}"


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__
