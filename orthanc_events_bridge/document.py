"""A YAML text as plain data that knows its lines, with variables of the environment put in.

A message that doesn't name the line is half a message, and YAML's own loaders forget lines, keep the last of
two equal keys without a word, and spell what they find in a message, be it a password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orthanc_events_bridge.values import Place

#: Stands for a value that couldn't be determined; what depends on it isn't reported a second time.
UNKNOWN: Final = object()

# Names and defaults as Orthanc takes them in its own configuration (measured on 1.10.1): a name is anything
# up to the colon or the brace, and a variable that is set but empty counts as set. Unlike there, one that is
# not set is a mistake, and $${…} is left as ${…}.
_VARIABLE = re.compile(r"(?P<literal>\$)?\$\{(?:(?P<name>[^:{}]+)(?::-(?P<default>[^}]*))?\})?")

# What PyYAML says (without the part that can quote the text) -> what it means for the writer of the file.
_SYNTAX: Final = (
    ("found character '\\t'", "a tab can't be used here", "indent with spaces"),
    (
        "mapping values are not allowed",
        "a colon is not expected here",
        "check the indentation, or put the text in quotes",
    ),
    ("could not find expected ':'", "the colon behind an option's name is missing", "write `option: value`"),
    ("found unexpected end of stream", "a quote is opened and never closed", "add the closing quote"),
    ("another document", "a second document begins here", "keep one, and remove the line `---`"),
    (
        "expected <block end>",
        "the indentation doesn't fit",
        "align it with the lines of the same block above",
    ),
    (
        "expected ',' or",
        "a list or block in brackets is not closed here",
        "close it, and put values with ${…} in quotes",
    ),
    (
        "found undefined alias",
        "`*` refers to something that is not there",
        "put text that begins with * in quotes",
    ),
    ("found duplicate anchor", "an anchor (`&`) is defined twice", "give it another name"),
    ("that cannot start any token", "text can't begin with this character", "put it in quotes"),
    (
        "found unknown escape character",
        "a backslash in double quotes begins an unknown escape",
        "use single quotes",
    ),
    ("special characters are not allowed", "a control character is in the file", "remove it"),
)


@dataclass
class Document:
    """What a file says.

    :ivar data: mappings, lists and scalars; `UNKNOWN` where a value couldn't be determined.
    :ivar lines: the line of each option's name, or of a list's item.
    :ivar texts: unquoted scalars as they are written, because text such as `no` or `0123` is not meant as
        anything else.
    :ivar variables: the names of the variables that a value holds. Such a value is not shown, for it can be
        secret.
    :ivar origins: the variable that says a value, in place of the file.
    :ivar mistakes: place, line, what is wrong, what would be right.
    """

    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    texts: dict[Place, str] = field(default_factory=dict)
    variables: dict[Place, list[str]] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)
    mistakes: list[tuple[Place, int, str, str]] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """The line of an option, or of the nearest block around it that is there."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    @property
    def options(self) -> dict[str, Any] | None:
        """What is to be validated; None where there is nothing."""
        return self.data if isinstance(self.data, dict) else None

    def said_by(self, place: Place) -> list[str]:
        """The variables that a value holds or comes from; none where the file says all of it."""
        origin = self.origin(place)
        return self.variables.get(place, []) if origin is None else [origin]

    def origin(self, place: Place) -> str | None:
        """The variable that says what is in a place; None for the file."""
        while place and place not in self.origins:
            place = place[:-1]
        return self.origins.get(place)


def read(text: str, environment: Mapping[str, str]) -> Document:
    """Read a YAML text. Never raises: what is wrong is in the result."""
    document = Document(data=UNKNOWN)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            document.data = None if node is None else _Reader(document, loader, environment).value(node, ())
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else 1
        document.mistakes.append(((), line, *_plain(str(error.reason))))
    except yaml.MarkedYAMLError as error:
        said = f"{error.context} {error.problem}"
        mark = error.problem_mark or error.context_mark
        if error.context_mark and ("quoted scalar" in said or "expected ':'" in said):
            mark = error.context_mark  # where it begins, and not where the search for its end was given up
        document.mistakes.append(((), mark.line + 1 if mark else 1, *_plain(said)))
    except RecursionError:
        document.mistakes.append(((), 1, "blocks are nested too deeply", "no option needs more than four levels"))
    return document


