"""What the service is told by its environment, and nothing else: every variable that begins with ``AI_SERVICE_``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

PREFIX: Final = "AI_SERVICE_"


class SettingsError(Exception):
    """A variable is wrong. The message names it and says what to do, and has no secret in it."""


class Option(NamedTuple):
    """What is known of an option: what it means, and its least value."""

    meaning: str
    least: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options. The variable of each is its name in capitals behind the prefix: ``AI_SERVICE_PORT``."""

    host: Annotated[str, Option("the address to listen at")] = "127.0.0.1"
    port: Annotated[int, Option("the port to listen at", 1)] = 8008
    folder: Annotated[Path, Option("where series are kept until their results are sent")] = Path("ai-service-data")
    results_url: Annotated[
        str, Option("DICOMweb root that results are sent to; without it POST /studies takes nothing")
    ] = ""
    results_authorization: Annotated[str, Option("the header Authorization for it, as Basic … or Bearer …")] = field(
        default="", repr=False
    )
    results_authorization_file: Annotated[Path, Option("a file with that header in place of the variable")] = Path()
    quiet_seconds: Annotated[float, Option("a series is complete when nothing has come for so long", 0)] = 5.0
    answer_seconds: Annotated[float, Option("how long the receiver of results may take for its answer", 0.1)] = 60.0
    retry_seconds: Annotated[float, Option("the longest pause between two tries to send results", 0.1)] = 300.0
    give_up_hours: Annotated[float, Option("how long sending is tried before the service gives up", 0)] = 24.0
    keep_hours: Annotated[float, Option("how long images are kept after their results are sent", 0)] = 24.0
    max_body_mb: Annotated[int, Option("the most megabytes of one request", 1)] = 2048
    max_instance_mb: Annotated[int, Option("the most megabytes of one instance", 1)] = 512
    max_instances: Annotated[int, Option("the most instances of one request, and of one series", 1)] = 2000
    max_requests: Annotated[int, Option("how many bodies are read at a time; others wait", 1)] = 4
    # For tests of what stands around the service.
    fault_crash: Annotated[frozenset[int], Option("FOR TESTS: dies at these series, before the result is sent")] = (
        frozenset()
    )
    fault_crash_sent: Annotated[frozenset[int], Option("FOR TESTS: dies right after the result was sent")] = frozenset()
    fault_late: Annotated[frozenset[int], Option("FOR TESTS: the results of these series are late")] = frozenset()
    fault_late_seconds: Annotated[float, Option("FOR TESTS: by how long", 0)] = 30.0
    fault_refuse: Annotated[frozenset[int], Option("FOR TESTS: refuses these series for good, with 409")] = frozenset()

    @property
    def faults(self) -> frozenset[int]:
        """The numbers of all series at which the service shall misbehave."""
        return self.fault_crash | self.fault_crash_sent | self.fault_late | self.fault_refuse


def _options() -> dict[str, tuple[str, type, Option]]:
    """By the name of the variable: the name of the field, its type, and what is known of it."""
    found = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, option = get_args(hint)
        found[PREFIX + name.upper()] = (name, get_origin(kind) or kind, option)
    return found


def read(environment: Mapping[str, str]) -> Settings:
    """Return the options that an environment sets.

    :raises SettingsError: one is wrong, or there is none of that name.
    """
    options, values = _options(), dict[str, Any]()
    for name, text in environment.items():
        if not name.startswith(PREFIX):
            continue
        if name not in options:
            near = difflib.get_close_matches(name, options, 1)
            raise SettingsError(f"there is no {name}{f', did you mean {near[0]}?' if near else ''} (see --help)")
        if text.strip():
            field_name, kind, option = options[name]
            values[field_name] = _value(name, kind, option.least, text.strip())
    path = values.get("results_authorization_file")
    if path is not None:
        try:
            values["results_authorization"] = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            name = f"{PREFIX}RESULTS_AUTHORIZATION_FILE"
            raise SettingsError(f"{name}: the file can't be read ({type(error).__name__}): {path}") from error
    return Settings(**values)


def explain() -> str:
    """Return the table of the variables, for ``--help``."""
    defaults, lines = Settings(), []
    for name, (field_name, _, option) in _options().items():
        default = getattr(defaults, field_name)
        lines.append(f"  {name:<38} {option.meaning}{f' ({default})' if default and default != Path() else ''}")
    return "\n".join(lines)


def _value(name: str, kind: type, least: float | None, text: str) -> object:
    value: Any
    try:
        value = frozenset(int(one) for one in text.split(",")) if kind is frozenset else kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number", frozenset: "numbers of series, as 3,7"}[kind]
        raise SettingsError(f"{name} has to be {wanted}, not {text!r}") from None
    # The comparison is this way round for NaN.
    if least is not None and not least <= value < float("inf"):
        raise SettingsError(f"{name} has to be {least} or more, not {text}")
    if kind is frozenset and min(value) < 1:
        raise SettingsError(f"{name}: series are counted from 1")
    if name == f"{PREFIX}PORT" and value > 65535:
        raise SettingsError(f"{name} has to be 65535 or less, not {text}")
    return _url(name, text) if name == f"{PREFIX}RESULTS_URL" else value


def _url(name: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment:
        raise SettingsError(f"{name} has to be the root of a DICOMweb server, as http://localhost:8042/dicom-web")
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"{name} must not have a password in it: give it in {PREFIX}RESULTS_AUTHORIZATION")
    return text.rstrip("/")
