"""Options that variables of the environment say, over those of the file, in the way of Orthanc's own images.

``ORTHANC_EVENTS__DATA__TAGS=["Modality"]`` is ``data: {tags: [Modality]}``, and a number is an item of a list:
``ORTHANC_EVENTS__TRANSPORTS__0__USER=bridge``. A value is JSON if it can be read as that, else text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import PydanticCustomError

from orthanc_events_bridge.document import Document
from orthanc_events_bridge.transports.blocks import block_of

if TYPE_CHECKING:
    from orthanc_events_bridge.values import Place

#: What the variables begin with; two underscores also stand between an option and one of its block.
PREFIX: Final = "ORTHANC_EVENTS__"


def override(document: Document, environment: Mapping[str, str]) -> None:
    """Put what the variables say into a document. Never raises: what is wrong is in the document's mistakes."""
    said = {tuple(name[len(PREFIX) :].lower().split("__")): name for name in environment if name.startswith(PREFIX)}
    if document.data is None and said:
        document.data = {}
    if isinstance(document.data, dict):
        # A block before what is in it, an item before the next one.
        for steps in sorted(said, key=lambda steps: [f"{step:>9}" for step in steps]):
            _put(document, steps, said[steps], environment[said[steps]])


def _put(document: Document, steps: Sequence[str], name: str, text: str) -> None:
    block: Any = document.data
    place: Place = ()
    for number, written in enumerate(steps):
        step: int | str = int(written) if isinstance(block, list) and written.isdecimal() else written
        place = (*place, step)
        known = step in block if isinstance(block, dict) else isinstance(step, int) and step < len(block)
        if not known and isinstance(block, list) and step != len(block):
            document.origins[place] = name
            wrong = f"an item is expected, from 0 to {len(block)}, which would be a new one"
            document.mistakes.append((place, 1, wrong, "number them from 0, or give the whole list as JSON"))
            return
        if number + 1 == len(steps):
            value = _value(text)
            _forget(document, place, inside=True)
            document.origins[place] = name
            if not isinstance(value, dict | list):
                document.texts[place] = text
        else:
            value = block[step] if known else None
            if not isinstance(value, dict | list):
                value = _block(value, steps[number + 1])
                _forget(document, place)
        if known or isinstance(block, dict):
            block[step] = value
        else:
            block.append(value)
        block = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _block(value: object, step: str) -> dict[str, Any] | list[Any]:
    """What stands where the file has no block: a URL's, or an empty one."""
    if step.isdecimal():
        return []
    try:
        return block_of(value) if isinstance(value, str) else {}
    except PydanticCustomError:
        return {}


def _forget(document: Document, place: Place, *, inside: bool = False) -> None:
    """Drop what the file has said in a place, and what was wrong with it."""

    def there(one: Place) -> bool:
        return one[: len(place)] == place if inside else one == place

    document.mistakes[:] = [mistake for mistake in document.mistakes if not there(mistake[0])]
    for known in (document.texts, document.variables):
        for one in [one for one in known if there(one)]:
            del known[one]
