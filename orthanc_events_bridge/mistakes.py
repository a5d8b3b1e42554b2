"""From pydantic's errors to sentences for the operator. Nothing of pydantic's own words gets through."""

from __future__ import annotations

import contextlib
import difflib
import json
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from orthanc_events_bridge.document import UNKNOWN, Document
from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports import registration
from orthanc_events_bridge.transports import types as transport_types
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.values import MISTAKE, Options, Place

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


def explain(
    document: Document, errors: list[ErrorDetails], model: type[Options]
) -> Iterator[tuple[Place, int, str, str]]:
    """Say for each mistake: its place, its line, what is wrong, what would be right.

    :param document: what was validated.
    :param errors: what pydantic found; what only follows from another mistake is left out.
    :param model: what declares the options.
    """
    said: set[tuple[Place, str]] = set()  # pydantic asks a block that can hold itself twice
    for error in errors:
        if _consequence(document.data, error, errors):
            continue
        place = written(document.data, error["loc"])
        context = error.get("ctx", {})
        if error["type"] == MISTAKE:
            wrong, right, shown = context["wrong"], context["right"], context["shown"]
            block = place[: len(place) - context.get("depth", 0)]
            for number, other in enumerate(context["options"]):
                option = (*block, *other)
                line = f" (line {document.lines[option]})" if option in document.lines else ""  # not all are in a file
                wrong = wrong.replace(f"{{{number}}}", f"{spell(other)}{line}")
        else:
            wrong, right, shown = _translate(place, error, document.data, model)
        if shown is not None:
            variables = document.said_by(place)
            if variables:
                wrong = f"the value with {' and '.join(f'${{{name}}}' for name in variables)} {wrong}"
            else:
                shown = "".join(one if one.isprintable() else "�" for one in shown)
                wrong = f"'{shown if len(shown) <= 60 else shown[:57] + '…'}' {wrong}"
        if (place, wrong) not in said:
            said.add((place, wrong))
            yield place, document.line(place), wrong, right


def written(data: Any, place: Place) -> Place:
    """A place of pydantic's as it is in the file: there, what counts as a list of one is none, and a name has no place.

    :param data: of the file. What a value of it is turned into is not in it, and is left as pydantic has it.
    """
    found: list[str | int] = []
    for number, step in enumerate(place):
        if step == "[key]":
            continue
        if isinstance(data, Mapping) and not isinstance(step, int):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int):
            data = data[step]
        elif not isinstance(step, int):
            return (*found, *place[number:])
        else:
            continue
        found.append(step)
    return tuple(found)


def spell(place: Place) -> str:
    """Write a place as an operator would: ``transports[0].servers``."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _consequence(data: Any, error: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    """Whether it only follows from a mistake that is reported anyway."""
    value, place = data, error["loc"]
    for step in written(data, place):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            value = value[step]
    if value is UNKNOWN:
        return True
    if error["type"] == "too_short":  # pydantic counts right items only
        return bool(value) or isinstance(value, Mapping)
    return (
        error["type"] == "missing"
        and any(  # there, but misspelt
            other["type"] == "extra_forbidden"
            and other["loc"][:-1] == place[:-1]
            and _nearest(str(other["loc"][-1]), [str(place[-1])])
            for other in errors
        )
    )


def _nearest(name: str, known: list[str]) -> str:
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)), "")


def _translate(place: Place, error: ErrorDetails, data: Any, model: type[Options]) -> tuple[str, str, str | None]:
    """What is wrong, what would be right, and the value where it may and should be shown."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    field = _field(place, data, model)
    found = f"and {kind_of(value)} was found"
    if field is None and place and (named := _field(place[:-1], data, model)) and get_origin(named.annotation) is dict:
        sample = _sample(place[:-1], named)  # a name of the operator's own
    else:
        sample = _sample(place, field)
    if kind == "missing":
        return "is required", sample, None
    if kind == "extra_forbidden":
        return _unknown_option(place, data, model)
    if kind == "literal_error":
        choices = [str(choice) for choice in _choices(field.annotation if field else None)]
        near = _nearest(str(value), choices)
        listed = f"write one of: {', '.join(choices)}"
        text = str(value) if isinstance(value, str | int | float) else None
        wrong = "is none of the choices" if text is not None else f"one of several words is expected, {found}"
        return wrong, f"did you mean {near}? {listed.capitalize()}" if near else listed, text
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
        return "is out of range", f"it has to be {bound}", str(value)
    if kind == "string_too_short":
        return "is empty", sample, None
    if kind == "too_short":
        return "is an empty list", f"name at least one; {sample}", None
    expected = {
        "string_type": "text is expected",
        "path_type": "a file's name is expected",
        "tuple_type": "a list is expected",
        "list_type": "a list is expected",
        "model_type": "a block of options is expected",
        "dict_type": "names and values are expected",
        "bool_type": "true or false is expected",
        "bool_parsing": "true or false is expected",
        "int_type": "a whole number is expected",
        "int_parsing": "a whole number is expected",
        "int_from_float": "a whole number is expected",
        "float_type": "a number is expected",
        "float_parsing": "a number is expected",
        "finite_number": "a number with an end is expected",
    }.get(kind, "another value is expected")
    right = sample
    if expected == "true or false is expected":
        right = "write true or false"
    elif expected == "a whole number is expected":
        right = "write a whole number"
    elif "a number" in expected:
        right = "write a number"
    elif expected == "a block of options is expected":
        right = "write its options below it, indented, one `option: value` per line"
    return f"{expected}, {found}", right, None


