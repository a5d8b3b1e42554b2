"""What events look like, for machines: the JSON Schemas and the AsyncAPI document that come with the package.

They are files beside this module, in ``schemas/``, generated from the catalog (``make docs``), with the defaults of
`type_prefix` and `schema_base` in them.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import lru_cache
from importlib import resources
from typing import Any, Final

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events.catalog import VERSION

#: The schema of a whole event that the bridge sends, and of one that a consumer has published.
WHOLE: Final = "cloudevent"
WHOLE_DERIVED: Final = "derived-cloudevent"

_FOLDER: Final = resources.files("orthanc_events_bridge.events").joinpath("schemas")
_END: Final = f".{VERSION}.json"


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all schemas: ``study.stable`` …, and `WHOLE` and `WHOLE_DERIVED`."""
    files = (one.name for one in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_END) for name in files if name.endswith(_END)))


def schema_text(name: str) -> str:
    """The schema of a type's data, or of whole events, as JSON.

    :param name: short, or as it is in an event's ``type`` or ``dataschema``.
    :raises BridgeError: there is none.
    """
    short = re.split("[:/]", name.removesuffix(".json").removesuffix(f".{VERSION}"))[-1]
    type_name = ".".join(short.split(".")[-2:])
    known = next((one for one in (short, type_name) if one in names()), None)
    if known is None:
        near = difflib.get_close_matches(type_name.lower(), names(), 3, 0.5)
        remedy = f"near it are {', '.join(near)}" if near else "`orthanc-events schema --all` has them all"
        raise BridgeError(f"no event is called {name!r}", remedy)
    return _FOLDER.joinpath(f"{known}{_END}").read_text(encoding="utf-8")


def schema(name: str) -> dict[str, Any]:
    """The same, read.

    :raises BridgeError: there is none.
    """
    document: dict[str, Any] = json.loads(schema_text(name))
    return document


def asyncapi_text() -> str:
    """The AsyncAPI document (3.0), as YAML: which events are where on each broker."""
    return _FOLDER.joinpath("asyncapi.yaml").read_text(encoding="utf-8")