def _plain(problem: str) -> tuple[str, str]:
    for words, wrong, right in _SYNTAX:
        if words in problem:
            return wrong, right
    return "this is not valid YAML", "check the indentation, brackets and quotes here and on the line above"


class _Reader:
    def __init__(self, document: Document, loader: yaml.SafeLoader, environment: Mapping[str, str]) -> None:
        self._document = document
        self._loader = loader
        self._environment = environment
        self._checked: set[int] = set()
        self._open: list[int] = []

    def value(self, node: yaml.Node, place: Place) -> Any:
        self._document.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if id(node) in self._open:
            return self._unknown(node, place, "an alias (`*`) refers to the block that it is in", "write the block out")
        standard = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != f"tag:yaml.org,2002:{standard}":
            return self._tag(node, place)
        self._open.append(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*place, number)) for number, item in enumerate(node.value)]
            return self._mapping(node, place)
        finally:
            self._open.pop()

    def _mapping(self, node: Any, place: Place) -> Any:
        if id(node) not in self._checked:  # an alias leads here again
            self._checked.add(id(node))
            first: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in first and key.value != "<<":
                    wrong = f"is given a second time, after line {first[key.value]}"
                    self._document.mistakes.append(((*place, key.value), line, wrong, "keep one of them"))
                elif isinstance(key, yaml.ScalarNode):
                    first[key.value] = line
            self._loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                return self._unknown(
                    key,
                    place,
                    "a block in braces stands where an option's name is expected",
                    "put text in braces in quotes",
                )
            option = (*place, key.value)
            self._document.lines[option] = key.start_mark.line + 1
            result[key.value] = self.value(value, option)
        return result

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        implicit = node.style is None and node.tag == self._resolve(node.value)
        names: list[str] = []
        unset: list[str] = []
        broken: list[str] = []

        def replace(match: re.Match[str]) -> str:
            if match["literal"]:
                return match[0][1:]
            if match["name"] is None:
                broken.append(match[0])
                return ""
            names.append(match["name"])
            default: str | None = match["default"]
            if match["name"] not in self._environment and default is None:
                unset.append(match["name"])
            return self._environment.get(match["name"], default or "")

        text = _VARIABLE.sub(replace, node.value)
        if names:
            self._document.variables[place] = names
        for name in dict.fromkeys(unset):
            self._unknown(
                node,
                place,
                f"the environment variable {name} is not set",
                f"set it where the process is started, or give a default: ${{{name}:-…}}",
            )
        if broken:
            wrong = "holds a variable that is not written as one"
            self._unknown(node, place, wrong, "write ${NAME} or ${NAME:-default}, or $${ for a plain ${")
        if unset or broken:
            return UNKNOWN
        tag = self._resolve(text) if implicit else node.tag
        try:
            value = self._loader.construct_object(yaml.ScalarNode(tag, text, node.start_mark, node.end_mark))
        except (yaml.constructor.ConstructorError, ValueError):  # a tag; or such as the date 2024-02-31
            value = text if implicit else b""
        if isinstance(value, bytes):
            return self._tag(node, place)
        if implicit and value is not None:
            self._document.texts[place] = text
        return value

    def _resolve(self, text: str) -> str:
        tag: str = self._loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return tag

    def _tag(self, node: yaml.Node, place: Place) -> Any:
        return self._unknown(node, place, "begins with a YAML tag (`!`)", "put text that begins with ! in quotes")

    def _unknown(self, node: yaml.Node, place: Place, wrong: str, right: str) -> Any:
        self._document.mistakes.append((place, node.start_mark.line + 1, wrong, right))
        return UNKNOWN
