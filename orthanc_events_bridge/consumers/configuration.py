"""What applies to a consumer: the command line, the environment, its file, the code, in that order; option by option.

The file is named by the command line, by ``ORTHANC_EVENTS_CONSUMER``, or by ``config=`` in the code. The blocks
``retry`` and ``orthanc`` are put together from all of them, ``broker`` and ``store`` each come from one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from orthanc_events_bridge.consumers.retry import RetryPolicy
from orthanc_events_bridge.consumers.settings import ConsumerSettings
from orthanc_events_bridge.document import Document, read
from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.loading import (
    Advice,
    ConfigError,
    Problem,
    problems_of,
    read_file,
    validate,
)
from orthanc_events_bridge.mistakes import explain, spell
from orthanc_events_bridge.orthanc_api import ENVIRONMENT as ORTHANC_ENVIRONMENT
from orthanc_events_bridge.orthanc_api import OrthancOptions

_S = TypeVar("_S", bound=ConsumerSettings)

#: Names the file.
ENVIRONMENT: Final = "ORTHANC_EVENTS_CONSUMER"
#: Names the broker, by its URL.
BROKER_ENVIRONMENT: Final = "ORTHANC_EVENTS_BROKER"
#: Options that the environment can give as they are → the variables.
_OUTSIDE: Final = {
    "broker": BROKER_ENVIRONMENT,
    "store": "ORTHANC_EVENTS_STORE",
    "store_file": "ORTHANC_EVENTS_STORE_FILE",
}
#: Options that the command line calls otherwise.
_FLAGS: Final = {"name": "--consumer"}
_ADVICE: Final = Advice(
    missing=f"write one (docs/consumer-configuration.md), or name another in {ENVIRONMENT}",
    name="consumer.yaml",
    reader="the user that the consumer runs as",
    smallest="give at least the broker; docs/consumer-configuration.md has an example",
)


@dataclass(slots=True)
class CommandLine:
    """What the command line says, for the consumers that the user's module makes. Only commands set it.

    :ivar file: in place of every other.
    :ivar options: option → value.
    """

    file: Path | None = None
    options: Mapping[str, Any] | None = None


#: Of this process.
command_line = CommandLine()


@dataclass(frozen=True, slots=True)
class Configuration(Generic[_S]):
    """What applies.

    :ivar settings: validated.
    :ivar orthanc: which Orthanc handlers ask, the environment included; none where nothing names one.
    """

    settings: _S
    orthanc: OrthancOptions | None

    def with_settings(self, **changes: Any) -> Configuration[_S]:
        """The same with other settings, which are not validated again."""
        return Configuration(self.settings.model_copy(update=changes), self.orthanc)

    def for_dry_run(self) -> Configuration[_S]:
        """The same under a name of its own, from now on: it must not take events from those that work."""
        return self.with_settings(name=f"{self.settings.name}-dry-run", start="new")


def configure(
    code: Mapping[str, Any],
    file: Path | str | None = None,
    environment: Mapping[str, str] = os.environ,
    given: CommandLine = command_line,
) -> Configuration[ConsumerSettings]:
    """Put a consumer's configuration together, and validate it: `configure_as` for what every consumer has."""
    return configure_as(ConsumerSettings, code, file, environment, given)


def configure_as(
    kind: type[_S],
    code: Mapping[str, Any],
    file: Path | str | None = None,
    environment: Mapping[str, str] = os.environ,
    given: CommandLine = command_line,
) -> Configuration[_S]:
    """Put a consumer's configuration together, and validate it.

    :param kind: declares the options.
    :param code: what the code says, option by option; none of an option: it says nothing.
    :param file: that the code names.
    :raises ConfigError: the file can't be read, or with every mistake, each with the place that it is in.
    """
    chosen = given.file or environment.get(ENVIRONMENT) or file
    path = None if chosen is None else Path(chosen)
    problems: list[Problem] = []
    document = Document(data={})
    if path is not None:
        document = read(read_file(path, _ADVICE), environment)
        problems = problems_of(document, str(path), _ADVICE)
        if document.options is None:
            raise ConfigError(problems)
    said = {name: value for name, value in code.items() if value is not None}
    orthanc = said.get("orthanc")
    if isinstance(orthanc, OrthancOptions):  # it may hold secrets, and is checked by itself
        said.pop("orthanc")
    if isinstance(said.get("retry"), RetryPolicy):
        # In a file an option without a value counts as left out, so that no limit is written as 0 there.
        said["retry"] = {name: 0 if value is None else value for name, value in asdict(said["retry"]).items()}
    outside = {option: environment[name] for option, name in _OUTSIDE.items() if environment.get(name)}
    if "store_file" in outside:
        outside["store_file"] = str(Path(outside["store_file"]).absolute())  # not from the file's folder
    line = dict(given.options or {})
    in_file = dict(document.data)
    document.data = {}
    for layer in (said, in_file, outside, line):
        if "store" in layer or "store_file" in layer:  # one place says it, whichever way
            document.data = {name: value for name, value in document.data.items() if not name.startswith("store")}
        document.data |= layer
    over = outside.keys() | line.keys()
    document.lines = {place: number for place, number in document.lines.items() if not over & set(place[:1])}
    if isinstance(said.get("retry"), dict) and isinstance(in_file.get("retry"), dict):
        document.data["retry"] = {**said["retry"], **in_file["retry"]}
    where = {option: f"the consumer {said.get('name', '')}".strip() for option in said}
    where |= dict.fromkeys(in_file, str(path)) | {option: _OUTSIDE[option] for option in outside}
    where |= {option: _FLAGS.get(option, f"--{option.replace('_', '-')}") for option in line}

    settings, errors = validate(kind, document, path.parent if path else Path())
    for place, number, wrong, right in explain(document, errors, kind):
        source = where.get(str(place[0]) if place else "", str(path) if path else "the consumer")
        in_document = path is not None and source == str(path)
        problems.append(Problem(source, number if in_document else None, spell(place), wrong, right))
    if settings is None or problems:
        raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0))
    asked = (str(path), document.lines.get(("orthanc",))) if "orthanc" in in_file else None
    return Configuration(settings, _orthanc(settings, said, orthanc, environment, asked))


def _orthanc(
    settings: ConsumerSettings,
    said: Mapping[str, Any],
    options: object,
    environment: Mapping[str, str],
    in_file: tuple[str, int | None] | None,
) -> OrthancOptions | None:
    """The environment, then the file, then the code; a login comes from one of them."""
    layers: list[Mapping[str, Any]] = []
    if in_file or "orthanc" in said:
        layers.append(settings.orthanc.given())
    if in_file and "orthanc" in said:
        under = said["orthanc"]
        layers.append({"url": under} if isinstance(under, str) else dict(under))
    if isinstance(options, OrthancOptions):
        layers.append({field.name: getattr(options, field.name) for field in fields(options)})
    if not environment.get(f"{ORTHANC_ENVIRONMENT}URL") and not any(layer.get("url") for layer in layers):
        return None
    try:
        return OrthancOptions.find({}, environment, *layers)
    except OrthancError as error:
        outside = [name for name in environment if name.startswith(ORTHANC_ENVIRONMENT) and environment[name]]
        place, line = in_file or (f"the consumer {settings.name}", None)
        source = " and ".join([*([place] if layers else []), *sorted(outside)])
        raise ConfigError(
            [Problem(source, None if outside else line, "orthanc", error.message, error.remedy)]
        ) from None
