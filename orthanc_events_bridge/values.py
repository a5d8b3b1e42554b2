"""What options are made of: durations, sizes, event filters, and the base that finds every mistake at once.

Options are declared once, as pydantic models with their documentation in ``Field(description=…)``: the
loader's messages, ``docs/configuration.md`` and the JSON Schema come from there. A validator that refuses a
value raises what `mistake` returns, in words for the operator; pydantic's own words are translated by
`orthanc_events_bridge.mistakes`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from orthanc_events_bridge.events.catalog import TYPES

_EVENT_NAMES = tuple(event_type.name for event_type in TYPES)

#: The type of the errors that carry our own words (`mistake`).
MISTAKE = "mistake"

#: The place of an option in a block: names, and numbers of list items.
Place = tuple[str | int, ...]

_DURATIONS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZES = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}


def mistake(wrong: str, right: str, *, shown: object = None, options: tuple[Place, ...] = ()) -> PydanticCustomError:
    """Say what is wrong with a value, for the operator.

    :param wrong: what is wrong, without the value; where `options` are given, ``{0}``, ``{1}`` … stand for
        them.
    :param right: what would be right.
    :param shown: the value, if it may be shown. Never a secret, never a URL with credentials in it.
    :param options: the options that contradict each other, as places in the block that is validated.
    """
    return PydanticCustomError(
        MISTAKE,
        "{wrong}; {right}",
        {"wrong": wrong, "right": right, "shown": None if shown is None else str(shown), "options": options},
    )


class Options(BaseModel):
    """A block of options. Unknown ones are refused; one with nothing behind it counts as left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    #: Options of which it is a mistake to leave nothing behind them.
    spoken: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Find options that exclude or need each other, by which of them are given.

        Asked also when some of the values are wrong, so that all mistakes are reported at once.

        :return: the place to name, and the mistake.
        """
        return iter(())

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Find values that don't go together. Asked when each of them is right by itself."""
        return iter(())

    @model_validator(mode="wrap")
    @classmethod
    def _every_mistake(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        given = {key: value for key, value in data.items() if value is not None or key not in known}
        found = [_at(place, error) for place, error in cls.conflicts(given)]
        nothing = mistake("has nothing behind it", "write something there, or remove the line if that is meant")
        found += [_at((name,), nothing) for name in cls.spoken if data.get(name, "") is None]
        try:
            options = handler(given)
        except ValidationError as error:
            found += [
                InitErrorDetails(
                    type=PydanticCustomError(
                        line["type"], "{message}", {"message": line["msg"], **line.get("ctx", {})}
                    ),
                    loc=line["loc"],
                    input=line["input"],
                )
                for line in error.errors(include_url=False)
                if line["type"] != "default_factory_not_called"  # only the consequence of another one
            ]
        else:
            found += [_at(place, error) for place, error in options.contradictions()]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found, hide_input=True)
        return options


def _at(place: Place, error: PydanticCustomError) -> InitErrorDetails:
    # How many steps lead back to the block, to which the mistake's `options` refer.
    context = {**(error.context or {}), "depth": len(place)}
    return InitErrorDetails(type=PydanticCustomError(MISTAKE, "{wrong}; {right}", context), loc=place, input=None)


@dataclass(frozen=True)
class Duration:
    """Seconds as a number, or text with units: ``90``, ``500ms``, ``12h``, ``7d``, ``1h30m``.

    Use it as ``Annotated[float, Duration(maximum=60)]``.

    :param minimum: in seconds.
    :param maximum: in seconds.
    :param zero: what 0 means where it is allowed below `minimum`.
    """

    minimum: float = 0
    maximum: float = math.inf
    zero: str = ""
    kind: ClassVar[str] = "duration"
    pattern: ClassVar[str] = r"^\s*\d+(\.\d+)?\s*((ms|s|m|h|d|w)(\s*\d+(\.\d+)?\s*(ms|s|m|h|d|w))*)?\s*$"

    def parse(self, value: object) -> float | None:
        """Read a duration in seconds. ``None`` stays ``None``."""
        if value is None:
            return None
        right = 'write seconds as a number, or text with a unit (ms, s, m, h, d, w) such as "90s", "12h" or "7d"'
        number = _number(value)
        if number is None and isinstance(value, str):
            parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)", value)
            if parts and re.fullmatch(r"(\s*\d+(\.\d+)?\s*(ms|s|m|h|d|w)\s*)+", value):
                number = sum(float(count) * _DURATIONS[unit] for count, unit in parts)
        if number is None:
            raise mistake("is no duration", right, shown=_shown(value))
        if (number == 0 and self.zero) or self.minimum <= number <= self.maximum:
            return number
        raise _outside(value, self.minimum, self.maximum, format_duration, self.zero)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.parse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": self.pattern}]}


