"""A configuration file: YAML to validated options, or one message per mistake.

Each message has file, line, option, what is wrong, and what would be right; none has a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from orthanc_events_bridge.document import UNKNOWN, Document, read
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.mistakes import explain, kind_of, spell, written
from orthanc_events_bridge.values import Options, Place

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_O = TypeVar("_O", bound=Options)


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


@dataclass(frozen=True, slots=True)
class Advice:
    """What to tell who has no file, or none that can be read.

    :ivar missing: there is no such file.
    :ivar name: how such a file is called by default.
    :ivar reader: who has to be able to read it.
    :ivar smallest: what it has to hold at least.
    """

    missing: str
    name: str
    reader: str
    smallest: str


def read_file(path: Path | str, advice: Advice) -> str:
    """The text of a configuration file.

    :raises ConfigError: it can't be read.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        problem = ("there is no such file", advice.missing)
    except IsADirectoryError:
        problem = "this is a folder", f"name the file in it, such as {advice.name}"
    except OSError as error:
        problem = f"the file can't be read: {error.strerror}", f"let {advice.reader} read it"
    else:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            wrong = Problem(str(path), line, "", "the file is not UTF-8 text here", "save it as UTF-8")
            raise ConfigError([wrong]) from None  # the chained exception would hold the file
    raise ConfigError([Problem(str(path), None, "", *problem)])


def problems_of(document: Document, file_name: str, advice: Advice) -> list[Problem]:
    """What is wrong with a file before its options are looked at."""
    problems = _problems(document, file_name, document.mistakes)
    if document.data is None:
        problems.append(Problem(file_name, 1, "", "the file is empty", advice.smallest))
    elif not isinstance(document.data, dict) and document.data is not UNKNOWN:
        wrong = f"options are expected, and {kind_of(document.data)} was found"
        problems.append(Problem(file_name, 1, "", wrong, advice.smallest))
    return problems


def _problems(document: Document, file_name: str, found: Iterable[tuple[Place, int, str, str]]) -> list[Problem]:
    problems = []
    for place, line, wrong, right in found:
        variable = document.origin(place)
        file, number = (file_name, line) if variable is None else (variable, None)
        problems.append(Problem(file, number, spell(place), wrong, right))
    return problems


def parse(
    model: type[_O],
    text: str,
    file_name: str,
    environment: Mapping[str, str],
    advice: Advice,
    override: Callable[[Document, Mapping[str, str]], None] = lambda document, environment: None,
) -> _O:
    """Read options from a YAML text, without any I/O.

    :param model: declares them.
    :param file_name: for messages, and its folder for relative file names in the text.
    :param override: puts over them what is said elsewhere.
    :raises ConfigError: with every mistake in the text.
    """
    document = read(text, environment)
    override(document, environment)
    problems = problems_of(document, file_name, advice)
    if document.options is not None:
        options, errors = validate(model, document, Path(file_name).parent)
        problems += _problems(document, file_name, explain(document, errors, model))
        if options is not None and not problems:
            return options
    raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0))


def validate(model: type[_O], document: Document, folder: Path) -> tuple[_O | None, list[ErrorDetails]]:
    """The options of a document, or what pydantic finds wrong with it.

    :param folder: where files with relative names are.
    """
    errors: list[ErrorDetails] = []
    for _ in range(2):
        try:
            return model.model_validate(document.data, context={"folder": folder}), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
        # Where text is wanted, an unquoted `no`, `0123` or `2024-01-01` is meant as it is written.
        places = [
            written(document.data, error["loc"]) for error in errors if error["type"] in ("string_type", "path_type")
        ]
        restored = [place for place in places if place in document.texts]
        for place in restored:
            block = document.data
            for step in place[:-1]:
                block = block[step]
            block[place[-1]] = document.texts[place]
        if not restored:
            break
    return None, errors