def _unknown_option(place: Place, data: Any, model: type[Options]) -> tuple[str, str, str | None]:
    name, block = str(place[-1]), _block(place[:-1], data, model)
    known = list(options_of(block)) if block else []
    for option, field in options_of(block).items() if block else ():
        inner = options_class(field.annotation)
        if inner is not None and inner is not block and name in options_of(inner):
            return "there is no such option here", f"it belongs into the block {option}", None
    if len(place) > 1 and name in model.model_fields:
        return "there is no such option here", "it belongs to the top of the file, not indented", None
    near = _nearest(name, known)
    if near:
        return "there is no such option", f"did you mean {near}?", None
    return "there is no such option", f"the options here are: {', '.join(known)}", None


def _block(place: Place, data: Any, model: type[Options]) -> type[Options] | None:
    """The class of the block of options at a place; a transport's by its type."""
    block: type[Options] | None = model
    named = False  # what comes next is a name of the operator's own, of a block
    for step in place:
        if isinstance(data, Mapping):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        if named:
            named = False
        elif not isinstance(step, int):
            field = options_of(block).get(step) if block else None
            block = options_class(field.annotation) if field else None
            named = field is not None and get_origin(field.annotation) is dict
        if block is TransportOptions and isinstance(data, Mapping) and isinstance(data.get("type"), str):
            with contextlib.suppress(TransportConfigurationError):  # the mistake at `type` says so
                block = registration(data["type"]).options
    return block


def _field(place: Place, data: Any, model: type[Options]) -> FieldInfo | None:
    while place and isinstance(place[-1], int):
        place = place[:-1]
    block = _block(place[:-1], data, model) if place else None
    return options_of(block).get(str(place[-1])) if block else None


def options_of(block: type[Options]) -> dict[str, FieldInfo]:
    """A block's options by the names that they have in a file."""
    return {field.alias or name: field for name, field in block.model_fields.items()}


def options_class(annotation: Any) -> type[Options] | None:
    return next(
        (part for part in annotation_parts(annotation) if isinstance(part, type) and issubclass(part, Options)),
        None,
    )


def _choices(annotation: Any) -> list[Any]:
    return [part for part in annotation_parts(annotation) if isinstance(part, str)]


def annotation_parts(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of: the parts of tuples, unions and literals, without their frames."""
    origin = get_origin(annotation)
    if origin is None:
        yield annotation
    elif origin is Annotated:
        yield from annotation_parts(get_args(annotation)[0])
    elif origin in (tuple, list, Union, types.UnionType):
        for part in get_args(annotation):
            yield from annotation_parts(part)
    else:
        yield from get_args(annotation)


def _sample(place: Place, field: FieldInfo | None) -> str:
    if place and isinstance(place[-1], int):
        return 'write text, in quotes if need be: "…"'
    if field is None or not place:
        return "see the documentation of the configuration"
    if place == ("transports",):
        return f"write a list of blocks, each beginning with `- type: nats` (types: {', '.join(transport_types())})"
    if field.examples:
        example = field.examples[0]
        if isinstance(example, list | dict):
            example = json.dumps(example)
        return f"write it as in `{place[-1]}: {example}`"
    inner = options_class(field.annotation)
    first = next(iter(options_of(inner))) if inner else ""
    if get_origin(field.annotation) is dict:
        return f"write names of your own, each with its options: `NAME: {{{first}: …}}`"
    if inner:
        return f"write a list of blocks, each beginning with `- {first}: …`"
    return "write text, in quotes if need be"


def kind_of(value: Any) -> str:
    """Say in plain words what was found where something else is expected."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int):
        return "a number"
    if isinstance(value, float):
        return "a number with a fraction"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "a block of options"
    return "a date" if hasattr(value, "year") else "something else"