@dataclass(frozen=True)
class Size:
    """Bytes as a whole number, or text with units: ``1048576``, ``10GiB`` (1024), ``500MB`` (1000).

    Use it as ``Annotated[int, Size(minimum=1024)]``.

    :param minimum: in bytes.
    :param zero: what 0 means where it is allowed below `minimum`.
    """

    minimum: int = 0
    zero: str = ""
    kind: ClassVar[str] = "size"
    pattern: ClassVar[str] = r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]?[iI]?[bB])?\s*$"

    def parse(self, value: object) -> int | None:
        """Read a size in bytes. ``None`` stays ``None``."""
        if value is None:
            return None
        number = _number(value)
        if number is None and isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
            factor = _SIZES.get(match[2].lower()) if match else None
            if match and factor:
                number = float(match[1]) * factor
        if number is None:
            units = "KiB, MiB, GiB, TiB; kB, MB, GB, TB"
            right = f'write bytes as a number, or text with a unit ({units}) such as "10GiB"'
            raise mistake("is no size", right, shown=_shown(value))
        if number >= 2**63:
            raise mistake("is larger than any disk", "write a smaller size", shown=_shown(value))
        if (number == 0 and self.zero) or number >= self.minimum:
            return int(number)
        raise _outside(value, self.minimum, math.inf, format_size, self.zero)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.parse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": self.pattern}]}


def format_duration(seconds: float) -> str:
    """Write a duration as an operator would: the largest unit in which it is a whole number, else seconds."""
    if seconds and seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit in ("d", "h", "m"):
        if seconds and seconds % _DURATIONS[unit] == 0:
            return f"{seconds / _DURATIONS[unit]:g}{unit}"
    return f"{seconds:g}s"


def format_size(size: float) -> str:
    """Write a size as an operator would: the largest unit in which it is a whole number, else bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _SIZES[unit.lower()] == 0:
            return f"{size / _SIZES[unit.lower()]:g}{unit}"
    return f"{size:.0f}"


def _number(value: object) -> float | None:
    """A finite number of 0 or more, also one that is written as text; everything else is none."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _shown(value: object) -> str | None:
    return str(value) if isinstance(value, str | int | float) else None


def _outside(value: object, minimum: float, maximum: float, text: Any, zero: str) -> PydanticCustomError:
    if maximum == math.inf:
        right = f"the least is {text(minimum)}"
    else:
        right = f"it can be {text(minimum)} to {text(maximum)}"
    return mistake("is out of range", right + (f" (or 0: {zero})" if zero else ""), shown=_shown(value))


def _in_folder(path: Path, info: ValidationInfo) -> Path:
    folder = info.context.get("folder") if isinstance(info.context, Mapping) else None
    return Path(folder) / path if folder else path


#: A file's name; a relative one is looked up in the folder of the configuration file, wherever the bridge was
#: started.
FileName = Annotated[Path, AfterValidator(_in_folder)]


def _glob(pattern: str) -> str:
    if re.fullmatch(r"[a-z0-9.*?\[\]!-]+", pattern) is None:
        raise mistake(
            "is no pattern for event types",
            'write a short name such as "study.stable", or one with wildcards such as "job.*"',
            shown=pattern,
        )
    if re.search(r"\.v\d+$", pattern) is not None:
        raise mistake(
            "is a whole event type, but short names are compared",
            'leave out the prefix and the version, as in "study.stable"',
            shown=pattern,
        )
    if not fnmatch.filter(_EVENT_NAMES, pattern):
        near = difflib.get_close_matches(pattern, _EVENT_NAMES, 1)
        right = f"did you mean {near[0]}?" if near else 'use names such as "study.stable" or "job.*"'
        raise mistake("matches no type of event", right, shown=pattern)
    return pattern


Glob = Annotated[str, AfterValidator(_glob)]


class EventFilter(Options):
    """Which events are sent, by their short names: `{level}.{verb}`, such as `study.stable` or `job.failed`.

    A pattern may hold `*` (anything), `?` (one character) and `[…]` (one of these). An event is sent if a
    pattern of `include` matches it and none of `exclude` does.
    """

    include: tuple[Glob, ...] = Field(
        default=("*",),
        description="Patterns of the events to send.",
        examples=[["study.*", "job.failed"]],
    )
    exclude: tuple[Glob, ...] = Field(
        default=(),
        description="Patterns of the events not to send, though `include` matches them.",
        examples=[["instance.*", "*.metadata-updated"]],
    )

    def accepts(self, short_name: str) -> bool:
        """Tell whether an event is sent, by its short name (``study.stable``)."""
        return _accepts(self.include, self.exclude, short_name)


# There are a few filters and some fifty names, and this is asked for every event and transport.
@functools.lru_cache(maxsize=4096)
def _accepts(include: tuple[str, ...], exclude: tuple[str, ...], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in include) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in exclude
    )
